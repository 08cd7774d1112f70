"""What the tests compare with: extended-precision row arithmetic, and float64 end to end with torch's own functions.

Neither shares a formula with the package: no expm1, no log1p, no polynomial, no difference of logits.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    divergence: np.ndarray  # (C,)
    gradient: np.ndarray  # (C, V) of each row's divergence with respect to its student logits
    student_entropy: np.ndarray  # (C,)
    teacher_entropy: np.ndarray  # (C,)
    log_p: np.ndarray  # (C, V)
    log_q: np.ndarray  # (C, V)


def rows(
    student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0, entry_clip: float | None = None
) -> Rows:
    """Straight from the definitions, in long double: exact to 1e-5 relative even where KL is 1e-12 of its terms."""
    log_p, log_q = (_log_softmax(x.double().numpy().astype(np.longdouble) / temperature) for x in (student, teacher))
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # -inf - -inf of an entry that both forbid, which _weighted then leaves out
        return _rows(log_p, log_q, beta, temperature, entry_clip)


def _rows(log_p: np.ndarray, log_q: np.ndarray, beta: float, temperature: float, entry_clip: float | None) -> Rows:
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


class EndToEnd(NamedTuple):
    loss: Tensor
    divergence: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


def end_to_end(student_hidden, student_weight, teacher_hidden, teacher_weight=None, *, token_weight=None, beta=0.5,
               temperature=1.0, dtype=torch.float64) -> EndToEnd:  # fmt: skip
    """F.kl_div of explicit softmaxes on full logits, and autograd, in `dtype`."""
    hidden = student_hidden.detach().to(dtype).requires_grad_()
    weight = student_weight.detach().to(dtype).requires_grad_()
    head = student_weight if teacher_weight is None else teacher_weight
    log_p = F.log_softmax(hidden @ weight.T / temperature, dim=-1)
    log_q = F.log_softmax(teacher_hidden.detach().to(dtype) @ head.detach().to(dtype).T / temperature, dim=-1)

    def kl(of: Tensor, to: Tensor) -> Tensor:  # KL(of || to) per row
        return F.kl_div(to, of, log_target=True, reduction="none").sum(dim=-1)

    if beta == 0:
        divergence = kl(log_q, log_p)
    elif beta == 1:
        divergence = kl(log_p, log_q)
    else:
        log_m = torch.log((1 - beta) * log_p.exp() + beta * log_q.exp())
        divergence = (1 - beta) * kl(log_p, log_m) + beta * kl(log_q, log_m)
    loss = (divergence if token_weight is None else divergence * token_weight.to(dtype)).sum()
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    return EndToEnd(loss.detach(), divergence.detach(), grad_hidden, grad_weight)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖, and NaN if either has one."""
    got, expected = got.detach().double(), expected.detach().double()
    return ((got - expected).norm() / expected.norm()).item()
