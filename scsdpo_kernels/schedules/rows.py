"""Which rows are computed, those that have a weight or a policy's loss or the caller's own list, and what is known."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.contract import PerRow
from ..problem import ENDS, Objective, Problem, mapped, share_range


class Rows(NamedTuple):
    """The K rows to compute: indices into the outputs and both sides' hidden states, and what is given per row."""

    kept: Tensor  # (K,) int64: where they are among all rows
    student: Tensor  # (K,) int64: where the student's hidden states have them
    teacher: Tensor | None  # (K,) int64: where the teacher's have them. None: support_logp is known instead
    given: PerRow  # (K,)
    support_ids: Tensor | None  # (K, S) int64, -1: an empty slot
    support_logp: Tensor | None  # (K, S)
    are_all: bool  # the rows are all rows, in order
    beta: Tensor | None = None  # (K,) float64 in place of the objective's, or `Kernels.shares`'; NaN: out of range

    def chunk(self, which: slice) -> "Rows":
        whole = which.start == 0 and which.stop == len(self.kept)
        return self if whole else mapped(lambda path, x: x[which], self)


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
    problem: Problem,
    vocabulary: int,
    summed_head: Tensor | None,  # () the sum of a head that must not have infinite entries
    is_prefix: bool,  # a longer head has more tokens, which the message then says
) -> tuple[Tensor, bool]:  # (K,) int64, whether summed_head is finite
    """The rows to compute, checked.

    On an accelerator this waits for the device once, and not at all where `rows` is given: nothing is checked then
    (`complete` answers for the list) and the head is taken to be finite.
    """
    weight, rows, policy = problem.token_weight.reshape(-1), problem.rows, problem.policy
    objective = problem.objective
    if rows is not None and weight.device.type != "cpu":
        return rows.clamp(0, max(0, weight.numel() - 1)), True
    keep = problem.counts.reshape(-1)
    looked_at = keep if rows is None else _listed(rows, keep)
    if weight.numel() == 0:
        return keep.long(), True
    asked = {"count": keep.sum(), "largest": weight.float().abs().amax()}
    if policy is not None:
        asked["policy"] = torch.stack([policy.advantages, policy.coefficient]).float().abs().amax()
    if problem.target is not None:
        ids = torch.where(looked_at, problem.target.ids.reshape(-1).long(), 0)
        asked["lowest"], asked["highest"] = ids.aminmax()
    if problem.support is not None and problem.support.ids is not None:
        valid = valid_support(problem.support.ids.flatten(0, -2), vocabulary)
        asked["support"] = (valid | (weight == 0)).all()
    if summed_head is not None:
        asked["head"] = summed_head
    if objective.token_beta is not None:
        beta = objective.token_beta.reshape(-1)
        asked["shares"] = (_in_range(beta, objective.kind) | (weight == 0)).all()
        asked["least share"], asked["largest share"] = torch.where(weight == 0, 0.5, beta).aminmax()
    numbers = torch.stack([x.double() for x in asked.values()]).tolist()  # waits for the device
    told = {"lowest": 0, "highest": 0, "support": True, "head": 0.0, "policy": 0.0, "shares": True}
    told |= dict(zip(asked, numbers, strict=True))
    if not math.isfinite(told["largest"]):
        raise ValueError("token_weight: expected numbers that are finite in fp32, got NaN, inf or larger ones")
    if not math.isfinite(told["policy"]):
        raise ValueError("policy: expected advantages and coefficients that are finite in fp32, got NaN, inf or larger")
    lowest, highest = int(told["lowest"]), int(told["highest"])
    if not 0 <= lowest <= highest < vocabulary:
        which = ", the prefix that both heads have" if is_prefix else ""
        raise ValueError(f"target_ids: expected ids in [0, {vocabulary}){which}, got {lowest} to {highest}")
    if not told["support"]:
        raise ValueError(f"support.ids: expected ids in [0, {vocabulary}), each once in a row, or -1 for an empty slot")
    if not told["shares"]:
        least, most, expected = told["least share"], told["largest share"], share_range(objective.kind)
        raise ValueError(f"beta: expected numbers in {expected}, got {least:.9g} to {most:.9g}")
    head_is_finite = math.isfinite(told["head"])
    if rows is not None:
        if not complete(rows, keep):
            raise ValueError("rows: expected every row whose token_weight, or policy's advantage, is not 0, once")
        return rows, head_is_finite
    ranks = torch.arange(1, int(told["count"]) + 1, device=keep.device)
    if len(ranks) == len(keep):
        return ranks - 1, head_is_finite
    # The k-th kept row is where the running count reaches k: as torch.nonzero, without waiting for the device again.
    return torch.searchsorted(keep.cumsum(0), ranks), head_is_finite


def valid_support(
    ids: Tensor,  # (N, S)
    vocabulary: int,
) -> Tensor:  # (N,) bool
    """Whether a row's ids are in the vocabulary and different from each other; -1 is an empty slot."""
    ids = ids.long().sort(dim=-1).values
    repeated = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    return ((ids >= -1) & (ids < vocabulary)).all(-1) & ~repeated.any(-1)


def shares(
    objective: Objective,
    kept: Tensor,  # (K,) int64
    weight: Tensor,  # (K,) of these rows
) -> Tensor | None:  # (K,) float64
    """The kept rows' β, if each has its own: NaN out of range, unless the row does not count."""
    if objective.token_beta is None:
        return None
    beta = objective.token_beta.reshape(-1)[kept].double()
    return torch.where(_in_range(beta, objective.kind), beta, torch.where(weight == 0, 0.5, torch.nan))


def _in_range(beta: Tensor, divergence: str) -> Tensor:
    at_0, at_1 = ENDS[divergence]
    return ((beta > 0) & (beta < 1)) | ((beta == 0) & (at_0 is not None)) | ((beta == 1) & (at_1 is not None))


def _listed(rows: Tensor, keep: Tensor) -> Tensor:
    count = keep.numel()
    if rows.numel() and not (rows.amin() >= 0 and rows.amax() < count):
        raise ValueError(f"rows: expected indices in [0, {count}), got {rows.min().item()} to {rows.max().item()}")
    return torch.zeros_like(keep).index_fill_(0, rows, True)


def complete(
    rows: Tensor,  # (K,) int64
    weight: Tensor,  # (N,) of all rows; 0: it is not to be computed
) -> Tensor:  # () bool
    """Whether a list of rows has every row that is to be computed once, no row twice and none that does not exist."""
    within = (rows >= 0) & (rows < len(weight))
    listed = rows.clamp(0, max(0, len(weight) - 1))
    times = torch.zeros_like(weight, dtype=torch.int32).index_add_(
        0, listed, torch.ones_like(listed, dtype=torch.int32)
    )
    return within.all() & ((times == 1) | ((times == 0) & (weight == 0))).all()
