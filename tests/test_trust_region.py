"""The trust region's teacher against interpolating full logits, and the teacher's entropy as a weight."""

import oracle
import pytest
import torch
from oracle import relative_error
from problems import DTYPES, problem
from test_docs import ROOT, blocks

from scsdpo_kernels import TrustRegionTeacher


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0], ids="beta {}".format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shared", [False, True], ids=["two heads", "one head"])
def test_teacher_between_two_models(dtype, share, shared, beta):
    given = problem((3, 4), vocabulary=301, dtype=dtype, distance=0.3)
    weight, own = given.head, given.teacher
    width = weight.shape[1] if shared else 24
    reference_hidden = torch.randn(3, 4, width).to(dtype)
    reference_weight = weight if shared else (torch.randn(301, width) * width**-0.5).to(dtype)
    teacher = TrustRegionTeacher(reference_weight, weight.requires_grad_(), share)
    assert teacher.weight.shape[1] == (width if shared else width + weight.shape[1])
    assert not shared or teacher.weight.data_ptr() == weight.data_ptr()
    logits = (1 - share) * reference_hidden.double() @ reference_weight.double().T
    logits = (logits + share * own.double() @ weight.double().T).detach()
    # The interpolated logits are hidden states under a head that is the identity.
    exact, *exact_gradients = oracle.expected(given.but(teacher=logits, teacher_head=torch.eye(301)), beta=beta)
    given = given.but(teacher=teacher.hidden(reference_hidden, own), teacher_head=teacher.weight)
    result, *gradients = given.run(beta=beta)
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert abs(result.loss - exact.loss) <= tolerance * exact.loss
    for got, want in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, want) < tolerance


@pytest.mark.parametrize(
    "error, match, reference_weight, share",
    [
        (ValueError, "reference_weight: expected shape", torch.ones(30, 8), 0.1),
        (TypeError, "reference_weight: expected student_weight's dtype", torch.ones(31, 8).bfloat16(), 0.1),
        (ValueError, "share: expected a number in", torch.ones(31, 8), 1.1),
        (TypeError, "share: expected a number, got str", torch.ones(31, 8), "0.1"),
    ],
)
def test_what_does_not_fit_raises(error, match, reference_weight, share):
    with pytest.raises(error, match=match):
        TrustRegionTeacher(reference_weight, torch.ones(31, 8), share)


def test_hidden_states_that_do_not_fit_raise():
    teacher = TrustRegionTeacher(torch.randn(31, 6), torch.randn(31, 8), 0.1)
    with pytest.raises(ValueError, match="reference_hidden: expected shape"):
        teacher.hidden(torch.randn(4, 8), torch.randn(4, 8))
    with pytest.raises(TypeError, match="reference_hidden: expected own_hidden's dtype"):
        teacher.hidden(torch.randn(4, 6).double(), torch.randn(4, 8))
    assert not teacher.hidden(torch.randn(4, 6, requires_grad=True), torch.randn(4, 8)).requires_grad


def test_weights_of_the_teachers_entropy():
    """The two calls in docs/concepts.md: Σ e^(-c H(q)) D and its gradients are those of full logits."""
    given = problem(12, vocabulary=301, distance=0.5).leaves()
    names = {"torch": torch, "c": 0.5, "teacher_hidden": given.teacher}
    names |= {"student_hidden": given.hidden, "student_weight": given.head}
    (recipe,) = (x.code for x in blocks(ROOT / "docs" / "concepts.md") if ").teacher_entropy" in x.code)
    exec(recipe, names)
    gradients = torch.autograd.grad(names["loss"], given.trained)
    token_weight = torch.exp(-0.5 * oracle.expected(given)[0].teacher_entropy)
    exact, *exact_gradients = oracle.expected(given, token_weight=token_weight)
    torch.testing.assert_close(names["loss"].double(), exact.loss, rtol=2e-5, atol=0)
    for got, want in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, want) < 2e-5
