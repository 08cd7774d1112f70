"""From a problem to what a schedule computes, the kept rows of it, and from there to what the operator returns."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.contract import PerRow, RowPolicy, Scalars
from ..problem import Gradients, Head, Objective, Problem, Side, Support, cut
from . import rows as row_choice
from .rows import Rows, as_matrix, as_teachers_matrix, complete, valid_support
from .shards import Shard


class Teacher(NamedTuple):
    side: Side  # hidden: (M, D)
    rows: slice  # of the plan's: those that have this teacher


class Plan(NamedTuple):
    student: Side  # hidden: (M, D), of which `rows` are computed
    teachers: tuple[Teacher, ...]  # one after the other they have all rows, or there is none
    rows: Rows
    objective: Objective
    support: Support | None
    shard: Shard
    whole_head: Head  # the student's with rows that do not count, whose gradient is 0
    difference: bool  # one fp32 head, which is applied to the difference of hidden states in place of the teacher's
    grad_hidden: Tensor | None  # out: rows.kept of it are written. None: not wanted
    wanted: Gradients  # dtype of each gradient, None where it is not wanted
    metrics: tuple[str, ...]


# A schedule returns (scalars + metrics, K) fp32 and gradients of Σ weight · importance ratio · divergence + policy's.
Schedule = Callable[[Plan], tuple[Tensor, Gradients]]


class Outcome(NamedTuple):
    loss: Tensor  # () fp32
    scalars: Scalars  # (...,) fp32, None where it was not asked for
    metrics: Tensor | None  # (entries, ...) fp32
    gradients: Gradients


class Kept(NamedTuple):
    """The rows of this process, before those of others join them."""

    index: Tensor  # (K,) int64 among all rows; those of one teacher after another's
    are_all: bool  # these are all rows, in order
    taught: tuple[slice, ...]  # each teacher's of them
    right: Tensor | None  # () bool: whether a list that nobody has checked is complete. None: it was checked
    head_is_finite: bool


def run(problem: Problem, schedule: Schedule, wanted: list[bool]) -> Outcome:
    """What the operator returns, by the `run` of a schedule's module."""
    whole_head, is_prefix = problem.student.head, problem.vocabulary is not None and problem.part is None
    problem = _with_shared_head(cut(problem))
    shard = Shard(problem.part, problem.student.head.weight.shape[0])
    may_subtract = _may_subtract(problem)
    kept = _keep(problem, shard, may_subtract, is_prefix)
    student, teachers, rows = _sides(problem, kept, shard)
    counts = None
    if problem.part is not None and problem.part.sequence_parallel:
        student, teachers, rows, counts = _gather_rows(student, teachers, rows, shard)

    wanted = _dtypes(problem.student, wanted)
    hidden = problem.student.hidden
    grad_hidden = None
    if wanted.hidden is not None:
        grad_hidden = torch.zeros(hidden.shape, dtype=wanted.hidden, device=hidden.device)
    partial, computed = grad_hidden, rows
    if partial is not None and shard.group is None:
        partial = partial.view(-1, hidden.shape[-1])
    elif partial is not None:  # processes add these up, in fp32
        partial = torch.zeros(len(rows.given.weight), hidden.shape[-1], device=hidden.device)
        if counts is None:
            computed = rows._replace(kept=torch.arange(len(partial), device=hidden.device))
    plan = Plan(
        student=student,
        teachers=teachers,
        rows=computed,
        objective=problem.objective,
        support=problem.support,
        shard=shard,
        whole_head=whole_head,
        difference=may_subtract and kept.head_is_finite,
        grad_hidden=partial,
        wanted=wanted,
        metrics=problem.metrics,
    )
    scalars, gradients = schedule(plan)
    if shard.group is not None:
        _reduce_gradients(shard, counts, partial, grad_hidden, kept.index, gradients)
    return _outcome(problem, kept, rows, scalars, gradients._replace(hidden=grad_hidden), counts, shard)


def _with_shared_head(problem: Problem) -> Problem:
    """One tensor for a weight that both sides have: what a schedule tells a shared head by."""
    weight = problem.student.head.weight
    teachers = []
    for side in problem.teachers:
        shared = _same_storage(weight, side.head.weight)
        teachers.append(side._replace(head=side.head._replace(weight=weight)) if shared else side)
    return problem._replace(teachers=tuple(teachers))


def _may_subtract(problem: Problem) -> bool:
    """Whether both sides have one linear fp32 head, so that it may be applied to their difference."""
    if len(problem.teachers) != 1:
        return False
    student, teacher = problem.student, problem.teachers[0]
    return (
        student.head.weight.dtype == teacher.hidden.dtype == torch.float32
        and not student.head.softcap
        and _is_same(student.head, teacher.head)
    )


def _is_same(a: Head, b: Head) -> bool:
    """Whether two heads are one: the same storage and numbers."""
    if a.lora is None or b.lora is None:
        adapters = a.lora is b.lora
    else:
        adapters = all(map(_same_storage, a.lora[:2], b.lora[:2])) and a.lora.scale == b.lora.scale
    biases = a.bias is b.bias if a.bias is None or b.bias is None else _same_storage(a.bias, b.bias)
    numbers = (a.logit_scale, a.softcap) == (b.logit_scale, b.softcap)
    return adapters and biases and numbers and _same_storage(a.weight, b.weight)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _keep(problem: Problem, shard: Shard, may_subtract: bool, is_prefix: bool) -> Kept:
    """Chooses and checks the rows to compute: the one wait for a GPU, and none with the caller's own list."""
    unchecked = problem.rows is not None and problem.token_weight.device.type != "cpu"
    index, head_is_finite, of_teachers = row_choice.kept_rows(
        problem,
        vocabulary=shard.vocabulary,
        is_prefix=is_prefix,
        # An infinite entry, which forbids a token, would meet a difference of 0: 0 · inf is no logit.
        summed_head=problem.student.head.weight.sum() if may_subtract and not unchecked else None,
    )
    right = complete(problem.rows, problem.counts.reshape(-1)) if unchecked else None
    are_all = problem.rows is None and len(index) == problem.token_weight.numel()
    if len(of_teachers) > 1:
        index, are_all = index[problem.route.reshape(-1)[index].argsort(stable=True)], False
    ends = [0, *itertools.accumulate(of_teachers)]
    return Kept(index, are_all, tuple(map(slice, ends, ends[1:])), right, head_is_finite)


def _sides(problem: Problem, kept: Kept, shard: Shard) -> tuple[Side, tuple[Teacher, ...], Rows]:
    """All sides' hidden states as matrices, and the kept rows in them."""
    student_states, student_rows = as_matrix(problem.student.hidden, kept.index)
    teachers, teacher_rows = [], []
    for number, (side, taught) in enumerate(zip(problem.teachers, kept.taught, strict=True)):
        states, index = as_teachers_matrix(problem, number, kept.index[taught])
        teachers.append(Teacher(side._replace(hidden=states), taught))
        teacher_rows.append(index)
    weight = problem.token_weight.reshape(-1)
    weight = (weight.contiguous() if kept.are_all else weight[kept.index]).float()
    if kept.right is not None:  # the list was not checked: if it is wrong, poison the result with NaN
        weight = torch.where(kept.right, weight, torch.nan)
    given, target = PerRow(weight), problem.target
    if target is not None:
        old_logp = None
        if target.old_logp is not None:  # it may hold garbage where nothing counts
            counts = problem.counts.reshape(-1)[kept.index]
            old_logp = torch.where(counts, target.old_logp.reshape(-1)[kept.index].float(), 0.0)
        ids = target.ids.reshape(-1)[kept.index].long()
        given = PerRow(weight, ids, old_logp, target.importance_clip, _policy(problem, kept.index))
    support_ids, support_logp = _support(problem, kept.index, shard.vocabulary)
    rows = Rows(
        kept=kept.index,
        student=student_rows,
        teacher=_joined(teacher_rows),
        given=given,
        support_ids=support_ids,
        support_logp=support_logp,
        are_all=kept.are_all,
        beta=row_choice.shares(problem.objective, kept.index, weight),
    )
    return problem.student._replace(hidden=student_states), tuple(teachers), rows


def _joined(parts: list[Tensor]) -> Tensor | None:
    """Those of one teacher, mostly, as they are."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.cat(parts)


def _policy(problem: Problem, kept: Tensor) -> RowPolicy | None:
    """The kept rows' policy. Where nothing counts there may be anything in a ratio."""
    if (policy := problem.policy) is None:
        return None
    tensors = (policy.advantages, policy.coefficient, policy.ratio)
    advantage, coefficient, ratio = (None if x is None else x.reshape(-1)[kept].float() for x in tensors)
    if ratio is not None:
        ratio = torch.where(advantage == 0, 1.0, ratio)
    return RowPolicy(advantage, coefficient, ratio, 1.0 - policy.clip_low, 1.0 + policy.clip_high)


def _support(problem: Problem, kept: Tensor, vocabulary: int) -> tuple[Tensor | None, Tensor | None]:
    """Ids and log-probabilities of the kept rows' supports. A row of wrong ids, if nothing was checked, becomes NaN."""
    support = problem.support
    if support is None or support.ids is None:
        return None, None
    ids, logp = (x.flatten(0, -2)[kept] for x in (support.ids.long(), support.logp.float()))
    valid = valid_support(ids, vocabulary)[:, None]
    ids, logp = torch.where(valid, ids, 0), torch.where(valid, logp, torch.nan)
    computed = problem.token_weight.reshape(-1)[kept, None] != 0  # a list may have others, which may hold anything
    return torch.where(computed, ids, -1), torch.where(computed, logp, -torch.inf)


def _gather_rows(student: Side, teachers: tuple[Teacher, ...], rows: Rows, shard: Shard) -> tuple:
    """Hidden states and rows of all processes, where each has its own, and how many rows each has."""
    own = [x.rows.stop - x.rows.start for x in teachers] or [len(rows.kept)]
    times = shard.gather(torch.tensor(own, device=rows.kept.device))  # of each process's teachers
    of_teachers = times.tolist()
    counts = [sum(x) for x in of_teachers]
    weight, target, old_logp, importance_clip, policy = rows.given
    of_policy = () if policy is None else policy[:3]
    carried = weight, target, old_logp, rows.support_ids, rows.support_logp, rows.beta, *of_policy
    states = shard.gather_rows(student.hidden[rows.student], counts)
    carried = [None if x is None else shard.gather_rows(x, counts) for x in carried]
    index = torch.arange(len(states), device=states.device)
    gathered, teacher_rows, end = [], [], 0
    for teacher, lengths in zip(teachers, zip(*of_teachers, strict=True), strict=False):
        hidden = shard.gather_rows(teacher.side.hidden[rows.teacher[teacher.rows]], lengths)
        start, end = end, end + sum(lengths)
        gathered.append(Teacher(teacher.side._replace(hidden=hidden), slice(start, end)))
        teacher_rows.append(index[: end - start])
    if len(teachers) > 1:  # each process has its own in their order, and all processes' come one after the other
        teacher_of = torch.arange(len(teachers), device=index.device).repeat(len(of_teachers))
        teacher_of = teacher_of.repeat_interleave(times.flatten(), output_size=len(index))
        index = teacher_of.argsort(stable=True)
        carried = [None if x is None else x[index] for x in carried]
    weight, target, old_logp, support_ids, support_logp, beta, *of_policy = carried
    if policy is not None:
        policy = RowPolicy(*of_policy, *policy[3:])
    rows = Rows(
        kept=index,
        student=index,
        teacher=_joined(teacher_rows),
        given=PerRow(weight, target, old_logp, importance_clip, policy),
        support_ids=support_ids,
        support_logp=support_logp,
        are_all=len(teachers) < 2,
        beta=beta,
    )
    return student._replace(hidden=states), tuple(gathered), rows, counts


def _dtypes(student: Side, wanted: list[bool]) -> Gradients:
    lora_a, lora_b = (None, None) if student.head.lora is None else student.head.lora[:2]
    tensors = (student.hidden, student.head.weight, student.head.bias, lora_a, lora_b)
    dtypes = (gradient_dtype(x) if x is not None and want else None for x, want in zip(tensors, wanted, strict=True))
    dtypes = Gradients(*dtypes)
    if dtypes.weight is not None and student.head.main_grad is not None:
        return dtypes._replace(weight=student.head.main_grad.dtype)
    return dtypes


def gradient_dtype(tensor: Tensor) -> torch.dtype:
    """dtype in which a gradient waits for backward: fp16 would underflow before the loss scale reaches it."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _reduce_gradients(
    shard: Shard,
    counts: list[int] | None,
    partial: Tensor | None,  # (R, D) fp32
    grad_hidden: Tensor | None,  # (..., D) out
    kept: Tensor,
    gradients: Gradients,
) -> None:
    """Adds up the gradients that every process has a part of: of hidden states and of LoRA's A."""
    if partial is not None:
        whole = shard.add_up(partial) if counts is None else shard.scatter_rows(partial, counts)
        grad_hidden.view(-1, partial.shape[1])[kept] = whole.to(grad_hidden.dtype)
    if gradients.lora_a is not None:
        gradients.lora_a.copy_(shard.add_up(gradients.lora_a.float()))


def _outcome(
    problem: Problem,
    kept: Kept,
    rows: Rows,
    scalars: Tensor,  # (scalars + metrics, R)
    gradients: Gradients,
    counts: list[int] | None,
    shard: Shard,
) -> Outcome:
    """The loss of all computed rows, and this process's in the shape of token_weight."""
    weight, policy, known = rows.given.weight, rows.given.policy, rows.given.scalars
    of_rows = Scalars.of(scalars[:known])
    factor = weight.double()
    if rows.given.old_logp is not None:
        factor = factor * of_rows.importance_ratio.double()
    losses = torch.where(weight == 0, 0.0, factor * of_rows.divergence.double())
    if policy is not None:
        coefficient = policy.coefficient.double()
        losses = losses + torch.where(coefficient == 0, 0.0, coefficient * of_rows.policy_loss.double())
    loss = losses.sum().float()
    if counts is not None:
        if not rows.are_all:
            scalars = torch.empty_like(scalars).index_copy_(1, rows.kept, scalars)
        scalars = scalars.split(counts, dim=1)[shard.rank]
    if kept.right is not None and len(kept.index) == 0:  # nothing above has become NaN
        for result in (loss, *gradients):
            _ = result is None or result.masked_fill_(~kept.right, torch.nan)
    token_weight = problem.token_weight
    per_token = scalars
    if not kept.are_all:
        per_token = scalars.new_zeros(len(scalars), token_weight.numel())
        per_token[:, kept.index] = scalars
    per_token = per_token.view(len(scalars), *token_weight.shape)
    results = Scalars.of(field.clone() for field in per_token[:known])
    metrics = per_token[known:].clone() if len(scalars) > known else None
    if rows.given.old_logp is None:
        results = results._replace(importance_ratio=None)
    return Outcome(loss, results, metrics, gradients)
