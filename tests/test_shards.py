"""A vocabulary spread over processes: real process groups against the oracle, which sees all of it.

On gloo, and under `-m gpu` on NCCL with as many processes as there are GPUs. Groups of one to four are the last of four
processes that stay. A case asserts after its last exchange, so that one that fails leaves the processes in step.
"""

import functools
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import oracle
import pytest
import torch
import torch.distributed as dist
from problems import Problem, problem
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from scsdpo_kernels import (
    SampledToken,
    TopK,
    TopLogprobs,
    VocabShard,
    linear_divergence,
    linear_divergence_per_token,
    question_weights,
    scsdpo_loss,
    step_denominator,
)
from scsdpo_kernels.schedules import chunked

V, D, ROWS, OWN_WIDTH = 67, 16, 37, 12
# Where the parts end: uneven, one entry, none.
ENDS = {1: (67,), 2: (50, 67), 3: (10, 10, 67), 4: (1, 30, 67, 67)}
BETAS = (0.0, 0.3, 1.0)


class Process:
    """One of a group: its rank, its device, its part of the vocabulary."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, ends: tuple[int, ...] | None = None):
        self.group, self.device = group, device
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.last = self.rank == self.world - 1
        self.start, self.stop = (0, *(ends or ENDS[self.world]))[self.rank : self.rank + 2]

    @functools.cache  # noqa: B019
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

    def gather(self, tree: Any) -> list[Tensor]:
        """The numbers that each process has in its tensors."""
        own = torch.cat([x.detach().flatten().float() for x in tree_leaves(tree) if x is not None])
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own, group=self.group)
        return every

    def assert_exact(self, got, exact, tokens=slice(None), padding=0, limit=2e-5, floor=2e-6, rounding=None) -> None:
        """A result and its gradients: in every field, without any in padding. rounding: limit of the gradients."""
        (result, *gradients), (expected, *exact_gradients) = got, exact
        if isinstance(result, Tensor):
            result, expected = {"per token": result}, {"per token": oracle.per_token(expected)}
        else:
            result, expected = result._asdict(), expected._asdict()
        for name, x in result.items():
            y = expected[name]
            assert (x is None) == (y is None), name
            if x is not None:
                assert x.dtype == torch.float32, name
                assert_near(name, x, y[tokens] if y.dim() else y, limit, floor)
        exact_gradients[0] = exact_gradients[0][tokens]
        for number, (x, y) in enumerate(zip(gradients, exact_gradients, strict=True)):
            if len(y) == V:
                y, behind = y[self.start : self.stop], x[self.stop - self.start :]
                x = x[: self.stop - self.start]
                assert len(behind) == padding and (behind == 0).all(), f"gradient {number} of padding"
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
        values = result if isinstance(result, Tensor) else oracle.per_token(result)
        return (values * torch.linspace(-1, 1, ROWS, device=values.device)).sum()

    def __call__(self, process: Process) -> None:
        ends = [ROWS * r // max(1, process.world - 1) for r in range(process.world)] + [ROWS]
        tokens = slice(*ends[process.rank : process.rank + 2]) if self.own_tokens else slice(None)
        options = process.here(self.options, tokens) | {"shard": process.shard(sequence_parallel=self.own_tokens)}
        op = linear_divergence_per_token if self.per_token else linear_divergence
        with pytest.MonkeyPatch.context() as patch:
            if self.chunks:
                patch.setattr(chunked, "MIN_ROWS", 2)
                patch.setattr(chunked, "BUFFER_BYTES", dict.fromkeys(chunked.BUFFER_BYTES, 4 * V * 8))
            got = process.part(self.given, tokens, self.padding).run(op, self.total, **options)
        every = process.gather(got[0].loss if self.own_tokens else got[:2])
        exact = oracle.expected(self.given, self.total, **self.options)
        process.assert_exact(got, exact, tokens, self.padding, **self.limits)
        assert all(torch.equal(x, every[0]) for x in every), "not the same bits on every process"


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


def named() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (ROWS,), generator=generator)
    targets = {"target_ids": ids, "old_logp": -1 - 4 * torch.rand(ROWS, generator=generator)}
    of_server = (
        torch.rand(ROWS, V, generator=generator).argsort(1)[:, :6],
        torch.randn(ROWS, 6, generator=generator) - 4,
    )
    empty_slots = of_server[0].clone()
    empty_slots[::2, 1:] = empty_slots[1] = -1
    own, shared, every = sides(own=True), sides(), sides(head="all")
    server, unweighted = (
        shared.but(teacher=None),
        {x: sides(x == "own").but(token_weight=None) for x in ("own", "shared")},
    )
    forbidden = sides(own=True, head="bias", teacher_head="bias")
    forbidden.head.bias[:12] = forbidden.teacher_head.bias[:12] = forbidden.teacher_head.bias[40:50] = -torch.inf
    cases = {
        **{f"beta {x}": case(beta=x) for x in BETAS},
        **{f"beta {x}, own head": case(own, beta=x, temperature=0.7) for x in BETAS},
        "targets": case(beta=0.0, target_ids=ids),
        "importance ratios": case(own, **targets, importance_clip=1.5),
        # heads
        "all that a head has, on both sides": case(sides(own=True, head="all", teacher_head="all")),
        "adapter in a linear head": case(every.but(head=every.head._replace(softcap=None)), **targets, beta=1.0),
        "teacher's bias": case(every.but(teacher_head=every.head._replace(bias=-every.head.bias))),
        "adapter and softcap, top 5": case(every, support=TopK(5)),
        # supports
        **{f"top {k}, {tail}": case(own, **targets, support=TopK(k, tail))
           for k in (1, 7, 60, 100) for tail in ("bucket", "renormalize")},
        "top 9, shared head": case(support=TopK(9), beta=0.0),
        "server": case(server, support=TopLogprobs(*of_server), beta=0.0),
        "server, renormalize": case(server, **targets, support=TopLogprobs(*of_server, "renormalize")),
        "server, empty slots": case(server, support=TopLogprobs(empty_slots, of_server[1])),
        "sampled token": case(**targets, support=SampledToken(), beta=1.0),
        "sampled token, own head": case(own, **targets, support=SampledToken(), beta=1.0),
        **{f"entries clipped at {x}": case(own, beta=0.0, entry_clip=x) for x in (1e-3, 0.05, 10.0)},
        # numbers
        **{f"{x} apart, beta {beta}": case(sides(distance=x), {"limit": 1e-4, "floor": 1e-30}, beta=beta)
           for x in (4e-3, 4e-5) for beta in (0.0, 0.5, 1.0)},
        **{f"peak at {at}, {x} apart": case(peaked(at, x), {"limit": 1e-4, "floor": 1e-12})
           for at in (0, 20, 66) for x in (4.0, 4e-4)},
        **{f"forbidden tokens, beta {x}": case(forbidden, target_ids=ids, beta=x) for x in (0.0, 0.5)},
        "weights of 0": case(shared.but(token_weight=torch.zeros(ROWS)), {"floor": 0.0}),
        "negative weights": case(shared.but(token_weight=torch.full((ROWS,), -3.0)), {"floor": 1e-30}),
        "huge weights": case(shared.but(token_weight=torch.linspace(-1e6, 1e6, ROWS)), {"floor": 1e-30}),
        "bf16": case(sides(own=True, dtype=torch.bfloat16), {"rounding": 1e-2}, **targets),
        "bf16, top 9": case(sides(dtype=torch.bfloat16), {"rounding": 1e-2}, support=TopK(9)),
        # tokens
        "no tokens": case(sides(rows=0), **{name: x[:0] for name, x in targets.items()}),
        "chunks": case(own, **targets, chunks=True),
        "chunks, adapter, top 5": case(sides(head="lora"), support=TopK(5), chunks=True),
        "per token": case(unweighted["own"], per_token=True, beta=0.4),
        "per token, top 5": case(unweighted["own"], **targets, per_token=True, support=TopK(5)),
        "own tokens": case(own, **targets, own_tokens=True),
        "own tokens, top 4": case(own, **targets, own_tokens=True, support=TopK(4)),
        "own tokens, server": case(server, own_tokens=True, support=TopLogprobs(*of_server)),
        "padding": case(own, padding=5),
        "padding, all that a head has": case(every, padding=5),
    }  # fmt: skip
    return cases


def peaked(at: int, distance: float) -> Problem:
    given = sides(distance=distance)
    given.head[at] = given.hidden[4] * 3 / 16
    return given


def frozen(process: Process, trained: str) -> None:
    given = sides()
    mine = process.part(given)
    leaf = getattr(mine, trained).clone().requires_grad_()
    mine.but(**{trained: leaf}).call(shard=process.shard()).loss.backward()
    _, of_hidden, of_head = oracle.expected(given)
    assert_near("gradient", leaf.grad, of_hidden if trained == "hidden" else of_head[process.start : process.stop])


# DTensors, as PyTorch's tensor parallelism has a head: equal parts, the last one smaller.


def spread(process: Process, dim: int = 0) -> tuple[Process, Problem, Problem]:
    """The process with its part, a problem, and that with heads that are DTensors."""
    given, size = sides(own=True, head="bias"), -(-V // process.world)
    mesh = DeviceMesh.from_group(process.group, process.device.type)
    mine = Problem(*process.here(tuple(given)), process.here(given.token_weight))
    head, teacher_head = tree_map_only(
        Tensor, lambda x: distribute_tensor(x, mesh, [Shard(min(dim, x.dim() - 1))]), (mine.head, mine.teacher_head)
    )
    ends = tuple(min(V, size * r) for r in range(1, process.world + 1))
    return Process(process.group, process.device, ends), given, mine.but(head=head, teacher_head=teacher_head)


def dtensors(process: Process, replicated: bool) -> None:
    equal, given, mine = spread(process)
    if replicated:
        mine = mine.but(hidden=distribute_tensor(mine.hidden, mine.head.weight.device_mesh, [Replicate()]))
    result, *gradients = mine.run()
    assert [x.placements for x in gradients if isinstance(x, DTensor)][-2:] == [(Shard(0),)] * 2
    local = [x.to_local() if isinstance(x, DTensor) else x for x in gradients]
    equal.assert_exact((result, *local), oracle.expected(given))


def whole_tensors_beside_a_dtensor(process: Process) -> None:
    _, given, mine = spread(process)
    bias, teacher_head = process.here((given.head.bias, given.teacher_head))
    got = mine.but(head=mine.head._replace(bias=bias), teacher_head=teacher_head).call()
    assert_near("loss", got.loss, oracle.expected(given)[0].loss)


def a_parameter_of_fsdp2(process: Process) -> None:
    """Outside of its forward, with tokens of each process's own."""
    _, _, mine = spread(process)
    with pytest.raises(ValueError, match=r"they differ\. A parameter of FSDP2"):
        mine.but(hidden=mine.hidden + process.rank).call()


def dtensors_of_columns(process: Process) -> None:
    _, _, mine = spread(process, dim=1)
    with pytest.raises(ValueError, match="student_head: expected a DTensor with placements"):
        mine.call()


# Refusals: on every process, with the difference, and nobody waits.


def refused(process: Process, what: str) -> None:
    given, last = process.part(sides()), process.last
    weight = given.token_weight.clone()
    weight[-1] = float(not last)
    elsewhere = f"refused on other processes, process {process.world - 1}: temperature: expected"
    sequence_parallel = {"rows": torch.arange(ROWS), "shard": process.shard(sequence_parallel=True)}
    changed, options, message = {
        "beta": ({}, {"beta": 0.25 if last else 0.5}, "beta: 0.5 on process 0, 0.25 on process"),
        "support": ({}, {"support": TopK(5) if last else None}, "support"),
        "weights of 0": ({"token_weight": weight}, {}, "token_weight's rows"),
        "gradients": ({"hidden": given.hidden.clone().requires_grad_(last)}, {}, "student_hidden"),
        "temperature of one": ({}, {"temperature": -1.0 if last else 1.0}, "^temperature" if last else elsewhere),
        "tokens": (vars(given.tokens(slice(ROWS - last))), {}, r"student_hidden: .*37.* on process 0, .*36"),
        "whole head": ({"head": process.here(sides().head)}, {}, "student_head: expected this process's"),
        "list of own tokens": ({}, sequence_parallel, "rows: expected None"),
        "reference": ({}, {"schedule": "reference"}, "schedule='reference': it does not have shard"),
    }[what]
    with pytest.raises(ValueError, match=message):
        given.but(**changed).call(**{"shard": process.shard(), **process.here(options)})


def refused_parts(process: Process, what: str) -> None:
    start, stop = process.start, process.stop
    bounds, options, message = {
        "overlap": ((start, stop + 1), {}, "expected parts that cover a vocabulary"),
        "an empty part covers nothing": (
            ((0, 30), (40, 40), (40, 67), (67, 67))[process.rank],
            {},
            "expected parts that cover a vocabulary",
        ),
        "others": ((start, stop), {"bounds": ((0, 68),) * process.world}, "bounds: expected"),
    }[what]
    with pytest.raises(ValueError, match=message):
        VocabShard(*bounds, process.group, **options)


def compiled(process: Process) -> None:
    """torch.compile takes the group with it."""
    given, shard = process.part(sides()), VocabShard(process.start, process.stop, process.group)
    expected = given.call(shard=shard).loss
    step = torch.compile(lambda *x: Problem(*x).call(shard=shard).loss, fullgraph=True, backend="eager")
    got = step(*given, given.token_weight)
    assert torch.equal(got, expected)


# Losses of a batch.


def batch(process: Process) -> tuple[Problem, Tensor, Tensor, Tensor]:
    """Rollouts of four questions, one of which nobody solves, their rewards, questions and masks."""
    rewards = torch.tensor([1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1.0])
    question = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3])
    mask = (torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) < 0.7).float()
    given = problem((12, 5), D, V, 2.0, scale=4.0)
    return Problem(*process.here(tuple(given))), *process.here((rewards, question, mask))


def own_rollouts(process: Process, reduction: str) -> None:
    """scsdpo_loss where each process has its own: one denominator for all."""
    given, rewards, question, mask = batch(process)
    weight, own = question_weights(rewards, question), slice(process.rank, None, process.world)
    whole = given.call(scsdpo_loss, mask=mask, question_weight=weight, reduction=reduction).loss
    options = {"mask": mask[own], "question_weight": weight[own], "reduction": reduction}
    got = process.part(given, own).call(scsdpo_loss, **options, shard=process.shard(sequence_parallel=True)).loss
    assert_near("loss", got, whole.cpu())


def sequence_mean_of_own_rollouts(process: Process) -> None:
    with pytest.raises(ValueError, match="sequence-mean"):
        own_rollouts(process, "sequence-mean")


def overflow_of_one_process(process: Process) -> None:
    """Its infinite upstream gradient reaches every part of the head."""
    given = process.part(sides()).but(token_weight=None).leaves()
    out = given.call(linear_divergence_per_token, shard=process.shard(sequence_parallel=True))
    out.backward(torch.full_like(out, torch.inf if process.rank == 0 else 1.0))
    assert given.head.grad.isnan().all()


# Where each process's rollouts end; one may have none, or those of the unsolved question only.
SPLITS = {
    "even": lambda world: [12 * r // world for r in range(world + 1)],
    "all on the first": lambda world: [0, *[12] * world],
    "uneven": lambda world: [0, *[min(12, 7 + r) for r in range(world - 1)], 12],
}


def split_batch(process: Process, reduction: str, split: str, micro: int) -> None:
    """Weights to the bit, and gradients to rounding, whichever way a batch is spread; questions straddle processes."""
    given, rewards, question, mask = batch(process)
    expected = question_weights(rewards, question)
    _, _, whole = given.run(scsdpo_loss, question_weight=expected, mask=mask, reduction=reduction)
    own = torch.arange(12, device=process.device)[slice(*SPLITS[split](process.world)[process.rank :][:2])]
    weight = question_weights(rewards[own], question[own], group=process.group)
    total = step_denominator(mask[own], weight, reduction=reduction, group=process.group)
    gradient = torch.zeros_like(given.head)
    for part in own.split(micro) if len(own) else (own,):
        options = {"question_weight": weight[part - own[:1]], "mask": mask[part], "denominator": total}
        gradient += given.tokens(part).run(scsdpo_loss, **options, reduction=reduction)[2]
    dist.all_reduce(gradient, group=process.group)
    assert torch.equal(weight, expected[own])
    assert_near("gradient", gradient, whole.cpu())


def data_and_vocabulary(process: Process) -> None:
    """A 2 × 2 mesh: DDP over the batch, the vocabulary spread within each of its processes."""
    mesh = init_device_mesh(process.device.type, (2, 2), mesh_dim_names=("data", "vocabulary"))
    data, vocabulary = mesh.get_group("data"), mesh.get_group("vocabulary")
    given, half = sides(rows=36), Process(vocabulary, process.device)
    shard = half.shard()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(half.cut(given.head).clone())

        def forward(self, mine: Problem) -> Tensor:
            return mine.but(head=self.weight).call(shard=shard).loss

    layer = DistributedDataParallel(Layer(), process_group=data)
    tokens = slice(18 * dist.get_rank(data), 18 * dist.get_rank(data) + 18)
    mine = half.part(given, tokens)
    mine.hidden.requires_grad_()
    loss = layer(mine)
    (2 * loss).backward()  # DDP takes the mean over its two processes
    total = loss.detach().clone()
    dist.all_reduce(total, group=data)
    exact, of_hidden, of_head = oracle.expected(given)
    assert_near("loss", total, exact.loss)
    assert_near("gradient of hidden states", mine.hidden.grad / 2, of_hidden[tokens])
    assert_near("gradient of the head", layer.module.weight.grad, half.cut(of_head))


def others() -> dict[str, Callable[[Process], None]]:
    reductions = ("token-mean", "weighted-token-mean", "sum")
    splits = itertools.product(("token-mean", "weighted-token-mean", "sequence-mean"), SPLITS, (1, 3, 12))
    return {
        **{f"{x} alone has a gradient": partial(frozen, trained=x) for x in ("hidden", "head")},
        "DTensors": partial(dtensors, replicated=False),
        "DTensors, replicated hidden states": partial(dtensors, replicated=True),
        "whole tensors beside a DTensor": whole_tensors_beside_a_dtensor,
        "a parameter of FSDP2": a_parameter_of_fsdp2,
        "DTensors of columns": dtensors_of_columns,
        **{f"refuses: {x}": partial(refused, what=x) for x in
           ("beta", "support", "weights of 0", "gradients", "temperature of one", "tokens", "whole head",
            "list of own tokens", "reference")},
        **{f"refuses parts: {x}": partial(refused_parts, what=x) for x in
           ("overlap", "an empty part covers nothing", "others")},
        "compiled": compiled,
        **{f"own rollouts, {x}": partial(own_rollouts, reduction=x) for x in reductions},
        "own rollouts, sequence-mean": sequence_mean_of_own_rollouts,
        "overflow of one process": overflow_of_one_process,
        **{f"batch, {x}, {split}, micro-batches of {n}": partial(split_batch, reduction=x, split=split, micro=n)
           for x, split, n in splits},
        "data and vocabulary": data_and_vocabulary,
    }  # fmt: skip


CASES = {**named(), **others()}
# What one process alone has nothing to say to, and what takes four.
LEAST = {name: 2 for name in CASES if name.startswith("refuses") or "FSDP2" in name}
LEAST |= {"refuses parts: an empty part covers nothing": 3, "data and vocabulary": 4}


PROCESSES: dict[int, Process] = {}


def make_groups() -> None:
    """This process as one of each group: the last processes."""
    most, device = dist.get_world_size(), torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    for world in range(1, most + 1):
        group = dist.new_group(range(most - world, most))
        if dist.get_rank() >= most - world:
            PROCESSES[world] = Process(group, device)


def run(world: int, name: str) -> None:
    CASES[name](PROCESSES[world])


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def ranks(request, tmp_path_factory):
    most = max(ENDS) if request.param == "gloo" else min(max(ENDS), torch.cuda.device_count())
    ranks = Ranks(tmp_path_factory.mktemp("rendezvous"), most, request.param, make_groups)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("world, name", [(x, name) for x in ENDS for name in CASES if x >= LEAST.get(name, 1)])
def test_parts_are_the_whole(ranks, world, name):
    if world > ranks.world:
        pytest.skip(f"needs {world} GPUs")
    ranks(run, last=world, world=world, name=name)
