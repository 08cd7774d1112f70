"""Rows whose divergence knows a few vocabulary entries one by one, and the rest by their sum.

    A            the support: the student's K likeliest entries, or K that the teacher has named
    P, Q         the mass outside of A:  log P = log Σ_{v ∉ A} e^(z_v/τ) - lse
    bucket       D of the K + 1 probabilities (p_A, P) and (q_A, Q)
    renormalize  D of p_A / Σ p_A and q_A / Σ q_A
    sampled      stop(log p_y - log q_y) log p_y of the sampled token y, A = {y}

(SDPO, arXiv 2601.20802.) A chunk's resident logits are taken apart: those of A are copied out and replaced with -inf,
so that what is left of a row is its tail, whose log-sum-exp then has nothing to cancel. The K + 1 log-probabilities are
short rows for the same kernel that takes whole ones; they are float64, in which no rounding is as large as the
difference of two distributions that are nearly equal. With g its gradient of the bucket, the dense one is
∂D/∂z_v = g p_v / P for v ∉ A.

As in SDPO's code, P and Q are at least 1 - e^-1e-7; a mass below that is constant, and has no gradient.
"""

import math

import torch
from torch import Tensor

from .arguments import Numbers
from .kernels import Kernels
from .rows import Rows

LEAST_LOG_TAIL = math.log(-math.expm1(-1e-7))


def divergence_on_support(
    student: Tensor,  # (C, V) fp32 logits; changed
    teacher: Tensor | None,  # (C, V) the teacher's, or teacher - student; changed. None: rows.support_logp
    rows: Rows,  # of the chunk; their weights are the gradient's
    numbers: Numbers,
    kernels: Kernels,
    *,
    teacher_is_difference: bool,
    gradient: Tensor | None,  # (C, V) fp32 or bf16 out; may lie over student. None: values only
) -> tuple[Tensor, ...]:  # 3 × (C,) fp32, 5 with target, 6 with old_logp, as the row kernels'
    """Row scalars on a support and the dense weighted gradient. What the teacher has not said of itself is 0."""
    temperature = numbers.temperature
    ids, exists = _support(student, rows, numbers)
    own, other = _taken(student, ids, exists), None
    target = _at_target(student, rows)
    if teacher is not None:
        other, other_target = _taken(teacher, ids, exists), _at_target(teacher, rows)
        if teacher_is_difference:
            other, other_target = own + other, None if target is None else target + other_target
    _mask(student, ids, exists, -torch.inf)
    if teacher is not None:
        _mask(teacher, ids, exists, 0.0 if teacher_is_difference else -torch.inf)
    tail, tail_t, entropy, entropy_t = kernels.row_statistics(
        student,
        student if teacher is None else teacher,
        temperature=temperature,
        teacher_is_difference=teacher_is_difference,
    )

    log_p, log_tail, lse = _normalised(own / temperature, tail)
    fields = [_entropy(log_p, log_tail, entropy)]
    if teacher is None:
        log_q = torch.where(exists, rows.support_logp.double(), -torch.inf)
        log_tail_t = torch.log(-torch.expm1(log_q.logsumexp(-1, keepdim=True).clamp(max=-1e-7)))
        fields.append(torch.zeros_like(fields[0]))
    else:
        log_q, log_tail_t, lse_t = _normalised(other / temperature, tail_t)
        fields.append(_entropy(log_q, log_tail_t, entropy_t))
    if target is not None:
        logp = target / temperature - lse
        fields += [logp, torch.zeros_like(logp) if teacher is None else other_target / temperature - lse_t]
    weight = rows.weight
    if rows.old_logp is not None:
        fields.append((logp - rows.old_logp).clamp(-20, 20).exp().clamp(max=numbers.importance_clip))
        weight = (weight * fields[-1]).float()

    # g: of the logits in A, and of the tail's log-sum-exp
    if numbers.sampled_token:
        ratio = log_p - log_q + 0.0 * target[:, None]  # NaN for a target that is none
        divergence = (ratio * log_p).squeeze(-1)
        g = weight[:, None] * ratio * log_tail.exp()
        g = torch.cat([g, -g], dim=-1)
    else:
        divergence, g = _few_entries(log_p, log_tail, log_q, log_tail_t, exists, weight, numbers, kernels)
    if gradient is not None:
        g = torch.where(weight[:, None] == 0, 0.0, g)  # whatever the row holds
        bounded = (log_tail < LEAST_LOG_TAIL).squeeze(-1) & (not numbers.sampled_token)
        g, g_tail = g[:, :-1], g[:, -1]
        g = g + (bounded * g_tail)[:, None] * log_p.exp()
        g_tail = torch.where(bounded, 0.0, g_tail) / temperature
        base = torch.where(tail.isfinite(), tail * temperature, 0.0).float()
        factor = torch.where(tail == -torch.inf, 0.0 * g_tail, g_tail * (base.double() / temperature - tail).exp())
        factor = torch.where(weight == 0, 0.0, factor)
        softcap = numbers.student_softcap
        kernels.tail_gradient(student, base, factor.float(), gradient, temperature=temperature, softcap=softcap)
        if softcap:
            g = g * (1 - (own / softcap) ** 2).clamp(min=0)
        _put(gradient, ids, exists, g / temperature)
    return tuple(x.float() for x in (divergence, *fields))


def _support(student: Tensor, rows: Rows, numbers: Numbers) -> tuple[Tensor, Tensor]:  # (C, K) int64, (C, K) bool
    """Ids, and which of the slots exist. A slot that does not repeats the row's first one that does, or 0."""
    if numbers.sampled_token:
        ids = rows.target.clamp(0, student.shape[1] - 1)[:, None]
    elif rows.support_ids is None:
        ids = student.topk(min(numbers.top_k, student.shape[1]), sorted=False).indices.sort().values  # one order
    else:
        exists = rows.support_ids >= 0
        first = rows.support_ids.gather(1, exists.int().argmax(1, keepdim=True)).clamp(min=0)
        return torch.where(exists, rows.support_ids, first), exists
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _taken(logits: Tensor, ids: Tensor, exists: Tensor) -> Tensor:  # (C, K) float64
    return torch.where(exists, logits.gather(1, ids).double(), -torch.inf)


def _mask(logits: Tensor, ids: Tensor, exists: Tensor, value: float) -> None:
    """Slots that do not exist repeat another, or where there is none leave entry 0 as it is."""
    some = exists.any(1, keepdim=True)
    logits.scatter_(1, ids, torch.where(some, value, logits.gather(1, ids)))


def _put(gradient: Tensor, ids: Tensor, exists: Tensor, g: Tensor) -> None:
    some = exists.any(1, keepdim=True)
    first = g.gather(1, exists.int().argmax(1, keepdim=True))
    g = torch.where(exists, g, first).to(gradient.dtype)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    gradient[rows, ids] = torch.where(some, g, gradient.gather(1, ids))  # scatter_ would copy all of a bf16 chunk


def _at_target(logits: Tensor, rows: Rows) -> Tensor | None:  # (C,) float64
    """NaN for an id that is not in the vocabulary."""
    if rows.target is None:
        return None
    inside = (rows.target >= 0) & (rows.target < logits.shape[1])
    z = logits.gather(1, torch.where(inside, rows.target, 0)[:, None]).squeeze(1)
    return torch.where(inside, z.double(), torch.nan)


def _normalised(z: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the entries in A (C, K), log P (C, 1), and the log-sum-exp of all (C,)."""
    lse = torch.cat([z, tail[:, None]], dim=-1).logsumexp(-1)
    return z - lse[:, None], (tail - lse)[:, None], lse


def _entropy(log_p: Tensor, log_tail: Tensor, tail_entropy: Tensor) -> Tensor:  # (C,)
    p, tail = log_p.exp(), log_tail.exp().squeeze(-1)
    of_tail = torch.where(tail > 0, tail * tail_entropy, 0.0)
    return torch.special.entr(p).sum(-1) + torch.special.entr(tail) + of_tail


def _few_entries(log_p, log_tail, log_q, log_tail_t, exists, weight, numbers: Numbers, kernels: Kernels):
    """(C,) divergence and (C, K + 1) its weighted gradient, by the row kernel."""
    if numbers.renormalize:
        student, teacher = log_p, log_q
        some = exists.any(1, keepdim=True)  # a row without any has the divergence of nothing from nothing
        student, teacher = (torch.where(some, x, 0.0) for x in (student, teacher))
    else:
        student = torch.cat([log_p, log_tail.clamp(min=LEAST_LOG_TAIL)], dim=-1)
        teacher = torch.cat([log_q, log_tail_t.clamp(min=LEAST_LOG_TAIL)], dim=-1)
    g = torch.empty_like(student, dtype=torch.float32)
    scalars = kernels.short_row_divergence(
        student.contiguous(), teacher.contiguous(), weight, None, beta=numbers.beta, temperature=1.0,
        teacher_is_difference=False, gradient=g,
    )  # fmt: skip
    if numbers.renormalize:  # nothing outside of A; but a NaN row is NaN throughout
        g = torch.cat([g, 0.0 * scalars[0][:, None]], dim=-1)
    return scalars[0], g
