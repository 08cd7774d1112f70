"""A vocabulary that is spread over processes, as the caller says it: parts, DTensors, agreement of all processes."""

import dataclasses
import sys
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .problem import Part, Path, Problem, Side, is_spread, leaves, mapped


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """This process's part of the vocabulary: entries start to stop, rows of both heads (and of bias and LoRA's B).

    Make it once, on every process of the group at the same time: they tell each other their parts, which have to cover
    the vocabulary without overlap, in any order. A part may be empty, and parts need not have one size. Rows of a head
    beyond stop - start are padding: they do not count, and have a gradient of 0. Both heads have as many of them, but
    in the last part with shared_prefix=True.

    Args:
        group: the process group over which the vocabulary is spread. None: all processes.
        sequence_parallel: hidden states, and all else that is per row, are this process's own rows, as many as it has.
            They are gathered on entry (those of weight other than 0) and the hidden gradient is reduced to its owners;
            `loss` is that of all. False: every process has all rows, the same.
        check: every call first compares shapes, dtypes, options and weights over the group, and raises on every
            process where they differ; one that is refused alone raises everywhere too. For tests and the first steps
            of a run: without it such calls wait for each other until the group's time-out.

    Raises:
        ValueError: on every process, where the parts do not cover a vocabulary from 0 without overlap.
    """

    start: int
    stop: int
    group: "dist.ProcessGroup | None" = None
    sequence_parallel: bool = False
    check: bool = False
    bounds: "tuple[tuple[int, int], ...] | None" = None  # every process's, if known; else they are asked

    def __post_init__(self):
        if self.group is None:
            object.__setattr__(self, "group", dist.group.WORLD)
        if self.bounds is None:
            every: list = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(every, (self.start, self.stop), group=self.group)
            object.__setattr__(self, "bounds", tuple(every))
        elif self.bounds[dist.get_rank(self.group)] != (self.start, self.stop):
            raise ValueError(f"bounds: expected {(self.start, self.stop)} for this process, got {self.bounds}")
        end = 0
        for start, stop in sorted(self.bounds):
            if start == stop:
                continue
            if start != end or stop < start:
                raise ValueError(f"shard: expected parts that cover a vocabulary without overlap, got {self.bounds}")
            end = stop
        if end == 0:
            raise ValueError(f"shard: expected a vocabulary of at least one entry, got parts {self.bounds}")

    @property
    def part(self) -> Part:
        return Part(
            group=self.group.group_name,
            start=self.start,
            longest=max(stop - start for start, stop in self.bounds),
            vocabulary=max(stop for _, stop in self.bounds),
            sequence_parallel=self.sequence_parallel,
        )


def local_part(problem: Problem, shard: VocabShard | None, shared_prefix: bool) -> tuple[Problem, VocabShard | None]:
    """A problem with this process's part of each tensor, and which part that is.

    Beside a DTensor, a plain tensor of the whole vocabulary is taken apart alike. Weights keep rows that are padding or
    beyond a shared prefix: the problem's `vocabulary` says so.

    Raises:
        ValueError: a DTensor that is not sharded as `shard` says, or in a way that is not known; without `shard`,
            hidden states that are not the same on every process; heads of unequal length that shared_prefix does not
            allow.
    """
    weight, main_grad = problem.student.head.weight, problem.student.head.main_grad
    numbered = problem.route is not None
    if main_grad is not None and (_is_dtensor(weight) or _is_dtensor(main_grad)):
        raise ValueError(
            "student_head.main_grad: expected plain tensors of this process's part, and a VocabShard, got a DTensor"
        )
    apart, whole = _is_dtensor(weight), {}
    if apart:
        shard, whole = _shard_of_dtensor(problem, shard, shared_prefix)
    if shard is None:
        return problem, None

    def local(path: Path, tensor: Tensor) -> Tensor:
        spread = is_spread(path)
        name = name_of(path, numbered)
        vocabulary, size = shard.part.vocabulary, shard.stop - shard.start
        if _is_dtensor(tensor):
            _expect_placement(name, tensor, 0 if spread else None)
            if spread and apart and _bounds(tensor, vocabulary)[0] != (shard.start, shard.stop):
                raise ValueError(
                    f"{name}: expected a DTensor with entries {shard.start} to {shard.stop} on this process, as "
                    f"student_head has them, got entries {' to '.join(map(str, _bounds(tensor, vocabulary)[0]))}"
                )
            tensor = tensor.to_local()
            return tensor if path[-1] == "weight" or not spread else tensor[:size]
        if not spread or tensor.dim() == 0:
            return tensor
        length = len(tensor)
        if apart and length == whole[path[: path.index("head")]]:
            return tensor[shard.start : shard.stop]
        if length <= size:
            return tensor
        if apart or (length >= vocabulary and size < vocabulary):
            raise ValueError(
                f"{name}: expected this process's {size} of {vocabulary} rows, got shape {tuple(tensor.shape)}"
            )
        return tensor if path[-1] in ("weight", "main_grad") else tensor[:size]  # without padding

    parts = mapped(local, problem)
    teachers = []
    for given, teacher in zip(problem.teachers, parts.teachers, strict=True):
        shared = given.head.weight is weight
        head = teacher.head._replace(weight=parts.student.head.weight) if shared else teacher.head
        teachers.append(teacher._replace(head=head))
    parts = parts._replace(teachers=tuple(teachers))
    sides = {_head_name(path, numbered): side.head.weight for path, side in _sides(parts).items()}
    lengths = {name: len(weight) for name, weight in sides.items() if weight.dim() > 0}
    if not apart:
        _check_own_lengths(lengths, shard, shared_prefix)
    size = shard.stop - shard.start
    return parts._replace(vocabulary=size if any(x > size for x in lengths.values()) else None), shard


def _sides(problem: Problem) -> dict[Path, Side]:
    """All of them by their paths, the student's first."""
    return {("student",): problem.student} | {("teachers", k): side for k, side in enumerate(problem.teachers)}


def _head_name(path: Path, numbered: bool) -> str:
    return name_of((*path, "head", "weight"), numbered)


def _shard_of_dtensor(
    problem: Problem, shard: VocabShard | None, shared_prefix: bool
) -> tuple[VocabShard, dict[Path, int]]:
    """Which part of the vocabulary a student's head, a DTensor, has here, and the rows of all sides' whole heads."""
    weight = problem.student.head.weight
    _expect_placement("student_head", weight, 0)
    processes = weight.device_mesh.size()
    whole = {path: _whole_length(side.head.weight, weight, processes) for path, side in _sides(problem).items()}
    for path, length in whole.items():
        check_lengths(_head_name(path, problem.route is not None), len(weight), length, shared_prefix)
    own, bounds = _bounds(weight, min(whole.values()))
    if shard is None:
        shard = VocabShard(*own, group=weight.device_mesh.get_group(), bounds=bounds)
        _expect_same_rows(problem.student.hidden, shard)
    elif (shard.start, shard.stop) != own:
        raise ValueError(
            f"shard: expected entries {own[0]} to {own[1]} as student_head, a DTensor, has them, got "
            f"{shard.start} to {shard.stop}"
        )
    return shard, whole


def _check_own_lengths(lengths: dict[str, int], shard: VocabShard, shared_prefix: bool) -> None:
    """ValueError where this process's parts of the heads have not as many rows as each other, and should have."""
    if "student_head" not in lengths:
        return
    student = lengths["student_head"]
    for name, length in lengths.items():
        check_lengths(name, student, length, shared_prefix)
        if length != student and shard.stop != shard.part.vocabulary:  # rows of other tokens, most likely
            raise ValueError(
                f"{name}: expected as many rows of {shard.start} to {shard.stop} as student_head has, "
                f"{student}, since only the part that ends a shared prefix may be longer, got {length}"
            )


def check_lengths(name: str, student: int, length: int, shared_prefix: bool) -> None:
    """ValueError where a teacher's head has not as many rows as the student's, and not because they share a prefix."""
    if student != length and not shared_prefix:
        raise ValueError(
            f"{name}: expected the {student} rows of student_head, or shared_prefix=True, with which the first "
            f"{min(student, length)} are both sides' tokens and the others are forbidden, got {length} rows"
        )


def _whole_length(weight: Tensor, student: Tensor, processes: int) -> int:
    """Rows of a side's whole head beside a student's that is a DTensor; the student's where this is a part."""
    if weight.dim() == 0:
        return len(student)
    size = -(-len(student) // processes)
    return len(weight) if _is_dtensor(weight) or processes == 1 or len(weight) > size else len(student)


def _bounds(tensor: Tensor, vocabulary: int) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
    """Which entries of the first `vocabulary` this process's part of a DTensor has, and every process's."""
    processes = tensor.device_mesh.size()
    size = -(-len(tensor) // processes)
    bounds = tuple((min(r * size, vocabulary), min((r + 1) * size, vocabulary)) for r in range(processes))
    return bounds[tensor.device_mesh.get_local_rank()], bounds


def name_of(path: Path, numbered: bool = False) -> str:
    """What a user calls a leaf of a problem. numbered: teachers are in lists."""
    if path[0] in ("student", "teachers"):
        side, *rest = path
        if side == "teachers":
            number, *rest = rest
        part, *rest = rest
        which = ""
        if side == "teachers" and numbered:
            which = f".heads[{number}]" if part == "head" else f"[{number}]"
        rest = [] if rest == ["weight"] else rest
        return ".".join([f"{side.removesuffix('s')}_{part}{which}", *rest])
    if path[0] == "route":
        return "teacher_head.index"
    if path[0] == "target":
        return "target_ids" if path[-1] == "ids" else path[-1]
    return path[-1] if path[0] == "objective" else ".".join(path)


def agreed(shard: VocabShard, check: Callable[[], Problem], schedule: str) -> Problem:
    """What `check` returns, where every process would go on to compute the same.

    Raises:
        TypeError, ValueError: on every process, what `check` raised, or what the processes differ in.
    """
    error, described, result = None, {}, None
    try:
        result = check()
        described = _described(result, schedule)
    except (TypeError, ValueError) as raised:
        error = raised
    every: list = [None] * dist.get_world_size(shard.group)
    dist.all_gather_object(every, (described, None if error is None else str(error)), group=shard.group)
    if error is not None:
        raise error
    refused = [f"process {rank}: {message}" for rank, (_, message) in enumerate(every) if message is not None]
    if refused:
        raise ValueError(f"shard: arguments were refused on other processes, {'; '.join(refused)}")
    first = every[0][0]
    for rank, (other, _) in enumerate(every):
        apart = [name for name in first | other if first.get(name) != other.get(name)]
        if apart:
            differences = (
                f"{name}: {first.get(name)} on process 0, {other.get(name)} on process {rank}" for name in apart
            )
            raise ValueError(f"shard: expected the same on every process, got {'; '.join(differences)}")
    return result


# Tensors whose gradients are summed over processes.
_SUMMED = (("student", "hidden"), ("student", "head", "lora", "a"))


def _described(problem: Problem, schedule: str) -> dict[str, Any]:
    own_rows = problem.part.sequence_parallel
    described: dict[str, Any] = {"schedule": schedule, "grad mode": torch.is_grad_enabled()}
    for path, value in leaves(problem):
        if path in (("part", "start"), ("vocabulary",)):  # each process has its own
            continue
        name = name_of(path, problem.route is not None)
        if not isinstance(value, Tensor):
            described[name] = value
            continue
        shape = list(value.shape)
        if is_spread(path):
            shape[0] = "part"
        elif own_rows and "head" not in path:  # per token
            shape = shape[-1:] if path[-1] == "hidden" or path[0] == "support" else []
        needs = value.requires_grad and path in (
            ("student", "hidden"),
            ("student", "head", "lora", "a"),
        )
        described[name] = (shape, str(value.dtype), needs)
    if problem.objective.token_beta is not None and not own_rows:
        described["beta's numbers"] = zlib.crc32(repr(problem.objective.token_beta.tolist()).encode())
    if problem.route is not None and not own_rows:
        computed = torch.where(problem.counts, problem.route.long(), 0)
        described["teacher_head.index's numbers"] = zlib.crc32(repr(computed.tolist()).encode())
    if not own_rows:
        described["token_weight's rows"] = zlib.crc32(bytes(problem.counts.flatten().tolist()))
    return described


def _expect_same_rows(hidden: Tensor, shard: VocabShard) -> None:
    """FSDP2's parameters are DTensors too, and sharded alike, over processes with rows of their own."""
    if torch.compiler.is_compiling():
        raise ValueError("shard: expected a VocabShard under torch.compile, where a DTensor head is not enough")
    hidden = hidden.detach()
    hidden = hidden.to_local() if _is_dtensor(hidden) else hidden
    size = torch.tensor(hidden.numel(), dtype=torch.float64, device=hidden.device)
    own = torch.stack([size, hidden.double().sum(), hidden.double().square().sum()]).unsqueeze(0)
    every = torch.empty(len(shard.bounds), 3, dtype=torch.float64, device=hidden.device)
    dist.all_gather(list(every.split(1)), own, group=shard.group)
    if not torch.equal(every.nan_to_num(), own.nan_to_num().expand_as(every)):
        raise ValueError(
            "student_head: a DTensor that is sharded on dim 0 is one part of a vocabulary for every process, whose "
            "student_hidden have to be the same; they differ. A parameter of FSDP2 is whole only inside the forward of "
            "its module: run linear_divergence there (scsdpo.head)"
        )


def _is_dtensor(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _expect_placement(name: str, tensor: Tensor, dim: int | None) -> None:
    """On a mesh of one dimension, sharded on `dim`, or replicated."""
    placements = tensor.placements
    right = len(placements) == 1 and (placements[0].is_replicate() if dim is None else placements[0].is_shard(dim))
    if not right or "Strided" in type(placements[0]).__name__:
        expected = "Replicate()" if dim is None else f"Shard({dim})"
        raise ValueError(f"{name}: expected a DTensor with placements ({expected},), got {tuple(placements)}")
