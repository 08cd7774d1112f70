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

import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.contract import Logits, PerRow, Scalars, SupportLogits, SupportValues
from ..problem import Objective, Support
from .rows import Rows
from .shards import Shard


def divergence_on_support(
    logits: Logits,  # changed
    rows: Rows,  # the chunk's; their weights are the gradient's
    objective: Objective,
    support: Support,
    kernels: Kernels,
    shard: Shard,  # the logits' part of the vocabulary
    gradient: Tensor | None,  # (C, V) fp32 or bf16 out; may lie over logits.student. None: values only
) -> tuple[Scalars, tuple[Tensor, Tensor]]:  # (C,) fp32, as the row kernels'
    """Row scalars on a support and the dense weighted gradient. What is not known of the teacher is 0.

    Returns both sides' log-probabilities of the support, too, (C, K) float64.
    """
    temperature, target = objective.temperature, rows.given.target
    at_target = shard.target_logits(kernels, logits, target)
    ids = _ids(logits.student, rows, support, kernels, shard)
    columns = shard.local(ids)
    student, *teacher = shard.values(kernels, logits, ids, columns)
    at = SupportLogits(ids, student, teacher[0] if teacher else None, rows.support_logp, at_target)
    tail = shard.statistics(kernels, logits, temperature)
    values = kernels.support_values(at, tail, rows.given, temperature, renormalize=support.renormalize)
    divergence, g = _divergence(values, objective, support, kernels)
    if gradient is not None:
        kernels.support_gradient(
            logits, columns, at, None if values.slope is None else shard.local(target), values, tail.student_lse, g,
            temperature, gradient, is_bounded=not support.sampled,
        )  # fmt: skip
    return Scalars.of((divergence, *values.scalars[1:])), (values.log_p, values.log_q)


def _ids(student: Tensor, rows: Rows, support: Support, kernels: Kernels, shard: Shard) -> Tensor:
    """(C, K) int64, negative in an empty slot."""
    if support.k:
        return shard.likeliest(kernels, student, support.k)
    return rows.given.target[:, None] if rows.support_ids is None else rows.support_ids


def _divergence(
    values: SupportValues, objective: Objective, support: Support, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """(C,) fp32 divergence, and (C, K + 1) its weighted gradient."""
    if support.sampled:
        ratio = values.log_p - values.log_q
        g = values.weight[:, None] * ratio * values.log_tail.exp()[:, None]
        return (ratio * values.log_p).squeeze(-1).float(), torch.cat([g, -g], dim=-1)
    g = torch.empty_like(values.few.student, dtype=torch.float32)
    rows, objective = PerRow(values.weight), objective._replace(temperature=1.0)
    divergence, *_ = kernels.row_divergence(values.few, rows, objective, g)
    if support.renormalize:  # nothing lies outside of A, but a NaN row is NaN throughout
        g = torch.cat([g, 0.0 * divergence[:, None]], dim=-1)
    return divergence, g
