"""What holds for every input: hypothesis draws sizes, scales, weights and beta."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative_error
from test_linear_divergence import fused, problem

SEEDS = st.integers(0, 2**31)
BETAS = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.01, 0.99))
EXPONENTS = st.floats(-5, 1)  # of ten: the distance between student and teacher
PROBLEMS = st.builds(
    lambda rows, width, vocabulary, exponent, scale, seed: problem(
        leading=(rows,), width=width, vocabulary=vocabulary, distance=10**exponent, scale=scale, seed=seed
    )[:3],
    rows=st.integers(1, 20),
    width=st.integers(1, 40),
    vocabulary=st.integers(2, 600),
    exponent=EXPONENTS,
    scale=st.floats(0.1, 10),
    seed=SEEDS,
)
examples = settings(max_examples=60, deadline=None)


@examples
@given(PROBLEMS, BETAS)
def test_divergence_is_never_negative(tensors, beta):
    hidden, weight, teacher = tensors
    for head in (None, weight.clone()):  # the difference of logits, and two sets of logits
        result, grad_hidden, grad_weight = fused(hidden, weight, teacher, head, beta=beta)
        assert (result.divergence >= 0).all()
        assert (result.student_entropy >= -1e-6).all() and (result.teacher_entropy >= -1e-6).all()
        assert grad_hidden.isfinite().all() and grad_weight.isfinite().all()


@examples
@given(PROBLEMS, BETAS)
def test_identical_inputs_have_exactly_no_divergence(tensors, beta):
    hidden, weight, _ = tensors
    for head in (None, weight.clone()):
        result, grad_hidden, grad_weight = fused(hidden, weight, hidden.clone(), head, beta=beta)
        assert result.loss == 0 and (result.divergence == 0).all()
        assert (grad_hidden == 0).all() and (grad_weight == 0).all()


@examples
@given(PROBLEMS, BETAS, st.floats(-30, 30), st.floats(-30, 30))
def test_a_constant_added_to_all_logits_changes_nothing(tensors, beta, student_constant, teacher_constant):
    """Through a direction that all rows of the head share: a column of ones, met by a constant hidden entry."""
    hidden, weight, teacher = tensors

    def extended(x, constant):
        return torch.cat([x, torch.full((len(x), 1), constant)], dim=1)

    plain, grad_hidden, grad_weight = fused(hidden, weight, teacher, weight.clone(), beta=beta)
    head = extended(weight, 1.0)
    moved, moved_hidden, moved_weight = fused(
        extended(hidden, student_constant), head, extended(teacher, teacher_constant), head.clone(), beta=beta
    )
    # logits near 30 are rounded to 2e-6: an error of that size in log(q / p)
    noise = 1e-4
    limit = noise * (plain.divergence + plain.divergence.sqrt()) + 1e-10
    assert ((moved.divergence - plain.divergence).abs() <= limit).all()
    scale = weight.norm(dim=1).max()
    assert (moved_hidden[:, :-1] - grad_hidden).norm(dim=1).max() <= noise * scale
    assert moved_hidden[:, -1].abs().max() <= noise
    assert (moved_weight[:, :-1] - grad_weight).abs().max() <= noise * hidden.norm(dim=0).max() + 1e-6


@examples
@given(PROBLEMS, BETAS, SEEDS)
def test_rows_do_not_depend_on_their_order(tensors, beta, seed):
    hidden, weight, teacher = tensors
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))
    result, grad_hidden, grad_weight = fused(hidden, weight, teacher, beta=beta)
    permuted, permuted_hidden, permuted_weight = fused(hidden[order], weight, teacher[order], beta=beta)
    torch.testing.assert_close(permuted.divergence, result.divergence[order], rtol=1e-5, atol=1e-12)
    assert relative_error(permuted_hidden, grad_hidden[order]) < 1e-5 or grad_hidden.norm() < 1e-12
    assert relative_error(permuted_weight, grad_weight) < 1e-5 or grad_weight.norm() < 1e-12


@examples
@given(PROBLEMS, BETAS, SEEDS)
def test_rows_of_weight_zero_have_bitwise_no_influence(tensors, beta, seed):
    hidden, weight, teacher = tensors
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randint(0, 2, (len(hidden),), generator=generator)
    options = {"token_weight": kept * torch.randn(len(hidden), generator=generator), "beta": beta}
    first = fused(hidden, weight, teacher, **options)
    zero = (kept == 0).unsqueeze(-1)
    second = fused(hidden.where(~zero, torch.nan), weight, teacher.where(~zero, -7.0), **options)
    assert torch.equal(first[0].divergence, second[0].divergence) and torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])


@examples
@given(PROBLEMS, BETAS, st.sampled_from([0.25, 0.5, 2.0, 4.0]))  # exact to divide by
def test_temperature_is_a_scale_of_both_heads(tensors, beta, temperature):
    hidden, weight, teacher = tensors
    hot, hot_hidden, _ = fused(hidden, weight, teacher, beta=beta, temperature=temperature)
    scaled, scaled_hidden, _ = fused(hidden / temperature, weight, teacher / temperature, beta=beta)
    close = {"rtol": 1e-3, "atol": 1e-10}
    torch.testing.assert_close(hot.divergence, scaled.divergence, **close)
    close = {"rtol": 1e-3, "atol": 1e-5 * hot_hidden.abs().max().item()}
    torch.testing.assert_close(hot_hidden * temperature, scaled_hidden, **close)


@examples
@given(PROBLEMS)
def test_jensen_shannon_is_symmetric(tensors):
    hidden, weight, teacher = tensors
    there, _, _ = fused(hidden, weight, teacher, weight.clone(), beta=0.5)
    back, _, _ = fused(teacher, weight, hidden, weight.clone(), beta=0.5)
    torch.testing.assert_close(there.divergence, back.divergence, rtol=1e-5, atol=1e-10)
    assert (there.divergence <= 0.6931472 + 1e-6).all()
