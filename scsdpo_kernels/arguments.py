"""What one call consists of, once it has been checked: the arguments of every schedule and of the operator."""

from typing import NamedTuple

from torch import Tensor


class Head(NamedTuple):
    """A model's output head: z = c tanh(s (h Wᵀ + b + λ (h Aᵀ) Bᵀ) / c).

    softcap c (Gemma), logit scale s (Cohere; Granite divides by 1/s), low-rank adapter λ B A (LoRA, arXiv 2106.09685).
    """

    weight: Tensor  # W (V, D)
    bias: Tensor | None  # b (V,)
    lora_a: Tensor | None  # A (r, D)
    lora_b: Tensor | None  # B (V, r)
    lora_scale: float
    logit_scale: float
    softcap: float  # 0: none


class Tensors(NamedTuple):
    student_hidden: Tensor  # (..., D)
    student_weight: Tensor  # (V, D)
    student_bias: Tensor | None  # (V,)
    student_lora_a: Tensor | None  # (r, D)
    student_lora_b: Tensor | None  # (V, r)
    teacher_hidden: Tensor | None  # (..., D_t); None with support_ids
    teacher_weight: Tensor | None  # (V, D_t); None: student_weight
    teacher_bias: Tensor | None  # (V,)
    teacher_lora_a: Tensor | None  # (r_t, D_t)
    teacher_lora_b: Tensor | None  # (V, r_t)
    token_weight: Tensor  # (...,)
    target_ids: Tensor | None  # (...,)
    old_logp: Tensor | None  # (...,)
    support_ids: Tensor | None  # (..., K)
    support_logp: Tensor | None  # (..., K)
    rows: Tensor | None  # (R,)


# The first so many tensors are the student's own, which take gradients.
DIFFERENTIABLE = 5


class Numbers(NamedTuple):
    beta: float
    temperature: float
    importance_clip: float
    entry_clip: float  # 0: none
    top_k: int  # 0: the whole vocabulary
    renormalize: bool  # what is outside of a support is left out; otherwise it is one bucket
    sampled_token: bool
    student_lora_scale: float
    student_logit_scale: float
    student_softcap: float  # 0: none
    teacher_lora_scale: float
    teacher_logit_scale: float
    teacher_softcap: float  # 0: none
    # Of a vocabulary that is spread over processes (shards.py): this process's part of it, and who has the others.
    shard_group: str  # "": the whole vocabulary is here
    shard_start: int  # of the heads' first row in the vocabulary
    shard_longest: int  # the most entries that any process has
    shard_vocabulary: int  # all entries
    sequence_parallel: bool  # what is per row is this process's rows


def student_head(tensors: Tensors, numbers: Numbers) -> Head:
    return Head(
        weight=tensors.student_weight,
        bias=tensors.student_bias,
        lora_a=tensors.student_lora_a,
        lora_b=tensors.student_lora_b,
        lora_scale=numbers.student_lora_scale,
        logit_scale=numbers.student_logit_scale,
        softcap=numbers.student_softcap,
    )


def teacher_head(tensors: Tensors, numbers: Numbers) -> Head:
    """The teacher's head; its weight is the student's own tensor where they share it."""
    return Head(
        weight=tensors.student_weight if tensors.teacher_weight is None else tensors.teacher_weight,
        bias=tensors.teacher_bias,
        lora_a=tensors.teacher_lora_a,
        lora_b=tensors.teacher_lora_b,
        lora_scale=numbers.teacher_lora_scale,
        logit_scale=numbers.teacher_logit_scale,
        softcap=numbers.teacher_softcap,
    )


def features(tensors: Tensors, numbers: Numbers) -> tuple[str, ...]:
    """Names of the arguments in use that not every schedule has."""
    used = {
        "top_k": numbers.top_k,
        "support_ids": tensors.support_ids is not None,
        "sampled_token": numbers.sampled_token,
        "entry_clip": numbers.entry_clip,
        "shard": numbers.shard_group,
    }
    for side, head in (("student", student_head), ("teacher", teacher_head)):
        head = head(tensors, numbers)
        used |= {
            f"{side}_bias": head.bias is not None,
            f"{side}_softcap": head.softcap,
            f"{side}_logit_scale": head.logit_scale != 1.0,
            f"{side}_lora": head.lora_a is not None,
        }
    return tuple(name for name, is_used in used.items() if is_used)
