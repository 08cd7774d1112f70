"""A vocabulary spread over processes: real process groups against the oracle, which sees all of it."""

import functools
from typing import Any, NamedTuple

import oracle
import pytest
import torch
import torch.distributed as dist
from inside import Inside
from problems import Problem, problem
from ranks import over
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from scsdpo_kernels import (
    Head,
    PolicyGradient,
    SampledToken,
    TopK,
    TopLogprobs,
    VocabShard,
    linear_divergence,
    linear_divergence_per_token,
)
from scsdpo_kernels.kernels import triton_kernels
from scsdpo_kernels.schedules import chunked

V, D, ROWS, OWN_WIDTH = 67, 16, 37, 12
# Where the parts end: uneven, one entry, none.
ENDS = {1: (67,), 2: (50, 67), 3: (10, 10, 67), 4: (1, 30, 67, 67)}


class Process:
    """One of a group: its rank, its device, its part of the vocabulary."""

    def __init__(self, group: dist.ProcessGroup, ends: tuple[int, ...] | None = None):
        self.group, self.device = group, torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.start, self.stop = (0, *(ends or ENDS[self.world]))[self.rank : self.rank + 2]

    def shard(self, **options) -> VocabShard:
        group = None if self.world == dist.get_world_size() else self.group  # None: all processes
        return VocabShard(self.start, self.stop, group, check=True, **options)

    def here(self, tree: Any, tokens: slice = slice(None)) -> Any:
        """These tokens of it on the device."""
        return tree_map_only(Tensor, lambda x: x[tokens].to(self.device), tree)

    def cut(self, tensor: Tensor) -> Tensor:
        """This process's part of what has a row for each entry, on the device; all of anything else."""
        return (tensor[self.start : self.stop] if len(tensor) == V else tensor).to(self.device)

    def part(self, given: Problem, tokens: slice = slice(None), padding: int = 0) -> Problem:
        """This process's part of a problem, with so many rows behind each of the heads' own."""

        @functools.cache  # what both sides have stays one tensor
        def own(x: Tensor) -> Tensor:
            part = self.cut(x)
            more = padding if len(x) == V else 0
            return torch.cat([part, part.new_full((more, *x.shape[1:]), 9.0)]) if more else part

        head, teacher_head = tree_map_only(Tensor, own, (given.head, given.teacher_head))
        hidden, teacher, weight = self.here((given.hidden, given.teacher, given.token_weight), tokens)
        return Problem(hidden, head, teacher, teacher_head, weight)

    def assert_exact(self, got, exact, tokens=slice(None), padding=0, limit=2e-5, floor=2e-6, rounding=None) -> None:
        """A result in every field and its gradients, none of them of padding. rounding: the gradients' limit."""
        (result, *gradients), (expected, *exact_gradients) = got, exact
        if isinstance(result, Tensor):
            result, expected = (result,), (expected,)
        for name, x, y in zip(getattr(result, "_fields", ["per token"]), result, expected, strict=True):
            assert (x is None) == (y is None), name
            if x is not None:
                assert x.dtype == torch.float32, name
                assert_near(name, x, y[tokens] if y.dim() else y, limit, floor)
        exact_gradients[0] = exact_gradients[0][tokens]
        for number, (x, y) in enumerate(zip(gradients, exact_gradients, strict=True)):
            if len(y) == V:
                y, size = y[self.start : self.stop], self.stop - self.start
                assert len(x) == size + padding and (x[size:] == 0).all(), f"gradient {number} of padding"
                x = x[:size]
            assert_near(f"gradient {number}", x, y, rounding or limit, floor)


def assert_near(name: str, got: Tensor, exact: Tensor, limit: float = 2e-5, floor: float = 2e-6) -> None:
    """In norm; equal where it is infinite."""
    assert got.shape == exact.shape, (name, got.shape, exact.shape)
    got, exact = got.detach().cpu().double(), exact.double()
    apart = torch.where(got == exact, 0.0, got - exact).norm()
    size = torch.where(exact.isinf(), 0.0, exact).norm()
    assert apart <= limit * size + floor, f"{name}: {apart:.3g} apart, of {size:.3g}"


class Case(NamedTuple):
    """linear_divergence on parts of a problem: near the oracle, with the same bits on every process."""

    given: Problem
    options: dict
    limits: dict
    per_token: bool = False
    own_tokens: bool = False  # sequence_parallel: as many as there are, the last process none
    padding: int = 0
    chunks: bool = False  # several, as many on every process, however uneven the parts are

    def total(self, result: Any) -> Tensor:
        """What gradients are taken of."""
        if not self.per_token:
            return result.loss
        values = result if isinstance(result, Tensor) else oracle.per_token(result, self.options.get("policy"))
        return (values * torch.linspace(-1, 1, ROWS, device=values.device)).sum()

    def check(self, process: Process) -> None:
        ends = [ROWS * r // max(1, process.world - 1) for r in range(process.world)] + [ROWS]
        tokens = slice(*ends[process.rank : process.rank + 2]) if self.own_tokens else slice(None)
        options = process.here(self.options, tokens) | {"shard": process.shard(sequence_parallel=self.own_tokens)}
        op = linear_divergence_per_token if self.per_token else linear_divergence
        with pytest.MonkeyPatch.context() as patch:
            if self.chunks:
                patch.setattr(chunked, "MIN_ROWS", 2)
                patch.setattr(chunked, "BUFFER_BYTES", dict.fromkeys(chunked.BUFFER_BYTES, 4 * V * 8))
            got = process.part(self.given, tokens, self.padding).run(op, self.total, **options)
        seen = got[0].loss if self.own_tokens else got[:2]
        own = torch.cat([x.detach().flatten().float() for x in tree_leaves(seen) if x is not None])
        every = [torch.empty_like(own) for _ in range(process.world)]
        dist.all_gather(every, own, group=process.group)
        exact = oracle.expected(self.given, self.total, **self.options)
        if self.per_token:
            exact = oracle.per_token(exact[0], self.options.get("policy")), *exact[1:]
        process.assert_exact(got, exact, tokens, self.padding, **self.limits)
        assert all(torch.equal(x, own) for x in every), "not the same bits on every process"


def sides(own: bool = False, distance: float = 2.0, rows: int = ROWS, **kinds) -> Problem:
    """Logits of ±4, and weights of either sign, of which a third are 0; own: a teacher with a head of its own."""
    width = OWN_WIDTH if own else None
    given = problem(rows, D, V, distance, scale=4.0, teacher_width=width, weighted=True, **kinds)
    given.token_weight[::3] = 0
    return given


def case(given: Problem | None = None, limits: dict | None = None, **more) -> Case:
    """With what is no field of a case among the operator's options."""
    options = {name: more.pop(name) for name in list(more) if name not in Case._fields}
    return Case(sides() if given is None else given, options, limits or {}, **more)


def peaked(at: int, distance: float) -> Problem:
    given = sides(distance=distance)
    given.head[at] = given.hidden[4] * 3 / 16
    return given


def sure_of(target: int) -> Problem:
    """One token has almost all of its probability there."""
    given = sides(own=True)
    given.head[target] = given.hidden[4] * 3 / 16
    return given


def forbidding(*entries: slice) -> Problem:
    """The student the first 12 entries, the teacher these."""
    given = sides(own=True, head="bias", teacher_head="bias")
    given.head.bias[:12] = -torch.inf
    for some in entries:
        given.teacher_head.bias[some] = -torch.inf
    return given


GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(V, (ROWS,), generator=GENERATOR)
TARGETS = {"target_ids": IDS, "old_logp": -1 - 4 * torch.rand(ROWS, generator=GENERATOR)}
POLICY = TARGETS | {"policy": PolicyGradient(torch.randn(ROWS, generator=GENERATOR), clip_high=0.3, coefficient=0.7)}
ON_POLICY = {name: POLICY[name] for name in ("target_ids", "policy")}
NAMED = torch.rand(ROWS, V, generator=GENERATOR).argsort(1)[:, :6]
EMPTY_SLOTS = NAMED.clone()
EMPTY_SLOTS[::2, 1:] = EMPTY_SLOTS[1] = -1
LOGP = torch.randn(ROWS, 6, generator=GENERATOR) - 4
SHARES = {
    "jensen_shannon": torch.linspace(0, 1, ROWS),
    "jeffreys": torch.linspace(0, 1, ROWS),
    "skewed_forward": torch.linspace(0, 0.9, ROWS),
    "skewed_reverse": torch.linspace(0.1, 1, ROWS),
}
FORBIDDEN = forbidding(slice(12), slice(40, 50))
OWN, SHARED, EVERY = sides(own=True), sides(), sides(head="all")
SERVER, UNWEIGHTED = SHARED.but(teacher=None), OWN.but(token_weight=None)
CASES = {
    **{f"beta {x}": case(beta=x) for x in (0.0, 0.3, 1.0)},
    **{f"beta {x}, own head": case(OWN, beta=x, temperature=0.7) for x in (0.0, 0.3, 1.0)},
    "targets": case(beta=0.0, target_ids=IDS),
    "importance ratios": case(OWN, **TARGETS, importance_clip=1.5),
    # Heads.
    "all that a head has, on both sides": case(sides(own=True, head="all", teacher_head="all")),
    "adapter in a linear head": case(EVERY.but(head=EVERY.head._replace(softcap=None)), **TARGETS, beta=1.0),
    "teacher's bias": case(EVERY.but(teacher_head=EVERY.head._replace(bias=-EVERY.head.bias))),
    "adapter and softcap, top 5": case(EVERY, support=TopK(5)),
    "padding": case(OWN, padding=5),
    "padding of all that a head has": case(EVERY, padding=5),
    # Supports.
    **{f"top {k}, {tail}": case(OWN, **TARGETS, support=TopK(k, tail))
       for k in (1, 7, 60, 100) for tail in ("bucket", "renormalize")},
    "top 9, shared head": case(support=TopK(9), beta=0.0),
    "server": case(SERVER, support=TopLogprobs(NAMED, LOGP), beta=0.0),
    "server, renormalize": case(SERVER, **TARGETS, support=TopLogprobs(NAMED, LOGP, "renormalize")),
    "server, empty slots": case(SERVER, support=TopLogprobs(EMPTY_SLOTS, LOGP)),
    "sampled token": case(**TARGETS, support=SampledToken(), beta=1.0),
    "sampled token, own head": case(OWN, **TARGETS, support=SampledToken(), beta=1.0),
    **{f"entries clipped at {x}": case(OWN, beta=0.0, entry_clip=x) for x in (1e-3, 0.05, 10.0)},
    **{x: case(OWN, divergence=x, beta=0.3) for x in SHARES},
    **{f"{x}, beta of each token": case(**TARGETS, divergence=x, beta=beta) for x, beta in SHARES.items()},
    "jeffreys, beta of each token, top 9": case(OWN, divergence="jeffreys", beta=SHARES["jeffreys"], support=TopK(9)),
    # A policy's loss.
    **{f"policy, beta {x}": case(OWN, **POLICY, beta=x, temperature=0.7) for x in (0.0, 0.3, 1.0)},
    **{f"policy, {x}": case(OWN, **POLICY, divergence=x, beta=0.3) for x in SHARES if x != "jensen_shannon"},
    **{f"policy, {x}, beta of each token": case(**POLICY, divergence=x, beta=beta) for x, beta in SHARES.items()},
    "policy, on-policy, all that a head has": case(EVERY, **ON_POLICY),
    "policy, entries clipped": case(OWN, **POLICY, beta=0.0, entry_clip=0.05),
    "policy, top 5": case(OWN, **POLICY, support=TopK(5)),
    "policy, server": case(SERVER, **POLICY, support=TopLogprobs(NAMED, LOGP, "renormalize")),
    "policy, sampled token": case(**POLICY, support=SampledToken(), beta=1.0),
    "policy alone": case(OWN.but(token_weight=torch.zeros(ROWS)), **POLICY),
    **{f"policy of a sure token, {x}": case(sure_of(x), {"limit": 1e-4, "floor": 1e-12},
                                            **POLICY | {"target_ids": torch.full((ROWS,), x)})
       for x in (0, 20, 66)},
    "policy, padding": case(OWN, **POLICY, padding=5),
    "policy, chunks": case(OWN, **POLICY, chunks=True),
    "policy per token": case(UNWEIGHTED, **POLICY, per_token=True),
    "policy, own tokens": case(OWN, **POLICY, own_tokens=True),
    "policy, own tokens, jeffreys, beta of each token":
        case(OWN, **POLICY, own_tokens=True, divergence="jeffreys", beta=SHARES["jeffreys"]),
    "policy, own tokens, top 4": case(OWN, **POLICY, own_tokens=True, support=TopK(4)),
    # Numbers.
    **{f"{x} apart, beta {beta}": case(sides(distance=x), {"limit": 1e-4, "floor": 1e-30}, beta=beta)
       for x in (4e-3, 4e-5) for beta in (0.0, 0.5, 1.0)},
    **{f"peak at {at}, {x} apart": case(peaked(at, x), {"limit": 1e-4, "floor": 1e-12})
       for at in (0, 20, 66) for x in (4.0, 4e-4)},
    **{f"forbidden tokens, beta {x}": case(FORBIDDEN, target_ids=IDS, beta=x) for x in (0.0, 0.5)},
    "forbidden to the student": case(forbidding(slice(40, 50)), target_ids=IDS),
    "weights of 0": case(SHARED.but(token_weight=torch.zeros(ROWS)), {"floor": 0.0}),
    "negative weights": case(SHARED.but(token_weight=torch.full((ROWS,), -3.0)), {"floor": 1e-30}),
    "huge weights": case(SHARED.but(token_weight=torch.linspace(-1e6, 1e6, ROWS)), {"floor": 1e-30}),
    "bf16": case(sides(own=True, dtype=torch.bfloat16), {"rounding": 1e-2}, **TARGETS),
    "bf16, top 9": case(sides(dtype=torch.bfloat16), {"rounding": 1e-2}, support=TopK(9)),
    # Tokens.
    "no tokens": case(sides(rows=0), **{name: x[:0] for name, x in TARGETS.items()}),
    "chunks": case(OWN, **TARGETS, chunks=True),
    "chunks, adapter, top 5": case(sides(head="lora"), support=TopK(5), chunks=True),
    "per token": case(UNWEIGHTED, per_token=True, beta=0.4),
    "per token, top 5": case(UNWEIGHTED, **TARGETS, per_token=True, support=TopK(5)),
    "own tokens": case(OWN, **TARGETS, own_tokens=True),
    "own tokens, top 4": case(OWN, **TARGETS, own_tokens=True, support=TopK(4)),
    "own tokens, server": case(SERVER, own_tokens=True, support=TopLogprobs(NAMED, LOGP)),
}  # fmt: skip


@over(1, 2, 3, 4)
@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_whole(group, name):
    CASES[name].check(Process(group))


@over(1, 2, 3, 4)
@pytest.mark.parametrize("trained", ["hidden", "head"])
def test_the_other_is_frozen(group, trained):
    process = Process(group)
    mine = process.part(SHARED)
    leaf = getattr(mine, trained).clone().requires_grad_()
    mine.but(**{trained: leaf}).call(shard=process.shard()).loss.backward()
    _, of_hidden, of_head = oracle.expected(SHARED)
    assert_near("gradient", leaf.grad, of_hidden if trained == "hidden" else process.cut(of_head).cpu())


@over(1, 2, 3, 4)
def test_overflow_of_one_process(group):
    """Its infinite upstream gradient reaches every part of the head."""
    process = Process(group)
    mine = process.part(SHARED.but(token_weight=None)).leaves()
    out = mine.call(linear_divergence_per_token, shard=process.shard(sequence_parallel=True))
    out.backward(torch.full_like(out, torch.inf if process.rank == 0 else 1.0))
    assert mine.head.grad.isnan().all()


# DTensors, as PyTorch's tensor parallelism has a head: equal parts, the last one smaller.


def spread(group: dist.ProcessGroup, dim: int = 0) -> tuple[Process, Problem, Problem]:
    """The process with such a part, a problem, and that with heads that are DTensors."""
    given, world = sides(own=True, head="bias"), dist.get_world_size(group)
    process = Process(group, tuple(min(V, -(-V // world) * r) for r in range(1, world + 1)))
    mesh = DeviceMesh.from_group(group, process.device.type)
    mine = Problem(*process.here(tuple(given)), process.here(given.token_weight))

    def distributed(x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, [Shard(min(dim, x.dim() - 1))])

    head, teacher_head = tree_map_only(Tensor, distributed, (mine.head, mine.teacher_head))
    return process, given, mine.but(head=head, teacher_head=teacher_head)


@over(1, 2, 3, 4)
@pytest.mark.parametrize("replicated", [False, True], ids=["", "replicated hidden states"])
def test_dtensors(group, replicated):
    process, given, mine = spread(group)
    if replicated:
        mine = mine.but(hidden=distribute_tensor(mine.hidden, mine.head.weight.device_mesh, [Replicate()]))
    result, *gradients = mine.run()
    placements = [x.placements for x in gradients if isinstance(x, DTensor)]
    assert placements == [(Replicate(),)] * replicated + [(Shard(0),)] * 2
    local = [x.to_local() if isinstance(x, DTensor) else x for x in gradients]
    process.assert_exact((result, *local), oracle.expected(given))


@over(1, 2, 3, 4)
def test_whole_tensors_beside_a_dtensor(group):
    process, given, mine = spread(group)
    bias, teacher_head = process.here((given.head.bias, given.teacher_head))
    got = mine.but(head=mine.head._replace(bias=bias), teacher_head=teacher_head).call()
    assert_near("loss", got.loss, oracle.expected(given)[0].loss)


@over(2, 3, 4)
def test_a_parameter_of_fsdp2(group):
    """Outside of its forward, with tokens of each process's own."""
    process, _, mine = spread(group)
    with pytest.raises(ValueError, match=r"they differ\. A parameter of FSDP2"):
        mine.but(hidden=mine.hidden + process.rank).call()


@over(1, 2, 3, 4)
def test_dtensors_of_columns(group):
    _, _, mine = spread(group, dim=1)
    with pytest.raises(ValueError, match="student_head: expected a DTensor with placements"):
        mine.call()


# Heads of unequal length, of which the shorter one's tokens are shared.


def unequal(given: Problem, longer: str, student: slice, teacher: slice) -> Problem:
    """These rows of the heads; the longer one has five tokens more."""

    def rows(head: Head, some: slice, further: int) -> Head:
        weight = torch.cat([head.weight, torch.full((further, head.weight.shape[1]), 9.0)])
        return Head(weight[some], bias=torch.cat([head.bias, torch.full((further,), 9.0)])[some])

    head = rows(given.head, student, 5 * (longer == "student"))
    return given.but(head=head, teacher_head=rows(given.teacher_head, teacher, 5 * (longer == "teacher")))


@over(1, 2, 3, 4)
@pytest.mark.parametrize("longer", ["student", "teacher"])
@pytest.mark.parametrize("support", [None, TopK(9)], ids=["whole", "top 9"])
def test_unequal_vocabularies(group, longer, support):
    """The last part of one head has rows of tokens that the other side has not."""
    process, given = Process(group), sides(own=True, head="bias", teacher_head="bias")
    exact = unequal(given, longer, slice(None), slice(None)).run(support=support, shared_prefix=True)
    further = 5 * (process.stop == V)
    parts = {side: slice(process.start, process.stop + further * (side == longer)) for side in ("student", "teacher")}
    mine = process.here(tuple(unequal(given, longer, **parts)))
    mine, shard = Problem(*mine, process.here(given.token_weight)), process.shard()
    got = mine.run(support=support, shard=shard, shared_prefix=True)
    assert_near("divergence", got[0].divergence, exact[0].divergence)
    assert_near("hidden", got[1], exact[1])
    for part, whole in zip(got[2:], exact[2:], strict=True):
        assert_near("head", part, whole[process.start :][: len(part)])
    with pytest.raises(ValueError, match=r"shared_prefix=True|refused on other processes"):
        mine.call(support=support, shard=shard)


@over(2, 3, 4)
def test_parts_of_heads_that_were_each_spread_over_its_own_length(group):
    process, given = Process(group), sides(own=True, head="bias", teacher_head="bias")
    parts = slice(process.start, process.stop + 1), slice(process.start, process.stop)
    mine = Problem(*process.here(tuple(unequal(given, "student", *parts))))
    with pytest.raises(ValueError, match=r"only the part that ends a shared prefix may be longer|refused on"):
        mine.call(shard=process.shard(), shared_prefix=True)


@over(1, 2, 3, 4)
@pytest.mark.parametrize("student, teacher", [(V, V - 3), (V - 3, V)], ids=["longer student", "longer teacher"])
def test_unequal_dtensors(group, student, teacher):
    """Beside a DTensor of either length, a plain teacher's head is taken apart as it is."""
    process, given = Process(group), sides(own=True, head="bias", teacher_head="bias")
    given = given.but(
        head=Head(given.head.weight[:student], bias=given.head.bias[:student]),
        teacher_head=Head(given.teacher_head.weight[:teacher], bias=given.teacher_head.bias[:teacher]),
    )
    exact, *exact_gradients = given.run(shared_prefix=True)
    mesh = DeviceMesh.from_group(group, process.device.type)
    mine = Problem(*process.here(tuple(given)), process.here(given.token_weight))
    mine = mine.but(head=tree_map_only(Tensor, lambda x: distribute_tensor(x, mesh, [Shard(0)]), mine.head))
    got, *gradients = mine.run(shared_prefix=True)
    assert_near("loss", got.loss, exact.loss)
    for gradient, want in zip(gradients, exact_gradients, strict=True):
        assert_near("gradient", gradient.full_tensor() if isinstance(gradient, DTensor) else gradient, want)
    with pytest.raises(ValueError, match=f"expected the {student} rows .* shared_prefix=True, .* got {teacher} rows"):
        mine.call()
    if process.world > 1:  # parts of 67 and of 64 entries begin at other tokens
        teacher_head = tree_map_only(Tensor, lambda x: distribute_tensor(x, mesh, [Shard(0)]), mine.teacher_head)
        with pytest.raises(ValueError, match="teacher_head: expected a DTensor with entries"):
            mine.but(teacher_head=teacher_head).call(shared_prefix=True)


# Refusals: on every process, with the difference, and nobody waits.

# What is given, which may differ on the last process, and the message.
REFUSED = {
    "beta": (lambda x, last: (x, {"beta": 0.25 if last else 0.5}), "beta: 0.5 on process 0, 0.25 on process"),
    "support": (lambda x, last: (x, {"support": TopK(5) if last else None}), "support"),
    "weights of 0": (lambda x, last: (x.but(token_weight=1.0 - last * (x.token_weight != 0).float()), {}),
                     "token_weight's rows"),
    "gradients": (lambda x, last: (x.but(hidden=x.hidden.clone().requires_grad_(last)), {}), "student_hidden"),
    "temperature of one": (lambda x, last: (x, {"temperature": -1.0 if last else 1.0}),
                           r"^(shard: arguments were refused on other processes, process \d: )?temperature: expected"),
    "tokens": (lambda x, last: (x.tokens(slice(ROWS - last)), {}), r"student_hidden: .*37.* on process 0, .*36"),
    "whole head": (lambda x, last: (x.but(head=SHARED.head.to(x.hidden.device)), {}),
                   "student_head: expected this process's"),
    "reference": (lambda x, last: (x, {"schedule": "reference"}), "schedule='reference': it does not have shard"),
    "rows": (lambda x, last: (x, {"rows": torch.arange(ROWS).to(x.hidden.device)}), "rows: expected None"),
}  # fmt: skip


@over(2, 3, 4)
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(group, name):
    process, (change, message) = Process(group), REFUSED[name]
    mine, shard = process.part(SHARED), process.shard(sequence_parallel=name == "rows")
    changed, options = change(mine, process.rank == process.world - 1)
    with pytest.raises(ValueError, match=message):
        changed.call(**options, shard=shard)
    mine.call(shard=shard)  # and they go on


EMPTY = ((0, 30), (40, 40), (40, 67), (67, 67))  # in the gap, which it does not fill
PARTS = {
    "overlap": (lambda x: (x.start, x.stop + 1), "expected parts that cover a vocabulary"),
    "an empty one in a gap": (lambda x: EMPTY[x.rank - x.world], "expected parts that cover a vocabulary"),
    "bounds of others": (lambda x: (x.start, x.stop, x.group, False, False, ((0, 68),) * 4), "bounds: expected"),
}


@over(2, 3, 4)
@pytest.mark.parametrize("name", PARTS)
def test_wrong_parts(group, name):
    parts, message = PARTS[name]
    start, stop, *more = parts(Process(group))
    with pytest.raises(ValueError, match=message):
        VocabShard(start, stop, *(more or [group]))


# Beside what else a trainer has.


@over(1, 2, 3, 4)
def test_compiled(group):
    """torch.compile takes the group with it."""
    process = Process(group)
    mine, shard = process.part(SHARED), VocabShard(process.start, process.stop, group)
    step = torch.compile(lambda *x: Problem(*x).call(shard=shard).loss, fullgraph=True, backend="eager")
    assert torch.equal(step(*mine, mine.token_weight), mine.call(shard=shard).loss)


@over(4)
def test_data_and_vocabulary(group):
    """A 2 × 2 mesh: DDP over the batch, the vocabulary spread within each of its processes."""
    mesh = init_device_mesh(Process(group).device.type, (2, 2), mesh_dim_names=("data", "vocabulary"))
    data, process, given = mesh.get_group("data"), Process(mesh.get_group("vocabulary")), sides(rows=36)
    tokens = slice(18 * dist.get_rank(data), 18 * dist.get_rank(data) + 18)
    mine, shard = process.part(given, tokens).leaves(), process.shard()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(mine.head.detach().clone())

        def forward(self, hidden: Tensor) -> Tensor:
            return mine.but(hidden=hidden, head=self.weight).call(shard=shard).loss

    layer = DistributedDataParallel(Layer(), process_group=data)
    loss = 2 * layer(mine.hidden)  # DDP takes the mean over its two processes
    loss.backward()
    total = loss.detach() / 2
    dist.all_reduce(total, group=data)
    exact, of_hidden, of_head = oracle.expected(given)
    assert_near("loss", total, exact.loss)
    assert_near("gradient of hidden states", mine.hidden.grad / 2, of_hidden[tokens])
    assert_near("gradient of the head", layer.module.weight.grad, process.cut(of_head).cpu())


class Tables(Inside):
    """How many tables of `mixtures` are made: two products each with a small matrix. One row is that of a number."""

    count = 0

    def saw(self, func, args, out):
        is_product = func.overloadpacket.__name__ in ("mm", "matmul") and args[1].shape == (8, 8)
        self.count += 0.5 * (is_product and len(args[0]) > 1)


@over(1, 2)
def test_a_gpus_constants_are_made_once_a_call(group):
    """Of a share of each token's own, and not for each chunk's sums and gradient again."""
    process, given = Process(group), problem(12, D, V, weighted=True)
    beta = torch.linspace(0, 1, 12)
    with pytest.MonkeyPatch.context() as patch, Tables() as tables:
        patch.setattr(chunked, "kernels_of", lambda device: triton_kernels())
        patch.setattr(chunked, "MIN_ROWS", 4)
        patch.setattr(chunked, "BUFFER_BYTES", {"cpu": 0, "gpu": 0})
        got = process.part(given).run(beta=beta.to(process.device), shard=process.shard())
    assert tables.count == 1
    process.assert_exact(got, oracle.expected(given, beta=beta))
