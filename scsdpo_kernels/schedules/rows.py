"""Which rows are computed, those of weight other than 0 or the caller's own list, and what is known of each."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The K rows to compute: indices into the outputs and both sides' hidden states, and what is given per row."""

    kept: Tensor  # (K,) int64 among all rows: of the outputs and of the hidden gradient
    student: Tensor  # (K,) int64 of the student's hidden states
    teacher: Tensor | None  # (K,) int64 of the teacher's; None: it has said support_logp
    weight: Tensor  # (K,) fp32
    target: Tensor | None  # (K,) int64
    old_logp: Tensor | None  # (K,) fp32
    importance_clip: float
    support_ids: Tensor | None  # (K, S) int64, -1: an empty slot
    support_logp: Tensor | None  # (K, S)

    @property
    def scalars(self) -> int:
        """How many numbers a row has in the end: divergence, two entropies, two log-probabilities, importance ratio."""
        return 3 if self.target is None else 5 if self.old_logp is None else 6

    def chunk(self, which: slice) -> "Rows":
        return Rows(*(x[which] if isinstance(x, Tensor) else x for x in self))


def as_matrix(
    hidden: Tensor,  # (..., D)
    kept: Tensor,  # (K,) int64 flat indices of the leading shape
) -> tuple[Tensor, Tensor]:
    """(M, D) with unit stride along D, and the kept rows' numbers in it: a view, or where none exists the kept rows."""
    try:
        matrix = hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        index, rest = [], kept
        for size in reversed(hidden.shape[:-1]):
            index.insert(0, rest % size)
            rest = rest // size
        matrix = hidden[tuple(index)]
        kept = torch.arange(len(kept), device=kept.device)
    return matrix if matrix.stride(1) == 1 else matrix.contiguous(), kept


def kept_rows(
    token_weight: Tensor,  # (...,)
    target_ids: Tensor | None,  # (...,)
    rows: Tensor | None,  # (K,) int64, the caller's own list
    support_ids: Tensor | None,  # (..., S)
    vocabulary: int,
    summed_head: Tensor | None,  # () the sum of a head that must not have infinite entries
) -> tuple[Tensor, bool]:  # (K,) int64, whether summed_head is finite
    """The rows to compute, checked.

    On an accelerator this waits for the device once, and not at all where `rows` is given: nothing is checked then
    (`complete` answers for the list) and the head is taken to be finite.
    """
    weight = token_weight.reshape(-1)
    if rows is not None and weight.device.type != "cpu":
        return rows.clamp(0, max(0, weight.numel() - 1)), True
    keep = weight != 0
    ids = torch.zeros_like(keep, dtype=torch.int64) if target_ids is None else target_ids.reshape(-1).long()
    ids = torch.where(keep if rows is None else _listed(rows, keep), ids, 0)
    lowest, highest = ids.aminmax() if ids.numel() else (ids.sum(), ids.sum())
    finite = torch.isfinite(weight.float()).all()
    head = torch.ones_like(finite) if summed_head is None else torch.isfinite(summed_head)
    support = torch.ones_like(finite)
    if support_ids is not None:
        support = (valid_support(support_ids.flatten(0, -2), vocabulary) | ~keep).all()
    count, finite, head, support, lowest, highest = torch.stack(
        [keep.sum(), finite.long(), head.long(), support.long(), lowest, highest]
    ).tolist()
    if not finite:
        raise ValueError("token_weight: expected numbers that are finite in fp32, got NaN, inf or larger ones")
    if not 0 <= lowest <= highest < vocabulary:
        raise ValueError(f"target_ids: expected ids in [0, {vocabulary}), got {lowest} to {highest}")
    if not support:
        raise ValueError(f"support.ids: expected ids in [0, {vocabulary}), each once in a row, or -1 for an empty slot")
    if rows is not None:
        if not complete(rows, weight):
            raise ValueError("rows: expected every row whose token_weight is not 0, once")
        return rows, bool(head)
    # The k-th kept row is where the running count reaches k: as torch.nonzero, without waiting for the device again.
    running, ranks = keep.cumsum(0), torch.arange(1, count + 1, device=keep.device)
    return torch.searchsorted(running, ranks), bool(head)


def valid_support(
    ids: Tensor,  # (N, S)
    vocabulary: int,
) -> Tensor:  # (N,) bool
    """Whether a row's ids are in the vocabulary and different from each other; -1 is an empty slot."""
    ids = ids.long().sort(dim=-1).values
    repeated = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    return ((ids >= -1) & (ids < vocabulary)).all(-1) & ~repeated.any(-1)


def _listed(rows: Tensor, keep: Tensor) -> Tensor:
    count = keep.numel()
    if rows.numel() and not (rows.amin() >= 0 and rows.amax() < count):
        raise ValueError(f"rows: expected indices in [0, {count}), got {rows.min().item()} to {rows.max().item()}")
    return torch.zeros_like(keep).index_fill_(0, rows, True)


def complete(
    rows: Tensor,  # (K,) int64
    weight: Tensor,  # (N,) all weights
) -> Tensor:  # () bool
    """Whether a list of rows has every row of weight other than 0 once, no row twice and none that does not exist."""
    within = (rows >= 0) & (rows < len(weight))
    listed = rows.clamp(0, max(0, len(weight) - 1))
    times = torch.zeros_like(weight, dtype=torch.int32).index_add_(
        0, listed, torch.ones_like(listed, dtype=torch.int32)
    )
    return within.all() & ((times == 1) | ((times == 0) & (weight == 0))).all()
