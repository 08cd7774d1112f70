"""linear_divergence_per_token: a divergence of every row that takes any upstream gradient."""

import pytest
import torch
from test_linear_divergence import DTYPES, problem

from scsdpo_kernels import linear_divergence, linear_divergence_per_token
from scsdpo_kernels.linear_divergence import problem_of
from scsdpo_kernels.problem import flatten
from scsdpo_kernels.schedules import chunked

SCHEDULES = ("chunked", "reference")
BETAS = (0.0, 0.5, 1.0)


def leaves(hidden, weight):
    return hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()


@pytest.fixture
def computed(monkeypatch):
    """How many rows each call of the fused operator has projected."""
    counts, run = [], chunked.run
    monkeypatch.setattr(chunked, "run", lambda plan: counts.append(len(plan.rows.given.weight)) or run(plan))
    return counts


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["shared head", "own head"])
def test_any_upstream_gradient(schedule, beta, importance, own):
    """Values and gradients of Σ f(D) are autograd's through full logits in float64."""
    hidden, weight, teacher, head = problem(leading=(3, 5), vocabulary=301, teacher_width=24 if own else None)
    options = {"beta": beta, "temperature": 1.3}
    if importance:
        ids = torch.randint(301, (3, 5))
        options |= {"target_ids": ids, "old_logp": -5.7 + torch.randn(3, 5), "importance_clip": 1.5}
    inputs, exact_inputs = leaves(hidden, weight), leaves(hidden.double(), weight.double())
    got = linear_divergence_per_token(*inputs, teacher, head, **options, schedule=schedule)
    exact = linear_divergence_per_token(
        *exact_inputs, teacher.double(), None if head is None else head.double(), **options, schedule="reference"
    )
    assert got.shape == (3, 5) and got.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=1e-7)
    upstream = torch.randn(3, 5)
    gradients = torch.autograd.grad((torch.sin(3 * got) * upstream).sum(), inputs)
    expected = torch.autograd.grad((torch.sin(3 * exact) * upstream).sum(), exact_inputs)
    for x, y in zip(gradients, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_sum_is_the_weighted_loss(dtype):
    hidden, weight, teacher, _ = problem(leading=(40,), dtype=dtype)
    token_weight = torch.randn(40).relu()
    inputs, others = leaves(hidden, weight), leaves(hidden, weight)
    (linear_divergence_per_token(*inputs, teacher) * token_weight).sum().backward()
    linear_divergence(*others, teacher, token_weight=token_weight).loss.backward()
    for x, y in zip(inputs, others, strict=True):
        assert x.grad.dtype == dtype and torch.equal(x.grad, y.grad)


def test_rows_without_a_gradient_are_not_computed_again(computed):
    hidden, weight, teacher, _ = problem(leading=(30,), vocabulary=101)
    inputs = leaves(hidden, weight)
    out = linear_divergence_per_token(*inputs, teacher)
    assert computed == [30]
    out[:7].sum().backward(retain_graph=True)
    assert computed == [30, 7] and (inputs[0].grad[7:] == 0).all() and (inputs[0].grad[:7] != 0).any()
    first = [x.grad.clone() for x in inputs]
    out[:7].sum().backward()  # again: nothing was handed over
    for x, y in zip(inputs, first, strict=True):
        torch.testing.assert_close(x.grad, 2 * y)
    frozen = inputs[0].detach()
    linear_divergence_per_token(frozen, inputs[1], teacher)[3].backward()
    assert computed[-1] == 1 and not linear_divergence_per_token(frozen, weight, teacher).requires_grad


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_that_the_caller_wants(schedule):
    hidden, weight, teacher, _ = problem(leading=(2, 6), vocabulary=50)
    rows = torch.tensor([11, 0, 3])
    inputs, others = leaves(hidden, weight), leaves(hidden, weight)
    out = linear_divergence_per_token(*inputs, teacher, rows=rows, schedule=schedule)
    every = linear_divergence_per_token(*others, teacher, schedule=schedule)
    listed = torch.zeros(12, dtype=torch.bool).index_fill(0, rows, True).view(2, 6)
    assert (out[~listed] == 0).all()
    torch.testing.assert_close(out[listed], every[listed])
    upstream = torch.randn(2, 6)
    (out * upstream).sum().backward()
    (every * upstream * listed).sum().backward()
    for x, y in zip(inputs, others, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


def test_an_overflown_loss_scale_shows_in_the_gradients():
    hidden, weight, teacher, _ = problem(leading=(4,), vocabulary=31)
    for bad in (torch.inf, torch.nan):
        inputs = leaves(hidden, weight)
        out = linear_divergence_per_token(*inputs, teacher)
        out.backward(torch.tensor([1.0, bad, 0.0, 2.0]))
        assert all(x.grad.isnan().any() for x in inputs)


def test_empty_and_single_rows():
    hidden, weight, teacher, _ = problem(leading=(0,), vocabulary=31)
    inputs = leaves(hidden, weight)
    out = linear_divergence_per_token(*inputs, teacher)
    out.sum().backward()
    assert out.shape == (0,) and (inputs[1].grad == 0).all()
    hidden, weight, teacher, _ = problem(leading=(), vocabulary=31)
    inputs = leaves(hidden, weight)
    out = linear_divergence_per_token(*inputs, teacher)
    out.backward()
    assert out.shape == () and inputs[0].grad.shape == hidden.shape


def test_double_backward_raises_but_in_the_reference():
    hidden, weight, teacher, _ = problem(leading=(4,), vocabulary=31)
    inputs = leaves(hidden, weight)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(linear_divergence_per_token(*inputs, teacher).sum(), inputs, create_graph=True)
    out = linear_divergence_per_token(*inputs, teacher, schedule="reference")
    (grad,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    grad.square().sum().backward()
    assert inputs[1].grad.isfinite().all()


@pytest.mark.parametrize("target", [False, True])
def test_opcheck(target):
    hidden, weight, teacher, head = problem(leading=(3, 5), width=8, vocabulary=31, teacher_width=6)
    ids, old = (torch.randint(31, (3, 5)), -3.4 + torch.rand(3, 5)) if target else (None, None)
    operands = flatten(problem_of(*leaves(hidden, weight), teacher, head, target_ids=ids, old_logp=old))
    torch.library.opcheck(torch.ops.scsdpo_kernels.divergence_per_token.default, tuple(operands))


def test_compiled_has_the_bits_of_eager():
    hidden, weight, teacher, _ = problem(leading=(2, 9), width=16, vocabulary=101)
    upstream = torch.randn(2, 9).relu()

    def step(hidden, weight):
        return (linear_divergence_per_token(hidden, weight, teacher).square() * upstream).sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        inputs = leaves(hidden, weight)
        loss = run(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-9)


def test_bad_input_names_the_argument():
    hidden, weight, teacher, _ = problem(leading=(4,), vocabulary=31)
    for error, match, changed in (
        (TypeError, "student_hidden: expected a tensor", {"student_hidden": [1.0]}),
        (ValueError, "beta: ", {"beta": 1.5}),
        (ValueError, "schedule: expected one of", {"schedule": "fast"}),
        (ValueError, "rows: expected", {"rows": torch.zeros(2, 2, dtype=torch.int64)}),
        (ValueError, "rows: expected", {"rows": torch.tensor([0, 4])}),
        (ValueError, "rows: expected", {"rows": torch.tensor([0.0])}),
        (TypeError, "rows: expected a tensor", {"rows": [0]}),
        (ValueError, "old_logp: expected target_ids", {"old_logp": torch.zeros(4)}),
    ):
        arguments = {"student_hidden": hidden, "student_head": weight, "teacher_hidden": teacher, **changed}
        with pytest.raises(error, match=match):
            linear_divergence_per_token(**arguments)
    with pytest.raises(TypeError, match=r"token_weight: .* takes none"):
        linear_divergence_per_token(hidden, weight, teacher, token_weight=torch.ones(4))
