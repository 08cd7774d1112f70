"""What the tests compare with: extended-precision row arithmetic, and float64 end to end with torch's own functions.

Neither shares a formula with the package: no expm1, no log1p, no polynomial, no difference of logits. What they take
from it are the names of a problem's parts.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scsdpo_kernels import Head, SampledToken, TopK


class Rows(NamedTuple):
    divergence: np.ndarray  # (C,)
    gradient: np.ndarray  # (C, V) of each row's divergence with respect to its student logits
    student_entropy: np.ndarray  # (C,)
    teacher_entropy: np.ndarray  # (C,)
    log_p: np.ndarray  # (C, V)
    log_q: np.ndarray  # (C, V)


def rows(
    student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0, entry_clip: float | None = None,
    divergence: str = "jensen_shannon",
) -> Rows:  # fmt: skip
    """Straight from the definitions, in long double: exact to 1e-5 relative even where KL is 1e-12 of its terms."""
    log_p, log_q = (_log_softmax(x.double().numpy().astype(np.longdouble) / temperature) for x in (student, teacher))
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # -inf - -inf of an entry that both forbid, which _weighted then leaves out
        return _rows(log_p, log_q, beta, temperature, entry_clip, divergence)


def _rows(
    log_p: np.ndarray, log_q: np.ndarray, beta: float, temperature: float, entry_clip: float | None, kind: str
) -> Rows:
    p, q = np.exp(log_p), np.exp(log_q)
    beta = np.longdouble(beta)
    if entry_clip is not None:
        terms = _weighted(q, log_q - log_p)
        kept = np.where(terms > entry_clip, 0, q)
        divergence = np.where(terms > entry_clip, entry_clip, terms).sum(axis=-1)
        gradient = p * kept.sum(axis=-1, keepdims=True) - kept
    elif beta == 0:
        divergence, gradient = _mean(q, log_q - log_p), p - q
    elif beta == 1:
        divergence = _mean(p, log_p - log_q)
        gradient = _weighted(p, log_p - log_q - divergence[:, None])
    elif kind == "jeffreys":
        forward, reverse = _mean(q, log_q - log_p), _mean(p, log_p - log_q)
        divergence = (1 - beta) * forward + beta * reverse
        gradient = (1 - beta) * (p - q) + beta * _weighted(p, log_p - log_q - reverse[:, None])
    elif kind == "skewed_forward":  # ∂KL(q‖m)/∂p = -(1-β) q/m
        m = (1 - beta) * p + beta * q
        divergence = _mean(q, log_q - np.log(m))
        score = np.where(m == 0, 0, (1 - beta) ** 2 * (p - q) / np.where(m == 0, 1, m))
        gradient = p * (score - _mean(p, score)[:, None])
    elif kind == "skewed_reverse":  # ∂KL(p‖m)/∂p = log(p/m) + 1 - (1-β) p/m
        m = (1 - beta) * p + beta * q
        divergence = _mean(p, log_p - np.log(m))
        score = log_p - np.log(m) - (1 - beta) * p / np.where(m == 0, 1, m)
        gradient = _weighted(p, score - _mean(p, score)[:, None])
    else:
        log_m = np.log((1 - beta) * p + beta * q)
        kl_p, kl_q = _mean(p, log_p - log_m), _mean(q, log_q - log_m)
        divergence = (1 - beta) * kl_p + beta * kl_q
        gradient = (1 - beta) * _weighted(p, log_p - log_m - kl_p[:, None])
    return Rows(divergence, gradient / temperature, -_mean(p, log_p), -_mean(q, log_q), log_p, log_q)


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def _weighted(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.where(p == 0, 0, p * x)


def _mean(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    return _weighted(p, x).sum(axis=-1)


class Expected(NamedTuple):
    """Field for field what `linear_divergence` returns."""

    loss: Tensor  # ()
    divergence: Tensor  # (...) and the following
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    student_logp: Tensor | None
    teacher_logp: Tensor | None
    importance_ratio: Tensor | None
    policy_loss: Tensor | None
    policy_clipped: Tensor | None
    metrics: None = None  # test_metrics.py has them


def expected(problem, of=lambda result: result.loss, *, token_weight=None, beta=0.5, divergence="jensen_shannon",
             temperature=1.0, support=None, entry_clip=None, target_ids=None, old_logp=None, importance_clip=2.0,
             policy=None, shared_prefix=False) -> tuple:  # fmt: skip
    """Full logits in float64 and autograd: all fields, and the gradients of everything of the student's.

    `problem` is one of problems.py; the options are `linear_divergence`'s. As there, all fields of a token of weight 0
    are 0, and the gradients are of the loss or of another sum.
    """
    given = problem.to(torch.float64).leaves()
    if token_weight is None:
        token_weight = problem.token_weight
    weight = given.hidden.new_ones(given.hidden.shape[:-1]) if token_weight is None else token_weight.double()
    weighted = kept = weight != 0
    if policy is not None:
        coefficient = torch.as_tensor(policy.coefficient).double().expand_as(weight)
        kept = weighted | ((policy.advantages != 0) & (coefficient != 0))
    log_p, log_q = _log_probabilities(given, temperature, shared_prefix)
    at = None if target_ids is None else target_ids.long().where(kept, 0)[..., None]
    student_logp, teacher_logp = (None if at is None or x is None else x.gather(-1, at)[..., 0] for x in (log_p, log_q))

    if isinstance(support, SampledToken):
        value = (student_logp - teacher_logp).detach() * student_logp
    elif entry_clip is not None:
        value = _terms(log_q, log_p).clamp(max=entry_clip).sum(dim=-1)
    elif isinstance(beta, Tensor):
        sides = (x.flatten(0, -2) for x in _seen(log_p, log_q, support, weighted))
        each = zip(*sides, beta.double().where(kept, 0.5).flatten().tolist(), strict=True)
        value = torch.stack([between(p, q, share, divergence) for p, q, share in each]).view(kept.shape)
    else:
        value = between(*_seen(log_p, log_q, support, weighted), beta, divergence)
    fields = [value, _entropy(log_p), log_q if log_q is None else _entropy(log_q), student_logp, teacher_logp]
    value, *others = (x if x is None else x.where(kept, 0.0) for x in fields)

    ratio = None
    if old_logp is not None:
        ratio = (student_logp.detach() - old_logp.double()).clamp(-20, 20).exp().clamp(max=importance_clip)
        ratio = ratio.where(kept, 0.0)
    loss = (weight * value * (1.0 if ratio is None else ratio)).where(weighted, 0.0).sum()
    policy_loss = clipped = None
    if policy is not None:
        policy_loss, clipped = (x.where(kept, 0.0) for x in _policy(policy, student_logp, old_logp))
        loss = loss + (coefficient * policy_loss).sum()
    result = Expected(loss, value, *others, ratio, policy_loss, clipped)
    gradients = torch.autograd.grad(of(result), given.trained)
    return Expected(*(x if x is None else x.detach() for x in result)), *gradients


def _policy(policy, logp: Tensor, old_logp: Tensor | None) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss of each token, and whether it is the clip that counts."""
    advantages = policy.advantages.double()
    before = logp.detach() if old_logp is None or policy.ratio is not None else old_logp.double()
    ratio = torch.exp(logp - before)
    if policy.ratio is not None:
        ratio = ratio * policy.ratio.double()
    ratio = ratio.where(advantages != 0, 1.0)
    plain, bounded = ratio * advantages, ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high) * advantages
    return -torch.minimum(plain, bounded), (plain > bounded).double()


def logits(hidden: Tensor, head: Tensor | Head) -> Tensor:
    weight, bias, lora, logit_scale, softcap, _ = Head(head) if isinstance(head, Tensor) else head
    z = hidden @ weight.T
    if lora is not None:
        z = z + lora.scale * (hidden @ lora.a.T) @ lora.b.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _log_probabilities(given, temperature: float, shared_prefix: bool) -> tuple[Tensor, Tensor | None]:
    """Both sides', (..., V); nothing flows into the teacher, whose head may be the student's."""
    sides = [logits(given.hidden, given.head)]
    if given.teacher is not None:
        with torch.no_grad():
            sides.append(logits(given.teacher, given.head if given.teacher_head is None else given.teacher_head))
    if shared_prefix:  # to the length of the longer side; what the shorter side has not is forbidden on both
        lengths = [z.shape[-1] for z in sides]
        allowed = torch.arange(max(lengths)) < min(lengths)
        sides = [F.pad(z, (0, max(lengths) - z.shape[-1])).where(allowed, -torch.inf) for z in sides]
    log_p, *log_q = (F.log_softmax(z / temperature, dim=-1) for z in sides)
    return log_p, log_q[0] if log_q else None


def _seen(log_p: Tensor, log_q: Tensor | None, support, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities that a divergence on a support sees of both sides."""
    if support is None:
        return log_p, log_q
    if isinstance(support, TopK):
        ids = log_p.topk(min(support.k, int((log_p > -torch.inf).sum(-1).min()))).indices
        log_q = log_q.gather(-1, ids)
    else:
        ids = support.ids.long().where(kept[..., None], -1)
        log_q = support.logp.double()
    there = ids >= 0
    sides = log_p.gather(-1, ids.clamp(min=0)), log_q
    return tuple(_with_tail(x.where(there, -torch.inf), support.tail) for x in sides)


def _with_tail(log_p: Tensor, tail: str) -> Tensor:
    mass = log_p.exp().sum(dim=-1, keepdim=True)
    if tail == "renormalize":
        return log_p - mass.where(mass > 0, 1.0).log()
    return torch.cat([log_p, (1 - mass).clamp(min=1e-7).log()], dim=-1)


def between(log_p: Tensor, log_q: Tensor, beta: float, divergence: str = "jensen_shannon") -> Tensor:
    """The divergence of each row of log-probabilities, which may be -inf."""
    if beta in (0, 1):
        return (_terms(log_q, log_p) if beta == 0 else _terms(log_p, log_q)).sum(dim=-1)
    if divergence == "jeffreys":
        return ((1 - beta) * _terms(log_q, log_p) + beta * _terms(log_p, log_q)).sum(dim=-1)
    m = (1 - beta) * log_p.exp() + beta * log_q.exp()
    log_m = m.where(m > 0, 1.0).log()
    if divergence in ("skewed_forward", "skewed_reverse"):
        return _terms(log_q if divergence == "skewed_forward" else log_p, log_m).sum(dim=-1)
    return (1 - beta) * _terms(log_p, log_m).sum(dim=-1) + beta * _terms(log_q, log_m).sum(dim=-1)


def _terms(of: Tensor, to: Tensor) -> Tensor:
    """Entry by entry, KL(of || to), where 0 log 0 is 0."""
    there = of > -torch.inf
    return F.kl_div(to.where(there, 0.0), of.where(there, 0.0), log_target=True, reduction="none").where(there, 0.0)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.where(log_p > -torch.inf, 0.0)).sum(dim=-1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖, and NaN if either has one."""
    got, expected = got.detach().double(), expected.detach().double()
    return ((got - expected).norm() / expected.norm()).item()


def assert_near(got: tuple, exact: tuple, limit: float = 2e-5, floor: float = 1e-9) -> None:
    """Two results with their gradients: the loss roughly, since its rows may cancel, and each gradient's norm."""
    torch.testing.assert_close(got[0].loss.double(), exact[0].loss, rtol=1e-2, atol=1e-5)
    for x, y in zip(got[1:], exact[1:], strict=True):
        assert (x.double() - y).norm() <= limit * y.norm() + floor, relative_error(x, y)


def per_token(result: Expected, policy=None) -> Tensor:
    """What `linear_divergence_per_token` returns."""
    value = result.divergence if result.importance_ratio is None else result.importance_ratio * result.divergence
    return value if policy is None else value + policy.coefficient * result.policy_loss
