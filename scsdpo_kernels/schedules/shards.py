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

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from ..kernels import Kernels
from ..kernels.contract import Logits, RowStatistics, inverse_of
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

    def local(self, ids: Tensor) -> Tensor:
        """This part's columns for ids, -1 for those that are elsewhere."""
        if self.group is None:
            return ids
        columns = ids - self.start
        return torch.where((columns >= 0) & (columns < self.size), columns, -1)

    def values(self, kernels: Kernels, logits: Logits, ids: Tensor, columns: Tensor) -> Tensor:
        """(sides, C, K) float64: the logits of both sides at ids, -inf in an empty slot. Then forbids them."""
        if self.group is None:
            return kernels.entries(logits, columns, -torch.inf, forbid=True)
        values = self.gather(kernels.entries(logits, columns, 0.0, forbid=True)).sum(0)
        return torch.where((ids >= 0) & (ids < self.vocabulary), values, -torch.inf)

    def likeliest(self, kernels: Kernels, student: Tensor, k: int) -> Tensor:
        """(C, K) ids of the student's likeliest entries of all parts' candidates, ascending if there are several."""
        most = min(k, self.longest)
        columns = student.new_empty(len(student), 0, dtype=torch.int64)
        if self.size:
            columns = kernels.likeliest(student, min(most, self.size))
        if self.group is None:
            return columns
        candidates = torch.full((2, len(student), most), -torch.inf, dtype=torch.float64, device=student.device)
        candidates[0] = -1  # an empty slot
        candidates[:, :, : columns.shape[1]] = torch.stack([columns + self.start, student.gather(1, columns)]).double()
        ids, logits = self.gather(candidates).movedim(0, 2).flatten(2)  # (C, parts · most)
        order = torch.where(ids < 0, -torch.inf, logits.clamp(min=torch.finfo(torch.float64).min))
        best = order.topk(min(k, self.vocabulary), sorted=False).indices
        return ids.gather(1, best).long().sort(1).values  # every part has one order

    def target_logits(self, kernels: Kernels, logits: Logits, target: Tensor | None) -> Tensor | None:
        """(sides, C) float64 at the targets, None without; NaN for an id that is not in the vocabulary."""
        if target is None:
            return None
        columns = self.local(target)[:, None]
        if self.group is None:
            return kernels.entries(logits, columns, torch.nan).squeeze(2)
        values = self.gather(kernels.entries(logits, columns, 0.0)).sum(0).squeeze(2)
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


def merge_statistics(parts: Tensor, temperature: float) -> RowStatistics:  # (processes, 7, C) float64
    student, teacher, largest, centre, log_ratio, entropy_s, entropy_t = parts.unbind(1)
    inverse = inverse_of(temperature)
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
