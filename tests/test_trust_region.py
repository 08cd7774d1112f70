"""The trust region's teacher against mixing full logits, within and past both models, and the teacher's entropy."""

import math

import oracle
import pytest
import torch
from oracle import logits, relative_error
from problems import DTYPES, Problem, head_of, problem
from test_docs import ROOT, blocks
from torch.utils._pytree import tree_map_only

from scsdpo_kernels import Head, LoRA, TopK, TrustRegionTeacher, linear_divergence_per_token

V = 301
SHARES = {"reference": 0.0, "within": 0.1, "student": 1.0, "past the student": 2.5, "away from it": -0.75}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

of_every_share = pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
one_head_or_two = pytest.mark.parametrize("shared", [False, True], ids=["two heads", "one head"])


def models(shared: bool, dtype=torch.float32, kind="plain", reference_kind=None) -> tuple[Problem, torch.Tensor, Head]:
    """A student whose own hidden states after the teacher's prompt are the problem's; the reference's, and its head."""
    given = problem((3, 4), vocabulary=V, dtype=dtype, distance=0.3)
    weight, generator = given.head, torch.Generator().manual_seed(7)
    given = given.but(head=head_of(kind, weight))
    width = weight.shape[1] if shared else 24
    reference_hidden = torch.randn(3, 4, width, generator=generator).to(dtype)
    if shared:
        return given, reference_hidden, given.head
    weight = (torch.randn(V, width, generator=generator) * width**-0.5).to(dtype)
    return given, reference_hidden, head_of(kind if reference_kind is None else reference_kind, weight, seed=5)


def mixed(given, reference_hidden, reference_head, share) -> Problem:
    """The mixed logits are hidden states under a head that is the identity."""
    sides = tree_map_only(
        torch.Tensor, torch.Tensor.double, (reference_hidden, reference_head, given.teacher, given.head)
    )
    reference_hidden, reference_head, own, head = sides
    c = share.double()[..., None] if isinstance(share, torch.Tensor) else share
    z = (1 - c) * logits(reference_hidden, reference_head) + c * logits(own, head)
    return given.but(teacher=z.detach(), teacher_head=torch.eye(V))


def check(given, reference_hidden, reference_head, share, dtype=torch.float32, **options) -> None:
    """Loss and gradients of everything of the student's."""
    number = 0.3 if isinstance(share, torch.Tensor) else share
    teacher = TrustRegionTeacher(reference_head, given.head, number)
    per_token = (share,) if isinstance(share, torch.Tensor) else ()
    hidden = teacher.hidden(reference_hidden, given.teacher, *per_token)
    assert hidden.dtype == dtype and not hidden.requires_grad
    exact, *exact_gradients = oracle.expected(mixed(given, reference_hidden, reference_head, share), **options)
    result, *gradients = given.but(teacher=hidden, teacher_head=teacher.head).run(**options)
    larger = number if not per_token else share.abs().max().item()
    tolerance = TOLERANCE[dtype] * (1 + abs(larger))
    assert relative_error(result.divergence, exact.divergence) < tolerance
    for got, want in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, want) < tolerance


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0], ids="beta {}".format)
@pytest.mark.parametrize("dtype", DTYPES)
@of_every_share
@one_head_or_two
def test_teacher_between_two_models_and_past_them(dtype, share, shared, beta):
    check(*models(shared, dtype), share, dtype, beta=beta)


@one_head_or_two
def test_one_head_is_not_copied(shared):
    given, _, reference_head = models(shared)
    teacher = TrustRegionTeacher(reference_head, given.head.requires_grad_(), 2.0)
    width = given.head.shape[1]
    assert teacher.weight.shape[1] == (width if shared else width + 24) and not teacher.weight.requires_grad
    assert not shared or teacher.weight.data_ptr() == given.head.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@one_head_or_two
def test_a_share_of_each_token(dtype, shared):
    """Within and past both models, in one call."""
    share = torch.linspace(-1.0, 2.0, 12).view(3, 4)
    check(*models(shared, dtype), share, dtype, beta=0.0)


def test_a_share_of_each_token_is_that_tokens_number():
    given, reference_hidden, reference_head = models(shared=False)
    teacher = TrustRegionTeacher(reference_head, given.head, 0.3)
    share = torch.full((3, 4), 0.3)
    share[1, 2] = 1.7
    hidden = teacher.hidden(reference_hidden, given.teacher, share)
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(hidden[others], teacher.hidden(reference_hidden, given.teacher)[others])
    past = TrustRegionTeacher(reference_head, given.head, share[1, 2].item())
    assert torch.equal(hidden[1, 2], past.hidden(reference_hidden, given.teacher)[1, 2])


KINDS = ("plain", "bias", "logit_scale", "lora")
HEADS = [(kind, other) for kind in KINDS for other in KINDS if (kind, other) != ("plain", "plain")]


@of_every_share
@pytest.mark.parametrize("kind, reference_kind", HEADS)
def test_heads_that_are_more_than_a_weight(kind, reference_kind, share):
    """On one side or both; the student trains all of its head."""
    check(*models(False, kind=kind, reference_kind=reference_kind), share, beta=0.3)


@of_every_share
def test_heads_with_everything_but_a_softcap(share):
    """Each with a scale of its own, which multiplies its bias and adapter too."""
    given, reference_hidden, reference_head = models(False, kind="all")
    reference_head = reference_head._replace(softcap=None, logit_scale=-0.6)
    check(given.but(head=given.head._replace(softcap=None)), reference_hidden, reference_head, share, beta=0.3)


def test_one_bias_and_one_scale_of_two_weights():
    """They are no mixture, so that each token may have a share of its own."""
    given, reference_hidden, reference_head = models(False, kind="bias")
    bias, share = given.head.bias, torch.linspace(-1.0, 2.0, 12).view(3, 4)
    head, other = Head(given.head.weight, bias, logit_scale=1.7), Head(reference_head.weight, bias, logit_scale=1.7)
    check(given.but(head=head), reference_hidden, other, share, beta=0.3)


@pytest.mark.parametrize("kind", ["bias", "logit_scale", "lora"])
def test_one_head_that_is_more_than_a_weight(kind):
    given, reference_hidden, head = models(True, kind=kind)
    assert TrustRegionTeacher(head, head, 0.5).head.weight.data_ptr() == head.weight.data_ptr()
    check(given, reference_hidden, head, 1.5, beta=0.3)
    check(given, reference_hidden, head, torch.linspace(-1.0, 2.0, 12).view(3, 4), beta=0.3)


def test_an_adapter_over_a_frozen_head():
    """One weight on both sides, an adapter on the student's alone; a share of each token."""
    given, reference_hidden, head = models(True, kind="lora")
    check(given, reference_hidden, head.weight, torch.linspace(-1.0, 2.0, 12).view(3, 4), beta=0.3)
    two = head._replace(lora=head.lora._replace(scale=-0.25))
    check(given, reference_hidden, two, 1.5, beta=0.3)


def test_a_forbidden_token_of_both_heads():
    """One bias is no mixture: -inf stays -inf, past the student too."""
    given, reference_hidden, reference_head = models(False)
    bias = torch.zeros(V)
    bias[11] = -torch.inf
    teacher = TrustRegionTeacher(Head(reference_head, bias=bias), Head(given.head, bias=bias), 1.5)
    exact = mixed(given, reference_hidden, reference_head, 1.5)
    exact = exact.but(head=Head(given.head, bias=bias), teacher_head=Head(torch.eye(V), bias=bias))
    ours = exact.but(teacher=teacher.hidden(reference_hidden, given.teacher), teacher_head=teacher.head)
    (result, *gradients), (expected, *exact_gradients) = ours.run(beta=0.3), oracle.expected(exact, beta=0.3)
    assert relative_error(result.divergence, expected.divergence) < 5e-5
    for got, want in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, want) < 5e-5


def test_objectives_and_per_token_losses_take_it():
    given, reference_hidden, reference_head = models(False)
    share = torch.linspace(-1.0, 2.0, 12).view(3, 4)
    check(given, reference_hidden, reference_head, share, beta=1.0, support=TopK(7), temperature=0.8)
    teacher = TrustRegionTeacher(reference_head, given.head, 0.5)
    hidden = teacher.hidden(reference_hidden, given.teacher, share)
    ours = given.but(teacher=hidden, teacher_head=teacher.head)
    out, *gradients = ours.run(linear_divergence_per_token, lambda out: out.sin().sum())
    exact, *exact_gradients = oracle.expected(
        mixed(given, reference_hidden, reference_head, share), lambda result: result.divergence.sin().sum()
    )
    for got, want in zip((out, *gradients), (exact.divergence, *exact_gradients), strict=True):
        assert relative_error(got, want) < 5e-5


def test_what_does_not_fit_raises():
    weight = torch.randn(31, 8)
    other = torch.randn(31, 8)
    biased, forbidding = Head(weight, bias=torch.zeros(31)), Head(other, bias=torch.full((31,), -torch.inf))
    for error, match, arguments in (
        (ValueError, r"reference_head: expected shape \(31, D\) after student_head", (other[1:], weight, 0.1)),
        (ValueError, r"student_head: expected shape \(V, D\)", (other, weight[0], 0.1)),
        (TypeError, "reference_head: expected a tensor or a Head", (None, weight, 0.1)),
        (TypeError, "reference_head: expected student_head's dtype", (weight.bfloat16(), weight, 0.1)),
        (ValueError, "share: expected a finite number, got inf", (weight, weight, math.inf)),
        (ValueError, "share: expected a finite number, got nan", (weight, weight, math.nan)),
        (TypeError, "share: expected a number, got str", (weight, weight, "0.1")),
        (ValueError, "student_head.softcap: expected None", (weight, Head(weight, softcap=30.0), 0.1)),
        (ValueError, r"student_head.bias: expected shape \(31,\)", (weight, Head(weight, bias=torch.zeros(8)), 0.1)),
        (ValueError, r"student_head.lora: expected A \(r, 8\)",
         (weight, Head(weight, lora=LoRA(torch.zeros(2, 9), torch.zeros(31, 2))), 0.1)),
        (ValueError, "reference_head.bias: expected finite numbers", (forbidding, biased, 1.5)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            TrustRegionTeacher(*arguments)
    teacher = TrustRegionTeacher(torch.randn(31, 6), weight, 0.1)
    reference_hidden, own = torch.randn(4, 6, requires_grad=True), torch.randn(4, 8)
    for error, match, arguments in (
        (ValueError, "reference_hidden: expected shape", (own, own)),
        (TypeError, "reference_hidden: expected own_hidden's dtype", (reference_hidden.double(), own)),
        (TypeError, "share: expected a tensor, got float", (reference_hidden, own, 0.5)),
        (ValueError, r"share: expected shape \(4,\), got \(4, 1\)", (reference_hidden, own, torch.zeros(4, 1))),
        (TypeError, "share: expected floating-point", (reference_hidden, own, torch.zeros(4).long())),
        (ValueError, "share: expected finite numbers", (reference_hidden, own, torch.full((4,), math.nan))),
    ):
        with pytest.raises(error, match=match):
            teacher.hidden(*arguments)
    assert not teacher.hidden(reference_hidden, own, torch.zeros(4, requires_grad=True)).requires_grad
    with pytest.raises(ValueError, match="share: expected None where the heads have biases that differ"):
        TrustRegionTeacher(other, biased, 0.1).hidden(own, own, torch.zeros(4))
    with pytest.raises(ValueError, match="weight: expected `head` in its place"):
        _ = TrustRegionTeacher(other, biased, 0.1).weight


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
