"""SC-SDPO's loss of a batch of rollouts (arXiv 2605.27765): question weight × mask × divergence, aggregated.

    loss = Σ_{b,t} w̄_b m_{b,t} D_{b,t} / Σ_{b,t} m_{b,t}        ("token-mean", the default)

Tokens of questions with weight 0 count in the denominator and cost nothing else: they are never projected.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .arguments import DivergenceOptions, check_keywords
from .checks import check_number, check_policy, check_tensor
from .linear_divergence import LinearDivergence, linear_divergence
from .problem import Head, PolicyGradient, RoutedHeads
from .question_weights import question_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

REDUCTIONS = ("token-mean", "weighted-token-mean", "sequence-mean", "sum")


def scsdpo_loss(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor | Sequence[Tensor] | None = None,
    teacher_head: Tensor | Head | RoutedHeads | None = None,
    *,
    rewards: Tensor | None = None,
    question_ids: Tensor | None = None,
    question_weight: Tensor | None = None,
    mask: Tensor,
    reduction: str = "token-mean",
    denominator: float | Tensor | None = None,
    exponent: float = 0.5,
    success_threshold: float | None = None,
    group: "dist.ProcessGroup | None" = None,
    token_weight: Tensor | None = None,
    **options: "Unpack[DivergenceOptions]",
) -> LinearDivergence:
    """`linear_divergence` with the weights that SC-SDPO gives the tokens of a batch of rollouts.

    Either `rewards` and `question_ids` of the whole training batch, from which `question_weights` is computed here
    (with `exponent`, `success_threshold`, `group`), or, for a micro-batch, its rows of `question_weight` computed once
    for the whole batch.

    Args:
        student_hidden: (B, T, D), as of `linear_divergence`.
        student_head: (V, D), or a `Head`.
        teacher_hidden: (B, T, D_t), or with `RoutedHeads` a list of tensors. None with support=TopLogprobs(...).
        teacher_head: (V, D_t), a `Head` or `RoutedHeads`. None: the student's whole head.
        rewards: (B,) one per rollout.
        question_ids: (B,) integers; rollouts of a question share one.
        question_weight: (B,) instead of the two above, from `question_weights` or `PassRates.update`.
        mask: (B, T) 1 at response tokens that have a teacher, else 0.
        token_weight: (B, T) a further factor of each token. None: ones.
        exponent, success_threshold, group: as of `question_weights`.
        reduction: "token-mean": Σ w̄ m D / Σ m. "weighted-token-mean": Σ w̄ m D / Σ w̄ m. "sequence-mean": the mean over
            each rollout's tokens, then over all B rollouts. "sum": Σ w̄ m D. `token_weight` multiplies D in each of
            them and is in no denominator.
        denominator: tokens (or rollouts, for "sequence-mean") of the whole optimiser step, where this call is one
            micro-batch or rank of it: `step_denominator`. None: this call's. Above 0; a tensor has one element.
        options: every further keyword argument of `linear_divergence`. Of `policy` neither question weights nor
            `token_weight` multiply anything; its mask, reduction and denominator are those of D: with "token-mean" the
            loss is Σ w̄ m D / Σ m + coefficient · Σ m L / Σ m. Tokens of questions with weight 0 are then computed
            where they have an advantage. It does not go with "weighted-token-mean".

    Returns:
        LinearDivergence: `loss` is the aggregate, the per-token fields are (B, T) and neither weighted nor reduced.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    check_keywords("scsdpo_loss", options)
    if (question_weight is None) == (rewards is None and question_ids is None):
        raise ValueError("question_weight: expected either it or rewards with question_ids, got both or neither")
    if question_weight is None:
        if rewards is None or question_ids is None:
            raise ValueError("rewards, question_ids: expected both, got one")
        question_weight = question_weights(
            rewards, question_ids, exponent=exponent, success_threshold=success_threshold, group=group
        )
    elif exponent != 0.5 or success_threshold is not None or group is not None:
        raise ValueError(
            "exponent, success_threshold, group: expected none of them with question_weight, which is computed already"
        )
    _check(student_hidden, mask, question_weight, token_weight, reduction, denominator)
    policy = options.get("policy")
    _check_policy(policy, mask, reduction)
    shard = options.get("shard")
    over = shard.group if shard is not None and shard.sequence_parallel else None
    if over is not None and reduction == "sequence-mean":
        raise ValueError("reduction: expected no 'sequence-mean' with sequence_parallel, which may take rollouts apart")

    mask = mask.detach().float()
    weight, share = question_weight.detach().float().unsqueeze(-1) * mask, mask
    if reduction == "sequence-mean":
        length = mask.sum(dim=-1, keepdim=True).clamp(min=1)
        weight, share = weight / length, share / length
    if reduction != "sum":
        total = _denominator(reduction, mask, weight, denominator, over)
        weight, share = weight / total, share / total
    if token_weight is not None:
        weight = weight * token_weight.detach()
    if policy is not None:
        options["policy"] = policy._replace(coefficient=share * policy.coefficient)
    return linear_divergence(student_hidden, student_head, teacher_hidden, teacher_head, token_weight=weight, **options)


def step_denominator(
    mask: Tensor,
    question_weight: Tensor | None = None,
    *,
    reduction: str = "token-mean",
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """`scsdpo_loss`'s denominator of a whole optimiser step, over micro-batches and processes: call it once a step.

    A scalar in fp32, above 0.

    Then Σ over micro-batches and processes of scsdpo_loss(..., denominator=it).loss is the loss of the whole batch,
    however that is split. Gradients that are averaged over processes, as DDP and FSDP do, want the loss times their
    number.

    Args:
        mask: (B, T) of all micro-batches of this process's step.
        question_weight: (B,) of their rollouts; "weighted-token-mean" needs it.
        reduction: as of `scsdpo_loss`: Σ m, Σ w̄ m or B. "sum" has no denominator.
        group: process group over whose ranks the batch is spread: with `VocabShard.sequence_parallel` those of the
            vocabulary too, whose rows are their own. Collective: one number a rank. None: this process.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    if reduction not in REDUCTIONS or reduction == "sum":
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS[:-1])}, got {reduction!r}")
    if mask.dim() != 2:
        raise ValueError(f"mask: expected shape (B, T), got {tuple(mask.shape)}")
    if reduction == "sequence-mean":
        total = torch.tensor(float(len(mask)), dtype=torch.float64, device=mask.device)
    else:
        total = mask.detach().double()
        if reduction == "weighted-token-mean":
            if question_weight is None or question_weight.shape != mask.shape[:1]:
                got = None if question_weight is None else tuple(question_weight.shape)
                raise ValueError(f"question_weight: expected shape ({len(mask)},) with this reduction, got {got}")
            total = total * question_weight.detach().double().unsqueeze(1)
        total = total.sum()
    if group is not None:
        dist.all_reduce(total, group=group)
    return torch.where(total == 0, 1.0, total).float()


def _denominator(
    reduction: str, mask: Tensor, weight: Tensor, given: float | Tensor | None, over: "dist.ProcessGroup | None"
) -> float | Tensor:
    """Counts this call, and all of `over`. It is never 0: a batch without tokens has a loss of 0, not NaN."""
    if given is not None:
        return given if not isinstance(given, Tensor) else given.reshape(()).to(mask.device)
    if reduction == "sequence-mean":
        return max(1, len(mask))
    total = mask.sum() if reduction == "token-mean" else weight.sum()
    if over is not None:
        dist.all_reduce(total, group=over)
    return torch.where(total == 0, 1.0, total)


def _check(student_hidden, mask, question_weight, token_weight, reduction, denominator) -> None:
    check_tensor("student_hidden", student_hidden)
    for name, tensor in (("mask", mask), ("question_weight", question_weight), ("token_weight", token_weight)):
        if tensor is not None or name != "token_weight":
            check_tensor(name, tensor, student_hidden.device)
    if student_hidden.dim() != 3:
        raise ValueError(f"student_hidden: expected shape (B, T, D), got {tuple(student_hidden.shape)}")
    tokens = student_hidden.shape[:2]
    if mask.shape != tokens:
        raise ValueError(f"mask: expected shape {tuple(tokens)}, got {tuple(mask.shape)}")
    if question_weight.shape != tokens[:1]:
        raise ValueError(
            "rewards, question_ids, question_weight: expected shape "
            f"({tokens[0]},), one per rollout of student_hidden, got {tuple(question_weight.shape)}"
        )
    if token_weight is not None and token_weight.shape != tokens:
        raise ValueError(f"token_weight: expected shape {tuple(tokens)}, got {tuple(token_weight.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if denominator is not None:
        _check_denominator(reduction, denominator)
    # Values are looked at where that costs no synchronisation and can be compiled around.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask: expected zeros and ones, got other numbers; factors per token go into token_weight")


def _check_policy(policy: PolicyGradient | None, mask: Tensor, reduction: str) -> None:
    check_policy(policy)
    if policy is None:
        return
    if reduction == "weighted-token-mean":
        raise ValueError("policy: expected another reduction than 'weighted-token-mean', whose weights are questions'")
    if isinstance(policy.coefficient, Tensor):
        check_tensor("policy.coefficient", policy.coefficient, mask.device)
        if policy.coefficient.shape != mask.shape:
            got = tuple(policy.coefficient.shape)
            raise ValueError(f"policy.coefficient: expected a number or shape {tuple(mask.shape)}, got {got}")


def _check_denominator(reduction: str, denominator: float | Tensor) -> None:
    if reduction == "sum":
        raise ValueError("denominator: expected None with reduction='sum', which divides by nothing")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator: expected one number, got shape {tuple(denominator.shape)}")
        if denominator.device.type != "cpu" or torch.compiler.is_compiling():
            return
        denominator = denominator.item()
    check_number("denominator", denominator)
    if not 0 < denominator < math.inf:
        raise ValueError(f"denominator: expected a finite number above 0, got {denominator}")
