"""Objectives on a support, of sampled tokens, with clipped entries, and heads that are more than a product.

The oracle is written from the definitions on full logits, in float64 and with autograd, and shares nothing with the
package's own reference, which is checked like every other schedule.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from oracle import relative_error
from test_linear_divergence import DTYPES, problem
from torch.utils._pytree import tree_leaves, tree_map_only

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
from scsdpo_kernels.schedules import rows as row_choice

BETAS = (0.0, 0.3, 1.0)
V, D = 307, 24


def logits(hidden, head):
    weight, bias, lora, logit_scale, softcap = Head(head) if isinstance(head, torch.Tensor) else head
    z = hidden @ weight.T
    if lora is not None:
        z = z + lora.scale * (hidden @ lora.a.T) @ lora.b.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def divergence(log_p, log_q, beta):
    def kl(of, to):
        return F.kl_div(to, of, log_target=True, reduction="none").sum(-1)

    if beta in (0.0, 1.0):
        return kl(log_q, log_p) if beta == 0 else kl(log_p, log_q)
    log_m = torch.log((1 - beta) * log_p.exp() + beta * log_q.exp())
    return (1 - beta) * kl(log_p, log_m) + beta * kl(log_q, log_m)


def with_tail(log_p, tail):
    """Of true log-probabilities on a support."""
    inside = torch.logsumexp(log_p, -1, keepdim=True)
    if tail == "renormalize":
        return log_p - inside
    return torch.cat([log_p, torch.log(-torch.expm1(inside.clamp(max=-1e-7)))], -1)


def top_k(z_s, z_t, k, tail, beta):
    log_p, log_q = z_s.log_softmax(-1), z_t.log_softmax(-1)
    ids = z_s.topk(k).indices
    return divergence(with_tail(log_p.gather(-1, ids), tail), with_tail(log_q.gather(-1, ids), tail), beta)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "triton"] if DEVICE == "cpu" else ["cpu"])
def kernels(request, monkeypatch):
    """The native kernels, and where there is no GPU its kernels in Triton's interpreter; test_gpu.py has the others."""
    if request.param == "triton":
        monkeypatch.setattr(chunked, "kernels_of", lambda device: triton_kernels())
    return request.param


def leaves(*given, dtype=None):
    """Copies of tensors and heads, to differentiate into."""
    return tree_map_only(torch.Tensor, lambda x: x.detach().to(dtype or x.dtype).clone().requires_grad_(), list(given))


def double(given):
    return tree_map_only(torch.Tensor, torch.Tensor.double, given)


def tensors(given):
    """Those of heads too, in the order of their fields."""
    return [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]


def check(got, inputs, expected, exact_inputs, limit=2e-5, floor=1e-9):
    """The gradients of all inputs; `floor` is of a gradient's norm. Of the loss the rows, which may cancel in it, say
    how exact it is."""
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-5)
    gradients = torch.autograd.grad(got, tensors(inputs))
    exact = torch.autograd.grad(expected, tensors(exact_inputs))
    for x, y in zip(gradients, exact, strict=True):
        assert (x.double() - y).norm() <= limit * y.norm() + floor, relative_error(x, y)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("beta", BETAS)
def test_top_k(kernels, tail, beta):
    """Values and dense gradients, near-equal sides and far ones, K of 1, some and all, shared head and own."""
    cases = itertools.product((1e-3, 0.5), (1, 20, V), (None, 16))
    for distance, k, teacher_width in cases:
        hidden, weight, teacher, head = problem((9,), D, V, distance, scale=2.0, teacher_width=teacher_width)
        token_weight = torch.randn(9)
        inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.double)
        result = linear_divergence(*inputs, teacher, head, token_weight=token_weight, beta=beta, temperature=0.8,
                                   support=TopK(k, tail))  # fmt: skip
        z_t = logits(teacher.double(), (weight if head is None else head).double()) / 0.8
        z_s = logits(*exact) / 0.8
        expected = top_k(z_s, z_t, k, tail, beta)
        # a renormalised support of one entry has nothing to say
        floor = 1e-6 if k == 1 and tail == "renormalize" else 1e-8
        if k < V:
            torch.testing.assert_close(result.divergence.double(), expected, rtol=3e-4 if distance < 0.1 else 2e-5,
                                       atol=1e-9)  # fmt: skip
        check(result.loss, inputs, (token_weight * expected).sum(), exact,
              limit=5e-4 if distance < 0.1 else 2e-5, floor=floor)  # fmt: skip
        for side, z in (("student", z_s), ("teacher", z_t)):
            p = z.log_softmax(-1)
            torch.testing.assert_close(getattr(result, f"{side}_entropy").double(), -(p.exp() * p).sum(-1),
                                       rtol=1e-5, atol=2e-6)  # fmt: skip


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_top_k_is_what_trl_computes(beta, add_tail):
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    hidden, weight, teacher, _ = problem((40,), D, V, 0.7, scale=2.0)
    inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.double)
    support = TopK(20, "bucket" if add_tail else "renormalize")
    got = linear_divergence(*inputs, teacher, beta=beta, support=support)
    expected = losses.compute_topk_self_distillation_loss(
        logits(*exact), logits(teacher.double(), weight.double()),
        distillation_topk=20, distillation_alpha=beta, distillation_add_tail=add_tail,
    )  # fmt: skip
    torch.testing.assert_close(got.divergence.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    check(got.loss, inputs, expected.sum(), exact)


@pytest.mark.parametrize("beta", BETAS)
def test_top_k_of_near_equal_sides_keeps_relative_precision(kernels, beta):
    """A shared fp32 head: 1e-4 relative of the K + 1 buckets' divergence at 1e-9 and below."""
    hidden, weight, teacher, _ = problem((9,), D, V, 1e-5, scale=2.0)
    delta = teacher.double() - hidden.double()
    inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.double)
    got = linear_divergence(*inputs, teacher, beta=beta, support=TopK(20))
    z_s, d = logits(*exact), delta @ weight.double().T
    ids = z_s.topk(20).indices
    p = z_s.softmax(-1).detach()
    inside = torch.zeros_like(p).scatter(1, ids, 1.0)
    # d of a bucket is the mean of its entries' d; D = c/2 Var over buckets, to second order
    mass = torch.cat([p.gather(1, ids), (p * (1 - inside)).sum(1, keepdim=True)], 1)
    of_bucket = torch.cat([d.gather(1, ids), ((p * (1 - inside) * d).sum(1) / mass[:, -1])[:, None]], 1)
    mean = (mass * of_bucket).sum(1)
    variance = (mass * of_bucket**2).sum(1) - mean**2
    curvature = 1.0 if beta in (0.0, 1.0) else beta * (1 - beta)
    assert variance.max() < 1e-8
    assert relative_error(got.divergence, curvature / 2 * variance) < 1e-4
    # ∂D/∂z_v = -c p_v (d of v's bucket - mean), to first order
    of_entry = torch.where(inside > 0, d, of_bucket[:, -1:])
    gradient = -curvature * p * (of_entry - mean[:, None])
    grad_hidden, grad_weight = torch.autograd.grad(got.loss, inputs)
    assert relative_error(grad_hidden, gradient @ weight.double()) < 1e-4
    assert relative_error(grad_weight, gradient.T @ hidden.double()) < 1e-4


def test_top_k_bounds_the_tail_as_sdpo_does(kernels):
    """A peaked side's tail counts as 1e-7: a student that is unsure is not infinitely far from a sure teacher."""
    hidden, weight, teacher, _ = problem((6,), D, V, 0.5)
    teacher = teacher.clone()
    teacher[:3] *= 60.0  # nearly all the mass in one entry
    hidden[3:] *= 60.0
    for beta, tail in itertools.product(BETAS, ("bucket", "renormalize")):
        inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.double)
        got = linear_divergence(*inputs, teacher, beta=beta, support=TopK(5, tail))
        expected = top_k(logits(*exact), logits(teacher.double(), weight.double()), 5, tail, beta)
        torch.testing.assert_close(got.divergence.double(), expected.detach(), rtol=5e-5, atol=3e-7)
        check(got.loss, inputs, expected.sum(), exact, floor=1e-6)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("beta", BETAS)
def test_support_of_the_teacher(kernels, tail, beta):
    """A server's top-K: values, gradients, empty slots, rows of weight 0 whose slots may hold anything."""
    k, rows = 12, 10
    hidden, weight, teacher, _ = problem((2, 5), D, V, 0.5, scale=2.0)
    log_q, ids = logits(teacher.double(), weight.double()).log_softmax(-1).topk(k)
    ids, support_logp = ids.clone(), log_q.float()
    ids[0, 0, 3:] = -1
    ids[0, 1] = -1
    ids[1, 2, 0] = -1
    token_weight = torch.randn(2, 5)
    token_weight[1, 4] = 0
    ids[1, 4], support_logp[1, 4] = 10**6, torch.nan
    inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.double)
    result = linear_divergence(*inputs, support=TopLogprobs(ids, support_logp, tail), token_weight=token_weight,
                               beta=beta, target_ids=torch.zeros(2, 5, dtype=torch.long))  # fmt: skip
    log_p = logits(*exact).log_softmax(-1)
    expected = []
    for r in range(rows):
        of_row = ids.view(rows, k)[r]
        there = of_row >= 0
        if not token_weight.view(-1)[r] or (not there.any() and tail == "renormalize"):
            expected.append(log_p.new_zeros(()))
            continue
        p = with_tail(log_p.view(rows, V)[r, of_row[there]], tail)
        q = with_tail(support_logp.view(rows, k)[r, there].double(), tail)
        expected.append(divergence(p, q, beta))
    expected = torch.stack(expected).view(2, 5)
    torch.testing.assert_close(result.divergence.double(), expected, rtol=2e-5, atol=1e-7)
    check(result.loss, inputs, (token_weight * expected).sum(), exact)
    assert result.teacher_entropy is None and result.teacher_logp is None
    torch.testing.assert_close(result.student_logp[0].double(), log_p[0, :, 0], rtol=1e-5, atol=1e-6)


def test_support_of_the_teacher_is_top_k_where_both_choose_the_same(kernels):
    hidden, weight, teacher, _ = problem((8,), D, V, 1e-2, scale=3.0)
    ids = (hidden @ weight.T).topk(9).indices
    log_q = logits(teacher.double(), weight.double()).log_softmax(-1).gather(1, ids)
    for tail in ("bucket", "renormalize"):
        first, second = leaves(hidden, weight), leaves(hidden, weight)
        a = linear_divergence(*first, teacher, support=TopK(9, tail))
        b = linear_divergence(*second, support=TopLogprobs(ids, log_q, tail))
        torch.testing.assert_close(a.divergence, b.divergence, rtol=1e-3, atol=1e-9)
        for x, y in zip(torch.autograd.grad(a.loss, first), torch.autograd.grad(b.loss, second), strict=True):
            assert relative_error(x, y) < 1e-3


def test_wrong_supports_raise():
    hidden, weight, _, _ = problem((4,), D, V)
    ids, logp = torch.arange(12).view(4, 3), torch.full((4, 3), -2.0)
    for wrong in (ids + V, ids - 2, torch.where(ids == 4, 3, ids)):
        with pytest.raises(ValueError, match=r"support\.ids: expected ids in \[0, 307\), each once in a row"):
            linear_divergence(hidden, weight, support=TopLogprobs(wrong, logp))
    repeated = torch.tensor([[3, -1, 3], [-1, -1, -1], [0, 1, 2], [5, 6, -1]])
    with pytest.raises(ValueError, match=r"support\.ids"):
        linear_divergence(hidden, weight, support=TopLogprobs(repeated, logp))
    token_weight = torch.tensor([0.0, 1, 1, 1])
    linear_divergence(hidden, weight, support=TopLogprobs(repeated, logp), token_weight=token_weight)


@pytest.mark.parametrize("distance", [1e-3, 0.7])
def test_sampled_token(kernels, distance):
    hidden, weight, teacher, _ = problem((3, 7), D, V, distance, scale=2.0)
    ids, token_weight = torch.randint(V, (3, 7)), torch.randn(3, 7)
    ids[0] = (hidden[0] @ weight.T).argmax(-1)
    old = torch.randn(3, 7) - 4
    for importance in (False, True):
        inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.double)
        options = {"old_logp": old, "importance_clip": 1.5} if importance else {}
        result = linear_divergence(*inputs, teacher, target_ids=ids, token_weight=token_weight, beta=1.0,
                                   temperature=1.2, support=SampledToken(), **options)  # fmt: skip
        log_p = (logits(*exact) / 1.2).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        log_q = (logits(teacher.double(), weight.double()) / 1.2).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        expected = (log_p - log_q).detach() * log_p
        torch.testing.assert_close(result.divergence.double(), expected, rtol=1e-4 if distance < 0.1 else 1e-5,
                                   atol=1e-7)  # fmt: skip
        torch.testing.assert_close(result.student_logp.double(), log_p, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close((result.student_logp - result.teacher_logp).double(), log_p - log_q,
                                   rtol=1e-4, atol=3e-6)  # fmt: skip
        if importance:
            ratio = (log_p.detach() - old).clamp(-20, 20).exp().clamp(max=1.5)
            torch.testing.assert_close(result.importance_ratio.double(), ratio, rtol=1e-5, atol=1e-6)
            expected = expected * ratio
        check(result.loss, inputs, (token_weight * expected).sum(), exact, limit=1e-4 if distance < 0.1 else 2e-5)


def test_sampled_token_is_what_trl_computes():
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    hidden, weight, teacher, _ = problem((40,), D, V, 0.7, scale=2.0)
    ids = torch.randint(V, (40,))
    inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.double)
    got = linear_divergence(*inputs, teacher, beta=1.0, target_ids=ids, support=SampledToken())
    loss = losses.compute_sampled_token_self_distillation_loss
    expected = loss(logits(*exact), logits(teacher.double(), weight.double()), ids, distillation_alpha=1.0)
    stick = loss(logits(hidden, weight), logits(teacher, weight), ids, distillation_alpha=1.0)
    assert relative_error(got.divergence, expected) < 2 * relative_error(stick, expected)
    check(got.loss, inputs, expected.sum(), exact)


def clipped(z_s, z_t, bound):
    log_p, log_q = z_s.log_softmax(-1), z_t.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).clamp(max=bound).sum(-1)


def test_entry_clip(kernels):
    """Far sides, of which most clip some entries, and near ones, of which none does: that is the forward KL."""
    counts = []
    for distance, bound in ((1.0, 0.05), (1.0, 0.5), (0.3, 0.01), (1e-3, 0.05)):
        hidden, weight, teacher, _ = problem((30,), D, V, distance, scale=3.0)
        token_weight = torch.randn(30)
        inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.double)
        result = linear_divergence(*inputs, teacher, token_weight=token_weight, beta=0.0, temperature=0.9,
                                   entry_clip=bound)  # fmt: skip
        z_s, z_t = logits(*exact) / 0.9, logits(teacher.double(), weight.double()) / 0.9
        expected = clipped(z_s, z_t, bound)
        full = divergence(z_s.log_softmax(-1), z_t.log_softmax(-1), 0.0)
        counts.append(int((full > expected + 1e-9).sum()))
        torch.testing.assert_close(result.divergence.double(), expected, rtol=3e-4 if distance < 0.1 else 2e-5,
                                   atol=1e-6 if counts[-1] else 1e-9)  # fmt: skip
        check(result.loss, inputs, (token_weight * expected).sum(), exact,
              limit=3e-4 if distance < 0.1 else 2e-5)  # fmt: skip
        if distance < 0.1:
            plain = linear_divergence(hidden, weight, teacher, beta=0.0, temperature=0.9).divergence
            torch.testing.assert_close(result.divergence, plain, rtol=1e-4, atol=0)
    assert min(counts[:3]) >= 5 and counts[3] == 0, counts


def test_entry_clip_of_forbidden_entries(kernels):
    """What the student forbids counts as the bound, what the teacher forbids as nothing."""
    hidden, weight, teacher, _ = problem((5,), D, V, 0.5)
    bias = torch.zeros(V)
    bias[7] = -torch.inf
    forbids, allows = Head(weight, bias=bias), Head(weight, bias=torch.zeros(V))
    for student, of_teacher in ((forbids, allows), (weight, forbids), (forbids, None)):
        got = linear_divergence(hidden, student, teacher, of_teacher, beta=0.0, entry_clip=0.001).divergence
        log_p = logits(hidden.double(), double(student)).log_softmax(-1)
        log_q = logits(teacher.double(), double(of_teacher or student)).log_softmax(-1)
        terms = log_q.exp() * torch.where(log_q > -torch.inf, log_q - log_p, 0.0)
        torch.testing.assert_close(got.double(), terms.clamp(max=0.001).sum(-1), rtol=1e-5, atol=1e-6)


HEADS = {
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": 0.25},
    "lora": {"lora": 3},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 1.7, "lora": 5},
}


def head_of(kind, weight, seed):
    """A head of `weight` with what else such a head has."""
    generator = torch.Generator().manual_seed(seed)
    given = dict(HEADS[kind])
    if "bias" in given:
        given["bias"] = torch.randn(V, generator=generator)
    if "lora" in given:
        rank, width = given["lora"], weight.shape[1]
        a = torch.randn(rank, width, generator=generator) * width**-0.5
        given["lora"] = LoRA(a, torch.randn(V, rank, generator=generator), 0.5)
    return Head(weight, **given)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", HEADS)
def test_heads(kernels, beta, kind, monkeypatch):
    """Per side: the student's, the teacher's, both; values, and gradients of everything of the student's."""
    monkeypatch.setattr(chunked, "MIN_ROWS", 5)
    monkeypatch.setitem(chunked.BUFFER_BYTES, "cpu", 0)  # three chunks
    schedules = ("chunked", "reference") if kernels == "cpu" else ("chunked",)
    cases = (("s", None), ("t", None), ("st", 16), ("st", None))
    for (sides, teacher_width), schedule in itertools.product(cases, schedules):
        hidden, weight, teacher, other = problem((13,), D, V, 0.4, scale=2.0, teacher_width=teacher_width)
        student_head, teacher_head = weight, weight if other is None else other
        if "s" in sides:
            student_head = head_of(kind, student_head, 1)
        if "t" in sides:
            teacher_head = head_of(kind, teacher_head, 2)
        inputs, exact = leaves(hidden, student_head), leaves(hidden, student_head, dtype=torch.double)
        token_weight = torch.randn(13)
        got = linear_divergence(*inputs, teacher, teacher_head, beta=beta, temperature=0.8,
                                token_weight=token_weight, schedule=schedule)  # fmt: skip
        z_s, z_t = logits(*exact) / 0.8, logits(teacher.double(), double(teacher_head)) / 0.8
        expected = divergence(z_s.log_softmax(-1), z_t.log_softmax(-1), beta)
        torch.testing.assert_close(got.divergence.double(), expected, rtol=2e-5, atol=1e-8)
        check(got.loss, inputs, (token_weight * expected).sum(), exact, limit=3e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_a_teacher_without_a_head_of_its_own_has_the_students(kind):
    hidden, weight, teacher, _ = problem((7,), D, V, 0.3)
    head = head_of(kind, weight, 1)
    shared = linear_divergence(hidden, head, teacher)
    torch.testing.assert_close(shared, linear_divergence(hidden, head, teacher, head))
    assert (linear_divergence(hidden, head, hidden).divergence == 0).all()
    apart = linear_divergence(hidden, head, teacher, weight)
    assert not torch.allclose(apart.divergence, shared.divergence, rtol=1e-3)
    neutral = {"bias": torch.zeros(V), "softcap": math.inf, "logit_scale": 1.0,
               "lora": LoRA(torch.zeros(1, D), torch.zeros(V, 1))}  # fmt: skip
    replaced = head._replace(**{name: neutral[name] for name in HEADS[kind]})
    torch.testing.assert_close(linear_divergence(hidden, head, teacher, replaced).divergence,
                               apart.divergence, rtol=1e-4, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("beta", BETAS)
def test_shared_linear_heads_keep_relative_precision(kernels, beta):
    """With a bias, a scale and an adapter too, the difference of the hidden states is what is projected."""
    hidden, weight, teacher, _ = problem((9,), D, V, 1e-5, scale=2.0)
    head = head_of("all", weight, 1)._replace(softcap=None)
    got = linear_divergence(hidden, head, teacher, beta=beta)
    exact = double(head)
    p = logits(hidden.double(), exact).softmax(-1)
    d = logits(teacher.double() - hidden.double(), exact._replace(bias=None))
    variance = (p * d**2).sum(-1) - (p * d).sum(-1) ** 2
    curvature = 1.0 if beta in (0.0, 1.0) else beta * (1 - beta)
    assert variance.max() < 1e-8 and relative_error(got.divergence, curvature / 2 * variance) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", HEADS)
def test_heads_in_half_precision(dtype, kind):
    """Values as exact as in fp32; gradients within the rounding of the logit gradient, twice where two products add."""
    hidden, weight, teacher, _ = problem((30,), 64, V, 0.3, dtype=dtype)
    inputs = leaves(hidden, head_of(kind, weight, 1), dtype=dtype)
    exact = leaves(*inputs, dtype=torch.double)
    got = linear_divergence(*inputs, teacher)
    z_t = logits(teacher.double(), exact[1]).detach()
    expected = divergence(logits(*exact).log_softmax(-1), z_t.log_softmax(-1), 0.5)
    assert relative_error(got.divergence, expected) < 1e-4
    gradients = torch.autograd.grad(got.loss, tensors(inputs))
    sought = torch.autograd.grad(expected.sum(), tensors(exact))
    for x, y in zip(gradients, sought, strict=True):
        assert x.dtype == dtype and relative_error(x, y) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


def test_a_frozen_head_under_an_adapter_has_no_gradient_of_its_own(monkeypatch):
    hidden, weight, teacher, _ = problem((9,), D, V)
    (lora,) = leaves(head_of("lora", weight, 1).lora)
    shapes, add = [], products.HeadGradient.add
    monkeypatch.setattr(
        products.HeadGradient, "add", lambda self, g, h: shapes.append((g.shape[1], h.shape[1])) or add(self, g, h)
    )
    linear_divergence(hidden, Head(weight, lora=lora), teacher).loss.backward()
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
@pytest.mark.parametrize("kind", [None, "all"])
def test_objectives_and_heads_together(kernels, name, kind):
    """Against the reference in float64, per token, with an importance ratio, through a softcap, twice."""
    hidden, weight, teacher, _ = problem((2, 6), D, V, 0.5, scale=2.0)
    head = weight if kind is None else head_of(kind, weight, 1)
    options = {**EVERYTHING[name], "target_ids": torch.randint(V, (2, 6)), "old_logp": torch.randn(2, 6) - 5}
    upstream = torch.randn(2, 6)
    upstream[0, 2] = 0
    results = []
    for schedule in ("chunked", "reference"):
        dtype = torch.double if schedule == "reference" else torch.float32
        inputs = leaves(hidden, head, dtype=dtype)
        out = linear_divergence_per_token(*inputs, teacher.to(dtype), **options, temperature=1.1, schedule=schedule)
        loss = (torch.sin(out) * upstream).sum()
        results.append((out, *torch.autograd.grad(loss, tensors(inputs), retain_graph=True)))
        for x, y in zip(torch.autograd.grad(loss, tensors(inputs)), results[-1][1:], strict=True):
            torch.testing.assert_close(x, y)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", EVERYTHING)
def test_near_equal_peaked_and_forbidden(kernels, name):
    """Equal sides are 0 with a gradient of 0; -inf columns of one side or both; NaN and +inf stay in their row."""
    hidden, weight, _, _ = problem((6,), D, V, scale=8.0)
    options = {**EVERYTHING[name], "target_ids": torch.full((6,), 3)}
    inputs = leaves(hidden, weight)
    same = linear_divergence(*inputs, hidden, **options)
    assert (same.divergence == 0).all()
    assert all((x == 0).all() for x in torch.autograd.grad(same.loss, inputs))

    forbidden = torch.zeros(V)
    forbidden[10:200] = -torch.inf
    inputs = leaves(hidden, Head(weight, bias=forbidden))
    for teacher_head in (None, inputs[1]._replace(bias=torch.zeros(V))):
        given = [*inputs, hidden + 0.3, teacher_head]
        got = linear_divergence(*given, **options)
        expected = linear_divergence(*double(given), **options, schedule="reference")
        torch.testing.assert_close(got.divergence.double(), expected.divergence, rtol=1e-4, atol=1e-6)
        assert all(x.isfinite().all() for x in torch.autograd.grad(got.loss, tensors(inputs)))

    for bad in (torch.nan, torch.inf):
        broken = hidden.clone()
        broken[2, 0] = bad
        inputs = leaves(broken, weight)
        got = linear_divergence(*inputs, hidden, **options, token_weight=torch.ones(6))
        assert got.divergence[2].isnan() and got.divergence[[0, 1, 3, 4, 5]].isfinite().all()
        grad_hidden, _ = torch.autograd.grad(got.loss, inputs)
        assert grad_hidden[2].isnan().all() and grad_hidden[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERYTHING)
def test_objectives_in_every_dtype(dtype, name):
    hidden, weight, teacher, _ = problem((25,), 64, V, 0.4, scale=2.0, dtype=dtype)
    options = {**EVERYTHING[name], "target_ids": torch.randint(V, (25,))}
    inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.double)
    got = linear_divergence(*inputs, teacher, **options)
    expected = linear_divergence(*exact, teacher.double(), **options, schedule="reference")
    assert relative_error(got.divergence, expected.divergence) < 2e-5
    limit = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for x, y in zip(torch.autograd.grad(got.loss, inputs), torch.autograd.grad(expected.loss, exact), strict=True):
        assert x.dtype == dtype and relative_error(x, y) < limit


@pytest.mark.parametrize("name", EVERYTHING)
def test_zero_negative_and_huge_weights(name):
    hidden, weight, teacher, _ = problem((8,), D, V, 0.4)
    options = {**EVERYTHING[name], "target_ids": torch.randint(V, (8,))}
    token_weight = torch.tensor([0.0, 1.0, -2.0, 1e30, 0.0, 1e-30, -1e20, 3.0])
    inputs = leaves(hidden, weight)
    result = linear_divergence(*inputs, teacher, token_weight=token_weight, **options)
    grad_hidden, _ = torch.autograd.grad(result.loss, inputs)
    for r in range(8):
        one = leaves(hidden[r : r + 1], weight)
        options_r = {**options, "target_ids": options["target_ids"][r : r + 1]}
        alone = linear_divergence(*one, teacher[r : r + 1], **options_r)
        (expected,) = torch.autograd.grad(alone.loss, one[:1])
        torch.testing.assert_close(grad_hidden[r], expected[0] * token_weight[r], rtol=1e-4, atol=1e-37)
        assert result.divergence[r] == (0 if token_weight[r] == 0 else alone.divergence[0])


NAMED = TopLogprobs(torch.arange(8).view(4, 2), torch.full((4, 2), -1.0))


def called(options):
    """linear_divergence on small sides; a head in `options` is what it has beside its weight."""
    hidden, weight, teacher, _ = problem((4,), D, V)
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


def test_one_row_without_a_leading_axis():
    hidden, weight, teacher, _ = problem((1,), D, V)
    for head, support in ((weight, TopK(3)), (Head(weight, bias=torch.randn(V)), None)):
        one = linear_divergence(hidden[0], head, teacher[0], support=support)
        many = linear_divergence(hidden, head, teacher, support=support)
        assert one.divergence.shape == () and one.divergence == many.divergence[0]
    ids, logp = torch.tensor([3, 4, -1]), torch.tensor([-1.0, -2.0, 0.0])
    one = linear_divergence(hidden[0], weight, support=TopLogprobs(ids, logp))
    many = linear_divergence(hidden, weight, support=TopLogprobs(ids[None], logp[None]))
    assert one.divergence.shape == () and one.divergence == many.divergence[0] and one.teacher_entropy is None


def test_kernels_of_a_cpu_are_native():
    assert kernels_of(torch.device("cpu")) != triton_kernels()


def test_listed_rows_of_weight_0_may_hold_anything(kernels):
    """Padding in `rows=`: repeated ids, NaN, -inf and infinite divergences of rows of weight 0 reach no gradient."""
    hidden, weight, teacher, _ = problem((4,), D, V)
    ids, logp = torch.arange(12).view(4, 3), torch.full((4, 3), -2.0)
    token_weight, rows = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.arange(4)
    for beta in BETAS:
        for bad_ids, bad_logp in ((0, -2.0), (7, torch.nan), (9, -torch.inf)):
            given, teacher_logp = ids.clone(), logp.clone()
            given[1], teacher_logp[1], teacher_logp[3] = bad_ids, bad_logp, bad_logp
            results = []
            for listed in (None, rows):
                inputs = leaves(hidden, weight)
                out = linear_divergence(*inputs, support=TopLogprobs(given, teacher_logp), beta=beta,
                                        token_weight=token_weight, rows=listed)  # fmt: skip
                results.append((out.loss, *torch.autograd.grad(out.loss, inputs)))
            for x, y in zip(*results, strict=True):
                torch.testing.assert_close(x, y)
    forbids = torch.zeros(V)
    forbids[3] = -torch.inf
    inputs = leaves(hidden, Head(weight, bias=torch.zeros(V)))
    infinite = *inputs, teacher, inputs[1]._replace(bias=forbids)
    result = linear_divergence(*infinite, beta=1.0, token_weight=torch.zeros(4), rows=rows)
    assert result.divergence.isinf().all()
    assert all((x == 0).all() for x in torch.autograd.grad(result.loss, tensors(inputs)))
    out = linear_divergence_per_token(*infinite, beta=1.0, rows=rows)
    assert all((x == 0).all() for x in torch.autograd.grad(out, tensors(inputs), torch.zeros(4)))


def test_unchecked_ids_give_nan_in_their_row(kernels, monkeypatch):
    """What a GPU does with `rows=`, where nothing is checked: NaN in the rows of wrong ids, and in no others."""
    monkeypatch.setattr(row_choice, "kept_rows", lambda weight, target, rows, *_, **__: (rows, True))
    hidden, weight, teacher, _ = problem((5,), D, V)
    rows, logp = torch.arange(5), torch.full((5, 3), -2.0)
    ids = torch.tensor([[1, 2, 3], [-5, -7, -100], [-2, 3, 4], [3, 3, 4], [3, 4, V]])
    inputs = leaves(hidden, weight)
    result = linear_divergence(*inputs, support=TopLogprobs(ids, logp), rows=rows)
    assert result.divergence.isnan().tolist() == [False, True, True, True, True]
    (grad,) = torch.autograd.grad(result.loss, inputs[:1])
    assert grad[0].isfinite().all() and grad[1:].isnan().all()
    targets = torch.tensor([4, -100, V, 3, -100])
    token_weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])
    inputs = leaves(hidden, weight)
    result = linear_divergence(*inputs, teacher, beta=1.0, support=SampledToken(), target_ids=targets, rows=rows,
                               token_weight=token_weight)  # fmt: skip
    assert result.student_logp.isnan().tolist() == [False, True, True, False, True]
    (grad,) = torch.autograd.grad(result.loss, inputs[:1])
    assert grad.isnan().any(1).tolist() == [False, False, True, False, False]


def test_entry_clip_where_the_teacher_is_sure(kernels):
    """Nearly all of q is clipped: 1 - Q is summed, not subtracted, in value and gradient."""
    hidden, weight, teacher, _ = problem((6,), D, V, 0.5)
    for margin in (4.0, 8.0, 14.0):
        bias = torch.zeros(V)
        bias[5] = margin + 7
        inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.double)
        got = linear_divergence(*inputs, teacher, Head(inputs[1], bias=bias), beta=0.0, entry_clip=0.05)
        z_t = logits(teacher.double(), Head(weight.double(), bias=bias.double()))
        expected = clipped(logits(*exact), z_t, 0.05)
        assert z_t.softmax(-1)[:, 5].min() > 0.5
        assert relative_error(got.divergence, expected) < 3e-6
        for x, y in zip(torch.autograd.grad(got.loss, inputs), torch.autograd.grad(expected.sum(), exact), strict=True):
            assert relative_error(x, y) < 1e-5


def test_compiled_with_other_numbers():
    hidden, weight, teacher, _ = problem((4,), D, V)
    a, b = torch.randn(2, D), torch.randn(V, 2)

    def step(hidden, cap, scale, clip):
        head = Head(weight, lora=LoRA(a, b, scale), logit_scale=scale, softcap=cap)
        return linear_divergence(hidden, head, teacher, beta=0.0, entry_clip=clip).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for numbers in ((30.0, 1.0, 0.1), (20.0, 0.5, 0.2), (5.0, 0.25, 0.3)):
        assert torch.equal(compiled(hidden, *numbers), step(hidden, *numbers))
