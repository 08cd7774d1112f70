"""The same operator in plain PyTorch with full logits: the readable definition, and the oracle of the tests.

It shares no formula with the kernels, takes any floating dtype and differentiates any number of times. All of its
arithmetic is float64, whatever the inputs: its divergence is exact to about 1e-15 of the terms that it sums.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.contract import Scalars
from ..problem import ENDS, Head, Objective, Policy, Problem, Support, cut
from .rows import as_matrix, as_teachers_matrix, complete, kept_rows, shares, valid_support


def divergence(problem: Problem) -> tuple[Tensor, Tensor, Scalars, list[Tensor]]:
    """Loss, (...,) importance ratio · divergence, the divergence and what else is known of tokens, detached; metrics.

    All are fp32, or float64 for float64 hidden states.
    """
    is_prefix, problem = problem.vocabulary is not None, cut(problem)
    student, target, support = problem.student, problem.target, problem.support
    token_weight, temperature = problem.token_weight, problem.objective.temperature
    kept = kept_rows(problem, vocabulary=student.head.weight.shape[0], summed_head=None, is_prefix=is_prefix).index
    weight, counts = token_weight.reshape(-1)[kept].double(), problem.counts.reshape(-1)
    weight = torch.where(complete(kept, counts), weight, torch.nan)
    states, index = as_matrix(student.hidden, kept)
    log_p = _log_probabilities(states[index], student.head, temperature)
    log_q = _of_teachers(problem, kept)

    def at_target(log: Tensor) -> Tensor:  # (R, V) to (R,)
        return log.gather(-1, target.ids.reshape(-1)[kept].long().unsqueeze(-1)).squeeze(-1)

    if support is not None and support.sampled:
        divergence = (at_target(log_p) - at_target(log_q)).detach() * at_target(log_p)
    elif problem.objective.entry_clip:
        terms = log_q.exp() * torch.where(log_q > -torch.inf, log_q - log_p, 0.0)
        divergence = terms.clamp(max=problem.objective.entry_clip).sum(-1)
    else:
        seen = _on_support(log_p, log_q, support, token_weight, kept)
        divergence = _divergence(*seen, problem.objective, kept, weight)
    dtype = torch.float64 if student.hidden.dtype == torch.float64 else torch.float32
    ratio = log_ratio = old = None
    if target is not None and target.old_logp is not None:
        old = torch.where(counts[kept], target.old_logp.reshape(-1)[kept].double(), 0.0)
        log_ratio = at_target(log_p).detach() - old
        ratio = log_ratio.clamp(-20, 20).exp().clamp(max=target.importance_clip)
        weight = weight * ratio
    loss = (weight * torch.where(weight == 0, 0.0, divergence)).sum()
    policy_loss = clipped = None
    if problem.policy is not None:
        policy_loss, clipped, of_policy = _policy(problem.policy, at_target(log_p), old, kept)
        loss = loss + of_policy.sum()
    loss = loss.to(dtype)

    def scattered(rows: Tensor | None) -> Tensor | None:  # (R,) to (...,)
        if rows is None:
            return None
        out = torch.zeros(token_weight.numel(), dtype=dtype, device=rows.device)
        return out.index_copy(0, kept, rows.to(dtype)).view(token_weight.shape)

    sides = (log_p, log_q)
    entropies = (None if log is None else -_expectation(log, log) for log in sides)
    logps = (None if log is None or target is None else at_target(log) for log in sides)
    per_token = divergence if ratio is None else ratio * divergence
    if policy_loss is not None:
        per_token = per_token + of_policy
    per_token = scattered(per_token)
    fields = (scattered(x) for x in (divergence, *entropies, *logps, ratio, policy_loss, clipped))
    metrics = []
    if problem.metrics:
        metrics = [scattered(x).detach() for x in _metrics(problem, log_p, log_q, log_ratio, kept)]
    return loss, per_token, Scalars(*(x if x is None else x.detach() for x in fields)), metrics


def _policy(policy: Policy, logp: Tensor, old: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R,) each: -min(r A, clip(r) A), whether the clip is active, and the loss times its coefficient."""
    advantage, coefficient = (x.reshape(-1)[kept].double() for x in (policy.advantages, policy.coefficient))
    acts = advantage != 0
    before = logp.detach() if old is None or policy.ratio is not None else old
    ratio = torch.where(acts, logp - before, 0.0).exp()
    if policy.ratio is not None:
        ratio = ratio * torch.where(acts, policy.ratio.reshape(-1)[kept].double(), 1.0)
    bounded = ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high)
    loss = torch.where(acts, -torch.minimum(ratio * advantage, bounded * advantage), 0.0)
    clipped = (bounded * advantage < ratio * advantage).double()
    return loss, clipped, torch.where(coefficient == 0, 0.0, coefficient * loss)


def _of_teachers(problem: Problem, kept: Tensor) -> Tensor | None:
    """Log-probabilities of each row's teacher."""
    logs, places = [], []
    for number, teacher in enumerate(problem.teachers):
        place = torch.arange(len(kept), device=kept.device)
        if problem.route is not None:
            place = (problem.route.reshape(-1)[kept] == number).nonzero().squeeze(1)
        states, index = as_teachers_matrix(problem, number, kept[place])
        logs.append(_log_probabilities(states[index], teacher.head, problem.objective.temperature).detach())
        places.append(place)
    return torch.cat(logs)[torch.cat(places).argsort()] if logs else None


def _log_probabilities(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    hidden = hidden.double()
    logits = hidden @ head.weight.double().T
    if head.lora is not None:
        logits = logits + head.lora.scale * (hidden @ head.lora.a.double().T @ head.lora.b.double().T)
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.logit_scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def _on_support(log_p: Tensor, log_q: Tensor | None, support: Support | None, token_weight: Tensor, kept: Tensor):
    """Log-probabilities of both sides on the support and its tail; the whole vocabulary's where there is no support."""
    if support is None:
        return log_p, log_q
    log_p, log_q = _at_support(log_p, log_q, support, token_weight, kept)
    if support.renormalize:
        nothing = (log_p == -torch.inf).all(-1, keepdim=True) & (log_q == -torch.inf).all(-1, keepdim=True)
        return tuple(torch.log_softmax(torch.where(nothing, 0.0, x), dim=-1) for x in (log_p, log_q))
    return tuple(torch.log_softmax(torch.cat([x, _log_tail(x)], dim=-1), dim=-1) for x in (log_p, log_q))


def _at_support(log_p: Tensor, log_q: Tensor | None, support: Support, token_weight: Tensor, kept: Tensor):
    """Log-probabilities of both sides on the support itself."""
    if support.k:
        ids = log_p.topk(min(support.k, log_p.shape[1])).indices
        log_p, log_q = log_p.gather(1, ids), log_q.gather(1, ids)
    else:
        ids, log_q = (x.flatten(0, -2)[kept] for x in (support.ids.long(), support.logp.double()))
        computed = token_weight.reshape(-1)[kept, None] != 0  # a list may have others, which may hold anything
        ids = torch.where(computed, ids, -1)
        exists = ids >= 0
        log_q = torch.where(exists, log_q, -torch.inf)
        log_q = torch.where(valid_support(ids, log_p.shape[1])[:, None], log_q, torch.nan)
        log_p = torch.where(exists, log_p.gather(1, ids.clamp(0, log_p.shape[1] - 1)), -torch.inf)
    return log_p, log_q


def _metrics(
    problem: Problem, log_p: Tensor, log_q: Tensor | None, log_ratio: Tensor | None, kept: Tensor
) -> Iterator[Tensor]:  # (R,) each, in the order of the entries
    for name in problem.metrics:
        if name == "top1_agreement":
            both = (log_p == log_p.amax(1, keepdim=True)) & (log_q == log_q.amax(1, keepdim=True))
            yield torch.where((log_p + log_q).isnan().any(1), torch.nan, both.any(1).double())
        elif name == "support_mass":
            seen = _at_support(log_p, log_q, problem.support, problem.token_weight, kept)
            student, teacher = (x.exp().sum(1) for x in seen)
            yield from (student + 0 * teacher, teacher + 0 * student)  # both are NaN where one is
        elif name == "entry_clipped":
            allowed = log_q > -torch.inf
            term = log_q.exp() * torch.where(allowed, log_q - log_p, 0.0)
            share = (term > problem.objective.entry_clip).sum(1) / allowed.sum(1)
            yield torch.where(term.isnan().any(1), torch.nan, share)
        else:
            cut = (log_ratio.clamp(-20, 20).exp() > problem.target.importance_clip).double()
            yield torch.where(log_ratio.isnan(), torch.nan, cut)


def _log_tail(log: Tensor) -> Tensor:  # (R, K) to (R, 1)
    inside = log.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.log(-torch.expm1(inside))


def _divergence(log_p: Tensor, log_q: Tensor, objective: Objective, kept: Tensor, weight: Tensor) -> Tensor:  # (R,)
    if objective.token_beta is None:
        return _of_kind(objective.kind, log_p, log_q, objective.beta)
    beta = shares(objective, kept, weight)
    at_0, at_1 = ENDS[objective.kind]
    result = torch.zeros_like(beta)
    for kind, which in ((at_0, beta == 0), (at_1, beta == 1), (objective.kind, (beta != 0) & (beta != 1))):
        rows = which.nonzero().squeeze(1)
        if len(rows):
            result = result.index_copy(0, rows, _of_kind(kind, log_p[rows], log_q[rows], beta[rows, None]))
    return result


def _of_kind(kind: str, log_p: Tensor, log_q: Tensor, beta: float | Tensor) -> Tensor:  # beta: (R, 1), or of all rows
    if kind == "forward":
        return _kl(log_q, log_p)
    if kind == "reverse":
        return _kl(log_p, log_q)
    share = torch.as_tensor(beta, dtype=torch.float64, device=log_p.device)
    own, other = 1 - share.squeeze(-1), share.squeeze(-1)
    if kind == "jeffreys":
        return own * _kl(log_q, log_p) + other * _kl(log_p, log_q)
    allowed = (log_p > -torch.inf) | (log_q > -torch.inf)  # logaddexp has no gradient where both are -inf
    log_p_or_0, log_q_or_0 = (torch.where(allowed, log, 0.0) for log in (log_p, log_q))
    log_m = torch.logaddexp(log_p_or_0 + torch.log1p(-share), log_q_or_0 + torch.log(share))
    if kind == "skewed_forward":
        return _kl(log_q, log_m)
    if kind == "skewed_reverse":
        return _kl(log_p, log_m)
    return own * _kl(log_p, log_m) + other * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _expectation(log_p, log_p) - _expectation(log_p, log_q)


def _expectation(log_p: Tensor, of: Tensor) -> Tensor:  # Σ p · of, where p = 0 wins over an infinite value
    p = log_p.exp()
    return (p * torch.where(p > 0, of, 0.0)).sum(dim=-1)
