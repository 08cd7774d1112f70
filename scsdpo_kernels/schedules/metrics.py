"""Metrics of a chunk's rows, those that were asked for by name: read off its logits before a kernel overwrites them.

    top1_agreement       1 where one token is the likeliest of both sides, else 0
    support_mass         Σ_{v ∈ A} p_v and Σ_{v ∈ A} q_v of the support A
    entry_clipped        |{v : q_v log(q_v / p_v) > entry_clip}| / |{v : q_v > 0}|
    importance_clipped   1 where e^clamp(log p_y - old_logp, -20, 20) > importance_clip, else 0

Whole rows are looked at in blocks of a few, so that nothing here is as large as a chunk. Where the vocabulary is
spread, processes exchange some numbers of each row. A row whose probabilities are NaN has NaN.
"""

import math
from collections.abc import Iterator, Sequence

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
        # Ids that nobody has checked may be wrong, and the teacher is NaN there.
        found["student_support_mass"] = torch.where(teacher.isnan(), torch.nan, student).float()
        found["teacher_support_mass"] = teacher.float()
    if "importance_clipped" in names:
        log_ratio = (scalars.student_logp - given.old_logp).clamp(-20, 20)
        found["importance_clipped"] = _flag(log_ratio > math.log(given.importance_clip), ~log_ratio.isnan())
    return found


def _top1_agreement(logits: Logits, shard: Shard) -> Tensor:
    """Ties count on either side. Where the vocabulary is spread, a token that has both maxima has them in its part."""
    own = torch.full((3, len(logits.student)), -torch.inf, device=logits.student.device)
    for rows in _blocks(logits):
        student, teacher = logits.student[rows], _teacher(logits, rows)
        largest = student.amax(1), teacher.amax(1)
        at_both = (student == largest[0][:, None]) & (teacher == largest[1][:, None])
        own[:, rows] = torch.stack([*largest, at_both.any(1).float()])
    every = shard.gather(own)  # (parts, 3, C)
    largest = every[:, :2].amax(0)
    agree = ((every[:, :2] == largest).all(1) & (every[:, 2] == 1)).any(0)
    return _flag(agree, largest.isfinite().all(0))


def _entry_clipped(logits: Logits, objective: Objective, kernels: Kernels, shard: Shard) -> Tensor:
    known = shard.statistics(kernels, logits, objective.temperature)
    apart = (known.teacher_lse - known.student_lse).float()[:, None]
    teacher_lse = known.teacher_lse.float()[:, None]
    counts = torch.zeros(2, len(logits.student), device=logits.student.device)  # clipped, and all of the teacher's
    for rows in _blocks(logits):
        teacher = _teacher(logits, rows)
        ratio = logits.teacher[rows] if logits.difference else teacher - logits.student[rows]
        ratio = (ratio / objective.temperature).sub_(apart[rows])
        allowed = (teacher > -torch.inf).sum(1)
        term = (teacher / objective.temperature).sub_(teacher_lse[rows]).exp_().mul_(ratio)
        # A token that the student cannot have is clipped, though fp32 may lose its q.
        clipped = ((term > objective.entry_clip) | (ratio == torch.inf)).sum(1)
        counts[:, rows] = torch.stack([clipped, allowed]).float()
    clipped, allowed = shard.gather(counts).sum(0)
    share = clipped / allowed
    return torch.where(known.student_lse.isfinite() & known.teacher_lse.isfinite(), share, torch.nan)


def _flag(condition: Tensor, is_known: Tensor) -> Tensor:
    return torch.where(is_known, condition.float(), torch.nan)


def _blocks(logits: Logits) -> Iterator[slice]:
    rows, vocabulary = logits.student.shape
    if vocabulary == 0:
        return
    most = max(1, BLOCK_BYTES["cpu" if logits.student.device.type == "cpu" else "gpu"] // (4 * vocabulary))
    yield from (slice(start, start + most) for start in range(0, rows, most))


def _teacher(logits: Logits, rows: slice) -> Tensor:
    """The teacher's own logits of some rows."""
    return logits.student[rows] + logits.teacher[rows] if logits.difference else logits.teacher[rows]
