"""Collectives of a call whose vocabulary is spread over processes: each has a part of every row of logits.

What is known of a row is put together from its parts. With Z_r, Y_r the normalisers of student and teacher in part r,
c_r the constant that its log-ratio is counted from, and c that of the part with the student's largest logit (of the
parts that have something of both sides):

    lse = log Σ_r e^lse_r      P_r = e^(lse_r - lse)      H = Σ_r P_r (H_r - log P_r)
    log(Y/Z) - c/τ = log(1 + Σ_r P_r (e^(log(Y_r/Z_r) - c/τ) - 1))

which keeps its digits as teacher → student. Two exchanges of a few float64 numbers a row: these statistics, and then
the sums over entries that the divergence is made of, without which most gradients cannot begin. Every process computes
from the same numbers in the same order, so all have the same bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from ..kernels import Kernels
from ..kernels.contract import Logits, PerRow, RowStatistics
from ..problem import Part


class Shard:
    """A call's part of the vocabulary, or all of it, and every collective of the call."""

    def __init__(self, part: Part | None, size: int):
        self.group = None if part is None else _resolve_process_group(part.group)
        self.size = size
        self.start = 0 if part is None else part.start
        self.longest = size if part is None else part.longest
        self.vocabulary = size if part is None else part.vocabulary

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def gather(self, own: Tensor) -> Tensor:
        """(processes, ...) of everyone's (...)."""
        if self.group is None:
            return own.unsqueeze(0)
        every = own.new_empty(dist.get_world_size(self.group), *own.shape)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # PyTorch 2.13 has renamed it
        gather(every.flatten(0, 1), own.contiguous(), group=self.group)
        return every

    def local(self, ids: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """This part's columns for (C, K) ids, and which ids are here. Others repeat the first one that is."""
        columns = ids - self.start
        here = exists & (columns >= 0) & (columns < self.size)
        first = columns.gather(1, here.int().argmax(1, keepdim=True)).clamp(0, max(0, self.size - 1))
        return torch.where(here, columns, first), here

    def values(self, logits: Logits, ids: Tensor, exists: Tensor) -> Tensor:
        """(sides, C, K) float64: the logits of both sides at ids, wherever they are; 0 where they are nowhere."""
        columns, here = self.local(ids, exists)
        if self.size:
            own = logits_at(logits, columns)
        else:
            sides = 1 if logits.teacher is None else 2
            own = torch.zeros(sides, *ids.shape, dtype=torch.float64, device=ids.device)
        return self.gather(torch.where(here, own, 0.0)).sum(0)

    def target_logits(self, logits: Logits, target: Tensor | None) -> Tensor | None:
        """(sides, C) float64 at the targets, None without; NaN for an id that is not in the vocabulary."""
        if target is None:
            return None
        ids = target.unsqueeze(1)
        values = self.values(logits, ids, torch.ones_like(ids, dtype=torch.bool)).squeeze(2)
        return torch.where((target >= 0) & (target < self.vocabulary), values, torch.nan)

    def statistics(self, kernels: Kernels, logits: Logits, temperature: float) -> RowStatistics:
        """Whole rows', from everyone's parts of them. A teacher that is not there is the student."""
        student, teacher = logits.student, logits.student if logits.teacher is None else logits.teacher
        if self.size:
            own = kernels.row_statistics(logits._replace(teacher=teacher), temperature)
        else:
            nothing = torch.full((len(student),), -torch.inf, dtype=torch.float64, device=student.device)
            zero = torch.zeros_like(nothing)
            own = RowStatistics(nothing, nothing, nothing, zero, zero, zero, zero)
        if self.group is None:
            return own
        return merge_statistics(self.gather(torch.stack([x.double() for x in own])), temperature)

    def gather_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """Everyone's rows one after the other, of which each has so many."""
        if max(counts) == 0:
            return own
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        parts = zip(self.gather(padded), counts, strict=True)
        return torch.cat([part[:length] for part, length in parts])

    def scatter_rows(self, gathered: Tensor, counts: list[int]) -> Tensor:
        """This process's rows of the sum over processes."""
        if max(counts) == 0:
            return gathered
        padded = gathered.new_zeros(len(counts), max(counts), *gathered.shape[1:])
        for part, rows in zip(padded, gathered.split(counts), strict=True):
            part[: len(rows)] = rows
        own = torch.empty_like(padded[0])
        dist.reduce_scatter(own, list(padded.unbind()), group=self.group)
        return own[: counts[self.rank]]

    def add_up(self, tensor: Tensor) -> Tensor:
        """In place, the sum over processes."""
        if self.group is not None and tensor.numel():
            dist.all_reduce(tensor, group=self.group)
        return tensor


def logits_at(logits: Logits, columns: Tensor) -> Tensor:
    """(sides, C, K) float64 of student and, if it is there, teacher."""
    sides = (logits.student,) if logits.teacher is None else (logits.student, logits.teacher)
    values = torch.stack([x.gather(1, columns).double() for x in sides])
    if logits.difference:
        values[1] += values[0]
    return values


def _importance_ratio(logp: Tensor, old_logp: Tensor, clip: float) -> Tensor:
    """By how much more likely the student finds a token than the policy that sampled it, bounded."""
    return (logp - old_logp).clamp(-20, 20).exp().clamp(max=clip)


class OfTarget(NamedTuple):
    """What follows from the log-probability of a row's target."""

    scalars: list[Tensor]  # of Scalars, those behind both log-probabilities
    weight: Tensor  # (C,) fp32: multiplies the divergence's gradient
    slope: Tensor | None  # (C,) c A r, where there is a policy: multiplies p_v - [v = y]


def of_target(logp: Tensor | None, given: PerRow) -> OfTarget:
    """As the row kernels do it for whole rows. No log-probability: no target, and the weight alone."""
    scalars, weight, slope = [], given.weight, None
    if given.old_logp is not None:
        scalars.append(_importance_ratio(logp, given.old_logp, given.importance_clip))
        weight = (weight * scalars[0]).float()
    if given.policy is not None:
        policy_loss, clipped, slope = _policy_terms(logp, given)
        scalars = [*(scalars or [torch.ones_like(logp)]), policy_loss, clipped]
    return OfTarget(scalars, weight, slope)


def _policy_terms(logp: Tensor, given: PerRow) -> tuple[Tensor, Tensor, Tensor]:
    """(C,) each: the policy's loss, whether it is clipped, and its coefficient's share of -∂loss/∂log p: c A r.

    A row without an advantage has nothing of them, whatever its ratio; one whose log p is NaN has a gradient of NaN.
    """
    advantage, coefficient, ratio, lowest, highest = given.policy
    if ratio is not None:
        ratio = ratio.to(logp.dtype)
    elif given.old_logp is not None:
        ratio = (logp - given.old_logp).exp()
    else:
        ratio = torch.ones_like(logp)
    ratio = torch.where(logp.isnan(), torch.nan, ratio)
    clipped = ((advantage > 0) & (ratio > highest)) | ((advantage < 0) & (ratio < lowest))
    bounded = torch.where(clipped, ratio.clamp(lowest, highest), ratio)
    none = advantage == 0
    slope = torch.where(none | clipped | (coefficient == 0), 0.0, coefficient * advantage * ratio)
    return torch.where(none, 0.0, -advantage * bounded), clipped.to(logp.dtype), slope


def merge_statistics(parts: Tensor, temperature: float) -> RowStatistics:  # (processes, 7, C) float64
    student, teacher, largest, centre, log_ratio, entropy_s, entropy_t = parts.unbind(1)
    inverse = (1 / torch.tensor(temperature, dtype=torch.float32)).item()  # as the kernels have it
    lse_s, lse_t = student.logsumexp(0), teacher.logsumexp(0)
    comparable = log_ratio.isfinite() & (centre.abs() < 1e30)  # false where a side has nothing
    best = torch.where(comparable, largest, -torch.inf).argmax(0, keepdim=True)
    own = torch.where(comparable.any(0), centre.gather(0, best).squeeze(0), 0.0)
    share = _share(student, lse_s)
    grown = torch.where(
        share == 0,
        (teacher - lse_s - own * inverse).exp(),  # mass of the teacher where the student has none
        share * torch.expm1(log_ratio + (centre - own) * inverse),
    )
    grown = torch.where((share == 0) & (teacher == -torch.inf), 0.0, grown).sum(0)
    apart = lse_t - lse_s - own * inverse
    log_ratio = torch.where((grown > -0.5) & grown.isfinite(), grown.log1p(), apart)
    lse_t = torch.where(log_ratio.isfinite(), lse_s + own * inverse + log_ratio, lse_t)
    entropies = (
        (torch.special.entr(x) + torch.where(x == 0, 0.0, x * of)).sum(0)
        for x, of in ((share, entropy_s), (_share(teacher, teacher.logsumexp(0)), entropy_t))
    )
    others = (largest.amax(0), own, log_ratio, *entropies)
    return RowStatistics(lse_s.contiguous(), lse_t.contiguous(), *(x.float().contiguous() for x in others))


def _share(lse: Tensor, of_all: Tensor) -> Tensor:
    return torch.where((lse == -torch.inf) & (of_all > -torch.inf), 0.0, (lse - of_all).exp())
