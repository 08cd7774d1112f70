"""`Head.main_grad`: a head's gradient that is added to the caller's fp32 buffer, and to nothing else."""

from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error
from problems import DTYPES, problem
from ranks import over
from test_package import LargestTensor
from test_products import on_a_gpu  # noqa: F401
from test_shards import Process
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from scsdpo_kernels import (
    Head,
    PolicyGradient,
    TopK,
    TrustRegionTeacher,
    linear_divergence,
    linear_divergence_per_token,
    scsdpo_loss,
)
from scsdpo_kernels.schedules import chunked, products

V, D, ROWS = 701, 48, 24


@pytest.fixture(params=["fp32", "bf16"])
def logit_gradients(request, monkeypatch):
    """The dtype that a bf16 head's logit gradients have, on whichever processor: a sum waits for backward, or factors.

    In small: chunks of 16 tokens.
    """
    monkeypatch.setattr(products, "multiplies_bf16", lambda tensor: request.param == "bf16")
    monkeypatch.setattr(chunked, "MIN_ROWS", 16)
    monkeypatch.setitem(chunked.BUFFER_BYTES, "cpu", 0)
    return request.param


def weight_of(given):
    return given.head if isinstance(given.head, torch.Tensor) else given.head.weight


def buffer_of(given, value=0.0):
    return torch.full(weight_of(given).shape, value, dtype=torch.float32)


def with_buffer(leaves, main_grad):
    head = Head(leaves.head) if isinstance(leaves.head, torch.Tensor) else leaves.head
    return leaves.but(head=head._replace(main_grad=main_grad))


def into_buffer(given, main_grad, of=lambda result: result.loss, op=linear_divergence, **options):
    """Leaves of a problem after one backward pass with the buffer, in the order of `Problem.trained`."""
    leaves = given.leaves()
    of(with_buffer(leaves, main_grad).call(op, **options)).backward()
    return leaves.trained


# ---------------------------------------------------------------------------------------------------------------------
# Values.


def test_four_micro_batches(logit_gradients):
    """Additions cost fp32's rounding, where those of `.grad` cost bf16's; what a micro-batch is off is its own."""
    given = problem(4 * ROWS, D, V, dtype=torch.bfloat16, weighted=True)
    parts = [slice(i * ROWS, (i + 1) * ROWS) for i in range(4)]
    _, _, exact = oracle.expected(given)

    plain, buffer, each = given.leaves(), buffer_of(given), []
    accumulated = with_buffer(given.leaves(), buffer)
    for part in parts:
        plain.tokens(part).call().loss.backward()
        accumulated.tokens(part).call().loss.backward()
        each.append(buffer_of(given))
        into_buffer(given.tokens(part), each[-1])
    assert accumulated.head.weight.grad is None
    of_addition = relative_error(buffer, sum(x.double() for x in each))
    bf16_addition = relative_error(plain.head.grad, sum(x.double() for x in each))
    ours, theirs = relative_error(buffer, exact), relative_error(plain.head.grad, exact)
    print(f"\nlogit gradients in {logit_gradients}: of addition {of_addition:.1e} and .grad's {bf16_addition:.1e};"
          f" against float64 {ours:.1e} and .grad's {theirs:.1e}")  # fmt: skip
    assert of_addition < 1e-7 and bf16_addition > 1e-3
    assert ours < theirs / (100 if logit_gradients == "fp32" else 1.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 40, 3 * D], ids="{} tokens".format)
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_everything_else_has_the_bits_that_it_had(logit_gradients, dtype, rows, kind):
    """In one chunk, several, and several groups; with bias and LoRA, or without."""
    given = problem(rows, D, V, dtype=dtype, head=kind, weighted=True)
    exact, buffer = oracle.expected(given), buffer_of(given)
    plain = given.leaves()
    plain.call().loss.backward()
    hidden, weight, *others = into_buffer(given, buffer)
    assert weight.grad is None
    for got, want in zip((hidden, *others), (plain.hidden, *plain.trained[2:]), strict=True):
        assert got.grad.dtype == want.grad.dtype and torch.equal(got.grad, want.grad)
    error = relative_error(buffer, exact[2])
    assert error <= 1.01 * relative_error(weight_of(plain).grad, exact[2]) + 1e-6
    if dtype == torch.float16 or (dtype == torch.bfloat16 and logit_gradients == "fp32"):
        assert error < 1e-5  # nothing was rounded to the weight's dtype


@pytest.mark.parametrize("rows", [3, 20, 32, 33, 70], ids="{} tokens".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_products_of_a_gpu(request, rows, dtype):
    """As test_products.py has it: one group, which is kept, and several, whose sum is."""
    given = problem(rows, 16, 197, dtype=dtype, seed=rows, weighted=True)
    exact, buffer = oracle.expected(given), buffer_of(given)
    request.getfixturevalue("on_a_gpu")
    into_buffer(given, buffer)
    plain = given.run()
    assert relative_error(buffer, exact[2]) <= 1.01 * relative_error(plain[2], exact[2]) + 1e-6


def test_products_of_bf16_numbers_are_not_rounded_to_bf16():
    """Neither where they wait for backward nor in a sum over groups."""
    generator = torch.Generator().manual_seed(0)
    groups = [products.Factors(*(torch.randn(40, n, generator=generator).bfloat16() for n in (V, D))) for _ in range(2)]
    exact = sum(2.5 * (g.double().T @ h.double()) for g, h in groups)
    later, total = torch.zeros(V, D), products.HeadGradient(torch.zeros(V, D), torch.float32, 2, None)
    for group in groups:
        products.add_product(later, group, torch.tensor(2.5))
        total.add(*group)
    assert relative_error(later, exact) < 1e-6 and relative_error(2.5 * total.result(), exact) < 1e-6


@pytest.mark.parametrize("scale", [1.0, -0.3, 3.0])
def test_the_upstream_gradient_multiplies_and_the_buffer_keeps_what_it_had(logit_gradients, scale):
    given = problem(ROWS, D, V, dtype=torch.bfloat16, weighted=True)
    once, buffer = buffer_of(given), buffer_of(given, 0.5)
    into_buffer(given, once)
    into_buffer(given, buffer, lambda result: result.loss * scale)
    torch.testing.assert_close(buffer.double(), 0.5 + scale * once.double(), rtol=2e-7, atol=0)


def test_two_losses_add_up_and_a_forward_alone_adds_nothing(logit_gradients):
    given = problem(ROWS, D, V, dtype=torch.bfloat16, weighted=True)
    separate, buffer = [buffer_of(given), buffer_of(given)], buffer_of(given)
    leaves = with_buffer(given.leaves(), buffer)
    first, second, _ = leaves.call().loss, leaves.call(beta=0.0).loss, leaves.call(beta=1.0).loss
    assert (buffer == 0).all()
    second.backward()
    first.backward()
    for one, beta in zip(separate, (0.5, 0.0), strict=True):
        into_buffer(given, one, beta=beta)
    assert torch.equal(buffer, separate[1] + separate[0])
    with pytest.raises(RuntimeError, match="differentiated before"):
        first.backward()
    assert torch.equal(buffer, separate[1] + separate[0])
    with torch.no_grad():
        leaves.call()
    assert torch.equal(buffer, separate[1] + separate[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_loss_scale_is_as_in_plain_addition(logit_gradients, dtype):
    given = problem(ROWS, D, V, dtype=dtype)
    plain, buffer = given.leaves(), buffer_of(given, 0.5)
    (plain.call().loss * torch.inf).backward()
    into_buffer(given, buffer, lambda result: result.loss * torch.inf)
    expected = torch.full(plain.head.shape, 0.5).add_(plain.head.grad)
    assert not expected.isfinite().any()
    there = plain.head.grad.isinf()  # elsewhere an underflow in 16 bits was 0 · inf
    assert torch.equal(buffer[there], expected[there]) and not buffer.isfinite().any()


def test_hidden_states_may_change_before_backward(logit_gradients):
    given = problem(ROWS, D, V, dtype=torch.bfloat16)
    expected, buffer, leaves = buffer_of(given), buffer_of(given), given.leaves()
    into_buffer(given, expected)
    loss = with_buffer(leaves, buffer).call().loss
    with torch.no_grad():
        leaves.hidden.zero_()
    loss.backward()
    assert torch.equal(buffer, expected)


def test_frozen_hidden_states_and_tokens_without_weight(logit_gradients):
    given = problem(ROWS, D, V, dtype=torch.bfloat16)
    given = given.but(token_weight=torch.ones(ROWS).index_fill(0, torch.arange(0, ROWS, 3), 0.0))
    expected, buffer, leaves = buffer_of(given), buffer_of(given), given.leaves()
    into_buffer(given, expected)
    leaves.hidden.requires_grad_(False)
    with_buffer(leaves, buffer).call().loss.backward()
    assert torch.equal(buffer, expected) and (buffer != 0).any()
    into_buffer(given.but(token_weight=torch.zeros(ROWS)), buffer)
    assert torch.equal(buffer, expected)


def test_no_fp32_sum_of_the_head_for_few_tokens(monkeypatch):
    """Neither in the forward pass nor in backward: logits, their gradients, and a slab."""
    monkeypatch.setattr(products, "multiplies_bf16", lambda tensor: True)
    monkeypatch.setattr(products, "SLAB_ROWS", 512)
    given = problem(8, 64, 4096, dtype=torch.bfloat16)
    buffer, leaves = buffer_of(given), given.leaves()
    leaves = with_buffer(leaves, buffer)
    with LargestTensor() as largest:
        loss = leaves.call().loss
        held = loss.grad_fn.gradients.weight
        loss.backward()
    assert largest.numel < buffer.numel()
    assert 2 * (held.logit_gradient.numel() + held.hidden.numel()) == 2 * 8 * (4096 + 64) < buffer.nbytes / 4
    _, _, exact = oracle.expected(given)
    assert relative_error(buffer, exact) < 5e-3


@pytest.mark.parametrize("rows, gigabytes", [(2048, 0.64), (8192, 2.56), (8193, 2.49)])
def test_what_waits_by_count(rows, gigabytes):
    """The table of docs/parallel.md."""
    vocabulary, width = 151936, 4096
    one = rows <= chunked._group_rows(rows, width)
    waits = 2 * rows * (vocabulary + width) if one else 4 * vocabulary * width
    assert round(waits / 1e9, 2) == gigabytes and round(2 * vocabulary * width / 1e9, 2) == 1.24
    page = (Path(__file__).parents[1] / "docs" / "parallel.md").read_text()
    assert f"| {rows if one else 'more'} | {gigabytes} GB | 1.24 GB |" in page


# ---------------------------------------------------------------------------------------------------------------------
# Objectives, vocabularies, autocast, compilers.


@pytest.mark.parametrize(
    "options",
    [
        {"support": TopK(9)},
        {"beta": torch.linspace(0, 1, ROWS)},
        {"target_ids": torch.arange(ROWS), "policy": PolicyGradient(torch.linspace(-1, 1, ROWS))},
    ],
    ids=["top_k", "a beta each", "policy"],
)
def test_objectives(logit_gradients, options):
    given = problem(ROWS, D, V, dtype=torch.bfloat16, weighted=True, head="softcap")
    buffer, plain = buffer_of(given), given.run(**options)
    into_buffer(given, buffer, **options)
    exact = oracle.expected(given, **options)[2]
    assert relative_error(buffer, exact) <= 1.01 * relative_error(plain[2], exact)


def test_scsdpo_loss(logit_gradients):
    given = problem((4, 6), D, V, dtype=torch.bfloat16)
    options = {"mask": torch.ones(4, 6), "question_weight": torch.tensor([0.5, 0.0, 1.0, 2.0])}
    buffer, plain = buffer_of(given), given.run(scsdpo_loss, **options)
    into_buffer(given, buffer, op=scsdpo_loss, **options)
    assert relative_error(buffer, plain[2].float()) < 5e-3


def test_rows_beyond_a_shared_prefix_are_untouched(logit_gradients):
    given = problem(ROWS, D, V, dtype=torch.bfloat16, teacher_width=D, weighted=True)
    given = given.but(teacher_head=given.teacher_head[: V - 61])
    for scale in (1.0, torch.inf):
        buffer = buffer_of(given, 0.5)
        into_buffer(given, buffer, lambda result, scale=scale: result.loss * scale, shared_prefix=True)
        assert (buffer[V - 61 :] == 0.5).all() and (buffer[: V - 61] != 0.5).any(1).all()
    buffer = buffer_of(given)
    into_buffer(given, buffer, shared_prefix=True)
    assert relative_error(buffer, oracle.expected(given, shared_prefix=True)[2]) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_token(logit_gradients, dtype):
    """Any upstream gradient, as often as the graph is kept; not finite, it makes all of the gradient NaN."""
    given, upstream = problem(ROWS, D, V, dtype=dtype), torch.linspace(-1, 1, ROWS)
    _, _, exact = oracle.expected(given, lambda result: (result.divergence * upstream).sum())
    leaves, buffer = given.leaves(), buffer_of(given)
    divergence = with_buffer(leaves, buffer).call(linear_divergence_per_token)
    (divergence * upstream).sum().backward(retain_graph=True)
    limit = 5e-3 if dtype == torch.bfloat16 else 1e-5
    assert relative_error(buffer, exact) < limit and leaves.head.grad is None
    (divergence * upstream).sum().backward(retain_graph=True)
    assert relative_error(buffer, 2 * exact) < limit and leaves.hidden.grad.abs().sum() > 0
    (divergence * torch.inf).sum().backward()
    assert buffer.isnan().all()


def test_autocast_to_bf16_of_an_fp32_parameter(logit_gradients):
    given = problem(ROWS, D, V, weighted=True)
    rounded, expected, buffer = given.to(torch.bfloat16), buffer_of(given), buffer_of(given)
    into_buffer(rounded, expected)
    weight = torch.nn.Parameter(given.head.clone())
    weight.grad_added_to_main_grad = False
    with torch.autocast("cpu", torch.bfloat16):
        loss = given.but(head=Head(weight, main_grad=buffer)).call().loss
    loss.backward()
    assert torch.equal(buffer, expected)
    assert weight.grad_added_to_main_grad and (weight.grad == 0).all()


def test_a_compiler_is_told_or_leaves_the_call_alone():
    given = problem(5, 16, 61)
    expected, buffer = buffer_of(given), buffer_of(given)
    into_buffer(given, expected)

    def step(hidden, weight, main_grad):
        return linear_divergence(hidden, Head(weight, main_grad=main_grad), given.teacher, given.teacher_head).loss * 1

    with pytest.raises(Exception, match=r"main_grad: expected None under torch\.compile"):
        torch.compile(step, fullgraph=True, backend="eager")(*given.leaves().trained, buffer)
    torch.compile(step, backend="aot_eager")(*given.leaves().trained, buffer).backward()
    assert torch.equal(buffer, expected)


def test_a_trust_regions_teacher_of_the_students_head():
    """It is made of a head that has a buffer, and has none."""
    given = problem(5, 16, 61)
    buffer, leaves = buffer_of(given), given.leaves()
    leaves = with_buffer(leaves, buffer)
    teacher = TrustRegionTeacher(leaves.head, leaves.head, 0.5)
    assert teacher.head.main_grad is None
    leaves.but(teacher=teacher.hidden(given.teacher, given.hidden), teacher_head=teacher.head).call().loss.backward()
    assert (buffer != 0).any()


# ---------------------------------------------------------------------------------------------------------------------
# A vocabulary over several processes.


@over(1, 2, 3)
@pytest.mark.parametrize("padding", [0, 5])
def test_a_part_of_a_vocabulary(group, padding):
    """Each process's part has its rows of the gradient, and nothing behind them."""
    process, given = Process(group), problem(37, 16, 67, weighted=True)
    part = process.part(given, padding=padding)
    _, _, exact = oracle.expected(given)
    buffer = torch.full(part.head.shape, 0.5, device=process.device)
    leaves = part.leaves()
    with_buffer(leaves, buffer).call(shard=process.shard()).loss.backward()
    size = process.stop - process.start
    assert leaves.head.grad is None and (buffer[size:] == 0.5).all() and len(buffer) == size + padding
    error = (buffer[:size].double().cpu() - 0.5 - exact[process.start : process.stop]).norm()
    assert error <= 1e-6 * exact.norm() + 1e-6


@over(2)
def test_a_dtensor_is_refused(group):
    given = problem(5, 16, 61)
    mesh = DeviceMesh.from_group(group, Process(group).device.type)
    weight = distribute_tensor(given.head, mesh, [Shard(0)]).requires_grad_()
    for main_grad in (torch.zeros_like(weight, requires_grad=False), torch.zeros(weight.to_local().shape)):
        with pytest.raises(
            ValueError, match=r"^student_head\.main_grad: expected plain tensors of this process's part"
        ):
            given.but(head=Head(weight, main_grad=main_grad)).call()


# ---------------------------------------------------------------------------------------------------------------------
# Megatron-LM's hooks.


class FusedLinear(torch.autograd.Function):
    """What Megatron-LM's own layers do with a weight that has a main_grad."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.weight = weight
        ctx.save_for_backward(hidden)
        return hidden @ weight.T

    @staticmethod
    def backward(ctx, upstream):
        (hidden,) = ctx.saved_tensors
        ctx.weight.main_grad += upstream.T.float() @ hidden.float()
        ctx.weight.grad_added_to_main_grad = True
        zeros = getattr(ctx.weight, "zero_out_wgrad", False)
        return upstream @ ctx.weight, torch.zeros_like(ctx.weight) if zeros else torch.empty_like(ctx.weight)


class Hooks:
    """A parameter whose hooks do what those of Megatron's DistributedDataParallel do, and write down what they saw."""

    def __init__(self, weight, tied=False):
        self.weight, self.seen = torch.nn.Parameter(weight.detach().clone()), []
        self.weight.main_grad = torch.zeros(weight.shape)
        self.weight.grad_added_to_main_grad = False
        if tied:
            self.weight.zero_out_wgrad = True
        self.node = self.weight.expand_as(self.weight).grad_fn.next_functions[0][0]
        self.node.register_hook(self.reduce)
        self.weight.register_post_accumulate_grad_hook(self.accumulated)

    def accumulated(self, weight):
        self.seen.append(("accumulated", weight.grad_added_to_main_grad, weight.grad.shape, weight.grad.dtype))

    def reduce(self, *_):
        weight = self.weight
        assert weight.grad is not None  # as with overlap_grad_reduce
        if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):
            weight.main_grad.add_(weight.grad)
        weight.grad = None
        self.seen.append(("reduced", weight.grad_added_to_main_grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hooks_run_as_after_megatrons_layers(logit_gradients, dtype):
    given = problem(ROWS, D, V, dtype=dtype)
    theirs, ours, expected = Hooks(given.head), Hooks(given.head), buffer_of(given)
    into_buffer(given, expected)
    for _ in range(2):
        FusedLinear.apply(given.hidden, theirs.weight).sum().backward()
        given.but(head=Head(ours.weight, main_grad=ours.weight.main_grad)).call().loss.backward()
    assert ours.seen == theirs.seen and len(ours.seen) == 4
    assert ours.weight.grad is None and torch.equal(ours.weight.main_grad, expected + expected)


def test_embeddings_that_are_tied_to_the_head():
    """Their gradient comes by autograd, in the same backward pass, and the hook adds it to the head's."""
    given, ids = problem(ROWS, D, V), torch.arange(ROWS) * 7
    weight = given.head.clone().requires_grad_()
    given.but(hidden=F.embedding(ids, weight), head=weight, teacher_head=given.head).call().loss.backward()
    tied = Hooks(given.head, tied=True)
    head = Head(tied.weight, main_grad=tied.weight.main_grad)
    given.but(hidden=F.embedding(ids, tied.weight), head=head, teacher_head=given.head).call().loss.backward()
    assert len(tied.seen) == 2 and tied.weight.grad is None
    assert relative_error(tied.weight.main_grad, weight.grad) < 1e-6


def test_a_weight_without_megatrons_attribute_gets_no_gradient():
    given, reduced, accumulated = problem(ROWS, D, V), [], []
    weight, buffer = torch.nn.Parameter(given.head.clone()), buffer_of(given)
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: reduced.append(weight.grad))
    weight.register_post_accumulate_grad_hook(lambda _: accumulated.append(weight.grad))
    given.but(head=Head(weight, main_grad=buffer)).call().loss.backward()
    assert reduced == [None] and set(accumulated) <= {None} and weight.grad is None
    assert not hasattr(weight, "grad_added_to_main_grad") and (buffer != 0).any()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


def test_refusals():
    given = problem(5, 16, 61, teacher_width=12)
    weight = given.head.requires_grad_()
    overwritten = torch.nn.Parameter(given.head.detach())
    overwritten.overwrite_main_grad = True
    zeros = torch.zeros(61, 16)
    cases = [
        (Head(weight, main_grad=[]), TypeError, "expected a tensor, got list"),
        (Head(weight, main_grad=zeros.bfloat16()), TypeError, "expected torch.float32, got torch.bfloat16"),
        (Head(weight, main_grad=zeros[:60]), ValueError, r"expected the weight's shape \(61, 16\), got \(60, 16\)"),
        (Head(weight, main_grad=zeros.to("meta")), ValueError, "expected student_hidden's device cpu, got meta"),
        (Head(weight, main_grad=zeros.clone().requires_grad_()), ValueError, "does not require grad, got one that"),
        (Head(weight.detach(), main_grad=zeros), ValueError, "a weight that requires grad with it"),
        (Head(weight, main_grad=zeros[:1].expand(61, 16)), ValueError, r"do not overlap, got strides \(0, 1\)"),
        (Head(weight, main_grad=torch.zeros(16, 61).T), ValueError, r"of unit stride .* got strides \(1, 61\)"),
        (Head(overwritten, main_grad=zeros), ValueError, "without overwrite_main_grad"),
    ]
    for head, error, message in cases:
        for op in (linear_divergence, linear_divergence_per_token):
            with pytest.raises(error, match=rf"^student_head\.main_grad: .*{message}"):
                given.but(head=head).call(op)
    head = Head(weight, main_grad=zeros)
    for op in (linear_divergence, linear_divergence_per_token):
        with pytest.raises(ValueError, match=r"^student_head\.main_grad: expected None with schedule='reference'"):
            given.but(head=head).call(op, schedule="reference")
        with pytest.raises(ValueError, match=r"^teacher_head\.main_grad: expected None, since a teacher"):
            given.but(teacher_head=Head(given.teacher_head, main_grad=torch.zeros(61, 12))).call(op)
    assert (zeros == 0).all()
    with torch.no_grad():  # evaluation of a head that is trained
        given.but(head=head).call()


def test_rows_of_a_larger_buffer():
    """As Megatron's are parts of one: whatever lies between rows is left."""
    given = problem(ROWS, D, V)
    expected, whole = buffer_of(given), torch.zeros(V, D + 8)
    into_buffer(given, expected)
    into_buffer(given, whole[:, 4:-4])
    assert torch.equal(whole[:, 4:-4], expected) and (whole[:, :4] == 0).all() and (whole[:, -4:] == 0).all()
