"""linear_divergence_per_token: a divergence of every row that takes any upstream gradient."""

import oracle
import pytest
import torch
from problems import DTYPES, problem

from scsdpo_kernels import PolicyGradient, linear_divergence_per_token
from scsdpo_kernels.arguments import problem_of
from scsdpo_kernels.linear_divergence import DEFAULTS
from scsdpo_kernels.problem import flatten
from scsdpo_kernels.schedules import chunked

SCHEDULES = ("chunked", "reference")
BETAS = (0.0, 0.5, 1.0)


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
    given = problem((3, 5), vocabulary=301, teacher_width=24 if own else None)
    options = {"beta": beta, "temperature": 1.3}
    if importance:
        ids = torch.randint(301, (3, 5))
        options |= {"target_ids": ids, "old_logp": -5.7 + torch.randn(3, 5), "importance_clip": 1.5}
    upstream = torch.randn(3, 5)

    def above(out):
        return (torch.sin(3 * out) * upstream).sum()

    got, *gradients = given.run(linear_divergence_per_token, above, **options, schedule=schedule)
    exact, *exact_gradients = oracle.expected(given, lambda result: above(oracle.per_token(result)), **options)
    assert got.shape == (3, 5) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), oracle.per_token(exact), rtol=2e-5, atol=1e-7)
    for x, y in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_sum_is_the_weighted_loss(dtype):
    given, token_weight = problem(40, dtype=dtype), torch.randn(40).relu()
    _, *got = given.run(linear_divergence_per_token, lambda out: (out * token_weight).sum())
    _, *weighted = given.run(token_weight=token_weight)
    for x, y in zip(got, weighted, strict=True):
        assert x.dtype == dtype and torch.equal(x, y)


def test_rows_without_a_gradient_are_not_computed_again(computed):
    given = problem(30, vocabulary=101).leaves()
    inputs, teacher = given.trained, given.teacher
    out = given.call(linear_divergence_per_token)
    assert computed == [30]
    out[:7].sum().backward(retain_graph=True)
    assert computed == [30, 7] and (inputs[0].grad[7:] == 0).all() and (inputs[0].grad[:7] != 0).any()
    first = [x.grad.clone() for x in inputs]
    out[:7].sum().backward()  # again: nothing was handed over
    for x, y in zip(inputs, first, strict=True):
        torch.testing.assert_close(x.grad, 2 * y)
    frozen = inputs[0].detach()
    linear_divergence_per_token(frozen, inputs[1], teacher)[3].backward()
    assert computed[-1] == 1 and not linear_divergence_per_token(frozen, inputs[1].detach(), teacher).requires_grad


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_that_the_caller_wants(schedule):
    given, rows, upstream = problem((2, 6), vocabulary=50), torch.tensor([11, 0, 3]), torch.randn(2, 6)
    listed = torch.zeros(12, dtype=torch.bool).index_fill(0, rows, True).view(2, 6)
    some = given.run(linear_divergence_per_token, lambda out: (out * upstream).sum(), rows=rows, schedule=schedule)
    every = given.run(linear_divergence_per_token, lambda out: (out * upstream * listed).sum(), schedule=schedule)
    assert (some[0][~listed] == 0).all()
    torch.testing.assert_close(some[0][listed], every[0][listed])
    for x, y in zip(some[1:], every[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_overflown_loss_scale_shows_in_the_gradients(bad):
    given = problem(4, vocabulary=31).leaves()
    given.call(linear_divergence_per_token).backward(torch.tensor([1.0, bad, 0.0, 2.0]))
    assert all(x.grad.isnan().any() for x in given.trained)


def test_no_rows():
    out, _, grad_weight = problem(0, vocabulary=31).run(linear_divergence_per_token, torch.sum)
    assert out.shape == (0,) and (grad_weight == 0).all()


def test_one_row_without_a_leading_axis():
    given = problem((), vocabulary=31)
    out, grad_hidden, _ = given.run(linear_divergence_per_token, torch.sum)
    assert out.shape == () and grad_hidden.shape == given.hidden.shape


def test_double_backward_raises_but_in_the_reference():
    given = problem(4, vocabulary=31).leaves()
    inputs = given.trained
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(given.call(linear_divergence_per_token).sum(), inputs, create_graph=True)
    out = given.call(linear_divergence_per_token, schedule="reference")
    (grad,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    grad.square().sum().backward()
    assert inputs[1].grad.isfinite().all()


@pytest.mark.parametrize("target", [False, True])
def test_opcheck(target):
    given = problem((3, 5), width=8, vocabulary=31, teacher_width=6).leaves()
    ids, old = (torch.randint(31, (3, 5)), -3.4 + torch.rand(3, 5)) if target else (None, None)
    options = {"target_ids": ids, "old_logp": old}
    if target:
        options["policy"] = PolicyGradient(torch.randn(3, 5))
    operands = flatten(problem_of(*given, None, DEFAULTS | options))
    torch.library.opcheck(torch.ops.scsdpo_kernels.divergence_per_token.default, tuple(operands))


def test_compiled_has_the_bits_of_eager():
    given = problem((2, 9), width=16, vocabulary=101)
    upstream = torch.randn(2, 9).relu()

    def step(hidden, weight):
        return (linear_divergence_per_token(hidden, weight, given.teacher).square() * upstream).sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        inputs = given.leaves().trained
        loss = run(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "error, match, changed",
    [
        (TypeError, "student_hidden: expected a tensor", {"student_hidden": [1.0]}),
        (ValueError, "beta: ", {"beta": 1.5}),
        (ValueError, "schedule: expected one of", {"schedule": "fast"}),
        (ValueError, "rows: expected", {"rows": torch.zeros(2, 2, dtype=torch.int64)}),
        (ValueError, "rows: expected", {"rows": torch.tensor([0, 4])}),
        (ValueError, "rows: expected", {"rows": torch.tensor([0.0])}),
        (TypeError, "rows: expected a tensor", {"rows": [0]}),
        (ValueError, "old_logp: expected target_ids", {"old_logp": torch.zeros(4)}),
        (TypeError, r"token_weight: .* takes none", {"token_weight": torch.ones(4)}),
    ],
)
def test_bad_input_names_the_argument(error, match, changed):
    hidden, weight, teacher, _ = problem(4, vocabulary=31)
    arguments = {"student_hidden": hidden, "student_head": weight, "teacher_hidden": teacher, **changed}
    with pytest.raises(error, match=match):
        linear_divergence_per_token(**arguments)
