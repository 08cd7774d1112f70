"""The same operator in plain PyTorch with full logits: the readable definition, and the oracle of the tests.

It shares no formula with the kernels, takes any floating dtype and differentiates any number of times. All of its
arithmetic is float64, whatever the inputs: its divergence is exact to about 1e-15 of the terms that it sums.
"""

import math

import torch
from torch import Tensor

from .arguments import Head, Numbers, Tensors, student_head, teacher_head
from .rows import as_matrix, complete, valid_support


def linear_divergence(
    tensors: Tensors,
    numbers: Numbers,
    kept: Tensor,  # (R,) int64 flat indices of the rows that are computed
):
    """loss, (...,) importance ratio · divergence, and the other fields of LinearDivergence: fp32, or float64's own."""
    token_weight, temperature = tensors.token_weight, numbers.temperature
    weight = token_weight.reshape(-1)[kept].double()
    weight = torch.where(complete(kept, token_weight.reshape(-1)), weight, torch.nan)
    log_p = _log_probabilities(_rows(tensors.student_hidden, kept), student_head(tensors, numbers), temperature)
    log_q = None
    if tensors.teacher_hidden is not None:
        log_q = _log_probabilities(_rows(tensors.teacher_hidden, kept), teacher_head(tensors, numbers), temperature)
        log_q = log_q.detach()

    def at_target(log: Tensor) -> Tensor:  # (R, V) to (R,)
        return log.gather(-1, tensors.target_ids.reshape(-1)[kept].long().unsqueeze(-1)).squeeze(-1)

    if numbers.sampled_token:
        divergence = (at_target(log_p) - at_target(log_q)).detach() * at_target(log_p)
    elif numbers.entry_clip:
        terms = log_q.exp() * torch.where(log_q > -torch.inf, log_q - log_p, 0.0)
        divergence = terms.clamp(max=numbers.entry_clip).sum(-1)
    else:
        divergence = _divergence(*_on_support(log_p, log_q, tensors, numbers, kept), numbers.beta)
    dtype = torch.float64 if tensors.student_hidden.dtype == torch.float64 else torch.float32
    ratio = None
    if tensors.old_logp is not None:
        old = torch.where(weight == 0, 0.0, tensors.old_logp.reshape(-1)[kept].double())
        log_ratio = at_target(log_p).detach() - old
        ratio = log_ratio.clamp(-20, 20).exp().clamp(max=numbers.importance_clip)
        weight = weight * ratio
    loss = (weight * torch.where(weight == 0, 0.0, divergence)).sum().to(dtype)

    def scattered(rows: Tensor | None) -> Tensor | None:  # (R,) to (...,)
        if rows is None:
            return None
        out = torch.zeros(token_weight.numel(), dtype=dtype, device=rows.device)
        return out.index_copy(0, kept, rows.to(dtype)).view(token_weight.shape)

    sides = (log_p, log_q)
    entropies = (None if log is None else -_expectation(log, log) for log in sides)
    logps = (None if log is None or tensors.target_ids is None else at_target(log) for log in sides)
    per_token = divergence if ratio is None else ratio * divergence
    return loss, *(scattered(x) for x in (per_token, divergence, *entropies, *logps, ratio))


def _rows(hidden: Tensor, kept: Tensor) -> Tensor:
    matrix, numbers = as_matrix(hidden, kept)
    return matrix[numbers]


def _log_probabilities(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    hidden = hidden.double()
    logits = hidden @ head.weight.double().T
    if head.lora_a is not None:
        logits = logits + head.lora_scale * (hidden @ head.lora_a.double().T @ head.lora_b.double().T)
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.logit_scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def _on_support(log_p: Tensor, log_q: Tensor | None, tensors: Tensors, numbers: Numbers, kept: Tensor):
    """Log-probabilities of both sides on the support and its tail; the whole vocabulary's where there is no support."""
    if tensors.support_ids is not None:
        ids, log_q = (x.flatten(0, -2)[kept] for x in (tensors.support_ids.long(), tensors.support_logp.double()))
        computed = tensors.token_weight.reshape(-1)[kept, None] != 0  # a list may have others, which may hold anything
        ids = torch.where(computed, ids, -1)
        exists = ids >= 0
        log_q = torch.where(exists, log_q, -torch.inf)
        log_q = torch.where(valid_support(ids, log_p.shape[1])[:, None], log_q, torch.nan)
        log_p = torch.where(exists, log_p.gather(1, ids.clamp(0, log_p.shape[1] - 1)), -torch.inf)
    elif numbers.top_k:
        ids = log_p.topk(min(numbers.top_k, log_p.shape[1])).indices
        log_p, log_q = log_p.gather(1, ids), log_q.gather(1, ids)
    else:
        return log_p, log_q
    if numbers.renormalize:
        nothing = (log_p == -torch.inf).all(-1, keepdim=True) & (log_q == -torch.inf).all(-1, keepdim=True)
        return tuple(torch.log_softmax(torch.where(nothing, 0.0, x), dim=-1) for x in (log_p, log_q))
    return tuple(torch.log_softmax(torch.cat([x, _log_tail(x)], dim=-1), dim=-1) for x in (log_p, log_q))


def _log_tail(log: Tensor) -> Tensor:  # (R, K) to (R, 1)
    inside = log.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.log(-torch.expm1(inside))


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
