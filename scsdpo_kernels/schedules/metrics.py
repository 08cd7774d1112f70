"""Metrics of a chunk's rows, those that were asked for by name: read off its logits before a kernel overwrites them.

    top1_agreement       1 where one token is the likeliest of both sides, else 0
    support_mass         Σ_{v ∈ A} p_v and Σ_{v ∈ A} q_v of the support A
    entry_clipped        |{v : q_v log(q_v / p_v) > entry_clip}| / |{v : q_v > 0}|
    importance_clipped   1 where e^clamp(log p_y - old_logp, -20, 20) > importance_clip, else 0

Whole rows are looked at in blocks of a few, so that nothing here is as large as a chunk. Where the vocabulary is
spread, processes exchange some numbers of each row. A row whose probabilities are NaN has NaN.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.contract import Logits, PerRow, Scalars
from ..problem import Objective
from .shards import Shard

# One side's fp32 logits that are looked at at a time; a block is one row where a row has more.
BLOCK_BYTES = {"cpu": 2**20, "gpu": 2**24}


def of_logits(
    names: Sequence[str], logits: Logits, objective: Objective, kernels: Kernels, shard: Shard
) -> dict[str, Tensor]:
    """(C,) fp32 by name: what needs whole rows."""
    found = {}
    if "top1_agreement" in names:
        found["top1_agreement"] = _top1_agreement(logits, shard)
    if "entry_clipped" in names:
        found["entry_clipped"] = _entry_clipped(logits, objective, kernels, shard)
    return found


def of_rows(
    names: Sequence[str],
    scalars: Scalars,
    given: PerRow,
    on_support: tuple[Tensor, Tensor] | None,  # (C, K) both sides' log-probabilities there; -inf in an empty slot
) -> dict[str, Tensor]:
    """(C,) fp32 by name: what is known of rows in the end."""
    found = {}
    if "support_mass" in names:
        student, teacher = (x.exp().sum(-1) for x in on_support)
        is_known = ~(student + teacher).isnan()  # a side that is NaN may have chosen the support, or wrong ids have
        found["student_support_mass"], found["teacher_support_mass"] = (
            torch.where(is_known, x, torch.nan).float() for x in (student, teacher)
        )
    if "importance_clipped" in names:
        log_ratio = (scalars.student_logp - given.old_logp).clamp(-20, 20)
        found["importance_clipped"] = _flag(log_ratio > math.log(given.importance_clip), ~log_ratio.isnan())
    return found


def _top1_agreement(logits: Logits, shard: Shard) -> Tensor:
    """Ties count on either side. Where the vocabulary is spread, a token that has both maxima has them in its part."""

    def of_block(rows: slice) -> Tensor:  # (3, rows): both sides' largest logits, and 0 where one token has both
        student, teacher = logits.student[rows], _teacher(logits, rows)
        largest = student.amax(1), teacher.amax(1)
        # Neither difference is above 0, so that their sum is 0 only where both are.
        below = (student - largest[0][:, None]).add_(teacher - largest[1][:, None])
        return torch.stack([*largest, below.amax(1)])

    every = shard.gather(_by_blocks(of_block, logits, 3, -torch.inf))  # (parts, 3, C)
    largest = every[:, :2].amax(0)
    agree = ((every[:, :2] == largest).all(1) & (every[:, 2] == 0)).any(0)
    return _flag(agree, largest.isfinite().all(0))


def _entry_clipped(logits: Logits, objective: Objective, kernels: Kernels, shard: Shard) -> Tensor:
    temperature, known = objective.temperature, shard.statistics(kernels, logits, objective.temperature)
    teacher_lse = known.teacher_lse.float()[:, None]
    apart = (known.teacher_lse - known.student_lse).float()[:, None]

    def of_block(rows: slice) -> Tensor:  # (2, rows): how many are clipped, and how many the teacher may say
        teacher = _teacher(logits, rows)
        log_q = (teacher / temperature).sub_(teacher_lse[rows])
        allowed = log_q.clone().gt_(-torch.inf).sum(1)  # sums of ones are exact to 2^24, and faster than of booleans
        ratio = logits.teacher[rows] if logits.difference else teacher - logits.student[rows]
        ratio = (ratio / temperature).sub_(apart[rows])
        # What the student cannot say has an infinite term, if its q is not lost to underflow.
        term = log_q.clamp_(min=-80.0).exp_().mul_(ratio)
        return torch.stack([term.gt_(objective.entry_clip).sum(1), allowed])

    clipped, allowed = shard.gather(_by_blocks(of_block, logits, 2, 0.0)).sum(0)
    is_known = known.student_lse.isfinite() & known.teacher_lse.isfinite()
    return torch.where(is_known, clipped / allowed, torch.nan)


def _flag(condition: Tensor, is_known: Tensor) -> Tensor:
    return torch.where(is_known, condition.float(), torch.nan)


def _by_blocks(of_block: Callable[[slice], Tensor], logits: Logits, numbers: int, nothing: float) -> Tensor:
    """(numbers, C) of this process's part of the vocabulary; `nothing` where that has no token."""
    rows, vocabulary = logits.student.shape
    found = torch.full((numbers, rows), nothing, device=logits.student.device)
    if vocabulary == 0:
        return found
    most = max(1, BLOCK_BYTES["cpu" if logits.student.device.type == "cpu" else "gpu"] // (4 * vocabulary))
    for start in range(0, rows, most):
        found[:, start : start + most] = of_block(slice(start, start + most))
    return found


def _teacher(logits: Logits, rows: slice) -> Tensor:
    """The teacher's own logits of some rows."""
    return logits.student[rows] + logits.teacher[rows] if logits.difference else logits.teacher[rows]
