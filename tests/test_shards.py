"""A vocabulary spread over processes: real process groups against the unsharded operator in one process.

On gloo, and under `-m gpu` on NCCL where there are as many GPUs as processes. All cases of a number of processes run in
one group; each is a test of its own afterwards.
"""

import itertools
import os
import traceback
import uuid
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import scsdpo_kernels
from scsdpo_kernels import (
    Head,
    LoRA,
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

VOCABULARY, WIDTH, ROWS = 67, 16, 37
# Where the parts end: uneven, one entry, none.
CUTS = {1: (67,), 2: (50, 67), 3: (10, 10, 67), 4: (1, 30, 67, 67)}
FIELDS = ("divergence", "student_entropy", "teacher_entropy", "student_logp", "teacher_logp", "importance_ratio")


class Process:
    """One of the group: its rank, its device, its part of the vocabulary."""

    def __init__(self, rank: int, world: int, backend: str):
        self.rank, self.world = rank, world
        self.device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
        ends = (0, *CUTS[world])
        self.start, self.stop = ends[rank], ends[rank + 1]

    def shard(self, **options) -> VocabShard:
        return VocabShard(self.start, self.stop, check=True, **options)

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()[self.start : self.stop].clone().to(self.device)


def problem(dtype=torch.float32, distance=0.5, seed=0, rows=ROWS) -> dict[str, torch.Tensor]:
    """The same in every process."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    student, weight = normal(rows, WIDTH), normal(VOCABULARY, WIDTH)
    teacher = student + normal(rows, WIDTH, scale=distance)
    token_weight = normal(rows)
    token_weight[::3] = 0
    return {
        "student_hidden": student.to(dtype),
        "student_weight": weight.to(dtype),
        "teacher_hidden": teacher.to(dtype),
        "teacher_weight": (weight + normal(VOCABULARY, WIDTH, scale=distance)).to(dtype),
        "token_weight": token_weight,
        "target_ids": torch.randint(VOCABULARY, (rows,), generator=generator),
        "old_logp": -1 - 4 * torch.rand(rows, generator=generator),
        "student_bias": normal(VOCABULARY),
        "teacher_bias": normal(VOCABULARY),
        "lora_a": normal(3, WIDTH, scale=0.3),
        "lora_b": normal(VOCABULARY, 3, scale=0.3),
        "support_ids": torch.rand(rows, VOCABULARY, generator=generator).argsort(1)[:, :6],
        "support_logp": normal(rows, 6) - 4,
    }


PER_VOCABULARY = ("student_weight", "teacher_weight", "student_bias", "teacher_bias", "lora_b")
DIFFERENTIABLE = ("student_hidden", "student_weight", "student_bias", "lora_a", "lora_b")


def arguments(given: dict, *, student=None, teacher=None, tail="bucket") -> dict:
    """The operator's, of tensors as `problem` names them. student, teacher: the numbers of their heads."""
    given = dict(given)
    lora = LoRA(given.pop("lora_a"), given.pop("lora_b"), 0.7) if "lora_a" in given else None
    head = Head(given.pop("student_weight"), given.pop("student_bias", None), lora, **(student or {}))
    given["student_head"] = head
    bias = given.pop("teacher_bias", None)
    if "teacher_weight" in given:
        given["teacher_head"] = Head(given.pop("teacher_weight"), bias, **(teacher or {}))
    elif bias is not None:
        given["teacher_head"] = head._replace(bias=bias)
    if "support_ids" in given:
        given["support"] = TopLogprobs(given.pop("support_ids"), given.pop("support_logp"), tail)
    return given


def run(given: dict, op=linear_divergence, upstream=None, *, student=None, teacher=None, tail="bucket", **options):
    """Result and gradients of what is differentiable."""
    given = {name: x.clone() for name, x in given.items()}
    leaves = {name: given[name].requires_grad_() for name in DIFFERENTIABLE if name in given}
    result = op(**arguments(given, student=student, teacher=teacher, tail=tail), **options)
    loss = result.loss if upstream is None else (result * upstream).sum()
    loss.backward()
    return result, {name: leaf.grad for name, leaf in leaves.items()}


def compare(process: Process, names: tuple[str, ...], *, share=2e-5, floor=2e-6, given=None, op=None, **options):
    """The operator on parts beside the whole one, and the same bits on every process."""
    given = {name: x for name, x in (given or problem()).items() if name in names}
    device = process.device
    whole = {name: x.to(device) for name, x in given.items()}
    parts = {name: process.part(x) if name in PER_VOCABULARY else x.to(device) for name, x in given.items()}
    more = {} if op is None else {"op": op, "upstream": torch.linspace(-1, 1, ROWS, device=device)}
    expected, exact = run(whole, **more, **options)
    got, gradients = run(parts, **more, **options, shard=process.shard())

    def close(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        assert a.shape == b.shape and a.dtype == b.dtype, name
        apart = torch.where(a == b, 0.0, a.double() - b.double())
        size = torch.where(b.isinf(), 0.0, b.double()).norm()
        assert apart.norm() <= share * size + floor, (name, apart.norm().item(), size.item())

    if op is None:
        for name in ("loss", *FIELDS):
            a, b = getattr(got, name), getattr(expected, name)
            assert (a is None) == (b is None), name
            if a is not None:
                close(name, a.detach(), b.detach())
                same_everywhere(process, a.detach())
    else:
        close("per token", got.detach(), expected.detach())
    for name, gradient in gradients.items():
        close(name, gradient, process.part(exact[name]) if name in PER_VOCABULARY else exact[name])
    same_everywhere(process, gradients["student_hidden"])
    return got, gradients


def same_everywhere(process: Process, tensor: torch.Tensor) -> None:
    """To the bit."""
    every = [torch.empty_like(tensor) for _ in range(process.world)]
    dist.all_gather(every, tensor.contiguous())
    assert all(torch.equal(x, tensor) or (x.isnan() & tensor.isnan()).any() for x in every)


PLAIN = ("student_hidden", "student_weight", "teacher_hidden", "token_weight")
OWN_HEAD = (*PLAIN, "teacher_weight")
TARGETS = ("target_ids", "old_logp")
SERVER = ("student_hidden", "student_weight", "token_weight", "support_ids", "support_logp")


def betas(process):
    for beta in (0.0, 0.3, 1.0):
        compare(process, PLAIN, beta=beta)
        compare(process, OWN_HEAD, beta=beta, temperature=0.7)


def targets(process):
    compare(process, (*OWN_HEAD, *TARGETS), importance_clip=1.5)
    compare(process, (*PLAIN, "target_ids"), beta=0.0)


def heads(process):
    compare(process, (*OWN_HEAD, "student_bias", "teacher_bias"), student={"softcap": 2.0}, teacher={"softcap": 3.0})
    compare(process, (*PLAIN, "student_bias", "lora_a", "lora_b", *TARGETS), student={"logit_scale": 0.4}, beta=1.0)
    compare(process, (*PLAIN, "student_bias", "teacher_bias", "lora_a", "lora_b"), student={"softcap": 2.0})
    compare(process, (*PLAIN, "lora_a", "lora_b"), student={"softcap": 2.0}, support=TopK(5))


def supports(process):
    for k, tail in itertools.product((1, 7, 60, 100), ("bucket", "renormalize")):
        compare(process, (*OWN_HEAD, *TARGETS), support=TopK(k, tail))
    compare(process, PLAIN, support=TopK(9), beta=0.0)
    compare(process, SERVER, beta=0.0)
    compare(process, (*SERVER, *TARGETS), tail="renormalize")
    given = problem()
    given["support_ids"][::2, 1:] = -1
    given["support_ids"][1] = -1
    compare(process, SERVER, given=given)


def sampled_token(process):
    compare(process, (*OWN_HEAD, *TARGETS), support=SampledToken(), beta=1.0)
    compare(process, (*PLAIN, *TARGETS), support=SampledToken(), beta=1.0)


def clipped_entries(process):
    for clip in (1e-3, 0.05, 10.0):
        compare(process, OWN_HEAD, beta=0.0, entry_clip=clip)


def divergences(process):
    beta = torch.linspace(0, 1, ROWS)
    for divergence in ("jensen_shannon", "jeffreys", "skewed_forward", "skewed_reverse"):
        compare(process, OWN_HEAD, divergence=divergence, beta=0.3)
        low, high = float(divergence == "skewed_reverse"), 1 - float(divergence == "skewed_forward")
        shares = beta.clamp(0.1 * low, 0.9 + 0.1 * high).to(process.device)
        compare(process, (*PLAIN, *TARGETS), divergence=divergence, beta=shares)
    compare(process, OWN_HEAD, divergence="jeffreys", beta=beta.to(process.device), support=TopK(9))


def near_equal(process):
    """Self-distillation's normal state: as precise as the whole operator, against float64."""
    for distance, beta in itertools.product((1e-3, 1e-5), (0.0, 0.5, 1.0)):
        given = problem(distance=distance)
        got, gradients = compare(process, PLAIN, given=given, beta=beta, floor=1e-30)
        exact = {name: given[name].double() for name in PLAIN}
        result, expected = run(exact, beta=beta, schedule="reference")
        assert abs(got.loss.item() - result.loss.item()) <= 1e-4 * abs(result.loss.item())
        apart = gradients["student_hidden"].cpu().double() - expected["student_hidden"]
        assert apart.norm() <= 1e-4 * expected["student_hidden"].norm()


def peaked(process):
    for at, distance in itertools.product((0, 20, 66), (1.0, 1e-4)):
        given = problem(distance=distance)
        given["student_weight"][at] = given["student_hidden"][4] * 3
        compare(process, PLAIN, given=given, beta=0.5, floor=1e-12, share=1e-4)


def forbidden_tokens(process):
    given = problem()
    given["student_bias"][:12] = -torch.inf
    given["teacher_bias"][:12] = -torch.inf
    given["teacher_bias"][40:50] = -torch.inf
    for beta in (0.0, 0.5):
        compare(process, (*OWN_HEAD, "student_bias", "teacher_bias", *TARGETS[:1]), given=given, beta=beta)


def odd_weights(process):
    given = problem()
    for weight in (torch.zeros(ROWS), torch.full((ROWS,), -3.0), torch.linspace(-1e6, 1e6, ROWS)):
        given["token_weight"] = weight
        compare(process, PLAIN, given=given, floor=1e-30 if weight.any() else 0.0)


def no_rows(process):
    compare(process, (*PLAIN, *TARGETS), given=problem(rows=0))


def chunks(process):
    """Several, as many on every process, however uneven the parts are."""
    kept = chunked.BUFFER_BYTES, chunked.MIN_ROWS
    chunked.BUFFER_BYTES, chunked.MIN_ROWS = {"cpu": 4 * 67 * 8, "gpu": 4 * 67 * 8}, 2
    try:
        compare(process, (*OWN_HEAD, *TARGETS))
        compare(process, (*PLAIN, "lora_a", "lora_b"), support=TopK(5))
    finally:
        chunked.BUFFER_BYTES, chunked.MIN_ROWS = kept


def bf16(process):
    given = problem(torch.bfloat16)
    compare(process, (*OWN_HEAD, *TARGETS), given=given, share=1e-2)
    compare(process, PLAIN, given=given, share=1e-2, support=TopK(9))


def per_token(process):
    names = tuple(name for name in OWN_HEAD if name != "token_weight")
    compare(process, names, op=linear_divergence_per_token, beta=0.4)
    compare(process, (*names, *TARGETS), op=linear_divergence_per_token, support=TopK(5))


def frozen(process):
    """A head, or hidden states, without gradient."""
    given = problem()
    for name in ("student_hidden", "student_weight"):
        whole = {k: x.to(process.device) for k, x in given.items() if k in PLAIN}
        parts = {k: process.part(x) if k in PER_VOCABULARY else x for k, x in whole.items()}
        results = []
        for inputs, options in ((whole, {}), (parts, {"shard": process.shard()})):
            inputs[name] = inputs[name].clone().requires_grad_()
            linear_divergence(**arguments(inputs), **options).loss.backward()
            results.append(inputs[name].grad)
        exact = process.part(results[0]) if name in PER_VOCABULARY else results[0]
        torch.testing.assert_close(results[1], exact, rtol=1e-4, atol=1e-6)


def padded_heads(process):
    """Rows beyond stop - start do not count, and have no gradient."""
    given = {name: x.to(process.device) for name, x in problem().items() if name in OWN_HEAD}
    _, exact = run(given)
    for name in ("student_weight", "teacher_weight"):
        given[name] = torch.cat([process.part(given[name]), torch.full((5, WIDTH), 9.0, device=process.device)])
    _, got = run(given, shard=process.shard())
    expected = process.part(exact["student_weight"])
    torch.testing.assert_close(got["student_weight"][:-5], expected, rtol=1e-4, atol=1e-6)
    assert (got["student_weight"][-5:] == 0).all()


def dtensors(process):
    """A head as PyTorch's tensor parallelism has it: equal parts, the last ones smaller or empty."""
    mesh = init_device_mesh(process.device.type, (process.world,))
    given = {name: x.to(process.device) for name, x in problem().items() if name in (*OWN_HEAD, "student_bias")}
    expected, exact = run(given)
    for name in ("student_weight", "teacher_weight", "student_bias"):
        given[name] = distribute_tensor(given[name], mesh, [Shard(0)])
    got, gradients = run(given)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        if isinstance(gradient, DTensor):
            assert gradient.placements == (Shard(0),)
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=1e-6)
    given["student_hidden"] = distribute_tensor(given["student_hidden"], mesh, [Replicate()])
    torch.testing.assert_close(linear_divergence(**arguments(given)).loss, expected.loss, rtol=1e-5, atol=1e-6)
    given["student_hidden"] = given["student_hidden"].to_local()
    whole = {name: problem()[name].to(process.device) for name in ("teacher_weight", "student_bias")}
    loss = linear_divergence(**arguments({**given, **whole})).loss
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    if process.world > 1:  # as a parameter of FSDP2 outside of its forward, with rows of each process's own
        other = {**given, "student_hidden": given["student_hidden"] + process.rank}
        with pytest.raises(ValueError, match=r"they differ\. A parameter of FSDP2"):
            linear_divergence(**arguments(other))
    given["student_weight"] = distribute_tensor(problem()["student_weight"].to(process.device), mesh, [Shard(1)])
    with pytest.raises(ValueError, match="student_head: expected a DTensor with placements"):
        linear_divergence(**arguments(given))


def sequence_parallel(process):
    """Each process has its own rows, as many as it has; the last has none."""
    given = problem()
    ends = [ROWS * r // max(1, process.world - 1) for r in range(process.world)] + [ROWS]
    own = slice(ends[process.rank], ends[process.rank + 1])
    for options in ({}, {"support": TopK(4)}):
        whole, exact = run(
            {name: x.to(process.device) for name, x in given.items() if name in (*OWN_HEAD, *TARGETS)}, **options
        )
        parts = {
            name: process.part(x) if name in PER_VOCABULARY else x[own].to(process.device)
            for name, x in given.items()
            if name in (*OWN_HEAD, *TARGETS)
        }
        got, gradients = run(parts, **options, shard=process.shard(sequence_parallel=True))
        torch.testing.assert_close(got.loss, whole.loss, rtol=1e-5, atol=1e-6)
        same_everywhere(process, got.loss.detach())
        for name in FIELDS:
            torch.testing.assert_close(getattr(got, name), getattr(whole, name)[own], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradients["student_hidden"], exact["student_hidden"][own], rtol=1e-4, atol=1e-6)
        part = process.part(exact["student_weight"])
        torch.testing.assert_close(gradients["student_weight"], part, rtol=1e-4, atol=1e-6)


def data_and_vocabulary(process):
    """A 2 × 2 mesh: DDP over the batch, the vocabulary spread within each of its processes."""
    if process.world != 4:
        return
    mesh = init_device_mesh(process.device.type, (2, 2), mesh_dim_names=("data", "vocabulary"))
    given = {name: x.to(process.device) for name, x in problem(rows=36).items() if name in PLAIN}
    batch = {name: x for name, x in given.items() if name not in PER_VOCABULARY}
    expected, exact = run(given)
    cut = (40, VOCABULARY)[mesh.get_local_rank("vocabulary")]
    start = 0 if cut == 40 else 40
    shard = VocabShard(start, cut, group=mesh.get_group("vocabulary"), check=True)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(given["student_weight"][start:cut].clone())

        def forward(self, hidden, **options):
            return linear_divergence(hidden, self.weight, shard=shard, **options).loss

    head = DistributedDataParallel(Layer(), process_group=mesh.get_group("data"))
    rows = slice(18 * mesh.get_local_rank("data"), 18 * mesh.get_local_rank("data") + 18)
    own = {name: x[rows].clone() for name, x in batch.items()}
    hidden = own.pop("student_hidden").requires_grad_()
    loss = 2 * head(hidden, **own)  # DDP takes the mean over its two processes
    loss.backward()
    total = loss.detach() / 2
    dist.all_reduce(total, group=mesh.get_group("data"))
    torch.testing.assert_close(total, expected.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.module.weight.grad, exact["student_weight"][start:cut], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hidden.grad / 2, exact["student_hidden"][rows], rtol=1e-4, atol=1e-6)


def disagreement(process):
    """Raises on every process, with the difference, and nobody waits."""
    if process.world == 1:
        return
    given = {name: x.to(process.device) for name, x in problem().items() if name in PLAIN}
    given["student_head"] = process.part(given.pop("student_weight"))
    shard, last = process.shard(), process.rank == process.world - 1

    def raises(message: str, **options):
        with pytest.raises((ValueError, TypeError), match=message):
            linear_divergence(**{**given, "shard": shard, **options})

    raises("beta: 0.5 on process 0, 0.25 on process", beta=0.25 if last else 0.5)
    raises("support", support=TopK(5) if last else None)
    weight = given["token_weight"].clone()
    weight[-1] = float(not last)
    raises("token_weight's rows", token_weight=weight)
    raises("student_hidden", student_hidden=given["student_hidden"].clone().requires_grad_(last))
    if last:
        raises("temperature: expected", temperature=-1.0)
    else:
        raises(f"refused on other processes, process {process.world - 1}: temperature: expected")
    short = {name: x[: ROWS - last] for name, x in given.items() if name != "student_head"}
    raises(r"student_hidden: .*37.* on process 0, .*36", **short)
    with pytest.raises(ValueError, match="expected parts that cover a vocabulary"):
        VocabShard(process.start, process.stop + 1)
    with pytest.raises(ValueError, match="expected parts that cover a vocabulary"):  # an empty part covers nothing
        VocabShard(*((0, 30), (40, 40), (40, 67), (67, 67))[process.rank]) if process.world > 2 else VocabShard(0, 5)
    with pytest.raises(ValueError, match="bounds: expected"):
        VocabShard(process.start, process.stop, bounds=((0, 68),) * process.world)
    raises("student_head: expected this process's", student_head=problem()["student_weight"].to(process.device))
    with pytest.raises(ValueError, match="rows: expected None"):
        rows = torch.arange(ROWS, device=process.device)
        linear_divergence(**given, rows=rows, shard=process.shard(sequence_parallel=True))
    raises("schedule='reference': it does not have shard", schedule="reference")
    linear_divergence(**given, shard=shard)  # and goes on


def compiled(process):
    """torch.compile takes the group with it."""
    given = {name: x.to(process.device) for name, x in problem().items() if name in PLAIN}
    given["student_head"] = process.part(given.pop("student_weight"))
    shard = VocabShard(process.start, process.stop)
    expected = linear_divergence(**given, shard=shard).loss
    loss = torch.compile(lambda **x: linear_divergence(**x, shard=shard).loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(loss(**given), expected, rtol=0, atol=0)


def losses_over_own_rows(process):
    """scsdpo_loss where each process has its own tokens: one denominator for all; and one overflow for all."""
    generator = torch.Generator().manual_seed(2)
    hidden, teacher = (torch.randn(6, 4, WIDTH, generator=generator) for _ in "st")
    head = torch.randn(VOCABULARY, WIDTH, generator=generator)
    mask = (torch.rand(6, 4, generator=generator) < 0.7).float()
    weight = torch.tensor([0.5, 0, 1.5, 1, 0, 2])
    hidden, teacher, head, mask, weight = (x.to(process.device) for x in (hidden, teacher, head, mask, weight))
    own, shard = slice(process.rank, None, process.world), process.shard(sequence_parallel=True)
    for reduction in ("token-mean", "weighted-token-mean", "sum"):
        options = {"reduction": reduction}
        whole = scsdpo_loss(hidden, head, teacher, mask=mask, question_weight=weight, **options).loss
        parts = hidden[own], process.part(head), teacher[own]
        got = scsdpo_loss(*parts, mask=mask[own], question_weight=weight[own], shard=shard, **options).loss
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="sequence-mean"):
        scsdpo_loss(*parts, mask=mask[own], question_weight=weight[own], shard=shard, reduction="sequence-mean")
    leaf = process.part(head).requires_grad_()
    divergence = linear_divergence_per_token(hidden[own], leaf, teacher[own], shard=shard)
    divergence.backward(torch.full_like(divergence, torch.inf if process.rank == 0 else 1.0))
    assert leaf.numel() == 0 or leaf.grad.isnan().all()


# The global batch.


def splits_of_a_batch(process):
    """Weights to the bit, and gradients to rounding, whichever way a batch is spread over processes and micro-batches.

    Questions straddle processes; one process may have no rollout, or degenerate questions only.
    """
    rollouts, tokens = 12, 5
    generator = torch.Generator().manual_seed(1)
    rewards = torch.tensor([1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1.0])
    question = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3])
    mask = (torch.rand(rollouts, tokens, generator=generator) < 0.7).float()
    hidden, teacher = (torch.randn(rollouts, tokens, WIDTH, generator=generator) for _ in "st")
    head = torch.randn(VOCABULARY, WIDTH, generator=generator)
    tensors = [x.to(process.device) for x in (rewards, question, mask, hidden, teacher, head)]
    rewards, question, mask, hidden, teacher, head = tensors
    expected = question_weights(rewards, question)
    for reduction in ("token-mean", "weighted-token-mean", "sequence-mean"):
        leaf = head.clone().requires_grad_()
        scsdpo_loss(hidden, leaf, teacher, question_weight=expected, mask=mask, reduction=reduction).loss.backward()
        whole = leaf.grad
        even = [rollouts * r // process.world for r in range(process.world + 1)]
        first = [0, *[rollouts] * process.world]
        uneven = [0, *[min(rollouts, 7 + r) for r in range(process.world - 1)], rollouts]
        for ends, micro in itertools.product((even, first, uneven), (1, 3, 12)):
            own = torch.arange(ends[process.rank], ends[process.rank + 1], device=process.device)
            weight = question_weights(rewards[own], question[own], group=dist.group.WORLD)
            assert torch.equal(weight, expected[own])
            total = step_denominator(mask[own], weight, reduction=reduction, group=dist.group.WORLD)
            leaf = head.clone().requires_grad_()
            for part in own.split(micro) if len(own) else (own,):
                given = {"question_weight": weight[torch.searchsorted(own, part)], "mask": mask[part]}
                given |= {"reduction": reduction, "denominator": total}
                loss = scsdpo_loss(hidden[part], leaf, teacher[part], **given).loss
                loss.backward()
            dist.all_reduce(leaf.grad)
            torch.testing.assert_close(leaf.grad, whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())


CASES = {
    function.__name__: function
    for function in (betas, targets, heads, supports, sampled_token, clipped_entries, divergences, near_equal, peaked,
                     forbidden_tokens, odd_weights, no_rows, chunks, bf16, per_token, frozen, padded_heads, dtensors,
                     sequence_parallel, losses_over_own_rows, data_and_vocabulary, disagreement, compiled,
                     splits_of_a_batch)
}  # fmt: skip


def work(rank: int, world: int, backend: str, results: str) -> None:
    torch.set_num_threads(1)
    process = Process(rank, world, backend)
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    dist.init_process_group(
        backend, init_method=f"file://{results}.rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    failures = {}
    for name, case in CASES.items():
        if failures:  # the processes may be apart now
            failures[name] = "not run after a failure"
            continue
        try:
            case(process)
        except BaseException:
            failures[name] = traceback.format_exc()
    torch.save(failures, f"{results}.{rank}")
    if not failures:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)  # whatever the others wait for


GROUPS = [(backend, world) for backend in ("gloo", "nccl") for world in CUTS]


@pytest.fixture(
    scope="module",
    params=[pytest.param(x, marks=pytest.mark.gpu) if x[0] == "nccl" else x for x in GROUPS],
    ids=[f"{backend}, {world}" for backend, world in GROUPS],
)
def failures(request, tmp_path_factory) -> list[dict[str, str]]:
    """Of every case, by process."""
    backend, world = request.param
    if backend == "nccl" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    results = str(tmp_path_factory.mktemp("results") / uuid.uuid4().hex)
    mp.spawn(work, (world, backend, results), nprocs=world)
    return [torch.load(f"{results}.{rank}") for rank in range(world)]


@pytest.mark.parametrize("case", CASES)
def test_parts_are_the_whole(failures, case):
    for rank, failed in enumerate(failures):
        if case in failed:
            pytest.fail(f"process {rank}: {failed[case]}")


def test_the_public_name():
    assert scsdpo_kernels.VocabShard is VocabShard
