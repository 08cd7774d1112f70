"""What rows know of their supports, in PyTorch's operators: on a CPU a call of one costs little.

The numbers of a few entries are float64. 1 / τ is rounded to fp32, as it is for the rows' other entries.
"""

import torch
from torch import Tensor

from . import native
from .contract import LEAST_LOG_TAIL, Logits, PerRow, RowStatistics, SupportLogits, SupportValues, inverse_of
from .of_target import of_target


def likeliest(logits: Tensor, k: int) -> Tensor:  # (C, V) fp32 → (C, k) int64
    """Columns of the k largest logits, in any order; NaN is the largest."""
    return logits.topk(k, sorted=False).indices


def entries(
    logits: Logits,
    columns: Tensor,  # (C, K) int64
    absent: float,
    *,
    forbid: bool = False,
) -> Tensor:  # (sides, C, K) float64
    """Both sides' logits at columns, `absent` where a column is outside of [0, V). Then forbids these entries."""
    sides = [x for x in (logits.student, logits.teacher) if x is not None]
    at, here = _within(columns, logits.student.shape[1])
    if logits.student.shape[1] == 0:
        return torch.full((len(sides), *columns.shape), absent, dtype=torch.float64)
    found = torch.stack([x.gather(1, at).double() for x in sides])
    if logits.difference:
        found[1] += found[0]
    if forbid:
        some = here.any(1, keepdim=True)
        for side, number in zip(sides, (-torch.inf, 0.0 if logits.difference else -torch.inf), strict=False):
            side.scatter_(1, at, torch.where(some, number, side.gather(1, at)))
    return torch.where(here, found, absent)


def _within(columns: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Columns, and which of them exist. Others repeat the first one that does, or where none does are 0."""
    here = (columns >= 0) & (columns < vocabulary)
    first = columns.gather(1, here.int().argmax(1, keepdim=True))
    return torch.where(here, columns, torch.where(here.any(1, keepdim=True), first, 0)), here


def support_values(
    at: SupportLogits,
    tail: RowStatistics,  # the rows' other entries'
    given: PerRow,
    temperature: float,
    *,
    renormalize: bool,
) -> SupportValues:
    """Log-probabilities of the support's entries and of the tail, entropies, and what follows of a target's."""
    inverse = inverse_of(temperature)
    exists = at.ids >= 0
    log_p, log_tail, lse = _normalised(at.student * inverse, tail.student_lse)
    fields = [_entropy(log_p, log_tail, tail.student_entropy)]
    if at.teacher is None:
        log_q = torch.where(exists, at.teacher_logp.double(), -torch.inf)
        log_tail_other = torch.log(-torch.expm1(log_q.logsumexp(-1, keepdim=True).clamp(max=-1e-7)))
        fields.append(torch.zeros_like(fields[0]))
    else:
        log_q, log_tail_other, lse_other = _normalised(at.teacher * inverse, tail.teacher_lse)
        fields.append(_entropy(log_q, log_tail_other, tail.teacher_entropy))
    logp = None
    if at.target is not None:
        logp = at.target[0] * inverse - lse
        fields += [logp, torch.zeros_like(logp) if at.teacher is None else at.target[1] * inverse - lse_other]
    more, weight, slope = of_target(logp, given)
    fields += more
    if renormalize:
        some = exists.any(1, keepdim=True)  # an empty row diverges from nothing
        few = (torch.where(some, x, 0.0) for x in (log_p, log_q))
    else:
        few = (
            torch.cat([log, rest.clamp(min=LEAST_LOG_TAIL)], dim=-1)
            for log, rest in ((log_p, log_tail), (log_q, log_tail_other))
        )
    scalars = torch.stack([torch.empty_like(fields[0]), *fields]).float()
    slope = None if slope is None else slope.float()
    return SupportValues(log_p, log_q, lse, log_tail[:, 0], Logits(*few, False, 0.0), scalars, weight, slope)


def _normalised(z: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the support (C, K), log P (C, 1), and the log-sum-exp of all (C,)."""
    lse = torch.cat([z, tail[:, None]], dim=-1).logsumexp(-1)
    return z - lse[:, None], (tail - lse)[:, None], lse


def _entropy(log_p: Tensor, log_tail: Tensor, tail_entropy: Tensor) -> Tensor:  # (C,)
    p, tail = log_p.exp(), log_tail.exp().squeeze(-1)
    of_tail = torch.where(tail > 0, tail * tail_entropy, 0.0)
    return torch.special.entr(p).sum(-1) + torch.special.entr(tail) + of_tail


def support_gradient(
    logits: Logits,  # the student's, with the support forbidden
    columns: Tensor,  # (C, K) int64, where the support's entries are; outside of [0, V): elsewhere
    at: SupportLogits,
    target: Tensor | None,  # (C,) int64, a policy's target's column, alike
    values: SupportValues,
    tail_lse: Tensor,  # (C,) float64 log-sum-exp of the student's other logits / temperature
    g: Tensor,  # (C, K + 1) the weighted gradient of the log-probabilities of the support, and of the tail's
    temperature: float,
    gradient: Tensor,  # (C, V) fp32 or bf16 out; may lie over the student's logits, row by row
    *,
    is_bounded: bool,  # a tail below the least mass is constant
) -> None:
    """The dense gradient: a factor times p outside of the support, and its entries and the target one by one."""
    inverse, is_zero, softcap = inverse_of(temperature), values.weight == 0, logits.softcap
    g = torch.where(is_zero[:, None], 0.0, g.double())  # the row may hold anything
    g, g_tail = g[:, :-1], g[:, -1]
    if is_bounded:
        constant = values.log_tail < LEAST_LOG_TAIL
        g = torch.where(constant[:, None], g + g_tail[:, None] * values.log_p.exp(), g)
        g_tail = torch.where(constant, 0.0, g_tail)
    g_tail = g_tail * inverse
    base = torch.where(tail_lse.isfinite(), tail_lse / inverse, 0.0).float()
    apart, is_empty = base.double() * inverse, tail_lse == -torch.inf
    factor = torch.where(is_empty, 0.0 * g_tail, g_tail * (apart - tail_lse).exp())
    factor = torch.where(is_zero, 0.0, factor)
    if (slope := values.slope) is not None:
        logit = at.target[0]
        within = columns == target[:, None]
        of_tail = factor * (logit * inverse - apart).exp() / inverse
        at_target = torch.where(within.any(1), torch.where(within, g, 0.0).sum(1), of_tail)
        none = slope == 0
        at_target = at_target + torch.where(none, 0.0, slope * torch.expm1(logit * inverse - values.lse))
        g = g + torch.where(none[:, None], 0.0, slope[:, None] * values.log_p.exp())
        factor = factor + torch.where(none | is_empty, 0.0 * slope, slope * inverse * (apart - values.lse).exp())
    native.tail_gradient(logits, base, factor.float(), temperature, gradient)
    _put(gradient, columns, _below_softcap(g, at.student, softcap) * inverse)
    if slope is not None:
        _put(gradient, target[:, None], (_below_softcap(at_target, logit, softcap) * inverse)[:, None])


def _below_softcap(g: Tensor, logits: Tensor, softcap: float) -> Tensor:
    """The gradient of x, from that of c tanh(x / c)."""
    if not softcap:
        return g
    return torch.where(g == 0, 0.0, g * (1 - (logits / softcap) ** 2).clamp(min=0))


def _put(gradient: Tensor, columns: Tensor, g: Tensor) -> None:
    if gradient.shape[1] == 0:
        return
    at, here = _within(columns, gradient.shape[1])
    first = g.gather(1, here.int().argmax(1, keepdim=True))
    g = torch.where(here, g, first).to(gradient.dtype)
    rows = torch.arange(len(at))[:, None]
    g = torch.where(here.any(1, keepdim=True), g, gradient.gather(1, at))
    gradient[rows, at] = g  # scatter_ would copy all of a bf16 chunk
