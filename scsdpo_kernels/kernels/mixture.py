"""The constants of an objective's share β, as csrc/mixture.cpp has them; most are a mixture's, m = (1-β) p + β q."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Mixture(NamedTuple):
    student: float  # 1 - β
    teacher: float  # β
    turn: float  # above this d = log(q/p), log(m/q) is computed, below it log(m/p)
    score: tuple[float, ...]  # an entry's -score over d, as a polynomial of d for |d| ≤ 1; of KL(p‖m) over q/p
    divergence: tuple[float, ...]  # its term over p d², alike


_TERMS = 8
SIZE = 3 + 2 * _TERMS  # numbers of a Mixture


@functools.lru_cache(maxsize=64)
def mixture(kind: str, beta: float) -> Mixture:
    """The constants of β; kinds without a mixture have shares."""
    student, teacher, turn, *polynomials = mixtures(kind, torch.tensor([beta], dtype=torch.float64))[0].tolist()
    return Mixture(student, teacher, turn, tuple(polynomials[:_TERMS]), tuple(polynomials[_TERMS:]))


def mixtures(
    kind: str,
    beta: Tensor,  # (C,) float64; at the ends shares are all that counts
) -> Tensor:  # (C, SIZE) fp32 on its device, in the order of Mixture
    """The constants of each β. NaN gives NaN. Nobody waits for a device."""
    nodes, interpolation = _INTERPOLATION.to(beta.device, non_blocking=True).tensor_split([1])
    beta = beta[:, None]
    x = beta * torch.expm1(nodes)  # m / p - 1
    a = torch.log1p(x)
    if kind == "skewed_forward":
        # over p: q (log(q/m) - 1) + m, with m / q - 1 in place of x
        score = torch.expm1(nodes) / ((1 + x) * nodes)
        divergence = torch.exp(nodes) * _below_linear((1 - beta) * torch.expm1(-nodes)) / nodes**2
    elif kind == "skewed_reverse":
        # p (log(p/m) - 1) + m; over q, for what becomes of a small β
        below = _below_linear(x) * torch.exp(-nodes)
        score = (x * beta / (1 + x) - below) / nodes
        divergence = below / nodes**2
    else:
        score = a / nodes
        divergence = (beta * torch.exp(nodes) * nodes - torch.exp(a) * a) / nodes**2
    # Four nats beyond where both sides have the same share of m; on the side of the smaller share.
    turn = torch.log((1 - beta) / beta) + torch.where(beta <= 0.5, 4.0, -4.0)
    constants = (1 - beta, beta, turn.clamp(-80, 80), score @ interpolation, divergence @ interpolation)
    return torch.cat(constants, dim=1).float()


def _below_linear(x: Tensor) -> Tensor:
    return x - torch.log1p(x)


def _interpolation() -> Tensor:  # (1 + _TERMS, _TERMS) float64
    """Chebyshev's nodes of [-1, 1], and the matrix that makes coefficients of a polynomial of its values there."""
    angles = [math.pi * (j + 0.5) / _TERMS for j in range(_TERMS)]
    coefficients = [[0.0] * _TERMS for _ in angles]
    chebyshev, previous = [1.0] + [0.0] * (_TERMS - 1), [0.0] * _TERMS  # coefficients of T_k and T_k-1
    for k in range(_TERMS):
        for row, angle in zip(coefficients, angles, strict=True):
            share = math.cos(k * angle) * (1 if k == 0 else 2) / _TERMS
            row[:] = [x + share * c for x, c in zip(row, chebyshev, strict=True)]
        shifted = [0.0, *chebyshev[:-1]]  # T_k+1 = 2 x T_k - T_k-1
        chebyshev, previous = (
            [(1 if k == 0 else 2) * x - y for x, y in zip(shifted, previous, strict=True)],
            chebyshev,
        )
    return torch.tensor([[math.cos(angle) for angle in angles], *coefficients], dtype=torch.float64)


_INTERPOLATION = _interpolation()
