"""The torch.library operator: opcheck, compile, autocast, modes of autograd, and what bad input gets."""

import oracle
import pytest
import torch
from inside import Inside
from problems import DTYPES, known, problem

from scsdpo_kernels import PolicyGradient, TopK, TopLogprobs, checks, linear_divergence
from scsdpo_kernels.arguments import problem_of
from scsdpo_kernels.kernels import native
from scsdpo_kernels.linear_divergence import DEFAULTS
from scsdpo_kernels.problem import flatten
from scsdpo_kernels.schedules import products
from scsdpo_kernels.schedules.rows import complete


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)], ids=["both", "hidden", "head"])
def test_opcheck(dtype, beta, target, wants):
    hidden, weight, teacher, head = problem((3, 5), width=8, vocabulary=31, teacher_width=6, dtype=dtype)
    ids, old = (torch.randint(31, (3, 5)), -3.4 + torch.rand(3, 5)) if target else (None, None)
    inputs = hidden.requires_grad_(wants[0]), weight.requires_grad_(wants[1])
    options = {"target_ids": ids, "old_logp": old, "beta": beta}
    if target:
        options["policy"] = PolicyGradient(torch.randn(3, 5), coefficient=torch.rand(3, 5), ratio=torch.rand(3, 5))
    leaves = flatten(problem_of(*inputs, teacher, head, torch.randn(3, 5), DEFAULTS | options))
    torch.library.opcheck(torch.ops.scsdpo_kernels.divergence.default, (*leaves, [*wants, False, False, False]))


@pytest.mark.parametrize("operator, rest", [("divergence", ([True] * 5,)), ("divergence_per_token", ())])
@pytest.mark.parametrize("support", ["top_k", "top_logprobs"])
def test_opcheck_of_every_argument(support, operator, rest):
    given = problem(7, width=8, vocabulary=31, teacher_width=6, head="all", teacher_head="all").leaves()
    options = {"support": TopK(4)}
    if support == "top_logprobs":
        given = given.but(teacher=None, teacher_head=None)
        options["support"] = TopLogprobs(torch.arange(21).view(7, 3), torch.full((7, 3), -2.0))
    leaves = flatten(problem_of(*given, None, DEFAULTS | options))
    torch.library.opcheck(getattr(torch.ops.scsdpo_kernels, operator).default, (*leaves, *rest))


@pytest.mark.parametrize("dtype, backend", zip(DTYPES, ("inductor", "aot_eager", "aot_eager"), strict=True))
def test_compiled_has_the_bits_of_eager(dtype, backend):
    given = problem((2, 9), width=16, vocabulary=101, dtype=dtype)
    options = {"token_weight": torch.randn(2, 9).relu(), "target_ids": torch.randint(101, (2, 9))}
    options["old_logp"] = -4.6 + torch.randn(2, 9)
    options["policy"] = PolicyGradient(torch.randn(2, 9), coefficient=0.5)

    def step(hidden, weight):
        result = linear_divergence(hidden, weight, given.teacher, **options)
        return result.loss * 3, *(x for x in result[1:] if x is not None)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        inputs = given.leaves().trained
        outputs = run(*inputs)
        results.append((*outputs, *torch.autograd.grad(outputs[0], inputs)))
        assert [x.requires_grad for x in outputs] == [True] + [False] * 8
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_compiled_with_other_numbers_and_sizes():
    """beta, temperature and the number of rows change from call to call, under fullgraph, with the bits of eager."""
    hidden, weight, teacher, _ = problem(width=16, vocabulary=101)

    def step(hidden, weight, teacher, beta, temperature):
        return linear_divergence(hidden, weight, teacher, beta=beta, temperature=temperature).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    cases = [(3, 0.5, 1.0), (4, 0.3, 0.7), (9, 0.25, 1.5), (37, 0.0, 2.0), (1, 1.0, 1.0), (0, 0.5, 3.0)]
    for rows, beta, temperature in cases:
        results = []
        for run in (step, compiled):
            inputs = hidden[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
            loss = run(*inputs, teacher[:rows], beta, temperature)
            results.append((loss, *torch.autograd.grad(loss, inputs)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True)), (rows, beta, temperature)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(compiled, dtype):
    """fp32 hidden states and heads are cast as F.linear casts them; the op's own arithmetic is left alone."""
    hidden, weight, teacher, _ = problem()
    expected, expected_hidden, expected_weight = problem().to(dtype).run()

    def run(hidden, weight):
        return linear_divergence(hidden, weight, teacher)

    inputs = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        result = (torch.compile(run, fullgraph=True) if compiled else run)(*inputs)
    gradients = torch.autograd.grad(result.loss, inputs)
    assert torch.equal(result.divergence, expected.divergence)
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    # A compiler may leave out the rounding of a gradient to half precision on its way to fp32.
    close = {"rtol": 2**-10, "atol": 1e-7} if compiled and dtype == torch.float16 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(gradients[0], expected_hidden.float(), **close)
    torch.testing.assert_close(gradients[1], expected_weight.float(), **close)


def test_autocast_mixes_dtypes_as_a_linear_layer_does():
    hidden, weight, teacher, _ = problem()
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_divergence(hidden.bfloat16(), weight, teacher)
    assert torch.equal(result.loss, linear_divergence(hidden.bfloat16(), weight.bfloat16(), teacher.bfloat16()).loss)


def test_reference_under_autocast_keeps_fp32_logits():
    hidden, weight, teacher, _ = problem()
    expected = linear_divergence(hidden.bfloat16(), weight.bfloat16(), teacher.bfloat16(), schedule="reference")
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_divergence(hidden, weight, teacher, schedule="reference")
    assert torch.equal(result.divergence, expected.divergence)


class Calls:
    """Counts what the chunked schedule does, from inside."""

    def __init__(self, monkeypatch):
        self.back_projections = self.head_gradients = 0
        self.logit_gradients = []
        back_project, add, row = products.back_project, products.HeadGradient.add, native.row_divergence

        def counted_back_project(*args):
            self.back_projections += 1
            return back_project(*args)

        def counted_add(*args):
            self.head_gradients += 1
            return add(*args)

        def counted_row(logits, rows, objective, gradient=None):
            self.logit_gradients.append(gradient is not None)
            return row(logits, rows, objective, gradient)

        monkeypatch.setattr(products, "back_project", counted_back_project)
        monkeypatch.setattr(products.HeadGradient, "add", counted_add)
        monkeypatch.setattr(native, "row_divergence", counted_row)


@pytest.mark.parametrize("train_hidden", [True, False])
@pytest.mark.parametrize("train_head", [True, False])
def test_what_is_frozen_costs_no_product(monkeypatch, train_hidden, train_head):
    hidden, weight, teacher, _ = given = problem()
    _, expected_hidden, expected_weight = given.run()
    calls = Calls(monkeypatch)
    hidden.requires_grad_(train_hidden)
    weight.requires_grad_(train_head)
    loss = linear_divergence(hidden, weight, teacher).loss
    assert calls.logit_gradients == [train_hidden or train_head]
    assert (calls.back_projections, calls.head_gradients) == (int(train_hidden), int(train_head))
    assert loss.requires_grad == (train_hidden or train_head)
    if loss.requires_grad:
        loss.backward()
    assert torch.equal(hidden.grad, expected_hidden) if train_hidden else hidden.grad is None
    assert torch.equal(weight.grad, expected_weight) if train_head else weight.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_work_without_grad_mode(monkeypatch, mode):
    hidden, weight, teacher, _ = problem()
    expected = linear_divergence(hidden, weight, teacher).loss
    calls = Calls(monkeypatch)
    hidden.requires_grad_()
    weight.requires_grad_()
    with mode():
        loss = linear_divergence(hidden, weight, teacher).loss
    assert not loss.requires_grad and torch.equal(loss, expected)
    assert calls.logit_gradients == [False] and calls.back_projections == calls.head_gradients == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradient_scales(dtype):
    """Also where it is large: a loss scaler's 2^16 meets fp16 gradients before they are rounded to fp16."""
    given = problem(dtype=dtype)
    token_weight = torch.full((37,), 1e-7)  # a token-mean over ten million tokens
    _, *once = given.run()
    _, *scaled = given.run(of=lambda result: result.loss * 1e7, token_weight=token_weight)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for got, want in zip(scaled, once, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def test_gradients_accumulate():
    given = problem().leaves()
    _, *once = given.run()
    for _ in range(3):
        given.call().loss.backward()
    for leaf, gradient in zip(given.trained, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient)


def test_gradients_are_handed_over_without_a_copy(monkeypatch):
    """The head's gradient that backward scales and returns is the one that forward made: no second (V, D)."""
    made = []
    result = products.HeadGradient.result

    def noted_result(self):
        gradient = result(self)
        made.append(gradient.data_ptr())
        return gradient

    monkeypatch.setattr(products.HeadGradient, "result", noted_result)
    hidden, weight, teacher, _ = problem()
    weight.requires_grad_()
    (linear_divergence(hidden, weight, teacher).loss * 0.25).backward()
    assert made == [weight.grad.data_ptr()]


def test_second_backward_raises_and_leaves_the_first_alone():
    given = problem()
    _, expected, _ = given.run()
    given.hidden.requires_grad_()
    loss = given.call().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()
    assert torch.equal(given.hidden.grad, expected)


def test_double_backward_raises():
    hidden, weight, teacher, _ = problem()
    hidden.requires_grad_()
    loss = linear_divergence(hidden, weight, teacher).loss
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """Inside activation checkpointing, where backward runs the forward again: right, however often that is."""
    hidden, weight, teacher, _ = problem()
    calls = []

    def model(hidden, weight):
        calls.append(len(calls))
        return linear_divergence(hidden.tanh(), weight, teacher).loss

    inputs = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(model(*inputs), inputs)
    calls.clear()
    torch.utils.checkpoint.checkpoint(model, *inputs, use_reentrant=reentrant).backward()
    assert len(calls) == 2
    for x, gradient in zip(inputs, expected, strict=True):
        assert torch.equal(x.grad, gradient)


def bad_calls():
    hidden, weight, teacher, _ = problem((4, 5), width=8, vocabulary=31)
    good = {"student_hidden": hidden, "student_head": weight, "teacher_hidden": teacher}
    ones = torch.ones(4, 5)
    nan, inf = ones.clone(), ones.clone()
    nan[1, 1], inf[0, 0] = torch.nan, -torch.inf
    ids = torch.zeros(4, 5, dtype=torch.long)
    cases = [
        ("student_hidden", TypeError, {"student_hidden": hidden.long()}),
        ("student_hidden", TypeError, {"student_hidden": hidden.double()}),
        ("teacher_hidden", TypeError, {"teacher_hidden": teacher.to(torch.float64)}),
        ("student_hidden", ValueError, {"student_hidden": torch.tensor(1.0)}),
        ("teacher_hidden", ValueError, {"teacher_hidden": teacher[:3]}),
        ("student_head", ValueError, {"student_head": weight.t()}),
        ("student_head", ValueError, {"student_head": weight[0]}),
        ("student_head", ValueError, {"student_head": weight[:0]}),
        ("student_head", TypeError, {"student_head": weight.bfloat16()}),
        ("student_head", ValueError, {"student_head": weight.to("meta")}),
        ("which the teacher shares", ValueError, {"teacher_hidden": teacher[..., :6]}),
        ("teacher_head", ValueError, {"teacher_head": weight[:30]}),
        ("teacher_head", TypeError, {"teacher_head": weight.half()}),
        ("teacher_hidden", ValueError, {"teacher_hidden": teacher.to("meta")}),
        ("token_weight", ValueError, {"token_weight": ones[:3]}),
        ("token_weight", TypeError, {"token_weight": ones.to(torch.complex64)}),
        ("token_weight", ValueError, {"token_weight": nan}),
        ("token_weight", ValueError, {"token_weight": inf}),
        ("token_weight", ValueError, {"token_weight": ones.to("meta")}),
        ("target_ids", ValueError, {"target_ids": ids[0]}),
        ("target_ids", TypeError, {"target_ids": ids.float()}),
        ("target_ids", ValueError, {"target_ids": ids + 31}),
        ("target_ids", ValueError, {"target_ids": ids - 1}),
        ("target_ids", TypeError, {"target_ids": ids.to(torch.complex64)}),
        ("target_ids", TypeError, {"target_ids": ids.to(torch.uint16)}),
        ("student_hidden", TypeError, {"student_hidden": hidden.tolist()}),
        ("student_head", TypeError, {"student_head": None}),
        ("teacher_hidden", TypeError, {"teacher_hidden": teacher.numpy()}),
        ("token_weight", TypeError, {"token_weight": 1.0}),
        ("token_weight", ValueError, {"token_weight": ones.double() * 1e39}),
        ("beta", TypeError, {"beta": "0.5"}),
        ("temperature", TypeError, {"temperature": None}),
        ("temperature", ValueError, {"temperature": 1e-39}),
        ("temperature", ValueError, {"temperature": 1e39}),
        ("beta", ValueError, {"beta": -0.1}),
        ("beta", ValueError, {"beta": 1.5}),
        ("beta", ValueError, {"beta": float("nan")}),
        ("temperature", ValueError, {"temperature": 0.0}),
        ("temperature", ValueError, {"temperature": -1.0}),
        ("temperature", ValueError, {"temperature": float("inf")}),
        ("rows", TypeError, {"rows": [0, 1]}),
        ("rows", ValueError, {"rows": torch.tensor([[0, 1, 2]])}),
        ("rows", ValueError, {"rows": torch.tensor([0, 1, 2], dtype=torch.int32)}),
        ("rows: expected indices in", ValueError, {"rows": torch.tensor([0, 1, 9999])}),
        ("rows: expected every row", ValueError, {"rows": torch.tensor([0, 2])}),
        ("rows: expected every row", ValueError, {"rows": torch.tensor([0, 1, 1, 2])}),
    ]
    return [
        pytest.param({**good, **change}, error, match, id=f"{number}-{match}")
        for number, (match, error, change) in enumerate(cases)
    ]


@pytest.mark.parametrize("arguments, error, match", bad_calls())
def test_bad_input_names_the_argument(arguments, error, match):
    with pytest.raises(error, match=match):
        linear_divergence(**arguments)


def test_values_are_checked_by_the_reference_too():
    hidden, weight, teacher, _ = problem()
    with pytest.raises(ValueError, match="token_weight"):
        linear_divergence(hidden, weight, teacher, token_weight=torch.full((37,), torch.nan), schedule="reference")


@pytest.mark.parametrize("schedule", ["chunked", "reference"])
def test_ids_of_skipped_rows_are_not_looked_at(schedule):
    """-100 at masked tokens is how labels are padded."""
    hidden, weight, teacher, _ = problem()
    mask = torch.arange(37) % 2 == 0
    ids = torch.where(mask, 5, -100)
    result = linear_divergence(hidden, weight, teacher, token_weight=mask, target_ids=ids, schedule=schedule)
    assert (result.student_logp[mask] < 0).all() and (result.student_logp[~mask] == 0).all()


def test_a_schedule_that_cannot_run_says_why(monkeypatch):
    hidden, weight, teacher, _ = problem()
    with pytest.raises(ValueError, match="expected one of auto, chunked, reference, got 'fastest'"):
        linear_divergence(hidden, weight, teacher, schedule="fastest")
    elsewhere = hidden.to("meta"), weight.to("meta"), teacher.to("meta")
    with pytest.raises(ValueError, match=r"'chunked'.*no kernels for device 'meta'"):
        linear_divergence(*elsewhere, schedule="chunked")
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"'auto'.*need Triton, which is not installed"):
        linear_divergence(*elsewhere)
    assert linear_divergence(hidden, weight, teacher).loss > 0  # a CPU needs none


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_the_question_whether_a_schedule_runs_is_traced(device):
    """On every device: a GPU's answer is compiled into one graph too."""

    def step(x):
        return x + (checks.why_not("chunked", torch.device(device)) is None)

    expected = 0.0 if device == "meta" else 1.0
    assert torch.compile(step, fullgraph=True, backend="eager")(torch.zeros(())) == expected


@pytest.mark.parametrize("schedule", ["chunked", "reference"])
def test_rows_that_the_caller_knows(schedule):
    """The list may have rows of weight 0 as well, and any order: the loss and the gradients are those without it."""
    given = problem((3, 4), vocabulary=50)
    token_weight = torch.randn(3, 4)
    token_weight[1] = 0
    ids = torch.randint(50, (3, 4))
    options = {"token_weight": token_weight, "target_ids": ids, "schedule": schedule}
    options["old_logp"] = -4.0 + torch.randn(3, 4)
    expected, *gradients = given.run(**options)
    rows = torch.tensor([11, 0, 1, 2, 3, 8, 9, 10, 5])
    result, *got = given.run(rows=rows, **options)
    for x, y in zip((result.loss, *got), (expected.loss, *gradients), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    listed = torch.zeros(12, dtype=torch.bool).index_fill(0, rows, True).view(3, 4)
    for x, y in zip(known(result).values(), known(expected).values(), strict=True):
        torch.testing.assert_close(x[token_weight != 0], y[token_weight != 0], rtol=1e-5, atol=1e-5)
        assert (x[~listed] == 0).all()
    assert result.divergence[1, 1] > 0  # listed, though its weight is 0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("schedule", ["chunked", "reference"])
def test_all_rows_in_another_order(schedule, stride):
    given = problem(12, vocabulary=50)
    expected, *gradients = given.run(schedule=schedule)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([order] * stride, dim=1)[:, 0]
    assert rows.stride() == (stride,)
    result, *got = given.run(rows=rows, schedule=schedule)
    for x, y in zip((result.divergence, *got), (expected.divergence, *gradients), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "rows, weight, right",
    [
        ([0, 1, 2], [1.0, 2.0, 3.0], True),
        ([2, 0], [1.0, 0.0, 3.0], True),
        ([1, 2, 0], [1.0, 0.0, 3.0], True),
        ([], [0.0, 0.0], True),
        ([0, 1], [1.0, 2.0, 3.0], False),
        ([0, 0, 0], [1.0, 2.0, 3.0], False),
        ([0, 2, 2], [1.0, 0.0, 3.0], False),
        ([1, 1, 0], [1.0, 0.0], False),
        ([0, -1], [1.0, 2.0], False),
        ([0, 2], [1.0, 2.0], False),
        ([], [1.0], False),
    ],
)
def test_a_list_of_rows_is_complete_or_not(rows, weight, right):
    assert complete(torch.tensor(rows, dtype=torch.long), torch.tensor(weight)).item() == right


@pytest.mark.parametrize("case", ["transposed", "narrower"])
def test_heads_that_share_memory_but_not_shape_or_strides(case):
    """A transposed head is itself on both sides; a narrower view of the student's is a head of its own."""
    given = problem(12, width=16, vocabulary=50)
    if case == "transposed":
        given = given.but(head=given.head.t().contiguous().t())
    else:
        given = given.but(teacher=given.teacher[:, :8], teacher_head=given.head[:, :8])
    (exact, *exact_gradients), (result, *gradients) = oracle.expected(given), given.run()
    for got, want in zip((result.divergence, *gradients), (exact.divergence, *exact_gradients), strict=True):
        assert oracle.relative_error(got, want) < 3e-6


WAITING = {"item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}


class Waits(Inside):
    """Names of operators that would make the host wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.names = []

    def saw(self, func, args, out):
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.names.append(name)
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.names.append("index by a mask")


def test_the_host_waits_for_nothing_but_the_number_of_rows(monkeypatch):
    """What needs a value on the host is asked for in one transfer."""
    hidden, weight, teacher, _ = problem((3, 4), vocabulary=50)
    options = {"target_ids": torch.zeros(3, 4, dtype=torch.long)}
    transfers, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(len(self)) or tolist(self))
    hidden.requires_grad_()
    weight.requires_grad_()
    with Waits() as waits:
        loss = linear_divergence(hidden, weight, teacher, **options).loss
    assert loss > 0 and len(transfers) == 1 and waits.names == []
