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
    teacher: Tensor | None  # (K,) int64: where each one's teacher's have it. None: support_logp is known instead
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


def as_teachers_matrix(problem: Problem, number: int, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a teacher's hidden states, which may be those of its own tokens alone, in the order of all."""
    hidden = problem.teachers[number].hidden
    if hidden.shape[:-1] == problem.token_weight.shape:
        return as_matrix(hidden, kept)
    before = (problem.route.reshape(-1) == number).cumsum(0) - 1
    return as_matrix(hidden, before[kept])


class Chosen(NamedTuple):
    """The rows to compute, checked."""

    index: Tensor  # (K,) int64
    head_is_finite: bool
    of_teachers: list[int]  # how many of them each teacher has


def kept_rows(
    problem: Problem,
    vocabulary: int,
    summed_head: Tensor | None,  # () the sum of a head that must not have infinite entries
    is_prefix: bool,  # a longer head has more tokens, which the message then says
) -> Chosen:
    """The rows to compute, checked.

    On an accelerator this waits for the device once, and not at all where `rows` is given and one teacher: nothing but
    the route is checked then (`complete` answers for the list) and the head is taken to be finite.
    """
    weight, rows, policy = problem.token_weight.reshape(-1), problem.rows, problem.policy
    objective = problem.objective
    if rows is not None and weight.device.type != "cpu":
        rows = rows.clamp(0, max(0, weight.numel() - 1))
        asked = _asked_of_route(problem, rows)
        numbers = torch.stack(list(asked.values())).tolist() if asked else []  # waits for the device
        return Chosen(rows, True, _of_teachers(problem, dict(zip(asked, numbers, strict=True)), len(rows)))
    keep = problem.counts.reshape(-1)
    looked_at = keep if rows is None else _listed(rows, keep)
    if weight.numel() == 0:
        return Chosen(keep.long(), True, _of_teachers(problem, {}, 0))
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
    asked |= _asked_of_route(problem, looked_at if rows is None else rows)
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
        return Chosen(rows, head_is_finite, _of_teachers(problem, told, len(rows)))
    of_teachers = _of_teachers(problem, told, int(told["count"]))
    if told["count"] == len(keep):
        return Chosen(torch.arange(len(keep), device=keep.device), head_is_finite, of_teachers)
    ranks = torch.arange(1, int(told["count"]) + 1, device=keep.device)
    # The k-th kept row is where the running count reaches k: as torch.nonzero, without waiting for the device again.
    return Chosen(torch.searchsorted(keep.cumsum(0), ranks), head_is_finite, of_teachers)


def _asked_of_route(
    problem: Problem,
    computed: Tensor,  # (N,) bool, or (K,) int64 rows
) -> dict[str, Tensor]:
    """How many rows each teacher has, of those that are computed and of all, and how far the numbers go."""
    if problem.route is None:
        return {}
    route = problem.route.reshape(-1).long()
    is_its = route[:, None] == torch.arange(len(problem.teachers), device=route.device)
    if computed.dtype == torch.bool:
        of_computed, seen = is_its & computed[:, None], torch.where(computed, route, 0)
    else:
        of_computed, seen = is_its[computed], route[computed]
    asked = dict(zip(("least teacher", "last teacher"), seen.aminmax(), strict=True)) if len(seen) else {}
    for name, rows in (("computed", of_computed), ("all", is_its)):
        asked |= {f"{name} of teacher {number}": x for number, x in enumerate(rows.sum(0).unbind())}
    return asked


def _of_teachers(problem: Problem, told: dict[str, float], count: int) -> list[int]:
    """How many of the `count` computed rows each teacher has."""
    teachers = range(len(problem.teachers))
    if problem.route is None:
        return [count for _ in teachers]
    least, last = (int(told.get(f"{x} teacher", 0)) for x in ("least", "last"))
    if not 0 <= least <= last < len(teachers):
        raise ValueError(
            f"teacher_head.index: expected numbers in [0, {len(teachers)}), of teacher_head.heads, at tokens that are "
            f"computed, got {least} to {last}"
        )
    leading = problem.token_weight.shape
    for number in teachers:
        hidden, has = problem.teachers[number].hidden, int(told.get(f"all of teacher {number}", 0))
        if hidden.shape[:-1] not in (leading, (has,)):
            raise ValueError(
                f"teacher_hidden[{number}]: expected shape {(has, hidden.shape[1])}, of the tokens whose "
                f"teacher_head.index is {number}, or student_hidden's leading shape {tuple(leading)}, "
                f"got {tuple(hidden.shape)}"
            )
    return [int(told.get(f"computed of teacher {number}", 0)) for number in teachers]


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
