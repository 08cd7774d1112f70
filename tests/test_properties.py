"""What holds for every input: hypothesis draws sizes, scales, weights and beta."""

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from oracle import relative_error
from problems import Problem, problem

SEEDS = st.integers(0, 2**31)
BETAS = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.01, 0.99))
EXPONENTS = st.floats(-5, 1)  # powers of ten: the distance between student and teacher
PROBLEMS = st.builds(
    lambda rows, width, vocabulary, exponent, scale, seed: problem(
        rows, width=width, vocabulary=vocabulary, distance=10**exponent, scale=scale, seed=seed
    ),
    rows=st.integers(1, 20),
    width=st.integers(1, 40),
    vocabulary=st.integers(2, 600),
    exponent=EXPONENTS,
    scale=st.floats(0.1, 10),
    seed=SEEDS,
)
examples = settings(max_examples=60, deadline=None)
two_heads = pytest.mark.parametrize("head", ["shared", "own"])  # the difference of logits, and two sets of logits


def own(given: Problem, head: str = "own") -> Problem:
    return given if head == "shared" else given.but(teacher_head=given.head.clone())


@two_heads
@examples
@hypothesis.given(given=PROBLEMS, beta=BETAS)
def test_divergence_is_never_negative(given, beta, head):
    result, *gradients = own(given, head).run(beta=beta)
    assert (result.divergence >= 0).all()
    assert (result.student_entropy >= -1e-6).all() and (result.teacher_entropy >= -1e-6).all()
    assert all(x.isfinite().all() for x in gradients)


@two_heads
@examples
@hypothesis.given(given=PROBLEMS, beta=BETAS)
def test_identical_inputs_have_exactly_no_divergence(given, beta, head):
    result, *gradients = own(given, head).but(teacher=given.hidden.clone()).run(beta=beta)
    assert result.loss == 0 and all((x == 0).all() for x in (result.divergence, *gradients))


@examples
@hypothesis.given(PROBLEMS, BETAS, st.floats(-30, 30), st.floats(-30, 30))
def test_a_constant_added_to_all_logits_changes_nothing(given, beta, student_constant, teacher_constant):
    """Through a direction that all rows of the head share: a column of ones, met by a constant hidden entry."""
    hidden, weight, teacher, _ = given

    def extended(x, constant):
        return torch.cat([x, torch.full((len(x), 1), constant)], dim=1)

    plain, grad_hidden, grad_weight = own(given).run(beta=beta)
    head = extended(weight, 1.0)
    moved, moved_hidden, moved_weight = own(
        Problem(extended(hidden, student_constant), head, extended(teacher, teacher_constant))
    ).run(beta=beta)
    # logits near 30 are rounded to 2e-6: an error of that size in log(q / p)
    noise = 1e-4
    limit = noise * (plain.divergence + plain.divergence.sqrt()) + 1e-10
    assert ((moved.divergence - plain.divergence).abs() <= limit).all()
    scale = weight.norm(dim=1).max()
    assert (moved_hidden[:, :-1] - grad_hidden).norm(dim=1).max() <= noise * scale
    assert moved_hidden[:, -1].abs().max() <= noise
    assert (moved_weight[:, :-1] - grad_weight).abs().max() <= noise * hidden.norm(dim=0).max() + 1e-6


@examples
@hypothesis.given(PROBLEMS, BETAS, SEEDS)
def test_rows_do_not_depend_on_their_order(given, beta, seed):
    order = torch.randperm(len(given.hidden), generator=torch.Generator().manual_seed(seed))
    result, grad_hidden, grad_weight = given.run(beta=beta)
    permuted, permuted_hidden, permuted_weight = given.tokens(order).run(beta=beta)
    torch.testing.assert_close(permuted.divergence, result.divergence[order], rtol=1e-5, atol=1e-12)
    assert relative_error(permuted_hidden, grad_hidden[order]) < 1e-5 or grad_hidden.norm() < 1e-12
    assert relative_error(permuted_weight, grad_weight) < 1e-5 or grad_weight.norm() < 1e-12


@examples
@hypothesis.given(PROBLEMS, BETAS, SEEDS)
def test_rows_of_weight_zero_have_bitwise_no_influence(given, beta, seed):
    hidden, teacher = given.hidden, given.teacher
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randint(0, 2, (len(hidden),), generator=generator)
    options = {"token_weight": kept * torch.randn(len(hidden), generator=generator), "beta": beta}
    first = given.run(**options)
    zero = (kept == 0).unsqueeze(-1)
    second = given.but(hidden=hidden.where(~zero, torch.nan), teacher=teacher.where(~zero, -7.0)).run(**options)
    assert torch.equal(first[0].divergence, second[0].divergence) and torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])


@examples
@hypothesis.given(PROBLEMS, BETAS, st.sampled_from([0.25, 0.5, 2.0, 4.0]))  # exact to divide by
def test_temperature_is_a_scale_of_both_heads(given, beta, temperature):
    hidden, teacher = given.hidden, given.teacher
    hot, hot_hidden, _ = given.run(beta=beta, temperature=temperature)
    scaled, scaled_hidden, _ = given.but(hidden=hidden / temperature, teacher=teacher / temperature).run(beta=beta)
    close = {"rtol": 1e-3, "atol": 1e-10}
    torch.testing.assert_close(hot.divergence, scaled.divergence, **close)
    close = {"rtol": 1e-3, "atol": 1e-5 * hot_hidden.abs().max().item()}
    torch.testing.assert_close(hot_hidden * temperature, scaled_hidden, **close)


@examples
@hypothesis.given(PROBLEMS)
def test_jensen_shannon_is_symmetric(given):
    there = own(given).call(beta=0.5)
    back = own(given.but(hidden=given.teacher, teacher=given.hidden)).call(beta=0.5)
    torch.testing.assert_close(there.divergence, back.divergence, rtol=1e-5, atol=1e-10)
    assert (there.divergence <= 0.6931472 + 1e-6).all()
