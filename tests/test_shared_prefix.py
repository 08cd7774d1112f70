"""Vocabularies of unequal length: both sides have the shorter one's tokens, and the rest is forbidden."""

import math
from typing import NamedTuple

import oracle
import pytest
import torch
from conftest import DEVICE
from oracle import assert_near, relative_error
from problems import DTYPES, Problem, head_of, problem
from torch.utils._pytree import tree_leaves

from scsdpo_kernels import (
    Head,
    SampledToken,
    TopK,
    TopLogprobs,
    linear_divergence,
    linear_divergence_per_token,
    scsdpo_loss,
)
from scsdpo_kernels.arguments import problem_of
from scsdpo_kernels.linear_divergence import DEFAULTS
from scsdpo_kernels.problem import flatten
from scsdpo_kernels.schedules import chunked, products

SHORT, LONG, D = 283, 307, 24
LONGER = ("student", "teacher")
PREFIX = {"shared_prefix": True}

of_each_longer = pytest.mark.parametrize("longer", LONGER, ids="longer {}".format)


def unequal(longer: str, rows=9, *, kind="plain", dtype=torch.float32, weighted=False) -> Problem:
    """Heads of their own, of which one has more rows than the other."""
    given = problem(rows, D, LONG, scale=2.0, teacher_width=16, dtype=dtype, weighted=weighted)
    heads = {"head": given.head, "teacher_head": given.teacher_head}
    shorter = "teacher_head" if longer == "student" else "head"
    heads[shorter] = heads[shorter][:SHORT].clone()
    return given.but(**{name: head_of(kind, weight, seed=i) for i, (name, weight) in enumerate(heads.items())})


class Objective(NamedTuple):
    options: dict
    targets: bool = False


OBJECTIVES = {
    "forward KL": Objective({"beta": 0.0, "temperature": 0.8}),
    "Jensen-Shannon": Objective({"beta": 0.3}),
    "reverse KL": Objective({"beta": 1.0}),
    "importance ratios": Objective({"importance_clip": 1.5}, targets=True),
    "top_k": Objective({"support": TopK(11)}),
    "top_k of more than both have": Objective({"support": TopK(SHORT + 5, "renormalize"), "beta": 1.0}),
    "sampled_token": Objective({"support": SampledToken(), "beta": 1.0}, targets=True),
    "entry_clip": Objective({"entry_clip": 0.02, "beta": 0.0}),
}


def options_of(objective: Objective, *leading: int) -> dict:
    generator = torch.Generator().manual_seed(3)
    if not objective.targets:
        return {**objective.options, **PREFIX}
    ids = torch.randint(SHORT, leading, generator=generator)
    return {**objective.options, **PREFIX, "target_ids": ids, "old_logp": torch.randn(leading, generator=generator) - 5}


@of_each_longer
@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_whole_gradients(kernels, name, kind, longer, monkeypatch):
    """Against float64, in two chunks, with negative weights: of hidden states, weight, bias and adapter."""
    monkeypatch.setattr(chunked, "MIN_ROWS", 3)
    monkeypatch.setattr(chunked, "BUFFER_BYTES", dict.fromkeys(chunked.BUFFER_BYTES, 0))
    given = unequal(longer, 5, kind=kind, weighted=True)
    options = options_of(OBJECTIVES[name], 5)
    got, exact = given.run(**options), oracle.expected(given, **options)
    torch.testing.assert_close(got[0].divergence.double(), exact[0].divergence, rtol=3e-5, atol=1e-7)
    assert_near(got, exact, limit=5e-5)
    for field, other in zip(got[0][2:], exact[0][2:], strict=True):
        assert field is None if other is None else relative_error(field, other) < 1e-5
    for tensor, gradient in zip(given.trained, got[1:], strict=True):
        assert gradient.shape == tensor.shape
        if len(tensor) == LONG:
            assert (gradient[SHORT:] == 0).all() and (gradient[:SHORT] != 0).any()


@of_each_longer
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_reference(name, longer):
    """In float64, every field."""
    given = unequal(longer, kind="all", weighted=True).to(torch.float64)
    options = options_of(OBJECTIVES[name], 9)
    got, exact = given.run(**options, schedule="reference"), oracle.expected(given, **options)
    torch.testing.assert_close((*got[0], *got[1:]), (*exact[0], *exact[1:]), rtol=1e-7, atol=1e-9)


@of_each_longer
@pytest.mark.parametrize("name", OBJECTIVES)
def test_per_token(kernels, name, longer):
    given, upstream = unequal(longer, (2, 2)), torch.randn(2, 2, generator=torch.Generator().manual_seed(5))
    options = options_of(OBJECTIVES[name], 2, 2)
    out, *gradients = given.run(linear_divergence_per_token, lambda out: (out.sin() * upstream).sum(), **options)
    exact, *exact_gradients = oracle.expected(
        given, lambda result: (oracle.per_token(result).sin() * upstream).sum(), **options
    )
    torch.testing.assert_close(out.double(), oracle.per_token(exact), rtol=2e-4, atol=2e-6)
    for got, want in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, want) < 2e-4


@of_each_longer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0], ids="beta {}".format)
def test_has_the_bits_of_logits_that_are_minus_infinity(kernels, beta, dtype, longer):
    """On the longer side, beside a shorter side that forbids as many more."""
    given = unequal(longer, 4, dtype=dtype)
    forbidden = torch.zeros(LONG)
    forbidden[SHORT:] = -torch.inf

    def forbidding(weight):
        padded = torch.cat([weight, weight.new_zeros(LONG - len(weight), weight.shape[1])])
        return Head(padded, bias=forbidden)

    whole = given.but(head=forbidding(given.head), teacher_head=forbidding(given.teacher_head))
    got, *gradients = given.run(beta=beta, **PREFIX)
    expected, grad_hidden, grad_weight, _ = whole.run(beta=beta)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.divergence, expected.divergence)
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for x, y in zip(gradients, (grad_hidden, grad_weight[: len(given.head)]), strict=True):
        assert x.dtype == dtype and relative_error(x, y) < limit


@of_each_longer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, longer):
    """Groups of several chunks, whose sum of the head's gradient is rounded at the end."""
    given = unequal(longer, 130, dtype=dtype)
    (got, *gradients), (exact, *exact_gradients) = given.run(**PREFIX), oracle.expected(given, **PREFIX)
    assert relative_error(got.divergence, exact.divergence) < 2e-5
    limit = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for x, y in zip(gradients, exact_gradients, strict=True):
        assert x.dtype == dtype and relative_error(x, y) < limit


def test_equal_vocabularies_are_as_without():
    given = problem(7, D, LONG, teacher_width=16)
    for x, y in zip(tree_leaves(given.run(**PREFIX)), tree_leaves(given.run()), strict=True):
        assert x is None or torch.equal(x, y)


@pytest.mark.parametrize("name", ["all weights 0", "no tokens"])
def test_nothing_to_compute(name):
    given = unequal("student", 0 if name == "no tokens" else 4)
    result, *gradients = given.run(**PREFIX, token_weight=torch.zeros(len(given.hidden)))
    assert result.loss == 0
    for gradient, tensor in zip(gradients, given.trained, strict=True):
        assert gradient.shape == tensor.shape and (gradient == 0).all()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_teacher_with_the_students_own_first_rows(kernels, autocast):
    """One storage of two lengths; in fp32 the difference of hidden states is what is projected."""
    if (kernels, DEVICE) == ("triton", "cuda"):
        pytest.skip("a tensor that is moved there shares no storage")
    given = problem(9, D, LONG, 1e-3, scale=2.0)
    given = given.but(teacher_head=given.head[:SHORT])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result, *gradients = given.run(**PREFIX)
    rounded = given.to(torch.bfloat16).to(torch.float32) if autocast else given
    exact, *exact_gradients = oracle.expected(rounded, **PREFIX)
    assert relative_error(result.divergence, exact.divergence) < (0.05 if autocast else 1e-5)
    for x, y in zip(gradients, exact_gradients, strict=True):
        assert relative_error(x, y) < (0.05 if autocast else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_heads_gradient_is_summed_at_its_whole_length(dtype, monkeypatch):
    """What the caller gets is the memory that the products were added up in: there is no second (V, D)."""
    sums, result = [], products.HeadGradient.result
    monkeypatch.setattr(products.HeadGradient, "result", lambda self: sums.append(self.sum) or result(self))
    _, _, gradient = unequal("student", dtype=dtype).run(**PREFIX)
    assert [len(x) for x in sums] == [SHORT] and gradient.shape == (LONG, D)
    assert gradient.data_ptr() == sums[0].data_ptr()


def test_compiled():
    given = unequal("student", 6)

    def step(hidden, weight):
        return linear_divergence(hidden, weight, given.teacher, given.teacher_head, **PREFIX).loss

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = given.leaves().trained
        loss = run(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


@of_each_longer
def test_opcheck(longer):
    given = unequal(longer, 3).leaves()
    leaves = flatten(problem_of(*given, None, DEFAULTS | PREFIX))
    torch.library.opcheck(torch.ops.scsdpo_kernels.divergence.default, (*leaves, [True, True, False, False, False]))
    torch.library.opcheck(torch.ops.scsdpo_kernels.divergence_per_token.default, tuple(leaves))


def test_scsdpo_loss_takes_it():
    given = unequal("teacher", (2, 5))
    options = {"mask": torch.ones(2, 5), "question_weight": torch.tensor([0.5, 1.5])}
    loss = given.call(scsdpo_loss, **options, **PREFIX).loss
    weight = options["question_weight"][:, None].expand(2, 5) / 10
    torch.testing.assert_close(loss.double(), oracle.expected(given, token_weight=weight, **PREFIX)[0].loss)


@of_each_longer
@pytest.mark.parametrize("op", [linear_divergence, linear_divergence_per_token])
@pytest.mark.parametrize("schedule", ["chunked", "reference"])
def test_refused_by_default_with_both_sizes_and_the_option(longer, op, schedule):
    rows = (LONG, SHORT) if longer == "student" else (SHORT, LONG)
    message = f"teacher_head: expected the {rows[0]} rows of student_head, or shared_prefix=True, .* got {rows[1]} rows"
    with pytest.raises(ValueError, match=message):
        unequal(longer).call(op, schedule=schedule)


@pytest.mark.parametrize("schedule", ["chunked", "reference"])
@of_each_longer
def test_targets_that_one_side_does_not_have_are_refused(longer, schedule):
    """Their log-probability would be -inf; tokens of weight 0 may have any."""
    given, ids = unequal(longer, 4), torch.tensor([3, SHORT, 0, 1])
    options = {"target_ids": ids, "schedule": schedule, **PREFIX}
    message = rf"target_ids: expected ids in \[0, {SHORT}\), the prefix that both heads have, got 0 to {SHORT}"
    with pytest.raises(ValueError, match=message):
        given.call(**options)
    assert given.call(**options, token_weight=torch.tensor([1.0, 0, 1, 1])).student_logp.isfinite().all()


@of_each_longer
def test_unchecked_targets_that_one_side_does_not_have_are_nan(longer, gpu_kernels, unchecked):
    """As any id outside the vocabulary, where a GPU is given `rows=`."""
    given, ids = unequal(longer, 4), torch.tensor([3, SHORT, 0, 1])
    result, grad_hidden, _ = given.run(target_ids=ids, rows=torch.arange(4), **PREFIX)
    assert result.student_logp.isnan().tolist() == [False, True, False, False] and grad_hidden.isfinite().all()


NAMED = TopLogprobs(torch.arange(8).view(4, 2), torch.full((4, 2), -1.0))


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, "TopLogprobs: expected shared_prefix=False", {"support": NAMED, "teacher": None, **PREFIX}),
        (TypeError, "shared_prefix: expected True or False, got int", {"shared_prefix": SHORT}),
    ],
)
def test_what_does_not_go_together_raises_by_name(error, message, options):
    given = problem(4, D, LONG).but(teacher=options.get("teacher", torch.zeros(4, D)))
    with pytest.raises(error, match=message):
        given.call(**{name: x for name, x in options.items() if name != "teacher"})


def test_a_part_of_a_head_has_its_own_heads_length():
    given = unequal("student")
    short = given.but(head=Head(given.head, bias=torch.zeros(SHORT)))
    with pytest.raises(ValueError, match=rf"student_head\.bias: expected shape \({LONG},\), got \({SHORT},\)"):
        short.call(**PREFIX)
    assert math.isfinite(given.but(head=Head(given.head, bias=torch.zeros(LONG))).call(**PREFIX).loss)
