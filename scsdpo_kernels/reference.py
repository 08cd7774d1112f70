"""The same operator in plain PyTorch with full logits: the readable definition, and the oracle of the tests.

It shares no formula with the kernels, takes any floating dtype (logits of bf16 and fp16 inputs are fp32), and
differentiates any number of times. In float64 its divergence is exact down to about 1e-10 relative to what it sums.
"""

import torch
from torch import Tensor


def linear_divergence(
    student_hidden: Tensor,  # (..., D)
    student_weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (..., D_t)
    teacher_weight: Tensor | None,  # (V, D_t)
    token_weight: Tensor,  # (...,)
    target_ids: Tensor | None,  # (...,)
    beta: float,
    temperature: float,
):
    """The fields of LinearDivergence, in fp32 (float64 for float64 inputs)."""
    kept = token_weight != 0
    log_p = _log_probabilities(student_hidden[kept], student_weight, temperature)
    log_q = _log_probabilities(teacher_hidden[kept], student_weight if teacher_weight is None else teacher_weight,
                               temperature).detach()  # fmt: skip

    divergence = _divergence(log_p, log_q, beta)
    loss = (token_weight[kept].to(divergence.dtype) * divergence).sum()

    def scattered(rows: Tensor) -> Tensor:  # (N,) of kept rows to (...,)
        return rows.new_zeros(token_weight.shape).masked_scatter(kept, rows.detach())

    def logp(log: Tensor) -> Tensor | None:
        if target_ids is None:
            return None
        return scattered(log.gather(-1, target_ids[kept].long().unsqueeze(-1)).squeeze(-1))

    return (
        loss,
        scattered(divergence),
        scattered(-_expectation(log_p, log_p)),
        scattered(-_expectation(log_q, log_q)),
        logp(log_p),
        logp(log_q),
    )


def _log_probabilities(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.log_softmax(hidden.to(dtype) @ weight.to(dtype).T / temperature, dim=-1)


def _divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return _expectation(log_q, log_q) - _expectation(log_q, log_p)
    if beta == 1:
        return _expectation(log_p, log_p) - _expectation(log_p, log_q)
    log_m = torch.log((1 - beta) * log_p.exp() + beta * log_q.exp())
    return (1 - beta) * (_expectation(log_p, log_p) - _expectation(log_p, log_m)) + beta * (
        _expectation(log_q, log_q) - _expectation(log_q, log_m)
    )


def _expectation(log_p: Tensor, of: Tensor) -> Tensor:  # Σ p · of, where p = 0 wins over an infinite value
    allowed = log_p > -torch.inf
    return (log_p.exp() * torch.where(allowed, of, 0.0)).sum(dim=-1)
