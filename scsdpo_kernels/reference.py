"""The same operator in plain PyTorch with full logits: the readable definition, and the oracle of the tests.

It shares no formula with the kernels, takes any floating dtype and differentiates any number of times. All of its
arithmetic is float64, whatever the inputs: its divergence is exact to about 1e-15 of the terms that it sums.
"""

import math

import torch
from torch import Tensor

from .rows import as_matrix, complete


def linear_divergence(
    student_hidden: Tensor,  # (..., D)
    student_weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (..., D_t)
    teacher_weight: Tensor | None,  # (V, D_t)
    token_weight: Tensor,  # (...,)
    target_ids: Tensor | None,  # (...,)
    old_logp: Tensor | None,  # (...,)
    kept: Tensor,  # (K,) int64 flat indices of the rows that are computed
    beta: float,
    temperature: float,
    importance_clip: float,
):
    """loss, (...,) importance ratio · divergence, and the other fields of LinearDivergence: fp32, or float64's own."""
    teacher_weight = student_weight if teacher_weight is None else teacher_weight
    weight = token_weight.reshape(-1)[kept].double()
    weight = torch.where(complete(kept, token_weight.reshape(-1)), weight, torch.nan)
    log_p = _log_probabilities(_rows(student_hidden, kept), student_weight, temperature)
    log_q = _log_probabilities(_rows(teacher_hidden, kept), teacher_weight, temperature).detach()

    def at_target(log: Tensor) -> Tensor:  # (K, V) to (K,)
        return log.gather(-1, target_ids.reshape(-1)[kept].long().unsqueeze(-1)).squeeze(-1)

    divergence = _divergence(log_p, log_q, beta)
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    ratio = None
    if old_logp is not None:
        old = torch.where(weight == 0, 0.0, old_logp.reshape(-1)[kept].double())
        log_ratio = at_target(log_p).detach() - old
        ratio = log_ratio.clamp(-20, 20).exp().clamp(max=importance_clip)
        weight = weight * ratio
    loss = (weight * torch.where(weight == 0, 0.0, divergence)).sum().to(dtype)

    def scattered(rows: Tensor) -> Tensor:  # (K,) to (...,)
        out = torch.zeros(token_weight.numel(), dtype=dtype, device=rows.device)
        return out.index_copy(0, kept, rows.to(dtype)).view(token_weight.shape)

    entropies = (scattered(-_expectation(log, log)) for log in (log_p, log_q))
    logps = (None if target_ids is None else scattered(at_target(log)) for log in (log_p, log_q))
    per_token = divergence if ratio is None else ratio * divergence
    ratio = None if ratio is None else scattered(ratio)
    return loss, scattered(per_token), scattered(divergence), *entropies, *logps, ratio


def _rows(hidden: Tensor, kept: Tensor) -> Tensor:
    matrix, numbers = as_matrix(hidden, kept)
    return matrix[numbers]


def _log_probabilities(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(hidden.double() @ weight.double().T / temperature, dim=-1)


def _divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return _expectation(log_q, log_q) - _expectation(log_q, log_p)
    if beta == 1:
        return _expectation(log_p, log_p) - _expectation(log_p, log_q)
    allowed = (log_p > -torch.inf) | (log_q > -torch.inf)  # logaddexp has no gradient where both are -inf
    log_p_or_0, log_q_or_0 = (torch.where(allowed, log, 0.0) for log in (log_p, log_q))
    log_m = torch.logaddexp(log_p_or_0 + math.log1p(-beta), log_q_or_0 + math.log(beta))
    return (1 - beta) * (_expectation(log_p, log_p) - _expectation(log_p, log_m)) + beta * (
        _expectation(log_q, log_q) - _expectation(log_q, log_m)
    )


def _expectation(log_p: Tensor, of: Tensor) -> Tensor:  # Σ p · of, where p = 0 wins over an infinite value
    p = log_p.exp()
    return (p * torch.where(p > 0, of, 0.0)).sum(dim=-1)
