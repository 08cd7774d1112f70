"""The public operator: from hidden states and the head to the weighted divergence of student and teacher.

    p = softmax(h_s W_sᵀ / τ)    q = softmax(h_t W_tᵀ / τ)    loss = Σ_n w_n D(p_n, q_n)

with D the forward KL(q‖p) at beta = 0, the reverse KL(p‖q) at beta = 1 and the generalised Jensen-Shannon divergence
(1-β) KL(p‖m) + β KL(q‖m), m = (1-β) p + β q, between (SDPO, arXiv 2601.20802; GKD, arXiv 2306.13649).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .arguments import DIFFERENTIABLE, Numbers, Tensors
from .shards import WHOLE, VocabShard, agreed, local_parts

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class LinearDivergence(NamedTuple):
    """What one pass over the logits gives, fp32 (float64 from the reference schedule in float64), in nats.

    Every field but `loss` is detached.
    Rows that were skipped because their weight is 0 hold 0.
    """

    loss: Tensor  # () fp32, Σ token_weight · importance_ratio · divergence, differentiable
    divergence: Tensor  # (...,)
    student_entropy: Tensor  # (...,) -Σ p log p
    teacher_entropy: Tensor | None  # (...,) -Σ q log q, None with support_ids
    student_logp: Tensor | None  # (...,) log p at target_ids, None without them
    teacher_logp: Tensor | None  # (...,) log q at target_ids, None without them or with support_ids
    importance_ratio: Tensor | None  # (...,) what the row's weight was multiplied with, None without old_logp


def linear_divergence(
    student_hidden: Tensor,  # (..., D) bf16 | fp16 | fp32
    student_weight: Tensor,  # (V, D) same dtype
    teacher_hidden: Tensor | None = None,  # (..., D_t) bf16 | fp16 | fp32; None: support_ids and support_logp
    teacher_weight: Tensor | None = None,  # (V, D_t) the teacher's dtype; None: the student's whole head
    *,
    token_weight: Tensor | None = None,  # (...,) any finite numbers; None: ones
    beta: float = 0.5,
    temperature: float = 1.0,
    target_ids: Tensor | None = None,  # (...,) integers in [0, V)
    old_logp: Tensor | None = None,  # (...,) of target_ids, under the policy that sampled them
    importance_clip: float | None = None,  # above 0; None: 2 with old_logp
    top_k: int | None = None,  # K, at least 1; None: the whole vocabulary
    tail: str | None = None,  # "bucket" | "renormalize"; None: "bucket" with top_k or support_ids
    support_ids: Tensor | None = None,  # (..., K) integers in [0, V), or -1
    support_logp: Tensor | None = None,  # (..., K) nats
    sampled_token: bool = False,
    entry_clip: float | None = None,  # above 0, nats
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    student_softcap: float | None = None,  # above 0
    teacher_softcap: float | None = None,  # above 0
    student_logit_scale: float | None = None,  # None: 1
    teacher_logit_scale: float | None = None,  # None: 1
    student_lora: tuple[Tensor, Tensor, float] | None = None,  # A (r, D), B (V, r), scale
    teacher_lora: tuple[Tensor, Tensor, float] | None = None,  # A (r, D_t), B (V, r), scale
    schedule: str = "auto",
    rows: Tensor | None = None,  # (R,) int64 flat indices of the rows to compute; None: those of weight other than 0
    shard: VocabShard | None = None,  # None: the heads have the whole vocabulary, or are DTensors
) -> LinearDivergence:
    """Weighted divergence of student and teacher over the whole vocabulary; the logits never exist in full.

    Rows of weight 0 are never projected: they cost nothing, have zero gradient and are 0 in every output.
    The loss differentiates into `student_hidden` and the student's head (`student_weight`, `student_bias` and both
    matrices of `student_lora`), once: the gradients are made in the forward pass (the head is read there only), and a
    second backward or a double backward raises. Nothing differentiates into the teacher, even where `teacher_weight`
    is the student's or requires grad, nor into `token_weight`.
    Under autocast, hidden states and weights are cast as `torch.nn.functional.linear` casts them.

    Args:
        beta: the teacher's share. 0: forward KL(q‖p). 1: reverse KL(p‖q). Between: generalised Jensen-Shannon.
        temperature: divides both sides' logits; there is no τ² factor.
        target_ids: sampled tokens, asks for their log-probabilities. Ids of rows that are not computed are not looked
            at.
        old_logp: log-probabilities of target_ids at the time they were sampled. Each row's weight is then multiplied
            with its importance ratio min(e^clamp(log p - old_logp, -20, 20), importance_clip), detached, log p being
            this pass's own (SDPO, arXiv 2601.20802). Those of rows of weight 0 are not looked at.
        top_k: the divergence on the student's K likeliest entries, with their true probabilities, and the `tail`
            (SDPO, arXiv 2601.20802). The support has no gradient of its own.
        tail: what the divergence sees of the entries outside of the support. "bucket": one more entry, with their
            total probability, at least 1e-7. "renormalize": nothing; the support's probabilities are divided by
            their sum.
        support_ids, support_logp: a support that the teacher has named, as a server's top-K with its
            log-probabilities, in place of teacher_hidden. Only the student is projected. -1 is an empty slot. The
            log-probabilities are taken as they are: the teacher's own at this temperature.
        sampled_token: at beta=1, the objective stop(log p - log q) · log p of target_ids in place of the divergence,
            `divergence` being its value. Its expectation over tokens that p samples has the reverse KL's gradient.
        entry_clip: at beta=0, Σ_v min(q_v log(q_v / p_v), entry_clip) in place of KL(q‖p) (OPSD): a clipped entry's
            term has no gradient. The sum may be below 0.
        student_bias, student_softcap, student_logit_scale, student_lora: of a head whose logits are
            z = c tanh(s (h Wᵀ + b + λ (h Aᵀ) Bᵀ) / c): bias b, softcap c (Gemma), logit scale s (Cohere; 1/s divides
            in Granite), low-rank adapter (A, B, λ).
        teacher_bias, teacher_softcap, teacher_logit_scale, teacher_lora: the same of the teacher's head. A teacher
            without teacher_weight has the student's whole head, but for what is given here (inf is no softcap); with
            one, even the student's own tensor, it has only what is given here.
        schedule: "chunked" projects a chunk of rows at a time, into buffers. "tiled" (GPUs) has logits in registers
            only: slower, and with next to no memory but the gradients'. "reference" is plain PyTorch with full logits,
            in any dtype up to float64 and differentiable twice. "auto" is "chunked".
        rows: every row whose token_weight is not 0, once, and any others, for a caller who knows them. On a GPU the op
            waits for the device once, to learn how many rows there are and to check values; with `rows` it never
            does. What would have raised then gives NaN: an incomplete list NaN in the loss and all gradients, a
            target outside the vocabulary NaN in its log-probabilities, a support with wrong ids NaN in its row.
        shard: the vocabulary is spread over a process group, as in Megatron's tensor parallelism. `student_weight`,
            `teacher_weight`, biases and LoRA's B are this process's part; ids are the whole vocabulary's. Every
            process calls this with the same rows (or, with `shard.sequence_parallel`, each with its own) and gets the
            same results and the whole gradient of its hidden states and of its part of the head. `student_weight` as a
            DTensor that is sharded on dim 0 of a one-dimensional mesh means the same. Collective.

    Raises:
        TypeError, ValueError: an argument does not fit, or two do not fit together; the message names them, what was
            expected and what came.
    """
    tensors, numbers = _arguments(
        student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight=token_weight, beta=beta,
        temperature=temperature, target_ids=target_ids, old_logp=old_logp, importance_clip=importance_clip,
        top_k=top_k, tail=tail, support_ids=support_ids, support_logp=support_logp, sampled_token=sampled_token,
        entry_clip=entry_clip, student_bias=student_bias, teacher_bias=teacher_bias, student_softcap=student_softcap,
        teacher_softcap=teacher_softcap, student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale, student_lora=student_lora, teacher_lora=teacher_lora,
        schedule=schedule, rows=rows, shard=shard,
    )  # fmt: skip
    loss, *fields = ops.schedule(schedule, tensors, numbers)(tensors, numbers)
    has_target, has_teacher = target_ids is not None, support_ids is None
    there = (True, True, has_teacher, has_target, has_target and has_teacher, old_logp is not None)
    single = student_hidden.dim() == 1
    fields = ((x.squeeze(0) if single else x) if has else None for x, has in zip(fields, there, strict=True))
    return LinearDivergence(loss, *fields)


def linear_divergence_per_token(
    student_hidden: Tensor,  # (..., D) bf16 | fp16 | fp32
    student_weight: Tensor,  # (V, D) same dtype
    teacher_hidden: Tensor | None = None,  # (..., D_t) bf16 | fp16 | fp32; None: support_ids and support_logp
    teacher_weight: Tensor | None = None,  # (V, D_t) the teacher's dtype; None: the student's whole head
    *,
    schedule: str = "auto",
    rows: Tensor | None = None,  # (R,) int64 flat indices of the rows to compute; None: all of them
    **options,
) -> Tensor:  # (...,) fp32, nats
    """importance ratio · D(p_n, q_n) of every row, for a caller who makes the loss of them: any upstream gradient.

    `linear_divergence` with weights that are known beforehand is cheaper: it makes the gradients in the forward pass.
    Here backward computes the rows again, without those whose upstream gradient is 0. It can run more than once
    (retain_graph=True), but is not itself differentiable, but for schedule="reference". Arguments and errors are those
    of `linear_divergence`, all but `token_weight`; rows that are not in `rows` are 0.
    """
    if "token_weight" in options:
        raise TypeError("token_weight: linear_divergence_per_token takes none; multiply its result")
    tensors, numbers = _arguments(
        student_hidden, student_weight, teacher_hidden, teacher_weight, schedule=schedule, rows=rows, **options
    )
    if rows is not None:
        everything = tensors.token_weight.view(-1)
        inside = rows.clamp(0, max(0, len(everything) - 1))
        wanted = torch.zeros_like(everything).index_fill_(0, inside, 1.0).view(tensors.token_weight.shape)
        tensors = tensors._replace(token_weight=wanted)
    divergence = ops.per_token(schedule, tensors, numbers)
    return divergence.squeeze(0) if student_hidden.dim() == 1 else divergence


def _arguments(
    student_hidden, student_weight, teacher_hidden, teacher_weight, *, shard=None, **options
) -> tuple[Tensors, Numbers]:
    """The arguments of a schedule, checked; of a vocabulary that is spread over processes, this one's part."""
    given = {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        **options,
    }
    if shard is None or not shard.check or torch.compiler.is_compiling():
        return _own_part(given, shard)
    return agreed(shard, lambda: _own_part(given, shard), options["schedule"])


def _own_part(given: dict, shard: VocabShard | None) -> tuple[Tensors, Numbers]:
    given, shard = local_parts(given, shard)
    if shard is not None and shard.sequence_parallel and given.get("rows") is not None:
        raise ValueError("rows: expected None with sequence_parallel, in which processes tell each other their number")
    return _checked(**given, shard=shard)


def _checked(
    student_hidden, student_weight, teacher_hidden, teacher_weight, *, token_weight=None, beta=0.5, temperature=1.0,
    target_ids=None, old_logp=None, importance_clip=None, top_k=None, tail=None, support_ids=None, support_logp=None,
    sampled_token=False, entry_clip=None, student_bias=None, teacher_bias=None, student_softcap=None,
    teacher_softcap=None, student_logit_scale=None, teacher_logit_scale=None, student_lora=None, teacher_lora=None,
    schedule="auto", rows=None, shard=None,
) -> tuple[Tensors, Numbers]:  # fmt: skip
    """Alone, then with each other, then against the hidden states."""
    student_a, student_b, student_lora_scale = _lora("student_lora", student_lora)
    teacher_a, teacher_b, teacher_lora_scale = _lora("teacher_lora", teacher_lora)
    tensors = Tensors(
        student_hidden, student_weight, student_bias, student_a, student_b,
        teacher_hidden, teacher_weight, teacher_bias, teacher_a, teacher_b,
        token_weight, target_ids, old_logp, support_ids, support_logp, rows,
    )  # fmt: skip
    check_types(tensors._asdict())
    _check_numbers(beta, temperature)
    positive = {
        "importance_clip": importance_clip,
        "entry_clip": entry_clip,
        "student_softcap": student_softcap,
        "teacher_softcap": teacher_softcap,
    }
    for name, number in positive.items():
        _check_number(name, number, above_0=True)
    for name, number in (
        ("student_logit_scale", student_logit_scale),
        ("teacher_logit_scale", teacher_logit_scale),
        ("student_lora's scale", student_lora_scale),
        ("teacher_lora's scale", teacher_lora_scale),
    ):
        _check_number(name, number, above_0=False)
    _check_support_options(top_k, tail, sampled_token)
    _check_together(
        {
            **{name: value for name, value in tensors._asdict().items() if "lora" not in name},
            **positive,
            "top_k": top_k,
            "tail": tail,
            "sampled_token": sampled_token or None,
            "teacher_logit_scale": teacher_logit_scale,
            "teacher_lora": teacher_lora,
        },
        beta,
    )
    leading = student_hidden.shape[:-1]
    if token_weight is None:
        tensors = tensors._replace(token_weight=torch.ones(leading, device=student_hidden.device))
    _check_tensors(tensors, (*_DTYPES, torch.float64) if schedule == "reference" else _DTYPES, shard)

    if teacher_weight is None:  # the student's whole head
        teacher_softcap = student_softcap if teacher_softcap is None else teacher_softcap
        teacher_logit_scale = student_logit_scale if teacher_logit_scale is None else teacher_logit_scale
        if teacher_bias is None:
            tensors = tensors._replace(teacher_bias=student_bias)
        if teacher_lora is None:
            teacher_lora_scale = student_lora_scale
            tensors = tensors._replace(teacher_lora_a=student_a, teacher_lora_b=student_b)
    elif teacher_weight is student_weight:
        tensors = tensors._replace(teacher_weight=None)
    numbers = Numbers(
        beta=float(beta),
        temperature=float(temperature),
        importance_clip=float(importance_clip or 2.0),
        entry_clip=float(entry_clip or 0.0),
        top_k=int(top_k or 0),
        renormalize=tail == "renormalize",
        sampled_token=bool(sampled_token),
        student_lora_scale=float(student_lora_scale),
        student_logit_scale=1.0 if student_logit_scale is None else float(student_logit_scale),
        student_softcap=_softcap(student_softcap),
        teacher_lora_scale=float(teacher_lora_scale),
        teacher_logit_scale=1.0 if teacher_logit_scale is None else float(teacher_logit_scale),
        teacher_softcap=_softcap(teacher_softcap),
        **(WHOLE if shard is None else shard.numbers),
    )
    return _prepared(tensors), numbers


def _prepared(tensors: Tensors) -> Tensors:
    """Cast as autocast says, without gradients where none go, and with at least one leading axis."""
    student = tensors[:DIFFERENTIABLE]
    hidden, weight = _autocast(*student[:2])
    others = Tensors(*student, *(x if x is None else x.detach() for x in tensors[DIFFERENTIABLE:]))
    given = others.teacher_hidden, others.teacher_weight
    teacher, teacher_weight = (x if x is None else _autocast(x)[0] for x in given)
    given = others._replace(
        student_hidden=hidden,
        student_weight=weight,
        teacher_hidden=teacher,
        teacher_weight=teacher_weight,
        rows=None if tensors.rows is None else tensors.rows.contiguous(),
    )
    if hidden.dim() > 1:
        return given
    per_row = ("student_hidden", "teacher_hidden", "token_weight", "target_ids", "old_logp", "support_ids",
               "support_logp")  # fmt: skip
    single = {name: getattr(given, name) for name in per_row}
    return given._replace(**{name: x if x is None else x.unsqueeze(0) for name, x in single.items()})


def _lora(name: str, lora) -> tuple[Tensor | None, Tensor | None, float]:
    if lora is None:
        return None, None, 1.0
    if not isinstance(lora, tuple | list) or len(lora) != 3:
        raise TypeError(f"{name}: expected (A, B, scale), got {type(lora).__name__}")
    for part, tensor in zip("AB", lora[:2], strict=True):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a tensor of floating-point numbers as {part}, got {got}")
    if not isinstance(lora[2], int | float):
        raise TypeError(f"{name}: expected a number as scale, got {type(lora[2]).__name__}")
    return tuple(lora)


def _softcap(softcap: float | None) -> float:
    return 0.0 if softcap is None or softcap == math.inf else float(softcap)


def _in_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not _in_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_tensors(tensors: Tensors, dtypes: tuple[torch.dtype, ...], shard: VocabShard | None) -> None:
    hidden, leading = tensors.student_hidden, tensors.student_hidden.shape[:-1]
    vocabulary = tensors.student_weight.shape[0]
    for side in ("student", "teacher"):
        if tensors.teacher_hidden is not None or side == "student":
            _check_head(tensors, side, dtypes, shard)
    expected = {
        "token_weight": leading,
        "target_ids": leading,
        "old_logp": leading,
        "student_bias": (vocabulary,),
        "teacher_bias": (vocabulary,),
    }
    for name, shape in expected.items():
        tensor = getattr(tensors, name)
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensors.token_weight.is_complex():
        raise TypeError(f"token_weight: expected real numbers, got {tensors.token_weight.dtype}")
    for name in ("target_ids", "support_ids"):
        tensor = getattr(tensors, name)
        if tensor is not None and tensor.dtype not in _INTEGERS:
            raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    for name in ("old_logp", "support_logp", "student_bias", "teacher_bias"):
        tensor = getattr(tensors, name)
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
    ids, logp = tensors.support_ids, tensors.support_logp
    if ids is not None and (ids.shape[:-1] != leading or ids.dim() != hidden.dim() or ids.shape[-1] == 0):
        raise ValueError(f"support_ids: expected shape {(*leading, 'K')}, got {tuple(ids.shape)}")
    if ids is not None and logp.shape != ids.shape:
        raise ValueError(f"support_logp: expected support_ids' shape {tuple(ids.shape)}, got {tuple(logp.shape)}")
    rows = tensors.rows
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows: expected shape (R,) and dtype int64, got {tuple(rows.shape)} and {rows.dtype}")
    if rows is not None and rows.numel() > tensors.token_weight.numel():
        raise ValueError(
            f"rows: expected at most the {tensors.token_weight.numel()} rows that there are, got {rows.numel()}"
        )


def _check_head(tensors: Tensors, side: str, dtypes: tuple[torch.dtype, ...], shard: VocabShard | None) -> None:
    hidden, weight, lora_a, lora_b = (getattr(tensors, f"{side}_{x}") for x in ("hidden", "weight", "lora_a", "lora_b"))
    leading, student_weight = tensors.student_hidden.shape[:-1], tensors.student_weight
    if hidden.dtype not in dtypes:
        raise TypeError(f"{side}_hidden: expected one of {_names(dtypes)}, got {hidden.dtype}")
    if hidden.dim() < 1 or hidden.shape[:-1] != leading:
        raise ValueError(
            f"{side}_hidden: expected shape (..., D) with the leading shape of student_hidden {tuple(leading)}, "
            f"got {tuple(hidden.shape)}"
        )
    name = f"{side}_weight" if weight is not None else "student_weight (which the teacher shares)"
    head = student_weight if weight is None else weight
    if head.dim() != 2 or head.shape[1] != hidden.shape[-1] or head.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"{name}: expected shape (V, {hidden.shape[-1]}) after {side}_hidden {tuple(hidden.shape)}"
            f"{f' and V = {student_weight.shape[0]} of student_weight' if side == 'teacher' else ''}, "
            f"got {tuple(head.shape)}"
        )
    if shard is not None and head.shape[0] != shard.stop - shard.start:
        raise ValueError(
            f"{name}: expected the {shard.stop - shard.start} rows of {shard.start} to {shard.stop}, or more that are "
            f"padding, got shape {tuple(head.shape)}"
        )
    if head.shape[0] == 0 and shard is None:
        raise ValueError(f"{name}: expected a vocabulary of at least one entry, got shape {tuple(head.shape)}")
    if head.dtype not in dtypes or (head.dtype != hidden.dtype and not _in_autocast(hidden.device.type)):
        raise TypeError(f"{name}: expected {side}_hidden's dtype {hidden.dtype}, got {head.dtype}")
    if lora_a is None:
        return
    if lora_a.dim() != 2 or lora_a.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{side}_lora: expected A of shape (r, {hidden.shape[-1]}), got {tuple(lora_a.shape)}")
    if lora_b.shape != (head.shape[0], lora_a.shape[0]):
        raise ValueError(
            f"{side}_lora: expected B of shape ({head.shape[0]}, {lora_a.shape[0]}) after A {tuple(lora_a.shape)}, "
            f"got {tuple(lora_b.shape)}"
        )


def check_types(tensors: dict[str, Tensor | None]) -> None:
    """Each is a tensor, or None where that is allowed, on the device of `student_hidden`, which is among them."""
    required = ("student_hidden", "student_weight", "mask", "question_weight")
    for name, tensor in tensors.items():
        if tensor is None and name not in required:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device != tensors["student_hidden"].device:
            raise ValueError(
                f"{name}: expected student_hidden's device {tensors['student_hidden'].device}, got {tensor.device}"
            )


def _check_together(given: dict, beta: float) -> None:
    """Which of the arguments make sense together; None is an argument that was not given."""
    given = {name: value for name, value in given.items() if value is not None}

    def clash(name: str, *others: str, why: str) -> None:
        for other in others:
            if name in given and other in given:
                raise ValueError(f"{name}: expected no {other} with it, {why}")

    def needs(name: str, *others: str, why: str) -> None:
        if name in given and not any(other in given for other in others):
            raise ValueError(f"{name}: expected {' or '.join(others)} with it, {why}")

    if "teacher_hidden" not in given and "support_ids" not in given:
        raise ValueError("teacher_hidden: expected a tensor, or support_ids with support_logp in place of it, got None")
    needs("support_ids", "support_logp", why="the teacher's log-probabilities of them")
    needs("support_logp", "support_ids", why="whose log-probabilities these are")
    of_teacher = [f"teacher_{x}" for x in ("hidden", "weight", "bias", "softcap", "logit_scale", "lora")]
    clash("support_ids", *of_teacher, why="whose logits these stand for")
    clash("top_k", "support_ids", why="which is a support of its own")
    needs("tail", "top_k", "support_ids", why="outside of which the tail is")
    clash("sampled_token", "top_k", "support_ids", "entry_clip", why="since its objective is another")
    clash("entry_clip", "top_k", "support_ids", why="since it clips the entries of the whole vocabulary")
    needs("sampled_token", "target_ids", why="which were sampled")
    needs("importance_clip", "old_logp", why="whose ratio it bounds")
    needs("old_logp", "target_ids", why="whose log-probabilities these were")
    for name, only in (("sampled_token", 1), ("entry_clip", 0)):
        if name in given and beta != only:
            raise ValueError(f"{name}: expected beta={only} with it, got beta={beta}")


def _check_support_options(top_k, tail, sampled_token) -> None:
    if not isinstance(sampled_token, bool):
        raise TypeError(f"sampled_token: expected True or False, got {type(sampled_token).__name__}")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool)):
        raise TypeError(f"top_k: expected an integer, got {type(top_k).__name__}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if tail not in (None, "bucket", "renormalize"):
        raise ValueError(f"tail: expected 'bucket' or 'renormalize', got {tail!r}")


def _check_number(name: str, number: float | None, above_0: bool) -> None:
    if number is None:
        return
    if not isinstance(number, int | float):
        raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    if above_0 and not (2.0**-126 <= number <= 2.0**126 or number == math.inf):
        raise ValueError(f"{name}: expected a number above 0, normal in fp32, got {number}")
    if not above_0 and not -(2.0**126) <= number <= 2.0**126:
        raise ValueError(f"{name}: expected a finite number, normal in fp32, got {number}")


def _check_numbers(beta: float, temperature: float) -> None:
    for name, number in (("beta", beta), ("temperature", temperature)):
        if not isinstance(number, int | float):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    if not 2.0**-126 <= temperature <= 2.0**126:
        raise ValueError(
            f"temperature: expected a number above 0, it and its inverse normal in fp32, got {temperature}"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
