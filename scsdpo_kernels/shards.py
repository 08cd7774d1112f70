"""A vocabulary that is spread over processes: each has its rows of the heads, and of every row the logits of these.

What is known of a row is put together from its parts. With Z_r, Y_r the normalisers of student and teacher in part r,
c_r the constant that its log-ratio is counted from, and c that of the part with the student's largest logit (of the
parts that have something of both sides):

    lse = log Σ_r e^lse_r      P_r = e^(lse_r - lse)      H = Σ_r P_r (H_r - log P_r)
    log(Y/Z) - c/τ = log(1 + Σ_r P_r (e^(log(Y_r/Z_r) - c/τ) - 1))

which keeps its digits as teacher → student. Two exchanges of a few float64 numbers a row: these statistics, and then
the sums over entries that the divergence is made of, without which most gradients cannot begin. Every process computes
from the same numbers in the same order, so all have the same bits.
"""

import dataclasses
import sys
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from .arguments import Numbers, Tensors
from .rows import Rows, RowStatistics


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """This process's part of the vocabulary: entries start to stop, rows of both heads (and of bias and LoRA's B).

    Make it once, on every process of the group at the same time: they tell each other their parts, which have to cover
    the vocabulary without overlap, in any order. A part may be empty, and parts need not have one size. Rows of a head
    beyond stop - start are padding: they do not count, and have no gradient.

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
    bounds: "tuple[tuple[int, int], ...] | None" = None  # of every process, where they are known; else they are asked

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

        numbers = {
            "shard_group": self.group.group_name,
            "shard_start": self.start,
            "shard_longest": max(stop - start for start, stop in self.bounds),
            "shard_vocabulary": end,
            "sequence_parallel": self.sequence_parallel,
        }
        object.__setattr__(self, "numbers", numbers)  # as fields of `Numbers`


# Fields of `Numbers` where the whole vocabulary is here.
WHOLE = {
    "shard_group": "",
    "shard_start": 0,
    "shard_longest": 0,
    "shard_vocabulary": 0,
    "sequence_parallel": False,
}
_ROWS_OF_HEADS = ("student_weight", "teacher_weight", "student_bias", "teacher_bias")


def local_parts(given: dict[str, Any], shard: VocabShard | None) -> tuple[dict[str, Any], VocabShard | None]:
    """Arguments of linear_divergence with this process's part of each tensor, and which part that is.

    Beside a DTensor, a plain tensor of the whole vocabulary is taken apart alike.

    Raises:
        ValueError: a DTensor that is not sharded as `shard` says, or in a way that is not known; without `shard`,
            hidden states that are not the same on every process.
    """
    weight = given["student_weight"]
    apart = _is_dtensor(weight)
    if apart:
        _expect_placement("student_weight", weight, 0)
        length, processes = weight.shape[0], weight.device_mesh.size()
        size = -(-length // processes)
        bounds = tuple((min(r * size, length), min((r + 1) * size, length)) for r in range(processes))
        own = bounds[weight.device_mesh.get_local_rank()]
        if shard is None:
            shard = VocabShard(*own, group=weight.device_mesh.get_group(), bounds=bounds)
            _expect_same_rows(given["student_hidden"], shard)
        elif (shard.start, shard.stop) != own:
            raise ValueError(
                f"shard: expected entries {own[0]} to {own[1]} as student_weight, a DTensor, has them, got "
                f"{shard.start} to {shard.stop}"
            )
    if shard is None:
        return given, None

    def local(name: str, tensor: Tensor, rows: bool) -> Tensor:
        if _is_dtensor(tensor):
            _expect_placement(name, tensor, 0 if rows else None)
            tensor = tensor.to_local()
        if not rows or not isinstance(tensor, Tensor) or tensor.dim() == 0:
            return tensor
        length, vocabulary, size = len(tensor), shard.numbers["shard_vocabulary"], shard.stop - shard.start
        if apart and length == vocabulary:
            return tensor[shard.start : shard.stop]
        if length <= size:
            return tensor
        if apart or (length >= vocabulary and size < vocabulary):
            raise ValueError(
                f"{name}: expected this process's {size} of {vocabulary} rows, got shape {tuple(tensor.shape)}"
            )
        return tensor[:size]  # without padding

    parts = {}
    for name, value in given.items():
        if name.endswith("_lora") and isinstance(value, tuple | list) and len(value) == 3:
            parts[name] = (local(name, value[0], False), local(name, value[1], True), value[2])
        elif isinstance(value, Tensor):
            parts[name] = local(name, value, name in _ROWS_OF_HEADS)
        else:
            parts[name] = value
    if given["teacher_weight"] is weight:
        parts["teacher_weight"] = parts["student_weight"]
    return parts, shard


def agreed(shard: VocabShard, check: Callable[[], tuple[Tensors, Numbers]], schedule: str) -> tuple[Tensors, Numbers]:
    """What `check` returns, where every process would go on to compute the same.

    Raises:
        TypeError, ValueError: on every process, what `check` raised, or what the processes differ in.
    """
    error, described, result = None, {}, None
    try:
        result = check()
        described = _described(*result, schedule)
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
        apart = [name for name in first if first[name] != other[name]]
        if apart:
            differences = (f"{name}: {first[name]} on process 0, {other[name]} on process {rank}" for name in apart)
            raise ValueError(f"shard: expected the same on every process, got {'; '.join(differences)}")
    return result


def _described(tensors: Tensors, numbers: Numbers, schedule: str) -> dict[str, Any]:
    own_rows = numbers.sequence_parallel
    described: dict[str, Any] = {"schedule": schedule, "grad mode": torch.is_grad_enabled()}
    described |= {name: value for name, value in numbers._asdict().items() if name != "shard_start"}
    for name, tensor in tensors._asdict().items():
        if tensor is None:
            described[name] = None
            continue
        shape = list(tensor.shape)
        if name in _ROWS_OF_HEADS or name.endswith("lora_b"):
            shape[0] = "part"
        elif own_rows and "lora" not in name:
            shape = shape[-1:] if "hidden" in name or "support" in name else []
        needs = tensor.requires_grad and name in ("student_hidden", "student_lora_a")  # what crosses afterwards
        described[name] = (shape, str(tensor.dtype), needs)
    if not own_rows:
        described["token_weight's rows"] = zlib.crc32(bytes((tensors.token_weight != 0).flatten().tolist()))
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
            "student_weight: a DTensor that is sharded on dim 0 is one part of a vocabulary for every process, whose "
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


class Shard:
    """A call's part of the vocabulary, or all of it; what crosses processes, crosses here."""

    def __init__(self, numbers: Numbers, size: int):
        self.group = _resolve_process_group(numbers.shard_group) if numbers.shard_group else None
        self.start, self.size = numbers.shard_start, size
        self.longest = numbers.shard_longest if self.group else size
        self.vocabulary = numbers.shard_vocabulary if self.group else size

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
        """Of (C, K) ids in the vocabulary: columns of this part, and which are. Others repeat the first one that is."""
        columns = ids - self.start
        here = exists & (columns >= 0) & (columns < self.size)
        first = columns.gather(1, here.int().argmax(1, keepdim=True)).clamp(0, max(0, self.size - 1))
        return torch.where(here, columns, first), here

    def values(self, sides: tuple[Tensor, ...], ids: Tensor, exists: Tensor, difference: bool) -> Tensor:
        """(sides, C, K) float64: the logits of both sides at ids, wherever they are; 0 where they are nowhere."""
        columns, here = self.local(ids, exists)
        if self.size:
            own = logits_at(sides, columns, difference)
        else:
            own = torch.zeros(len(sides), *ids.shape, dtype=torch.float64, device=ids.device)
        return self.gather(torch.where(here, own, 0.0)).sum(0)

    def statistics(self, kernels, student: Tensor, teacher: Tensor, temperature: float, difference: bool):
        """RowStatistics of whole rows, from everyone's parts of them."""
        if self.size:
            own = kernels.row_statistics(student, teacher, temperature=temperature, teacher_is_difference=difference)
        else:
            nothing = torch.full((len(student),), -torch.inf, dtype=torch.float64, device=student.device)
            zero = torch.zeros_like(nothing)
            own = RowStatistics(nothing, nothing, nothing, zero, zero, zero, zero)
        if self.group is None:
            return own
        return _put_together(self.gather(torch.stack([x.double() for x in own])), temperature)

    def gather_rows(self, tensors: tuple[Tensor | None, ...]) -> tuple[list[Tensor | None], list[int]]:
        """Everyone's rows one after the other, and how many each has."""
        count = torch.tensor([len(tensors[0])], device=tensors[0].device)
        counts = self.gather(count).flatten().tolist()
        if max(counts) == 0:
            return list(tensors), counts
        gathered: list[Tensor | None] = []
        for tensor in tensors:
            if tensor is None:
                gathered.append(None)
                continue
            padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
            padded[: len(tensor)] = tensor
            parts = self.gather(padded)
            gathered.append(torch.cat([part[:length] for part, length in zip(parts, counts, strict=True)]))
        return gathered, counts

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


def divergence_on_part(
    student: Tensor,  # (C, size) fp32 logits
    teacher: Tensor,  # (C, size) the teacher's, or teacher - student
    rows: Rows,  # of the chunk; their weights are the gradient's
    numbers: Numbers,
    kernels,
    shard: Shard,
    *,
    teacher_is_difference: bool,
    gradient: Tensor | None,  # (C, size) fp32 or bf16 out; may lie over student. None: values only
) -> tuple[Tensor, ...]:  # 3 × (C,) fp32, 5 with target, 6 with old_logp, as the row kernels'
    """Row scalars over the whole vocabulary, and the weighted gradient of this part of it."""
    temperature, difference = numbers.temperature, teacher_is_difference
    target = target_logits(student, teacher, rows, shard, difference)
    known = shard.statistics(kernels, student, teacher, temperature, difference)
    fields, weight = [known.student_entropy, known.teacher_entropy], rows.weight
    if target is not None:
        fields += [target[0] / temperature - known.student_lse, target[1] / temperature - known.teacher_lse]
    if rows.old_logp is not None:
        fields.append(importance_ratio(fields[2], rows.old_logp, numbers.importance_clip))
        weight = (weight * fields[-1]).float()
    options = {"beta": numbers.beta, "temperature": temperature, "teacher_is_difference": difference}
    options["entry_clip"] = numbers.entry_clip
    if shard.size:
        own = kernels.row_terms(student, teacher, known, **options)
    else:
        own = torch.zeros(4, len(student), dtype=torch.float64, device=student.device)
    terms = shard.gather(own).sum(0)
    divergence = kernels.row_gradient(
        student, teacher, known, terms, weight, **options, student_softcap=numbers.student_softcap, gradient=gradient
    )
    return tuple(x.float() for x in (divergence, *fields))


def logits_at(sides: tuple[Tensor, ...], columns: Tensor, difference: bool) -> Tensor:
    """(sides, C, K) float64 of student and, if it is there, teacher, which may be given as teacher - student."""
    values = torch.stack([x.gather(1, columns).double() for x in sides])
    if difference:
        values[1] += values[0]
    return values


def target_logits(student: Tensor, teacher: Tensor | None, rows: Rows, shard: Shard, difference: bool):
    """(sides, C) float64 at the targets, None without; NaN for an id that is not in the vocabulary."""
    if rows.target is None:
        return None
    ids = rows.target.unsqueeze(1)
    sides = (student,) if teacher is None else (student, teacher)
    values = shard.values(sides, ids, torch.ones_like(ids, dtype=torch.bool), difference).squeeze(2)
    inside = (rows.target >= 0) & (rows.target < shard.vocabulary)
    return torch.where(inside, values, torch.nan)


def importance_ratio(logp: Tensor, old_logp: Tensor, clip: float) -> Tensor:
    """By how much more likely the student finds a token than the policy that sampled it, bounded."""
    return (logp - old_logp).clamp(-20, 20).exp().clamp(max=clip)


def _put_together(parts: Tensor, temperature: float) -> RowStatistics:  # (processes, 7, C) float64
    student, teacher, largest, centre, log_ratio, entropy_s, entropy_t = parts.unbind(1)
    inverse = (1 / torch.tensor(temperature, dtype=torch.float32)).item()  # as the kernels have it
    lse_s, lse_t = student.logsumexp(0), teacher.logsumexp(0)
    comparable = log_ratio.isfinite() & (centre.abs() < 1e30)  # not where a side has nothing
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
