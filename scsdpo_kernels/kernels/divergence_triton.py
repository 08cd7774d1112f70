"""The divergence in Triton: sums over vocabulary entries that any split can be merged from, values, and gradients.

For p = softmax(s/τ), q = softmax(t/τ) the log-ratio of an entry, log(q/p) = d, is known up to the row's normalisers:

    y = (t - s - c)/τ = d + η        η = log Σ_p e^y        for any constant c of the row.

A first walk over the vocabulary sums, with e = e^((s - max s)/τ) and φ(y) = e^y - 1 - y ≥ 0,

    Z = Σ e      Y = Σ e y      Φ = Σ e φ(y)      and so      η = log(1 + x),  x = (Y + Φ)/Z
    KL(p‖q) = η - Y/Z = Φ/Z - (x - log(1 + x))

which has nothing left to cancel when c is the mean of t - s under p. Each set of entries takes a centre of its own;
merging two sets moves both to the mean of all, as the parallel variance does. A row whose student has more than half
of its mass in one entry takes that entry's own t - s instead: its y is then exactly 0, and so does not round what the
gradient of a peaked row is made of. KL(q‖p) is the same with the sides exchanged. The Jensen-Shannon divergence needs
both normalisers before its value: its first walk sums S = Σ e (e^y - 1), of which η = log(1 + S/Z), and a second one
the terms.

Entries are (U, R, B): each of a program's R lanes has U times B of them, and sums them up for itself, (R,), until the
walk's end. What exists once a row is (1,). -inf logits contribute their limit; NaN and +inf come out as NaN.
"""

import functools
import math
import os
from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from ..problem import KINDS

# The place of an objective's kind in problem.KINDS.
FORWARD = tl.constexpr(KINDS.index("forward"))
REVERSE = tl.constexpr(KINDS.index("reverse"))
JENSEN_SHANNON = tl.constexpr(KINDS.index("jensen_shannon"))
CLIPPED = tl.constexpr(KINDS.index("clipped"))  # its first walk is Jensen-Shannon's

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_INFINITY = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(3.4028234e38)
# A set whose largest logit is below it is as good as forbidden: the rounding of larger exponents might overflow e.
_FORBIDDEN = tl.constexpr(-1e8)
# What x is compared with before log(1 + x) is trusted; beyond it the logarithms of Z_s and Z_t are far apart.
_TRUSTED = tl.constexpr(1e4)
_LOG2_E, _LN_2 = tl.constexpr(1.44269504), tl.constexpr(0.69314718)


class Mixture(NamedTuple):
    """m = (1-β) p + β q, as csrc/mixture.h has it."""

    student: float  # 1 - β
    teacher: float  # β
    turn: float  # above this d, log(m/q) is computed, below it log(m/p)
    score: tuple[float, ...]  # log(m/p) / d, as a polynomial of d for |d| ≤ 1
    divergence: tuple[float, ...]  # an entry's term over p d², alike


class Entries(NamedTuple):
    """Entries' logits; `difference` is t - s, with all its digits."""

    s: tl.tensor
    t: tl.tensor
    difference: tl.tensor


class Moments(NamedTuple):
    """Sums over a set of entries. `side` is the student (the teacher for KL(q‖p)) and `other` the other one."""

    max_student: tl.tensor
    max_teacher: tl.tensor
    own: tl.tensor  # t - s at the side's largest logit
    centre: tl.tensor  # c
    z_student: tl.tensor  # Σ e_s, e_s = 2^u_s, u_s = s log2(e)/τ + bias(max_student)
    z_teacher: tl.tensor
    h_student: tl.tensor  # Σ e_s u_s: the entropy is log z - h/z, in bits
    h_teacher: tl.tensor
    linear: tl.tensor  # Y (0 for Jensen-Shannon), weighted by the side's e; y = ±(t - s - c)/τ is log(other/side)
    excess: tl.tensor  # Φ (S for Jensen-Shannon), alike


class Values(NamedTuple):
    """What the first walk knows of a row's values."""

    divergence: tl.tensor  # KL. Of the other objectives, 0, or NaN in a row with NaN
    student_entropy: tl.tensor
    teacher_entropy: tl.tensor
    log_student: tl.tensor  # log Σ e^((s - base)/τ)
    log_teacher: tl.tensor


class Row(NamedTuple):
    """What every entry needs to know of its row."""

    bias_student: tl.tensor  # p = 2^(s log2(e)/τ + bias) inverse
    bias_teacher: tl.tensor
    centre: tl.tensor
    log_ratio: tl.tensor  # d = (t - s - centre)/τ - log_ratio. The reverse KL needs d up to a constant only, and has 0
    inverse_student: tl.tensor
    inverse_teacher: tl.tensor
    reference: tl.tensor  # score from which the scores are counted
    mean_score: tl.tensor  # known late of Jensen-Shannon. Of clipped entries Q, or 1 - Q where most are


class Probabilities(NamedTuple):
    p: tl.tensor
    q: tl.tensor
    d: tl.tensor


class Terms(NamedTuple):
    """Second walk's sums."""

    divergence: tl.tensor
    score: tl.tensor  # of Jensen-Shannon, counted from the row's reference; of clipped entries Q
    unclipped: tl.tensor  # 1 - Q
    plain: tl.tensor  # the divergence to take where Q is large


_TERMS = 8


@functools.lru_cache(maxsize=64)
def mixture(beta: float) -> Mixture:
    """The constants of β, as csrc/mixture.cpp has them; the ends have no mixture."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Elementary functions.


@triton.jit
def _phi(x):
    """e^x - 1 - x for |x| ≤ 1, to 3e-7 relative: x² times a minimax polynomial."""
    r = x * 2.7722836e-6 + 2.535483e-5
    r = r * x + 1.9844023e-4
    r = r * x + 1.3885451e-3
    r = r * x + 8.3333105e-3
    r = r * x + 4.1666735e-2
    r = r * x + 1.6666667e-1
    r = r * x + 0.5
    return x * x * r


@triton.jit
def exponential(x):
    """e^x by the hardware's 2^x, to 2e-7 + 1e-7 |x| relative; 0 below the normal numbers."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _log2(x):
    """The hardware's log2(x), to 3e-7 absolute about 1."""
    if is_cuda() and not _INTERPRETED:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def _reciprocal(x):
    """1/x of normal x, to 1e-7 relative."""
    if is_cuda() and not _INTERPRETED:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def hyperbolic_tangent(x):
    """tanh(x), to 6e-7 relative: -e/(e + 2) with e = e^(-2|x|) - 1."""
    y = tl.abs(x) * -2.0
    e = tl.where(y > -1, y + _phi(y), exponential(y) - 1.0)
    z = e / (e + 2.0)
    return tl.where(x > 0, -z, z)


@triton.jit
def _log_series(x):
    """(log(1 + x), x - log(1 + x)) for -0.3 ≤ x ≤ 0.45, both to 6e-7 relative: log(1 + x) = 2 artanh(x/(2 + x))."""
    z = x * _reciprocal(x + 2.0)
    w = z * z
    series = w * ((w * 0.14790256 + 0.19994383) * w + 0.33333343)
    return 2.0 * z * (series + 1.0), z * x - 2.0 * z * series


@triton.jit
def _is_small(x):
    return (x >= -0.3) & (x <= 0.45)


@triton.jit
def _log_one_plus(u, x):
    """log(u), to 6e-7 relative, where u is 1 + x rounded, and x still has the digits that u lost."""
    z = x * _reciprocal(x * 0.5 + 1.0)  # log(1 + x) = 2 artanh(z / 2)
    w = z * z
    series = w * ((w * 2.3109775e-3 + 1.2496489e-2) * w + 8.3333358e-2)
    return tl.where(tl.abs(x) < 0.29, z * series + z, _log2(u) * _LN_2)


@triton.jit
def _polynomial(c, x):
    y = x * c[7] + c[6]
    for i in tl.static_range(6):
        y = y * x + c[5 - i]
    return y


@triton.jit
def _times(p, x):
    """p x, where p = 0 wins over an infinite x."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def _product(a, b):
    """a b, where a zero on either side wins."""
    return tl.where((a == 0) | (b == 0), 0.0, a * b)


@triton.jit
def _excess(p, q, x):
    """p e^x - p, given q = p e^x: exact to rounding for small x, without overflow for large ones."""
    return tl.where(tl.abs(x) < 1, p * (x + _phi(x)), q - p)


@triton.jit
def _summed_excess(p, q, x):
    """As `_excess`, for sums: to 1e-6 of p |x|, with half as many instructions."""
    r = x * 8.3488478e-3 + 4.1775295e-2
    r = r * x + 1.6666642e-1
    r = r * x + 4.9999830e-1
    r = r * x + 1.0
    return tl.where(tl.abs(x) < 0.25, p * x * r, q - p)


@triton.jit
def _above_linear(p, q, x):
    """p (e^x - 1 - x), given q = p e^x."""
    return tl.where(tl.abs(x) < 1, p * _phi(x), q - p - _times(p, x))


# ---------------------------------------------------------------------------------------------------------------------
# Rows of entries.


@triton.jit
def _spread(of_lane):
    """(R,) beside entries."""
    return of_lane[None, :, None]


@triton.jit
def total(x):
    """(R,) sums of entries."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def largest(x):
    """(R,) maxima of entries."""
    return tl.max(tl.max(x, 2), 0)


# ---------------------------------------------------------------------------------------------------------------------
# First walk: the moments of a set of entries, and of the union of sets.


@triton.jit
def base(maximum):
    """A maximum to subtract: 0 where everything is forbidden."""
    return tl.where(maximum > _FORBIDDEN, maximum, 0.0)


@triton.jit
def _bias(maximum, bits):
    """What makes exponents of 2, s bits + bias, less than 1: an integer.

    It stands in sums of several kinds, which a compiler may fuse with a product in one place and not in another. Of an
    integer, no digit depends on that.
    """
    return -tl.floor(base(maximum) * bits)


@triton.jit
def _peak(maximum, bits):
    """2^(exponent of the largest logit): at least 1."""
    return tl.exp2(tl.fma(base(maximum), bits, _bias(maximum, bits)))


@triton.jit
def _centre(z, peak, own, mean):
    return tl.where((z <= 2 * peak) & (tl.abs(own) < _INFINITY), own, mean)


@triton.jit
def sums(at: Entries, max_student, max_teacher, own, centre, inverse_temperature, objective: tl.constexpr):
    """Moments of entries for given maxima and a given centre."""
    bits = inverse_temperature * _LOG2_E
    bias_s, bias_t = _bias(max_student, bits), _bias(max_teacher, bits)
    u_s, u_t = tl.fma(at.s, bits, _spread(bias_s)), tl.fma(at.t, bits, _spread(bias_t))
    e_s, e_t = tl.exp2(u_s), tl.exp2(u_t)
    footing = bias_s - bias_t - centre * bits  # puts e_t on the footing of e_s e^y
    if objective == FORWARD:
        e, other, sign, footing = e_t, e_s, -inverse_temperature, -footing
    else:
        e, other, sign = e_s, e_t, inverse_temperature
    y = (at.difference - _spread(centre)) * sign
    other = other * _spread(tl.exp2(footing))
    if objective == JENSEN_SHANNON:
        linear, excess = tl.zeros_like(centre), total(_summed_excess(e, other, y))
    else:
        linear, excess = total(_times(e, y)), total(_above_linear(e, other, y))
    return Moments(
        max_student, max_teacher, own, centre, total(e_s), total(e_t),
        total(e_s * tl.maximum(u_s, -1e4)), total(e_t * tl.maximum(u_t, -1e4)), linear, excess,
    )  # fmt: skip


@triton.jit
def moved(m: Moments, max_student, max_teacher, centre, inverse_temperature, objective: tl.constexpr):
    """The same set's moments, counted from other maxima, which are no less, and another centre."""
    bits = inverse_temperature * _LOG2_E
    # A set that allows nothing has bias 0, which may be less than the new one.
    shift_s = tl.minimum(_bias(max_student, bits) - _bias(m.max_student, bits), 0.0)
    shift_t = tl.minimum(_bias(max_teacher, bits) - _bias(m.max_teacher, bits), 0.0)
    factor_s, factor_t = tl.exp2(shift_s), tl.exp2(shift_t)
    if objective == FORWARD:
        z, shift, factor, sign = m.z_teacher, shift_t, factor_t, -inverse_temperature
    else:
        z, shift, factor, sign = m.z_student, shift_s, factor_s, inverse_temperature
    step = (m.centre - centre) * sign  # every y becomes y + step
    stretch = tl.exp2(shift + step * _LOG2_E)
    z_there, z = _product(z, stretch), z * factor
    excess = _product(m.excess, stretch)
    if objective == JENSEN_SHANNON:
        linear, excess = m.linear, excess + _summed_excess(z, z_there, step)
    else:
        linear_there, linear = _product(m.linear, stretch), _product(m.linear, factor)
        excess += _excess(linear, linear_there, step) + _above_linear(z, z_there, step)
        linear += _times(z, step)
    return Moments(
        max_student, max_teacher, m.own, centre, m.z_student * factor_s, m.z_teacher * factor_t,
        factor_s * (m.h_student + m.z_student * shift_s), factor_t * (m.h_teacher + m.z_teacher * shift_t),
        linear, excess,
    )  # fmt: skip


@triton.jit
def added(a: Moments, b: Moments):
    """Moments of the union of two disjoint sets that have the same maxima and centre."""
    return Moments(
        a.max_student, a.max_teacher, a.own, a.centre, a.z_student + b.z_student, a.z_teacher + b.z_teacher,
        a.h_student + b.h_student, a.h_teacher + b.h_teacher, a.linear + b.linear, a.excess + b.excess,
    )  # fmt: skip


@triton.jit
def _share(m: Moments, max_student, max_teacher, inverse_temperature, objective: tl.constexpr):
    """The side's z of a set, counted from another maximum, and the factor between."""
    bits = inverse_temperature * _LOG2_E
    if objective == FORWARD:
        z, old, new = m.z_teacher, m.max_teacher, max_teacher
    else:
        z, old, new = m.z_student, m.max_student, max_student
    factor = tl.exp2(tl.minimum(_bias(new, bits) - _bias(old, bits), 0.0))
    return z * factor, factor


# A lane's moments while its entries are walked in blocks: no lane knows of another before the walk's end.


@triton.jit
def _lane_centre(max_student, max_teacher, own, inverse_temperature):
    """t - s at the largest logit: y is 0 at what may be a row's peak.

    Where that is too far from the maxima's difference for e^y, or unknown, it is the latter.
    """
    apart = base(max_teacher) - base(max_student)
    return tl.where(tl.abs(own - apart) * inverse_temperature < 60, own, apart)


@triton.jit
def first_moments(at: Entries, like, objective: tl.constexpr):
    """Moments of empty lanes that start from the maxima of some entries of the row, rather than each from its own.

    A lane of entries that nearly forbid themselves then has nothing, as it should.
    """
    max_s, max_t = tl.max(largest(at.s), 0), tl.max(largest(at.t), 0)
    at_top = at.t == max_t if objective == FORWARD else at.s == max_s
    own = tl.max(largest(tl.where(at_top, at.difference, -_INFINITY)), 0)
    zero = tl.zeros_like(like)
    return Moments(zero + max_s, zero + max_t, zero + own, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def extended(m: Moments, at: Entries, inverse_temperature, objective: tl.constexpr, difference: tl.constexpr):
    """Moments with a block more.

    Jensen-Shannon's centre is the difference of the maxima. That is `own`, where both sides peak at one entry; where
    they do not, nothing depends on the last digits of η. `difference` has more digits than it.
    """
    block_s, block_t = largest(at.s), largest(at.t)
    max_s, max_t = tl.maximum(m.max_student, block_s), tl.maximum(m.max_teacher, block_t)
    if difference or objective != JENSEN_SHANNON:
        if objective == FORWARD:
            old, new, at_top = m.max_teacher, block_t, at.t == _spread(block_t)
        else:
            old, new, at_top = m.max_student, block_s, at.s == _spread(block_s)
        own = largest(tl.where(at_top, at.difference, -_INFINITY))
        own = tl.where(new > old, own, m.own)
        centre = _lane_centre(max_s, max_t, own, inverse_temperature)
    else:
        own = m.own
        centre = base(max_t) - base(max_s)
    m = moved(m, max_s, max_t, centre, inverse_temperature, objective)
    block = sums(at, max_s, max_t, own, centre, inverse_temperature, objective)
    both = added(m, block)
    return Moments(
        max_s, max_t, own, centre, both.z_student, both.z_teacher, both.h_student, both.h_teacher, both.linear,
        both.excess,
    )  # fmt: skip


@triton.jit
def _sum_lanes(x):
    return tl.sum(x, 0, keep_dims=True)


@triton.jit
def merged_lanes(m: Moments, own, inverse_temperature, objective: tl.constexpr):
    """(1,) moments of the union of all lanes, whose t - s at the side's largest logit is `own`."""
    max_s, max_t = tl.max(m.max_student, 0, keep_dims=True), tl.max(m.max_teacher, 0, keep_dims=True)
    z, factor = _share(m, max_s, max_t, inverse_temperature, objective)
    weighted = _product(z, m.centre)
    if objective != JENSEN_SHANNON:  # Y is what the lanes' means differ from their centres by
        difference = _product(factor, m.linear) / inverse_temperature
        weighted = weighted - difference if objective == FORWARD else weighted + difference
    z = _sum_lanes(z)
    mean = _sum_lanes(weighted) / tl.where(z == 0, 1.0, z)
    peak = _peak(max_t if objective == FORWARD else max_s, inverse_temperature * _LOG2_E)
    centre = _centre(z, peak, own, tl.where(tl.abs(mean) < _LARGEST, mean, base(max_t) - base(max_s)))
    m = moved(m, max_s, max_t, centre, inverse_temperature, objective)
    return Moments(
        max_s, max_t, own, centre, _sum_lanes(m.z_student), _sum_lanes(m.z_teacher), _sum_lanes(m.h_student),
        _sum_lanes(m.h_teacher), _sum_lanes(m.linear), _sum_lanes(m.excess),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Between the walks: what a row's moments say, and what every entry needs to know of its row.


@triton.jit
def _log_ratio_of(x):
    log, _ = _log_series(x)
    return tl.where(_is_small(x), log, tl.log(1.0 + x))


@triton.jit
def bounded_mean(mean):
    """An infinite mean (the teacher forbids what the student allows) is taken as the largest finite one: the forbidden
    entries' gradient is then +inf, never inf - inf."""
    return tl.where(mean > _LARGEST, _LARGEST, mean)


@triton.jit
def _log_sum(z, maximum, inverse_temperature):
    """log Σ e^((s - base)/τ), of a z that was summed with the bias."""
    bits = inverse_temperature * _LOG2_E
    return tl.log(z) - tl.fma(base(maximum), bits, _bias(maximum, bits)) * _LN_2


@triton.jit
def concluded(m: Moments, inverse_temperature, objective: tl.constexpr):
    """`Values` and `Row` of a whole row; the reference is 0."""
    log_s = _log_sum(m.z_student, m.max_student, inverse_temperature)
    log_t = _log_sum(m.z_teacher, m.max_teacher, inverse_temperature)
    z = m.z_teacher if objective == FORWARD else m.z_student
    x = (m.linear + m.excess) / z
    trusted = (x > -0.5) & (x < _TRUSTED)
    # log(Z_t / Z_s) of all entries, counted from centre
    apart = log_t - log_s + (base(m.max_teacher) - base(m.max_student) - m.centre) * inverse_temperature
    if objective == FORWARD:
        log_ratio = tl.where(trusted, -_log_ratio_of(x), apart)
    else:
        log_ratio = tl.where(trusted, _log_ratio_of(x), apart)
    mean = tl.zeros_like(z)
    divergence = tl.zeros_like(z)
    if objective != JENSEN_SHANNON:
        _, curvature = _log_series(x)
        eta = tl.where(trusted, tl.log(1.0 + x), -apart if objective == FORWARD else apart)
        divergence = tl.where(_is_small(x), m.excess / z - curvature, eta - m.linear / z)
        divergence = tl.where(divergence < 0, 0.0, divergence)
    # A NaN row is NaN throughout, even if its own entry's share has underflowed: both sums have kept it.
    divergence = tl.where((m.z_student == m.z_student) & (m.z_teacher == m.z_teacher), divergence, float("nan"))
    if objective == REVERSE:
        log_ratio = tl.zeros_like(z)
        mean = bounded_mean(-m.linear / z)
        mean = tl.where(divergence == divergence, mean, divergence)
    else:
        log_ratio = tl.where(divergence == divergence, log_ratio, divergence)
    bits = inverse_temperature * _LOG2_E
    inverse_s, inverse_t = 1.0 / m.z_student, 1.0 / m.z_teacher
    entropy_s = tl.log(m.z_student) - m.h_student * inverse_s * _LN_2
    entropy_t = tl.log(m.z_teacher) - m.h_teacher * inverse_t * _LN_2
    row = Row(
        _bias(m.max_student, bits), _bias(m.max_teacher, bits), m.centre, log_ratio, inverse_s, inverse_t,
        tl.zeros_like(z), mean,
    )  # fmt: skip
    return Values(divergence, entropy_s, entropy_t, log_s, log_t), row


@triton.jit
def row_of_lse(student_lse, teacher_lse, centre, log_ratio, inverse_temperature, mixture: Mixture,
               objective: tl.constexpr):  # fmt: skip
    """(R,) of rows whose statistics are known."""
    bits = inverse_temperature * _LOG2_E
    base_s = tl.where(tl.abs(student_lse) < _INFINITY, student_lse / inverse_temperature, 0.0).to(tl.float32)
    base_t = tl.where(tl.abs(teacher_lse) < _INFINITY, teacher_lse / inverse_temperature, 0.0).to(tl.float32)
    bias_s, bias_t = _bias(base_s, bits), _bias(base_t, bits)
    inverse_s = exponential(
        (base_s.to(tl.float64) * inverse_temperature - student_lse).to(tl.float32)
        - tl.fma(base_s, bits, bias_s) * _LN_2
    )
    inverse_t = exponential(
        (base_t.to(tl.float64) * inverse_temperature - teacher_lse).to(tl.float32)
        - tl.fma(base_t, bits, bias_t) * _LN_2
    )
    zero = tl.zeros_like(centre)
    row = Row(bias_s, bias_t, centre, log_ratio, inverse_s, inverse_t, zero, zero)
    if objective == JENSEN_SHANNON:
        row = with_reference(row, centre, inverse_temperature, mixture)
    return row


@triton.jit
def with_reference(row: Row, own, inverse_temperature, mixture: Mixture):
    """Scores are counted from that of the student's most likely entry: the mean score of a peaked row is then a sum of
    small terms, where nothing cancels."""
    score = mixture_score((own - row.centre) * inverse_temperature - row.log_ratio, mixture)
    reference = tl.where(tl.abs(score) < _INFINITY, score, 0.0)
    return Row(
        row.bias_student, row.bias_teacher, row.centre, row.log_ratio, row.inverse_student, row.inverse_teacher,
        reference, row.mean_score,
    )  # fmt: skip


@triton.jit
def with_mean(row: Row, mean):
    return Row(
        row.bias_student, row.bias_teacher, row.centre, row.log_ratio, row.inverse_student, row.inverse_teacher,
        row.reference, mean,
    )  # fmt: skip


@triton.jit
def _factors(at: Entries, row: Row, inverse_temperature):
    """Both sides' factors, of p = e_s inverse_student and q alike, and d."""
    bits = inverse_temperature * _LOG2_E
    e_s = tl.exp2(tl.fma(at.s, bits, _spread(row.bias_student)))
    e_t = tl.exp2(tl.fma(at.t, bits, _spread(row.bias_teacher)))
    d = (at.difference - _spread(row.centre)) * inverse_temperature - _spread(row.log_ratio)
    return e_s, e_t, d


@triton.jit
def probabilities(at: Entries, row: Row, inverse_temperature):
    e_s, e_t, d = _factors(at, row, inverse_temperature)
    return Probabilities(e_s * _spread(row.inverse_student), e_t * _spread(row.inverse_teacher), d)


# ---------------------------------------------------------------------------------------------------------------------
# Second walk, and the scores, of the Jensen-Shannon divergence D = (1-β) KL(p‖m) + β KL(q‖m), m = (1-β) p + β q.
#
# With a = log(m/p), an entry's term is β q d - m a, and its score -a. Where |d| < 1 both are polynomials of d. Beyond,
# the ratio of q and p is counted from the side that has most of the mixture, so that neither overflows nor cancels.


@triton.jit
def _far_mixture(d, mixture: Mixture):
    """An entry's term over p or q, whether it is over q, and its score. Also where d is infinite or NaN."""
    turned = d > mixture.turn
    x = tl.maximum(tl.where(turned, -d, d), -120.0)
    share = tl.where(turned, mixture.student, mixture.teacher)
    rest = tl.where(turned, mixture.teacher, mixture.student)
    part = exponential(x) * share
    u = part + rest
    log_u = _log_one_plus(u, part - share)
    return part * x - u * log_u, turned, tl.where(turned, x, 0.0) - log_u


@triton.jit
def mixture_score(d, mixture: Mixture):
    """-log(m/p)"""
    _, _, far = _far_mixture(d, mixture)
    return tl.where(tl.abs(d) < 1, -d * _polynomial(mixture.score, d), far)


@triton.jit
def _mixture_entry(p, q, d, mixture: Mixture):
    """An entry's term and score."""
    far, turned, far_score = _far_mixture(d, mixture)
    near = tl.abs(d) < 1
    term = tl.where(near, d * d * _polynomial(mixture.divergence, d), far)
    score = tl.where(near, -d * _polynomial(mixture.score, d), far_score)
    return tl.where(turned & ~near, q, p) * term, score


@triton.jit
def no_terms(like):
    zero = tl.zeros_like(like)
    return Terms(zero, zero, zero, zero)


@triton.jit
def added_terms(sums: Terms, at: Entries, row: Row, inverse_temperature, mixture: Mixture, entry_clip,
                objective: tl.constexpr):  # fmt: skip
    """`Terms` with more entries. Jensen-Shannon's lack a factor: see `finished`."""
    if objective == JENSEN_SHANNON:
        e_s, e_t, d = _factors(at, row, inverse_temperature)
        e_t *= _spread(row.inverse_teacher / row.inverse_student)
        term, score = _mixture_entry(e_s, e_t, d, mixture)
        score = e_s * (score - _spread(row.reference))
        new = Terms(sums.divergence + total(term), sums.score + total(score), sums.unclipped, sums.plain)
    elif objective == CLIPPED:
        new = _added_clipped_terms(sums, probabilities(at, row, inverse_temperature), entry_clip)
    else:
        p, q, d = probabilities(at, row, inverse_temperature)
        term = _above_linear(q, p, -d) if objective == FORWARD else _above_linear(p, q, d)
        new = Terms(sums.divergence + total(term), sums.score, sums.unclipped, sums.plain)
    return new


@triton.jit
def _added_clipped_terms(sums: Terms, at: Probabilities, entry_clip):
    """Terms of the clipped KL(q‖p), Σ min(q d, c): its value, Q, 1 - Q, and its value again.

    Q is the clipped mass. As Σ q = Σ p, p - q may be added to every entry: q φ(-d) then, and p - q + c of the clipped
    ones, which is the value to take where Q is small; where it is large, nothing of the plain sum cancels.
    """
    p, q, d = at
    term = _times(q, d)
    clipped = term > entry_clip
    kept = tl.where(tl.abs(d) < 1, q * _phi(-d), p - q + term)
    return Terms(
        sums.divergence + total(tl.where(clipped, p - q + entry_clip, kept)),
        sums.score + total(tl.where(clipped, q, 0.0)),
        sums.unclipped + total(tl.where(clipped, 0.0, q)),
        sums.plain + total(tl.where(clipped, entry_clip, term)),
    )


@triton.jit
def sum_lanes_of_terms(sums: Terms):
    return Terms(
        _sum_lanes(sums.divergence), _sum_lanes(sums.score), _sum_lanes(sums.unclipped), _sum_lanes(sums.plain)
    )


@triton.jit
def finished_terms(sums: Terms, row: Row, objective: tl.constexpr):
    """Sums of added_terms with all their factors. A row's that is NaN are NaN throughout."""
    poison = tl.where(row.log_ratio == row.log_ratio, 0.0, row.log_ratio)
    factor = row.inverse_student if objective == JENSEN_SHANNON else poison + 1.0
    return Terms(
        sums.divergence * factor + poison, sums.score * factor + poison, sums.unclipped + poison, sums.plain + poison
    )


# ---------------------------------------------------------------------------------------------------------------------
# Gradient.


@triton.jit
def softcap_slope(z, inverse_softcap):
    """d (c tanh(x / c)) / dx = 1 - (z / c)² of a logit z = c tanh(x / c)."""
    x = z * inverse_softcap
    return tl.maximum(1.0 - x * x, 0.0)


@triton.jit
def importance_ratio(logp, old_logp, clip):
    """By how much more likely the student finds a token than the policy that sampled it, bounded. NaN stays."""
    log_ratio = logp - old_logp
    log_ratio = tl.where(log_ratio > 20, 20.0, tl.where(log_ratio < -20, -20.0, log_ratio))
    ratio = tl.exp(log_ratio)
    return tl.where(ratio > clip, clip, ratio)


@triton.jit
def gradient_scale(weight, mixture: Mixture, inverse_temperature, objective: tl.constexpr):
    """(R,) what multiplies a row's `logit_gradient`."""
    scale = weight * inverse_temperature
    return scale * mixture.student if objective == JENSEN_SHANNON else scale


@triton.jit
def logit_gradient(at: Entries, row: Row, mostly_clipped, scale, inverse_temperature, mixture: Mixture, entry_clip,
                   objective: tl.constexpr):  # fmt: skip
    """weight · ∂D/∂s of entries."""
    if objective == JENSEN_SHANNON:
        e_s, _, d = _factors(at, row, inverse_temperature)
        score = mixture_score(d, mixture) - _spread(row.reference) - _spread(row.mean_score)
        slope, scale = e_s * score, row.inverse_student * scale
    else:
        p, q, d = probabilities(at, row, inverse_temperature)
        if objective == FORWARD:
            slope = -_excess(p, q, d)
        elif objective == REVERSE:
            slope = _times(p, -d - _spread(row.mean_score))
        else:  # p (1 - Q), and of an entry that is not clipped -q
            clipped = _times(q, d) > entry_clip
            share = p * _spread(row.mean_score)
            few = tl.where(clipped, p, -_excess(p, q, d)) - share
            slope = tl.where(_spread(mostly_clipped), tl.where(clipped, share, share - q), few)
    # Weight 0 means gradient 0 whatever the row holds.
    return tl.where(_spread(scale) == 0, 0.0, slope) * _spread(scale)
