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

A policy's loss of a target y adds c A r (p_v - [v = y]) to that, whose entry y is written alone.

As in SDPO's code, P and Q are at least 1 - e^-1e-7; a mass below that is constant, and has no gradient.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.contract import Logits, PerRow
from ..problem import Objective, Support
from .rows import Rows
from .shards import Shard, logits_at, of_target

LEAST_LOG_TAIL = math.log(-math.expm1(-1e-7))


def divergence_on_support(
    logits: Logits,  # changed
    rows: Rows,  # the chunk's; their weights are the gradient's
    objective: Objective,
    support: Support,
    kernels: Kernels,
    shard: Shard,  # the logits' part of the vocabulary
    gradient: Tensor | None,  # (C, V) fp32 or bf16 out; may lie over logits.student. None: values only
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:  # `rows.given.scalars` × (C,) fp32, as the row kernels'
    """Row scalars on a support and the dense weighted gradient. What is not known of the teacher is 0.

    Returns both sides' log-probabilities of the support, too, (C, K) float64.
    """
    temperature, (student, teacher, difference, _) = objective.temperature, logits
    targets = shard.target_logits(logits, rows.given.target)
    target, other_target = (None, None) if targets is None else (targets[0], targets[-1])
    ids, exists, own, other = _support(logits, rows, support, shard)
    columns, here = shard.local(ids, exists)
    _mask(student, columns, here, -torch.inf)
    if teacher is not None:
        _mask(teacher, columns, here, 0.0 if difference else -torch.inf)
    of_tail = shard.statistics(kernels, logits, temperature)

    log_p, log_tail, lse = _normalised(own / temperature, of_tail.student_lse)
    fields = [_entropy(log_p, log_tail, of_tail.student_entropy)]
    if teacher is None:
        log_q = torch.where(exists, rows.support_logp.double(), -torch.inf)
        log_tail_t = torch.log(-torch.expm1(log_q.logsumexp(-1, keepdim=True).clamp(max=-1e-7)))
        fields.append(torch.zeros_like(fields[0]))
    else:
        log_q, log_tail_t, lse_t = _normalised(other / temperature, of_tail.teacher_lse)
        fields.append(_entropy(log_q, log_tail_t, of_tail.teacher_entropy))
    logp = None
    if target is not None:
        logp = target / temperature - lse
        fields += [logp, torch.zeros_like(logp) if teacher is None else other_target / temperature - lse_t]
    more, weight, slope = of_target(logp, rows.given)
    fields += more

    if support.sampled:
        ratio = log_p - log_q + 0.0 * target[:, None]  # a wrong target gives NaN
        divergence = (ratio * log_p).squeeze(-1)
        g = weight[:, None] * ratio * log_tail.exp()
        g = torch.cat([g, -g], dim=-1)
        bounded = torch.zeros_like(lse, dtype=torch.bool)
    else:
        divergence, g = _few_entries(log_p, log_tail, log_q, log_tail_t, exists, weight, objective, support, kernels)
        bounded = (log_tail < LEAST_LOG_TAIL).squeeze(-1)
    if gradient is not None:
        g = torch.where(weight[:, None] == 0, 0.0, g)  # the row may hold anything
        seen = _Seen(ids, exists, own, log_p, of_tail.student_lse, bounded, lse)
        of_policy = None if slope is None else _OfPolicy(rows.given.target, target, logp, slope)
        _write_gradient(logits, seen, g, weight == 0, of_policy, temperature, kernels, shard, gradient)
    return tuple(x.float() for x in (divergence, *fields)), (log_p, log_q)


class _Seen(NamedTuple):
    """What is known of the student on a chunk's supports, float64."""

    ids: Tensor  # (C, K) int64
    exists: Tensor  # (C, K) bool
    logits: Tensor  # (C, K)
    log_p: Tensor  # (C, K)
    tail: Tensor  # (C,) log-sum-exp of the other entries' logits / temperature
    bounded: Tensor  # (C,) whether the tail's mass is below the least, and constant
    lse: Tensor  # (C,) of all entries


class _OfPolicy(NamedTuple):
    """What a policy's loss of the target y adds: slope · (p_v - [v = y])."""

    target: Tensor  # (C,) int64
    logit: Tensor  # (C,) float64, the target's
    logp: Tensor  # (C,) float64
    slope: Tensor  # (C,)


def _write_gradient(
    logits: Logits,
    seen: _Seen,
    g: Tensor,  # (C, K + 1) weighted, of the support's log-probabilities and of the tail's log-sum-exp
    is_zero: Tensor,  # (C,) bool: the row has no weight, and may hold anything
    of_policy: _OfPolicy | None,
    temperature: float,
    kernels: Kernels,
    shard: Shard,
    gradient: Tensor,  # (C, V) out
) -> None:
    """The dense gradient: a factor times p outside of the support, and its entries one by one."""
    tail, softcap = seen.tail, logits.softcap
    g, g_tail = g[:, :-1], g[:, -1]
    g = g + (seen.bounded * g_tail)[:, None] * seen.log_p.exp()
    g_tail = torch.where(seen.bounded, 0.0, g_tail) / temperature
    base = torch.where(tail.isfinite(), tail * temperature, 0.0).float()
    factor = torch.where(tail == -torch.inf, 0.0 * g_tail, g_tail * (base.double() / temperature - tail).exp())
    factor = torch.where(is_zero, 0.0, factor)
    if of_policy is not None:
        target, logit, logp, slope = of_policy
        inside = seen.exists & (seen.ids == target[:, None])
        of_tail = factor * (logit - base).div(temperature).exp() * temperature
        at_target = torch.where(inside.any(1), torch.where(inside, g, 0.0).sum(1), of_tail)
        at_target = at_target + slope * torch.expm1(logp)
        g = g + slope[:, None] * seen.log_p.exp()
        own_factor = slope / temperature * (base.double() / temperature - seen.lse).exp()
        factor = factor + torch.where(tail == -torch.inf, 0.0 * slope, own_factor)
    kernels.tail_gradient(logits, base, factor.float(), temperature, gradient)
    _put(gradient, *shard.local(seen.ids, seen.exists), _below_softcap(g, seen.logits, softcap) / temperature)
    if of_policy is not None:
        column, here = shard.local(target[:, None], torch.ones_like(target[:, None], dtype=torch.bool))
        _put(gradient, column, here, (_below_softcap(at_target, logit, softcap) / temperature)[:, None])


def _below_softcap(g: Tensor, logits: Tensor, softcap: float) -> Tensor:
    """The gradient of x, from that of c tanh(x / c)."""
    return g * (1 - (logits / softcap) ** 2).clamp(min=0) if softcap else g


def _support(
    logits: Logits, rows: Rows, support: Support, shard: Shard
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # (C, K) int64, bool, float64, float64
    """Ids, which of the slots exist, and both sides' logits at them; of a slot that does not exist -inf."""
    if support.k:
        ids, values = _likeliest(logits, support.k, shard)
        exists = torch.ones_like(ids, dtype=torch.bool)
    else:
        ids = rows.given.target[:, None] if rows.support_ids is None else rows.support_ids
        exists = torch.ones_like(ids, dtype=torch.bool) if rows.support_ids is None else ids >= 0
        values = shard.values(logits, ids, exists)
    own, other = values[0], None if logits.teacher is None else values[1]
    own, other = (None if x is None else torch.where(exists, x, -torch.inf) for x in (own, other))
    return ids, exists, own, other


def _likeliest(logits: Logits, k: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """(C, K) ids of the student's likeliest entries, ascending, and (sides, C, K) logits: of all parts' candidates."""
    sides, most = 1 if logits.teacher is None else 2, min(k, shard.longest)
    values, columns = logits.student.topk(min(most, shard.size), sorted=False)
    candidates = torch.full((1 + sides, len(values), most), -torch.inf, dtype=torch.float64, device=values.device)
    candidates[0] = -1  # an empty slot
    found = torch.cat([(columns + shard.start).double().unsqueeze(0), logits_at(logits, columns)])
    candidates[:, :, : columns.shape[1]] = found
    candidates = shard.gather(candidates).movedim(0, 2).flatten(2)  # (1 + sides, C, parts · most)
    ids, student = candidates[0], candidates[1]
    order = torch.where(ids < 0, -torch.inf, student.clamp(min=torch.finfo(torch.float64).min))
    best = order.topk(min(k, shard.vocabulary), sorted=False).indices
    best = best.gather(1, ids.gather(1, best).argsort(1))  # every part has one order
    return ids.gather(1, best).long(), candidates[1:].gather(2, best.expand(sides, -1, -1))


def _mask(logits: Tensor, ids: Tensor, exists: Tensor, value: float) -> None:
    """Slots that do not exist repeat another, or where there is none leave entry 0 as it is."""
    if logits.shape[1] == 0:
        return
    some = exists.any(1, keepdim=True)
    logits.scatter_(1, ids, torch.where(some, value, logits.gather(1, ids)))


def _put(gradient: Tensor, ids: Tensor, exists: Tensor, g: Tensor) -> None:
    if gradient.shape[1] == 0:
        return
    some = exists.any(1, keepdim=True)
    first = g.gather(1, exists.int().argmax(1, keepdim=True))
    g = torch.where(exists, g, first).to(gradient.dtype)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    gradient[rows, ids] = torch.where(some, g, gradient.gather(1, ids))  # scatter_ would copy all of a bf16 chunk


def _normalised(z: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the entries in A (C, K), log P (C, 1), and the log-sum-exp of all (C,)."""
    lse = torch.cat([z, tail[:, None]], dim=-1).logsumexp(-1)
    return z - lse[:, None], (tail - lse)[:, None], lse


def _entropy(log_p: Tensor, log_tail: Tensor, tail_entropy: Tensor) -> Tensor:  # (C,)
    p, tail = log_p.exp(), log_tail.exp().squeeze(-1)
    of_tail = torch.where(tail > 0, tail * tail_entropy, 0.0)
    return torch.special.entr(p).sum(-1) + torch.special.entr(tail) + of_tail


def _few_entries(
    log_p, log_tail, log_q, log_tail_t, exists, weight, objective: Objective, support: Support, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """(C,) divergence and (C, K + 1) its weighted gradient, by the row kernel."""
    if support.renormalize:
        student, teacher = log_p, log_q
        some = exists.any(1, keepdim=True)  # an empty row diverges from nothing
        student, teacher = (torch.where(some, x, 0.0) for x in (student, teacher))
    else:
        student = torch.cat([log_p, log_tail.clamp(min=LEAST_LOG_TAIL)], dim=-1)
        teacher = torch.cat([log_q, log_tail_t.clamp(min=LEAST_LOG_TAIL)], dim=-1)
    g = torch.empty_like(student, dtype=torch.float32)
    few = Logits(student.contiguous(), teacher.contiguous(), difference=False, softcap=0.0)
    scalars = kernels.row_divergence(few, PerRow(weight), objective._replace(temperature=1.0), g)
    if support.renormalize:  # nothing lies outside of A, but a NaN row is NaN throughout
        g = torch.cat([g, 0.0 * scalars[0][:, None]], dim=-1)
    return scalars[0], g
