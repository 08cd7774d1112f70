"""From the arguments of a call to one checked problem: of a vocabulary that is spread, this process's part of it."""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from .checks import (
    as_head,
    as_routed,
    as_teacher_head,
    check_options,
    check_problem,
    check_schedule,
    check_teacher,
    check_tensor,
    in_autocast,
)
from .main_grad import announced
from .problem import (
    Head,
    Path,
    Policy,
    PolicyGradient,
    Problem,
    RoutedHeads,
    SampledToken,
    Side,
    Support,
    Target,
    TopK,
    TopLogprobs,
    mapped,
    objective_of,
    shortest_head,
)
from .vocab_shard import VocabShard, agreed, local_part


class DivergenceOptions(TypedDict, total=False):
    """Keyword arguments of `linear_divergence` that every loss takes."""

    beta: float | Tensor
    divergence: str
    temperature: float
    support: TopK | TopLogprobs | SampledToken | None
    entry_clip: float | None
    target_ids: Tensor | None
    old_logp: Tensor | None
    importance_clip: float
    policy: PolicyGradient | None
    metrics: Sequence[str]
    schedule: str
    rows: Tensor | None
    shard: VocabShard | None
    shared_prefix: bool


def check_keywords(function: str, options: dict[str, Any]) -> None:
    """TypeError for an option that does not exist, in the name of the public function."""
    unknown = [name for name in options if name not in DivergenceOptions.__annotations__]
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")


def problem_of(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor | Sequence[Tensor] | None,
    teacher_head: Tensor | Head | RoutedHeads | None,
    token_weight: Tensor | None,
    options: DivergenceOptions,  # all of them
) -> Problem:
    schedule, shard, shared_prefix = options["schedule"], options["shard"], options["shared_prefix"]

    def own_part() -> Problem:
        problem = _problem(student_hidden, student_head, teacher_hidden, teacher_head, token_weight, options)
        problem, own_shard = local_part(problem, shard, shared_prefix)
        if own_shard is not None:
            if own_shard.sequence_parallel and problem.rows is not None:
                raise ValueError(
                    "rows: expected None with sequence_parallel, in which processes tell each other their number"
                )
            problem = problem._replace(part=own_shard.part)
        if token_weight is None:
            hidden = problem.student.hidden
            problem = problem._replace(token_weight=torch.ones(hidden.shape[:-1], device=hidden.device))
        check_problem(problem, teacher_head is None, schedule, own_shard, shared_prefix)
        if own_shard is None:
            problem = problem._replace(vocabulary=shortest_head(problem))
        check_schedule(schedule, problem)
        return _prepared(problem)

    if shard is None or not shard.check or torch.compiler.is_compiling():
        return own_part()
    return agreed(shard, own_part, schedule)


def _problem(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor | Sequence[Tensor] | None,
    teacher_head: Tensor | Head | RoutedHeads | None,
    token_weight: Tensor | None,
    options: DivergenceOptions,
) -> Problem:
    """Checks the arguments' types, and puts them together."""
    check_tensor("student_hidden", student_hidden)
    head = as_head("student_head", student_head)
    support, target_ids, old_logp = options["support"], options["target_ids"], options["old_logp"]
    check_teacher(teacher_hidden, teacher_head, support, options["shared_prefix"])
    check_options(options)
    teachers, route = (), None
    if isinstance(teacher_head, RoutedHeads):
        teachers, route = as_routed(teacher_hidden, teacher_head, student_hidden.shape[:-1])
    elif teacher_hidden is not None:
        check_tensor("teacher_hidden", teacher_hidden)
        own = head._replace(main_grad=None) if teacher_head is None else as_teacher_head("teacher_head", teacher_head)
        teachers = (Side(teacher_hidden, own),)
    for name, tensor in (("token_weight", token_weight), ("target_ids", target_ids), ("old_logp", old_logp)):
        if tensor is not None:
            check_tensor(name, tensor)
    return Problem(
        student=Side(student_hidden, head),
        teachers=teachers,
        route=route,
        token_weight=token_weight,
        rows=options["rows"],
        objective=objective_of(
            options["beta"], options["temperature"], options["entry_clip"] or 0.0, options["divergence"]
        ),
        support=_support(support),
        target=None if target_ids is None else Target(target_ids, old_logp, float(options["importance_clip"])),
        policy=_policy(options["policy"], student_hidden),
        part=None,
        vocabulary=None,
        metrics=tuple(dict.fromkeys(options["metrics"])),
    )


def _support(support: TopK | TopLogprobs | SampledToken | None) -> Support | None:
    if support is None:
        return None
    if isinstance(support, SampledToken):
        return Support(k=0, renormalize=False, sampled=True, ids=None, logp=None)
    given = (support.ids, support.logp) if isinstance(support, TopLogprobs) else (None, None)
    k = support.k if isinstance(support, TopK) else 0
    return Support(k, support.tail == "renormalize", False, *given)


def _policy(given: PolicyGradient | None, hidden: Tensor) -> Policy | None:
    if given is None:
        return None
    coefficient = given.coefficient
    if not isinstance(coefficient, Tensor):
        coefficient = torch.full(hidden.shape[:-1], float(coefficient), device=hidden.device)
    return Policy(given.advantages, coefficient, given.ratio, float(given.clip_low), float(given.clip_high))


def _prepared(problem: Problem) -> Problem:
    """Cast as autocast says, without gradients where none go, and with at least one leading axis."""
    student, given = problem.student, problem.teachers
    problem = mapped(
        lambda path, x: x if path[0] in ("student", "teachers") else x.detach(), problem._replace(teachers=())
    )
    weight = student.head.weight
    weight = _autocast(weight if student.head.main_grad is None else announced(weight))
    cast = Side(_autocast(student.hidden), student.head._replace(weight=weight))
    rows = None if problem.rows is None else problem.rows.contiguous()
    problem = problem._replace(student=cast, teachers=_teachers(given, student.head.weight, weight), rows=rows)
    if student.hidden.dim() > 1:
        return problem

    def with_axis(path: Path, tensor: Tensor) -> Tensor:
        is_matrix = path[0] == "teachers" and tensor.dim() > 1  # a teacher's own tokens
        return tensor if "head" in path or path[0] == "rows" or is_matrix else tensor.unsqueeze(0)

    return mapped(with_axis, problem)


def _teachers(given: tuple[Side, ...], student_weight: Tensor, student_cast: Tensor) -> tuple[Side, ...]:
    """Detached and cast, a tensor that several have but once."""
    teachers, seen = [], []

    def once(tensor: Tensor) -> Tensor:
        for known, result in seen:
            if known is tensor:
                return result
        seen.append((tensor, _autocast(tensor.detach())))
        return seen[-1][1]

    for hidden, head in given:
        head = mapped(lambda path, x: x if path == ("weight",) else x.detach(), head)
        shared = student_cast is not student_weight and _is_one(head.weight, student_weight)
        weight = student_cast.detach() if shared else once(head.weight)
        teachers.append(Side(once(hidden), head._replace(weight=weight)))
    return tuple(teachers)


def _is_one(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same or, as a parameter and what is detached of it, the same numbers."""
    if a is b or torch.compiler.is_compiling():  # it cannot compare two addresses
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if not in_autocast(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
