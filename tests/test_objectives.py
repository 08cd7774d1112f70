"""Objectives on a support, of sampled tokens, with clipped entries, and heads that are more than a product.

The oracle shares nothing with the package's own reference, which is checked like every other schedule.
"""

import math

import oracle
import pytest
import torch
from conftest import every_schedule, few_in_the_interpreter
from oracle import assert_near, logits, relative_error
from problems import DTYPES, HEADS, Problem, problem

from scsdpo_kernels import (
    Head,
    LoRA,
    SampledToken,
    TopK,
    TopLogprobs,
    linear_divergence,
    linear_divergence_per_token,
)
from scsdpo_kernels.kernels import kernels_of, triton_kernels
from scsdpo_kernels.schedules import chunked, products

BETAS = (0.0, 0.3, 1.0)
V, D = 307, 24


TAILS = ("bucket", "renormalize")

of_every_tail = pytest.mark.parametrize("tail", TAILS)
of_every_beta = pytest.mark.parametrize("beta", BETAS, ids="beta {}".format)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def near_or_far(distance, near, far):
    """Sides that are close to one another have lost digits of their difference."""
    return near if distance < 0.1 else far


@of_every_tail
@of_every_beta
@pytest.mark.parametrize("k", [1, 20, V], ids="k {}".format)
@pytest.mark.parametrize("distance, teacher_width", [(1e-3, None), (0.5, None), (0.5, 16)], ids=["near", "far", "own"])
def test_top_k(kernels, tail, beta, distance, k, teacher_width):
    """Values and dense gradients."""
    rows = few_in_the_interpreter(kernels, 9, 5)
    given = problem(rows, D, V, distance, scale=2.0, teacher_width=teacher_width, weighted=True)
    options = {"beta": beta, "temperature": 0.8, "support": TopK(k, tail)}
    got, exact = given.run(**options), oracle.expected(given, **options)
    result, expected = got[0], exact[0]
    if k < V:
        rtol = near_or_far(distance, 3e-4, 2e-5)
        torch.testing.assert_close(result.divergence.double(), expected.divergence, rtol=rtol, atol=1e-9)
    # a renormalised support of one entry has nothing to say
    floor = 1e-6 if k == 1 and tail == "renormalize" else 1e-8
    assert_near(got, exact, limit=near_or_far(distance, 5e-4, 2e-5), floor=floor)
    for side in ("student_entropy", "teacher_entropy"):
        x, y = getattr(result, side), getattr(expected, side)
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-6)


def both_logits(given):
    """In float64, for what others compute of them; and the leaves."""
    leaves = given.to(torch.float64).leaves()
    return (logits(leaves.hidden, leaves.head), logits(leaves.teacher, leaves.head).detach()), leaves


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_top_k_is_what_trl_computes(beta, add_tail):
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    given = problem(40, D, V, 0.7, scale=2.0)
    options = {"beta": beta, "support": TopK(20, "bucket" if add_tail else "renormalize")}
    (z_s, z_t), leaves = both_logits(given)
    trls = losses.compute_topk_self_distillation_loss(
        z_s, z_t, distillation_topk=20, distillation_alpha=beta, distillation_add_tail=add_tail
    )
    got = given.run(**options)
    torch.testing.assert_close(got[0].divergence.double(), trls.detach(), rtol=1e-5, atol=1e-7)
    of_trl = got[0]._replace(loss=trls.sum().detach()), *torch.autograd.grad(trls.sum(), leaves.trained)
    assert_near(got, of_trl)
    assert_near(of_trl, oracle.expected(given, **options))


@of_every_beta
def test_top_k_of_near_equal_sides_keeps_relative_precision(kernels, beta):
    """A shared fp32 head: 1e-4 relative of the K + 1 buckets' divergence at 1e-9 and below."""
    given = problem(9, D, V, 1e-5, scale=2.0)
    result, grad_hidden, grad_weight = given.run(beta=beta, support=TopK(20))
    hidden, weight, teacher, _ = given.to(torch.float64)
    z_s, d = logits(hidden, weight), (teacher - hidden) @ weight.T
    ids = z_s.topk(20).indices
    p = z_s.softmax(-1)
    inside = torch.zeros_like(p).scatter(1, ids, 1.0)
    # d of a bucket is the mean of its entries' d; D = c/2 Var over buckets, to second order
    mass = torch.cat([p.gather(1, ids), (p * (1 - inside)).sum(1, keepdim=True)], 1)
    of_bucket = torch.cat([d.gather(1, ids), ((p * (1 - inside) * d).sum(1) / mass[:, -1])[:, None]], 1)
    mean = (mass * of_bucket).sum(1)
    variance = (mass * of_bucket**2).sum(1) - mean**2
    curvature = 1.0 if beta in (0.0, 1.0) else beta * (1 - beta)
    assert variance.max() < 1e-8
    assert relative_error(result.divergence, curvature / 2 * variance) < 1e-4
    # ∂D/∂z_v = -c p_v (d of v's bucket - mean), to first order
    of_entry = torch.where(inside > 0, d, of_bucket[:, -1:])
    gradient = -curvature * p * (of_entry - mean[:, None])
    assert relative_error(grad_hidden, gradient @ weight) < 1e-4
    assert relative_error(grad_weight, gradient.T @ hidden) < 1e-4


@of_every_tail
@of_every_beta
def test_top_k_bounds_the_tail_as_sdpo_does(kernels, beta, tail):
    """A peaked side's tail counts as 1e-7: a student that is unsure is not infinitely far from a sure teacher."""
    given = problem(6, D, V, 0.5)
    given.teacher[:3] *= 60.0  # nearly all the mass in one entry
    given.hidden[3:] *= 60.0
    options = {"beta": beta, "support": TopK(5, tail)}
    got, exact = given.run(**options), oracle.expected(given, **options)
    torch.testing.assert_close(got[0].divergence.double(), exact[0].divergence, rtol=5e-5, atol=3e-7)
    assert_near(got, exact, floor=1e-6)


def teachers_logp(given):
    return logits(given.teacher.double(), given.head.double()).log_softmax(-1)


@of_every_tail
@of_every_beta
def test_support_of_the_teacher(kernels, tail, beta):
    """A server's top-K: values, gradients, empty slots, rows of weight 0 whose slots may hold anything."""
    given = problem((2, 5), D, V, 0.5, scale=2.0, weighted=True)
    logp, ids = teachers_logp(given).topk(12)
    ids, logp = ids.clone(), logp.float()
    ids[0, 0, 3:] = -1
    ids[0, 1] = -1
    ids[1, 2, 0] = -1
    given.token_weight[1, 4] = 0
    ids[1, 4], logp[1, 4] = 10**6, torch.nan
    given = given.but(teacher=None)
    options = {"support": TopLogprobs(ids, logp, tail), "beta": beta, "target_ids": torch.zeros(2, 5).long()}
    got, exact = given.run(**options), oracle.expected(given, **options)
    result, expected = got[0], exact[0]
    torch.testing.assert_close(result.divergence.double(), expected.divergence, rtol=2e-5, atol=1e-7)
    assert_near(got, exact)
    assert result.teacher_entropy is None and result.teacher_logp is None
    torch.testing.assert_close(result.student_logp.double(), expected.student_logp, rtol=1e-5, atol=1e-6)


@of_every_tail
def test_support_of_the_teacher_is_top_k_where_both_choose_the_same(kernels, tail):
    given = problem(8, D, V, 1e-2, scale=3.0)
    ids = (given.hidden @ given.head.T).topk(9).indices
    named = TopLogprobs(ids, teachers_logp(given).gather(1, ids), tail)
    a, *chosen = given.run(support=TopK(9, tail))
    b, *named_gradients = given.but(teacher=None).run(support=named)
    torch.testing.assert_close(a.divergence, b.divergence, rtol=1e-3, atol=1e-9)
    for x, y in zip(chosen, named_gradients, strict=True):
        assert relative_error(x, y) < 1e-3


LOGP = torch.full((4, 3), -2.0)
TWELVE = torch.arange(12).view(4, 3)
REPEATED = torch.tensor([[3, -1, 3], [-1, -1, -1], [0, 1, 2], [5, 6, -1]])
WRONG = {
    "above": TWELVE + V,
    "below": TWELVE - 2,
    "twice": torch.where(TWELVE == 4, 3, TWELVE),
    "twice, with empty slots": REPEATED,
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_supports_raise(name):
    given = problem(4, D, V).but(teacher=None)
    with pytest.raises(ValueError, match=r"support\.ids: expected ids in \[0, 307\), each once in a row"):
        given.call(support=TopLogprobs(WRONG[name], LOGP))


def test_wrong_supports_of_rows_of_weight_0():
    given = problem(4, D, V).but(teacher=None)
    given.call(support=TopLogprobs(REPEATED, LOGP), token_weight=torch.tensor([0.0, 1, 1, 1]))


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("distance", [1e-3, 0.7], ids=["near", "far"])
def test_sampled_token(kernels, distance, importance):
    given = problem((3, 7), D, V, distance, scale=2.0, weighted=True)
    ids = torch.randint(V, (3, 7))
    ids[0] = (given.hidden[0] @ given.head.T).argmax(-1)
    options = {"target_ids": ids, "beta": 1.0, "temperature": 1.2, "support": SampledToken()}
    if importance:
        options |= {"old_logp": torch.randn(3, 7) - 4, "importance_clip": 1.5}
    got, exact = given.run(**options), oracle.expected(given, **options)
    result, expected = got[0], exact[0]
    rtol = near_or_far(distance, 1e-4, 1e-5)
    torch.testing.assert_close(result.divergence.double(), expected.divergence, rtol=rtol, atol=1e-7)
    torch.testing.assert_close(result.student_logp.double(), expected.student_logp, rtol=1e-6, atol=2e-6)
    apart = (x.student_logp.double() - x.teacher_logp.double() for x in (result, expected))
    torch.testing.assert_close(*apart, rtol=1e-4, atol=3e-6)
    assert (result.importance_ratio is None) == (not importance)
    if importance:
        ratio = expected.importance_ratio
        torch.testing.assert_close(result.importance_ratio.double(), ratio, rtol=1e-5, atol=1e-6)
    assert_near(got, exact, limit=near_or_far(distance, 1e-4, 2e-5))


def test_sampled_token_is_what_trl_computes():
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    given, ids = problem(40, D, V, 0.7, scale=2.0), torch.randint(V, (40,))
    options = {"beta": 1.0, "target_ids": ids, "support": SampledToken()}
    (z_s, z_t), leaves = both_logits(given)
    loss = losses.compute_sampled_token_self_distillation_loss
    trls = loss(z_s, z_t, ids, distillation_alpha=1.0)
    stick = loss(logits(given.hidden, given.head), logits(given.teacher, given.head), ids, distillation_alpha=1.0)
    got = given.run(**options)
    assert relative_error(got[0].divergence, trls) < 2 * relative_error(stick, trls)
    of_trl = got[0]._replace(loss=trls.sum().detach()), *torch.autograd.grad(trls.sum(), leaves.trained)
    assert_near(got, of_trl)
    assert_near(of_trl, oracle.expected(given, **options))


@pytest.mark.parametrize("distance, bound", [(1.0, 0.05), (1.0, 0.5), (0.3, 0.01), (1e-3, 0.05)])
def test_entry_clip(kernels, distance, bound):
    """Far sides, of which most clip some entries, and near ones, of which none does: that is the forward KL."""
    rows = few_in_the_interpreter(kernels, 30, 12)
    given = problem(rows, D, V, distance, scale=3.0, weighted=True)
    options = {"beta": 0.0, "temperature": 0.9}
    got, exact = given.run(**options, entry_clip=bound), oracle.expected(given, **options, entry_clip=bound)
    result, expected = got[0], exact[0]
    full, *_ = oracle.expected(given, **options)
    clipped = int((full.divergence > expected.divergence + 1e-9).sum())
    assert clipped == 0 if distance < 0.1 else clipped >= rows // 6
    rtol, atol = near_or_far(distance, 3e-4, 2e-5), 1e-6 if clipped else 1e-9
    torch.testing.assert_close(result.divergence.double(), expected.divergence, rtol=rtol, atol=atol)
    assert_near(got, exact, limit=near_or_far(distance, 3e-4, 2e-5))
    if not clipped:
        torch.testing.assert_close(result.divergence, given.call(**options).divergence, rtol=1e-4, atol=0)


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_entry_clip_of_forbidden_entries(kernels, who):
    """What the student forbids counts as the bound, what the teacher forbids as nothing."""
    given = problem(5, D, V, 0.5)
    bias = torch.zeros(V)
    bias[7] = -torch.inf
    forbids, allows = Head(given.head, bias=bias), Head(given.head, bias=torch.zeros(V))
    sides = {"student": (forbids, allows), "teacher": (given.head, forbids), "both": (forbids, None)}[who]
    given = given.but(head=sides[0], teacher_head=sides[1])
    options = {"beta": 0.0, "entry_clip": 0.001}
    got, (exact, *_) = given.call(**options), oracle.expected(given, **options)
    torch.testing.assert_close(got.divergence.double(), exact.divergence, rtol=1e-5, atol=1e-6)


SIDES = {
    "student": {"head"},
    "teacher": {"teacher_head"},
    "both": {"head", "teacher_head"},
}


def of_all_heads(test):
    """Heads of every kind, on either side and on both, with a teacher of the student's width or of another."""
    sides = [*((x, None) for x in SIDES), ("both", 16)]
    test = pytest.mark.parametrize("sides, teacher_width", sides)(of_every_beta(test))
    return pytest.mark.parametrize("kind", HEADS)(test)


def check_heads(kind, beta, sides, teacher_width, rows=13, **schedule):
    """Values, and gradients of everything of the student's."""
    heads = {"head": "plain", "teacher_head": "plain", **dict.fromkeys(SIDES[sides], kind)}
    given = problem(rows, D, V, 0.4, scale=2.0, teacher_width=teacher_width, weighted=True, **heads)
    options = {"beta": beta, "temperature": 0.8}
    got, exact = given.run(**options, **schedule), oracle.expected(given, **options)
    torch.testing.assert_close(got[0].divergence.double(), exact[0].divergence, rtol=2e-5, atol=1e-8)
    assert_near(got, exact, limit=3e-5)


@of_all_heads
def test_heads(kernels, kind, beta, sides, teacher_width, monkeypatch):
    rows = few_in_the_interpreter(kernels, 13, 5)
    monkeypatch.setattr(chunked, "MIN_ROWS", few_in_the_interpreter(kernels, 5, 2))
    monkeypatch.setattr(chunked, "BUFFER_BYTES", dict.fromkeys(chunked.BUFFER_BYTES, 0))  # three chunks
    check_heads(kind, beta, sides, teacher_width, rows)


@of_all_heads
def test_heads_in_the_reference(kind, beta, sides, teacher_width):
    check_heads(kind, beta, sides, teacher_width, schedule="reference")


@pytest.mark.parametrize("kind", HEADS)
def test_a_teacher_without_a_head_of_its_own_has_the_students(kind):
    given = problem(7, D, V, 0.3, head=kind)
    hidden, head, _, _ = given
    shared = given.call()
    torch.testing.assert_close(shared, given.but(teacher_head=head).call())
    assert (given.but(teacher=hidden).call().divergence == 0).all()
    apart = given.but(teacher_head=head.weight).call().divergence
    assert not torch.allclose(apart, shared.divergence, rtol=1e-3)
    neutral = {"bias": torch.zeros(V), "softcap": math.inf, "logit_scale": 1.0,
               "lora": LoRA(torch.zeros(1, D), torch.zeros(V, 1))}  # fmt: skip
    replaced = head._replace(**{name: neutral[name] for name in HEADS[kind]})
    torch.testing.assert_close(given.but(teacher_head=replaced).call().divergence, apart, rtol=1e-4, atol=1e-6)


@of_every_beta
def test_shared_linear_heads_keep_relative_precision(kernels, beta):
    """With a bias, a scale and an adapter too, the difference of the hidden states is what is projected."""
    given = problem(9, D, V, 1e-5, scale=2.0, head="all")
    given = given.but(head=given.head._replace(softcap=None))
    hidden, head, teacher, _ = given.to(torch.float64)
    p = logits(hidden, head).softmax(-1)
    d = logits(teacher - hidden, head._replace(bias=None))
    variance = (p * d**2).sum(-1) - (p * d).sum(-1) ** 2
    curvature = 1.0 if beta in (0.0, 1.0) else beta * (1 - beta)
    assert variance.max() < 1e-8
    assert relative_error(given.call(beta=beta).divergence, curvature / 2 * variance) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_heads_in_half_precision(dtype, kind):
    """Values as exact as in fp32; gradients within the rounding of the logit gradient, twice where two products add."""
    given = problem(30, 64, V, 0.3, dtype=dtype, head=kind).to(dtype)
    (got, *gradients), (exact, *exact_gradients) = given.run(), oracle.expected(given)
    assert relative_error(got.divergence, exact.divergence) < 1e-4
    for x, y in zip(gradients, exact_gradients, strict=True):
        assert x.dtype == dtype and relative_error(x, y) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


def test_a_frozen_head_under_an_adapter_has_no_gradient_of_its_own(monkeypatch):
    given = problem(9, D, V, head="lora").leaves()
    lora, weight = given.head.lora, given.head.weight.detach()
    shapes, add = [], products.HeadGradient.add
    monkeypatch.setattr(
        products.HeadGradient, "add", lambda self, g, h: shapes.append((g.shape[1], h.shape[1])) or add(self, g, h)
    )
    given.but(hidden=given.hidden.detach(), head=Head(weight, lora=lora)).call().loss.backward()
    assert shapes == [(3, D), (V, 3)] and lora.a.grad.abs().sum() > 0 and lora.b.grad.abs().sum() > 0
    assert weight.grad is None


EVERYTHING = {
    "whole vocabulary": {},
    "forward KL": {"beta": 0.0},
    "top_k": {"support": TopK(11)},
    "top_k, renormalize": {"support": TopK(11, "renormalize")},
    "sampled_token": {"support": SampledToken(), "beta": 1.0},
    "entry_clip": {"entry_clip": 0.02, "beta": 0.0},
}


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("kind", ["plain", "all"])
@every_schedule
def test_objectives_and_heads_together(kernels, schedule, name, kind):
    """Per token, with an importance ratio, through a softcap, twice."""
    leading = (2, few_in_the_interpreter(kernels, 6, 3))
    given = problem(leading, D, V, 0.5, scale=2.0, head=kind)
    options = {**EVERYTHING[name], "target_ids": torch.randint(V, leading), "old_logp": torch.randn(leading) - 5}
    options["temperature"] = 1.1
    upstream = torch.randn(leading)
    upstream[0, 2] = 0

    def above(out):
        return (torch.sin(out) * upstream).sum()

    exact, *exact_gradients = oracle.expected(given, lambda result: above(oracle.per_token(result)), **options)
    dtype = torch.float32 if schedule == "chunked" else torch.float64
    leaves = given.to(dtype).leaves()
    out = leaves.call(linear_divergence_per_token, **options, schedule=schedule)
    assert out.dtype == dtype
    first, second = (torch.autograd.grad(above(out), leaves.trained, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(second, first)
    for got, want in zip((out, *first), (oracle.per_token(exact), *exact_gradients), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", EVERYTHING)
def test_equal_sides_are_0_with_a_gradient_of_0(kernels, name):
    given = problem(6, D, V, scale=8.0)
    given = given.but(teacher=given.hidden)
    same, *gradients = given.run(**EVERYTHING[name], target_ids=torch.full((6,), 3))
    assert all((x == 0).all() for x in (same.divergence, *gradients))


@pytest.mark.parametrize("head", ["shared", "own"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_forbidden_columns(kernels, name, head):
    """-inf in the bias of one side or both."""
    hidden, weight, _, _ = problem(6, D, V, scale=8.0)
    forbidden = torch.zeros(V)
    forbidden[10:200] = -torch.inf
    own = None if head == "shared" else Head(weight, bias=torch.zeros(V))
    given = Problem(hidden, Head(weight, bias=forbidden), hidden + 0.3, own)
    options = {**EVERYTHING[name], "target_ids": torch.full((6,), 3)}
    (got, *gradients), (exact, *_) = given.run(**options), oracle.expected(given, **options)
    torch.testing.assert_close(got.divergence.double(), exact.divergence, rtol=1e-4, atol=1e-6)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", EVERYTHING)
def test_what_is_not_finite_stays_in_its_row(kernels, name, bad):
    given, others = problem(6, D, V, scale=8.0), [0, 1, 3, 4, 5]
    given = given.but(teacher=given.hidden.clone(), token_weight=torch.ones(6))
    given.hidden[2, 0] = bad
    got, grad_hidden, _ = given.run(**EVERYTHING[name], target_ids=torch.full((6,), 3))
    assert got.divergence[2].isnan() and got.divergence[others].isfinite().all()
    assert grad_hidden[2].isnan().all() and grad_hidden[others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERYTHING)
def test_objectives_in_every_dtype(dtype, name):
    given = problem(25, 64, V, 0.4, scale=2.0, dtype=dtype)
    options = {**EVERYTHING[name], "target_ids": torch.randint(V, (25,))}
    (got, *gradients), (exact, *exact_gradients) = given.run(**options), oracle.expected(given, **options)
    assert relative_error(got.divergence, exact.divergence) < 2e-5
    limit = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for x, y in zip(gradients, exact_gradients, strict=True):
        assert x.dtype == dtype and relative_error(x, y) < limit


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_reference_equals_the_oracle(name):
    """In float64, every field, with tokens of weight 0 and importance ratios."""
    given = problem((3, 5), D, V, 0.4, scale=2.0, head="all", weighted=True).to(torch.float64)
    given.token_weight[1] = 0
    options = {**EVERYTHING[name], "target_ids": torch.randint(V, (3, 5)), "old_logp": torch.randn(3, 5) - 5}
    options["temperature"] = 0.8
    got, exact = given.run(**options, schedule="reference"), oracle.expected(given, **options)
    torch.testing.assert_close((*got[0], *got[1:]), (*exact[0], *exact[1:]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", EVERYTHING)
def test_zero_negative_and_huge_weights(name):
    given, ids = problem(8, D, V, 0.4), torch.randint(V, (8,))
    token_weight = torch.tensor([0.0, 1.0, -2.0, 1e30, 0.0, 1e-30, -1e20, 3.0])
    result, grad_hidden, _ = given.run(**EVERYTHING[name], target_ids=ids, token_weight=token_weight)
    for r in range(8):
        row = slice(r, r + 1)
        alone, expected, _ = given.tokens(row).run(**EVERYTHING[name], target_ids=ids[row])
        torch.testing.assert_close(grad_hidden[r], expected[0] * token_weight[r], rtol=1e-4, atol=1e-37)
        assert result.divergence[r] == (0 if token_weight[r] == 0 else alone.divergence[0])


NAMED = TopLogprobs(torch.arange(8).view(4, 2), torch.full((4, 2), -1.0))


def called(options):
    """linear_divergence on small sides; a head in `options` is what it has beside its weight."""
    hidden, weight, teacher, _ = problem(4, D, V)
    given = {"student_head": {}, "teacher_hidden": teacher, **options}
    for name in {"student_head", "teacher_head"} & set(given):
        given[name] = Head(weight, **given[name])
    return linear_divergence(hidden, **given)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"support": TopK(2, tail="cut")}, "TopK: expected tail 'bucket' or 'renormalize', got 'cut'"),
        ({"support": TopK(0)}, "TopK: expected k of at least 1, got 0"),
        ({"old_logp": torch.zeros(4)}, "old_logp: expected target_ids"),
        ({"support": NAMED}, "TopLogprobs: expected no teacher_hidden"),
        ({"support": NAMED, "teacher_hidden": None, "teacher_head": {}}, "TopLogprobs: expected no teacher_head"),
        ({"support": NAMED._replace(logp=torch.zeros(4, 3)), "teacher_hidden": None},
         r"support.logp: expected support.ids' shape \(4, 2\)"),
        ({"support": NAMED._replace(ids=torch.arange(8)), "teacher_hidden": None},
         r"support.ids: expected shape \(4, 'K'\)"),
        ({"teacher_hidden": None}, "teacher_hidden: expected a tensor, or support=TopLogprobs"),
        ({"support": SampledToken(), "beta": 1.0}, "SampledToken: expected target_ids"),
        ({"support": SampledToken(), "target_ids": torch.zeros(4).long()},
         "SampledToken: expected beta=1 .* got beta=0.5"),
        ({"entry_clip": 0.1}, "entry_clip: expected beta=0 .* got beta=0.5"),
        ({"entry_clip": 0.1, "support": TopK(2), "beta": 0.0}, "entry_clip: expected no TopK"),
        ({"entry_clip": 0.1, "support": NAMED, "teacher_hidden": None, "beta": 0.0},
         "entry_clip: expected no TopLogprobs"),
        ({"entry_clip": 0.1, "support": SampledToken(), "target_ids": torch.zeros(4).long(), "beta": 1.0},
         "entry_clip: expected no SampledToken"),
        ({"entry_clip": 0.0, "beta": 0.0}, "entry_clip: expected a number above 0"),
        ({"student_head": {"softcap": -1.0}}, "student_head.softcap: expected a number above 0"),
        ({"student_head": {"logit_scale": math.inf}}, "student_head.logit_scale: expected a finite number"),
        ({"student_head": {"bias": torch.zeros(V + 1)}}, r"student_head.bias: expected shape \(307,\)"),
        ({"student_head": {"lora": LoRA(torch.zeros(2, D + 1), torch.zeros(V, 2))}},
         "student_head.lora: expected A of shape"),
        ({"teacher_head": {"lora": LoRA(torch.zeros(2, D), torch.zeros(V, 3))}},
         "teacher_head.lora: expected B of shape"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_raises_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        called(options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"support": TopK(2.0)}, "TopK: expected an integer as k, got float"),
        ({"support": 2}, "support: expected TopK, TopLogprobs, SampledToken or None, got int"),
        ({"student_head": {"softcap": "30"}}, "student_head.softcap: expected a number, got str"),
        ({"student_head": {"bias": torch.zeros(V).long()}}, "student_head.bias: expected floating-point"),
        ({"student_head": {"lora": torch.zeros(2, D)}}, "student_head.lora: expected a LoRA, got Tensor"),
        ({"support": NAMED._replace(logp=[0.0]), "teacher_hidden": None}, "support.logp: expected a tensor, got list"),
    ],
)
def test_types(options, message):
    with pytest.raises(TypeError, match=message):
        called(options)


@pytest.mark.parametrize("case", ["top_k", "bias", "top_logprobs"])
def test_one_row_without_a_leading_axis(case):
    given, of_one, of_many = problem(1, D, V), {}, {}
    if case == "top_k":
        of_one = of_many = {"support": TopK(3)}
    elif case == "bias":
        given = given.but(head=Head(given.head, bias=torch.randn(V)))
    one, many = given.tokens(0), given
    if case == "top_logprobs":
        ids, logp = torch.tensor([3, 4, -1]), torch.tensor([-1.0, -2.0, 0.0])
        of_one, of_many = {"support": TopLogprobs(ids, logp)}, {"support": TopLogprobs(ids[None], logp[None])}
        one, many = one.but(teacher=None), many.but(teacher=None)
    alone, together = one.call(**of_one), many.call(**of_many)
    assert alone.divergence.shape == () and alone.divergence == together.divergence[0]
    assert (alone.teacher_entropy is None) == (case == "top_logprobs")


def test_kernels_of_a_cpu_are_native():
    assert kernels_of(torch.device("cpu")) != triton_kernels()


@of_every_beta
@pytest.mark.parametrize("bad_ids, bad_logp", [(0, -2.0), (7, torch.nan), (9, -torch.inf)])
def test_listed_rows_of_weight_0_may_hold_anything(kernels, beta, bad_ids, bad_logp):
    """Padding in `rows=`: repeated ids, NaN and -inf of rows of weight 0 reach no gradient."""
    given = problem(4, D, V).but(teacher=None, token_weight=torch.tensor([1.0, 0.0, 2.0, 0.0]))
    ids, logp = torch.arange(12).view(4, 3), torch.full((4, 3), -2.0)
    ids[1], logp[1], logp[3] = bad_ids, bad_logp, bad_logp
    (kept, *of_kept), (listed, *of_listed) = (
        given.run(support=TopLogprobs(ids, logp), beta=beta, rows=rows) for rows in (None, torch.arange(4))
    )
    torch.testing.assert_close((listed.loss, *of_listed), (kept.loss, *of_kept))


def test_infinite_divergences_of_rows_of_weight_0_reach_no_gradient(kernels):
    given, forbids = problem(4, D, V), torch.zeros(V)
    forbids[3] = -torch.inf
    given = given.but(head=Head(given.head, bias=torch.zeros(V)), teacher_head=Head(given.head, bias=forbids))
    options = {"beta": 1.0, "rows": torch.arange(4)}
    result, *gradients = given.run(**options, token_weight=torch.zeros(4))
    assert result.divergence.isinf().all()
    leaves = given.leaves()
    out = leaves.call(linear_divergence_per_token, **options)
    assert all((x == 0).all() for x in (*gradients, *torch.autograd.grad(out, leaves.trained, torch.zeros(4))))


def test_unchecked_ids_of_a_support_give_nan_in_their_row(kernels, unchecked):
    ids = torch.tensor([[1, 2, 3], [-5, -7, -100], [-2, 3, 4], [3, 3, 4], [3, 4, V]])
    named = TopLogprobs(ids, torch.full((5, 3), -2.0))
    result, grad, _ = problem(5, D, V).but(teacher=None).run(support=named, rows=torch.arange(5))
    assert result.divergence.isnan().tolist() == [False, True, True, True, True]
    assert grad[0].isfinite().all() and grad[1:].isnan().all()


def test_unchecked_targets_give_nan_in_their_row(kernels, unchecked):
    given = problem(5, D, V).but(token_weight=torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0]))
    options = {"beta": 1.0, "support": SampledToken(), "target_ids": torch.tensor([4, -100, V, 3, -100])}
    result, grad, _ = given.run(**options, rows=torch.arange(5))
    assert result.student_logp.isnan().tolist() == [False, True, True, False, True]
    assert grad.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("margin", [4.0, 8.0, 14.0])
def test_entry_clip_where_the_teacher_is_sure(kernels, margin):
    """Nearly all of q is clipped: 1 - Q is summed, not subtracted, in value and gradient."""
    given, bias = problem(6, D, V, 0.5), torch.zeros(V)
    bias[5] = margin + 7
    given = given.but(teacher_head=Head(given.head, bias=bias))
    options = {"beta": 0.0, "entry_clip": 0.05}
    (got, *gradients), (exact, *exact_gradients) = given.run(**options), oracle.expected(given, **options)
    assert logits(given.teacher, given.teacher_head).softmax(-1)[:, 5].min() > 0.5
    assert relative_error(got.divergence, exact.divergence) < 3e-6
    for x, y in zip(gradients, exact_gradients, strict=True):
        assert relative_error(x, y) < 1e-5


def test_compiled_with_other_numbers():
    hidden, weight, teacher, _ = problem(4, D, V)
    a, b = torch.randn(2, D), torch.randn(V, 2)

    def step(hidden, cap, scale, clip):
        head = Head(weight, lora=LoRA(a, b, scale), logit_scale=scale, softcap=cap)
        return linear_divergence(hidden, head, teacher, beta=0.0, entry_clip=clip).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for numbers in ((30.0, 1.0, 0.1), (20.0, 0.5, 0.2), (5.0, 0.25, 0.3)):
        assert torch.equal(compiled(hidden, *numbers), step(hidden, *numbers))
