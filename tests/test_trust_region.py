"""The trust region's teacher against interpolating full logits, and the teacher's entropy as a weight."""

import pytest
import torch
from oracle import relative_error
from test_docs import ROOT, blocks
from test_linear_divergence import DTYPES, fused, problem

from scsdpo_kernels import TrustRegionTeacher


def full_logits(hidden, weight, teacher_logits, beta):
    """Loss and gradients of hidden and weight, of full logits in float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    log_q = torch.log_softmax(teacher_logits, -1)
    if beta == 0:
        loss = (log_q.exp() * (log_q - log_p)).sum()
    elif beta == 1:
        loss = (log_p.exp() * (log_p - log_q)).sum()
    else:
        log_m = torch.log((1 - beta) * log_p.exp() + beta * log_q.exp())
        loss = (1 - beta) * (log_p.exp() * (log_p - log_m)).sum() + beta * (log_q.exp() * (log_q - log_m)).sum()
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shared", [False, True], ids=["two heads", "one head"])
def test_teacher_between_two_models(dtype, share, shared):
    hidden, weight, own, _ = problem(leading=(3, 4), vocabulary=301, dtype=dtype, distance=0.3)
    width = weight.shape[1] if shared else 24
    reference_hidden = torch.randn(3, 4, width).to(dtype)
    reference_weight = weight if shared else (torch.randn(301, width) * width**-0.5).to(dtype)
    teacher = TrustRegionTeacher(reference_weight, weight.requires_grad_(), share)
    assert teacher.weight.shape[1] == (width if shared else width + weight.shape[1])
    assert not shared or teacher.weight.data_ptr() == weight.data_ptr()
    logits = (1 - share) * reference_hidden.double() @ reference_weight.double().T
    logits = (logits + share * own.double() @ weight.double().T).detach()
    for beta in (0.0, 0.5, 1.0):
        expected = full_logits(hidden, weight.detach(), logits, beta)
        result, *gradients = fused(hidden, weight, teacher.hidden(reference_hidden, own), teacher.weight, beta=beta)
        tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
        assert abs(result.loss - expected[0]) <= tolerance * expected[0]
        for got, want in zip(gradients, expected[1:], strict=True):
            assert relative_error(got, want) < tolerance


def test_what_does_not_fit_raises():
    weight = torch.randn(31, 8)
    for error, match, arguments in (
        (ValueError, "reference_weight: expected shape", (torch.randn(30, 8), weight, 0.1)),
        (TypeError, "reference_weight: expected student_weight's dtype", (weight.bfloat16(), weight, 0.1)),
        (ValueError, "share: expected a number in", (weight, weight, 1.1)),
        (TypeError, "share: expected a number, got str", (weight, weight, "0.1")),
    ):
        with pytest.raises(error, match=match):
            TrustRegionTeacher(*arguments)
    teacher = TrustRegionTeacher(torch.randn(31, 6), weight, 0.1)
    with pytest.raises(ValueError, match="reference_hidden: expected shape"):
        teacher.hidden(torch.randn(4, 8), torch.randn(4, 8))
    with pytest.raises(TypeError, match="reference_hidden: expected own_hidden's dtype"):
        teacher.hidden(torch.randn(4, 6).double(), torch.randn(4, 8))
    assert not teacher.hidden(torch.randn(4, 6, requires_grad=True), torch.randn(4, 8)).requires_grad


def test_weights_of_the_teachers_entropy():
    """The two calls in docs/concepts.md: Σ e^(-c H(q)) D and its gradients are those of full logits."""
    hidden, weight, teacher, _ = problem(leading=(12,), vocabulary=301, distance=0.5)
    inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    names = {"torch": torch, "c": 0.5, "teacher_hidden": teacher}
    names |= {"student_hidden": inputs[0], "student_weight": inputs[1]}
    (recipe,) = (x.code for x in blocks(ROOT / "docs" / "concepts.md") if ").teacher_entropy" in x.code)
    exec(recipe, names)
    gradients = torch.autograd.grad(names["loss"], inputs)

    student, head = hidden.double().requires_grad_(), weight.double().requires_grad_()
    p, q = torch.softmax(student @ head.T, -1), torch.softmax(teacher.double() @ weight.double().T, -1)
    m = (p + q) / 2
    divergence = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    loss = (torch.exp(0.5 * (q * q.log()).sum(-1)) * divergence).sum()
    torch.testing.assert_close(names["loss"].double(), loss, rtol=2e-5, atol=0)
    for got, want in zip(gradients, torch.autograd.grad(loss, (student, head)), strict=True):
        assert relative_error(got, want) < 2e-5
