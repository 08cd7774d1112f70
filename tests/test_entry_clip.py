"""What clipping signed entries does to the forward KL: its sign, its bias, and where its gradient is zero.

Σ_v min(e_v, c) of e_v = q_v log(q_v / p_v), which is below 0 where p_v > q_v. With C the clipped tokens and Q the
teacher's mass on the others, ∂/∂z_v = p_v Q - q_v [v ∉ C]. That is 0 at p = q, where nothing is clipped, and else only
where p_v = 0 on C and p_v = q_v / Q elsewhere, which no finite logits are: there the sum is c |C| + Q log Q.
"""

import math

import oracle
import pytest
import torch
from problems import Problem

V = 8
CLIPS = (0.01, 0.05, 0.2, 0.5)


def sides(distance: float, rows: int = 1, seed: int = 0) -> Problem:
    """Logits, as hidden states under heads that are the identity."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 1.5 * torch.randn(rows, V, generator=generator)
    student = teacher + distance * torch.randn(rows, V, generator=generator)
    return Problem(student, torch.eye(V), teacher)


def run(given: Problem, clip: float | None) -> tuple:
    """The sum of every token, and its gradient with respect to the logits; float64 agrees."""
    result, gradient, _ = given.run(beta=0.0, entry_clip=clip)
    exact, exact_gradient, _ = oracle.expected(given, beta=0.0, entry_clip=clip)
    torch.testing.assert_close(result.divergence.double(), exact.divergence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-6)
    return exact.divergence, exact_gradient


def entries(given: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    p, q = (x.double().softmax(-1) for x in (given.hidden, given.teacher))
    return q * (q / p).log(), p, q


@pytest.mark.parametrize("clip", CLIPS)
def test_it_is_biased_downward_by_what_is_cut_off(clip):
    """By Σ max(e_v - c, 0), never upward: below 0 for some tokens, but not below c - 1/e."""
    given = sides(3.0, rows=500)
    clipped, _ = run(given, clip)
    whole, _ = run(given, None)
    e, _, _ = entries(given)
    torch.testing.assert_close(whole - clipped, (e - clip).clamp(min=0).sum(-1), rtol=1e-6, atol=1e-9)
    assert (clipped <= whole).all() and (clipped >= min(0.0, clip - 1 / math.e)).all()
    assert (clipped < -0.01).any() == (clip < 1 / math.e)


@pytest.mark.parametrize("clip", CLIPS)
def test_equal_sides_are_stationary_and_a_minimum_nearby(clip):
    equal = sides(0.0)
    divergence, gradient = run(equal, clip)
    assert divergence.abs() < 1e-12 and gradient.norm() < 1e-12
    near = sides(0.002, rows=200)
    e, _, _ = entries(near)
    assert (e < clip).all()
    divergence, _ = run(near, clip)
    assert (divergence > 0).all()


@pytest.mark.parametrize("clip", CLIPS)
def test_elsewhere_the_gradient_is_not_zero_and_pushes_clipped_tokens_down(clip):
    """Away from the teacher, which finds them likelier than the student does."""
    given = sides(3.0, rows=500)
    _, gradient = run(given, clip)
    assert (gradient.norm(dim=-1) > 0).all()
    e, p, q = entries(given)
    clipped = e > clip
    kept = (q * ~clipped).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, p * kept - q * ~clipped, rtol=1e-5, atol=1e-8)
    assert clipped.any() and (gradient[clipped] > 0).all() and (q > p)[clipped].all()


def descended(given: Problem, clip: float, steps: int = 300) -> Problem:
    logits = given.hidden.clone()
    for _ in range(steps):
        _, gradient, _ = given.but(hidden=logits).run(beta=0.0, entry_clip=clip)
        logits = logits - 2 * gradient
    return given.but(hidden=logits)


@pytest.mark.parametrize("clip", CLIPS)
def test_descent_ends_at_the_teacher_or_without_the_tokens_that_it_began_without(clip):
    """The student begins without the teacher's likeliest token, of probability 1/2, and never gets it back: the other
    tokens take all the mass, and the sum ends at c - 1/2 log 2. Beside the teacher it ends at p = q."""
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(1, V - 1, generator=generator)
    teacher = torch.cat([others.logsumexp(-1, keepdim=True), others], dim=-1)
    without, apart = teacher.clone(), torch.randn(1, V, generator=generator)
    without[0, 0] -= 8
    near, far = (descended(Problem(x, torch.eye(V), teacher), clip) for x in (teacher + 0.01 * apart, without))
    divergence, _ = run(near, clip)
    e, p, q = entries(near)
    assert not (e > clip).any() and divergence.abs() < 1e-4 and (p - q).abs().max() < 1e-2

    divergence, gradient = run(far, clip)
    e, p, q = entries(far)
    assert (e > clip).tolist() == [[True] + [False] * (V - 1)] and gradient.norm() < 1e-2
    torch.testing.assert_close(p, torch.where(e > clip, 0.0, 2 * q), rtol=0, atol=1e-2)
    torch.testing.assert_close(divergence[0].item(), clip - math.log(2) / 2, rtol=0, atol=2e-3)
