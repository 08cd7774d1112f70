"""The constants of a mixture m = (1-β) p + β q, as csrc/mixture.cpp has them."""

import functools
import math
from typing import NamedTuple


class Mixture(NamedTuple):
    student: float  # 1 - β
    teacher: float  # β
    turn: float  # above this d = log(q/p), log(m/q) is computed, below it log(m/p)
    score: tuple[float, ...]  # log(m/p) / d, as a polynomial of d for |d| ≤ 1
    divergence: tuple[float, ...]  # an entry's term over p d², alike


_TERMS = 8


@functools.lru_cache(maxsize=64)
def mixture(beta: float) -> Mixture:
    """The constants of β; the ends have no mixture."""
    if not 0 < beta < 1:
        return Mixture(1.0 - beta, beta, 0.0, (0.0,) * _TERMS, (0.0,) * _TERMS)
    # Four nats beyond where both sides have the same share of m; on the side of the smaller share.
    turn = math.log((1 - beta) / beta) + (4 if beta <= 0.5 else -4)

    def a(d: float) -> float:
        return math.log1p(beta * math.expm1(d))

    score = _interpolate(lambda d: a(d) / d)
    divergence = _interpolate(lambda d: (beta * math.exp(d) * d - math.exp(a(d)) * a(d)) / (d * d))
    return Mixture(1.0 - beta, beta, max(-80.0, min(80.0, turn)), score, divergence)


def _interpolate(f) -> tuple[float, ...]:
    """Coefficients of the polynomial through f at Chebyshev's nodes of [-1, 1]."""
    angles = [math.pi * (j + 0.5) / _TERMS for j in range(_TERMS)]
    values = [f(math.cos(angle)) for angle in angles]
    total = [0.0] * _TERMS
    chebyshev, previous = [1.0] + [0.0] * (_TERMS - 1), [0.0] * _TERMS  # coefficients of T_k and T_k-1
    for k in range(_TERMS):
        share = sum(v * math.cos(k * x) for v, x in zip(values, angles, strict=True)) * (1 if k == 0 else 2) / _TERMS
        total = [x + share * c for x, c in zip(total, chebyshev, strict=True)]
        shifted = [0.0, *chebyshev[:-1]]  # T_k+1 = 2 x T_k - T_k-1
        chebyshev, previous = (
            [(1 if k == 0 else 2) * x - y for x, y in zip(shifted, previous, strict=True)],
            chebyshev,
        )
    return tuple(total)
