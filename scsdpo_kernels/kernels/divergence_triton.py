"""The divergence in Triton: sums over vocabulary entries that any split can be merged from, values, and gradients.

For p = softmax(s/τ), q = softmax(t/τ) the log-ratio of an entry, log(q/p) = d, is known up to the row's normalisers:

    y = (t - s - c)/τ = d + η        η = log Σ_p e^y        for any constant c of the row.

A first walk over the vocabulary sums, with e = e^((s - max s)/τ) and φ(y) = e^y - 1 - y ≥ 0,

    Z = Σ e      Y = Σ e y      Φ = Σ e φ(y)      and so      η = log(1 + x),  x = (Y + Φ)/Z
    KL(p‖q) = η - Y/Z = Φ/Z - (x - log(1 + x))

which has nothing left to cancel when c is the mean of t - s under p. Each set of entries takes a centre of its own;
merging two sets moves both to the mean of all, as the parallel variance does. A row whose student has more than half
of its mass in one entry takes that entry's own t - s instead: its y is then exactly 0, and so does not round what the
gradient of a peaked row is made of. Divergences from a mixture of both sides need both normalisers before their value:
their first walk sums S = Σ e (e^y - 1), of which η = log(1 + S/Z), and a second one the terms. Jeffreys' first walk is
that of KL(p‖q), and its second one sums the terms too.

KL(q‖p) is KL(p‖q) with the sides exchanged. So formulas speak of an own side, under which means are taken, and the
other one: of KL(q‖p) the own side is the teacher, of all else the student.

Entries are (U, R, B): each of a program's R lanes has U times B of them, and sums them up for itself, (R,), until the
walk's end. What exists once a row is (1,). -inf logits contribute their limit; NaN and +inf come out as NaN.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..problem import KINDS
from .elementary_triton import (
    LN_2,
    LOG2_E,
    above_linear,
    below_linear,
    excess,
    exponential,
    is_small,
    log_one_plus,
    log_series,
    phi,
    polynomial,
    product,
    reciprocal,
    summed_excess,
    times,
)
from .mixture import Mixture

# The place of an objective's kind in problem.KINDS.
FORWARD = tl.constexpr(KINDS.index("forward"))
REVERSE = tl.constexpr(KINDS.index("reverse"))
JENSEN_SHANNON = tl.constexpr(KINDS.index("jensen_shannon"))
CLIPPED = tl.constexpr(KINDS.index("clipped"))  # its first walk is Jensen-Shannon's
JEFFREYS = tl.constexpr(KINDS.index("jeffreys"))
SKEWED_FORWARD = tl.constexpr(KINDS.index("skewed_forward"))  # first walks as Jensen-Shannon's
SKEWED_REVERSE = tl.constexpr(KINDS.index("skewed_reverse"))

_INFINITY = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(3.4028234e38)
# A set whose largest logit is below it is as good as forbidden: the rounding of larger exponents might overflow e.
_FORBIDDEN = tl.constexpr(-1e8)
# log(1 + x) is trusted below; beyond, the logarithms of both Z are far apart.
_TRUSTED = tl.constexpr(1e4)


@triton.constexpr_function
def has_mixture(objective):
    return KINDS[objective] in ("jensen_shannon", "skewed_forward", "skewed_reverse")


@triton.constexpr_function
def has_terms(objective):
    """Whether a second walk sums what the gradient needs."""
    return KINDS[objective] not in ("forward", "reverse")


def first_walk(kind: str) -> str:
    """The kind whose moments a row's first walk sums."""
    return kind if kind in ("forward", "reverse", "jeffreys") else "jensen_shannon"


class Numbers(NamedTuple):
    """What an objective and a head are told at run time."""

    inverse_temperature: float
    entry_clip: float
    importance_clip: float
    inverse_softcap: float  # 0: none
    mixture: Mixture


class Entries(NamedTuple):
    """Entries' logits; `difference` is other - own, with all its digits."""

    own: tl.tensor
    other: tl.tensor
    difference: tl.tensor


class Moments(NamedTuple):
    """Sums over a set of entries."""

    max_own: tl.tensor
    max_other: tl.tensor
    at_top: tl.tensor  # other - own at the own side's largest logit
    centre: tl.tensor  # c
    z_own: tl.tensor  # Σ e, e = 2^u, u = s log2(e)/τ + bias(max_own)
    z_other: tl.tensor
    h_own: tl.tensor  # Σ e u: the entropy is log z - h/z, in bits
    h_other: tl.tensor
    linear: tl.tensor  # Y (0 for Jensen-Shannon), weighted by the own side's e; y is log(other/own)
    excess: tl.tensor  # Φ (S for Jensen-Shannon), alike


class Values(NamedTuple):
    """What the first walk knows of a row's values."""

    divergence: tl.tensor  # KL; the other objectives have 0, or NaN in a row with NaN
    own_entropy: tl.tensor
    other_entropy: tl.tensor
    log_own: tl.tensor  # log Σ e^((s - base)/τ)
    log_other: tl.tensor


class Row(NamedTuple):
    """What every entry needs to know of its row."""

    bias_own: tl.tensor  # p = 2^(s log2(e)/τ + bias) inverse
    bias_other: tl.tensor
    inverse_own: tl.tensor
    inverse_other: tl.tensor
    centre: tl.tensor
    log_ratio: tl.tensor  # d = (t - s - centre)/τ - log_ratio. The reverse KL needs d up to a constant only, and has 0


class Mean(NamedTuple):
    """What a row's scores are counted from."""

    reference: tl.tensor
    score: tl.tensor  # their mean, counted from there; clipped: Q, or 1 - Q where that is less
    mostly_clipped: tl.tensor


class Terms(NamedTuple):
    """Second walk's sums."""

    divergence: tl.tensor
    score: tl.tensor  # counted from the row's reference; clipped: Q
    unclipped: tl.tensor  # 1 - Q
    plain: tl.tensor  # the divergence to take where Q is large


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


@triton.jit
def _sum_lanes(x):
    return tl.sum(x, 0, keep_dims=True)


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
def _sums(at: Entries, max_own, max_other, at_top, centre, by: Numbers, objective: tl.constexpr):
    """Moments of entries for given maxima and a given centre."""
    bits = by.inverse_temperature * LOG2_E
    bias, bias_other = _bias(max_own, bits), _bias(max_other, bits)
    u, u_other = tl.fma(at.own, bits, _spread(bias)), tl.fma(at.other, bits, _spread(bias_other))
    e, e_other = tl.exp2(u), tl.exp2(u_other)
    y = (at.difference - _spread(centre)) * by.inverse_temperature
    there = e_other * _spread(tl.exp2(bias - bias_other - centre * bits))  # e e^y
    if objective == JENSEN_SHANNON:
        linear, beyond = tl.zeros_like(centre), total(summed_excess(e, there, y))
    else:
        linear, beyond = total(times(e, y)), total(above_linear(e, there, y))
    return Moments(
        max_own, max_other, at_top, centre, total(e), total(e_other),
        total(e * tl.maximum(u, -1e4)), total(e_other * tl.maximum(u_other, -1e4)), linear, beyond,
    )  # fmt: skip


@triton.jit
def _shift(old, new, bits):
    """From one maximum to another that is no less. A set that allows nothing has bias 0, which may be less."""
    return tl.minimum(_bias(new, bits) - _bias(old, bits), 0.0)


@triton.jit
def _moved(m: Moments, max_own, max_other, centre, by: Numbers, objective: tl.constexpr):
    """The same set's moments, counted from other maxima, which are no less, and another centre."""
    bits = by.inverse_temperature * LOG2_E
    shift, shift_other = _shift(m.max_own, max_own, bits), _shift(m.max_other, max_other, bits)
    factor, factor_other = tl.exp2(shift), tl.exp2(shift_other)
    step = (m.centre - centre) * by.inverse_temperature  # every y becomes y + step
    stretch = tl.exp2(shift + step * LOG2_E)
    z_there, z = product(m.z_own, stretch), m.z_own * factor
    beyond = product(m.excess, stretch)
    if objective == JENSEN_SHANNON:
        linear, beyond = m.linear, beyond + summed_excess(z, z_there, step)
    else:
        linear_there, linear = product(m.linear, stretch), product(m.linear, factor)
        beyond += excess(linear, linear_there, step) + above_linear(z, z_there, step)
        linear += times(z, step)
    return Moments(
        max_own, max_other, m.at_top, centre, m.z_own * factor, m.z_other * factor_other,
        factor * (m.h_own + m.z_own * shift), factor_other * (m.h_other + m.z_other * shift_other), linear, beyond,
    )  # fmt: skip


@triton.jit
def first_moments(at: Entries, like):
    """Moments of empty lanes that start from the maxima of some entries of the row, rather than each from its own.

    A lane of entries that nearly forbid themselves then has nothing, as it should.
    """
    max_own, max_other = tl.max(largest(at.own), 0), tl.max(largest(at.other), 0)
    at_top = tl.max(largest(tl.where(at.own == max_own, at.difference, -_INFINITY)), 0)
    zero = tl.zeros_like(like)
    return Moments(zero + max_own, zero + max_other, zero + at_top, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def extended(m: Moments, at: Entries, by: Numbers, objective: tl.constexpr, difference: tl.constexpr):
    """A lane's moments with a block more: no lane knows of another before the walk's end.

    The centre is the difference at the largest logit, so that y is 0 at what may be a row's peak. Where that is too far
    from the maxima's difference for e^y, or unknown, it is the latter. Jensen-Shannon's always is: both are one where
    both sides peak at one entry, and where they do not, nothing depends on the last digits of η. `difference` has more
    digits than it.
    """
    block_own = largest(at.own)
    max_own, max_other = tl.maximum(m.max_own, block_own), tl.maximum(m.max_other, largest(at.other))
    at_top, apart = m.at_top, base(max_other) - base(max_own)
    centre = apart
    if difference or objective != JENSEN_SHANNON:
        in_block = largest(tl.where(at.own == _spread(block_own), at.difference, -_INFINITY))
        at_top = tl.where(block_own > m.max_own, in_block, at_top)
        centre = tl.where(tl.abs(at_top - apart) * by.inverse_temperature < 60, at_top, apart)
    m = _moved(m, max_own, max_other, centre, by, objective)
    block = _sums(at, max_own, max_other, at_top, centre, by, objective)
    return Moments(
        max_own, max_other, at_top, centre, m.z_own + block.z_own, m.z_other + block.z_other, m.h_own + block.h_own,
        m.h_other + block.h_other, m.linear + block.linear, m.excess + block.excess,
    )  # fmt: skip


@triton.jit
def merged_lanes(m: Moments, at_top, by: Numbers, objective: tl.constexpr):
    """(1,) moments of the union of all lanes."""
    bits = by.inverse_temperature * LOG2_E
    max_own, max_other = tl.max(m.max_own, 0, keep_dims=True), tl.max(m.max_other, 0, keep_dims=True)
    factor = tl.exp2(_shift(m.max_own, max_own, bits))
    z = m.z_own * factor
    weighted = product(z, m.centre)
    if objective != JENSEN_SHANNON:  # Y is what the lanes' means differ from their centres by
        weighted += product(factor, m.linear) / by.inverse_temperature
    z = _sum_lanes(z)
    mean = _sum_lanes(weighted) / tl.where(z == 0, 1.0, z)
    mean = tl.where(tl.abs(mean) < _LARGEST, mean, base(max_other) - base(max_own))
    peaked = (z <= 2 * _peak(max_own, bits)) & (tl.abs(at_top) < _INFINITY)
    centre = tl.where(peaked, at_top, mean)
    m = _moved(m, max_own, max_other, centre, by, objective)
    return Moments(
        max_own, max_other, at_top, centre, _sum_lanes(m.z_own), _sum_lanes(m.z_other), _sum_lanes(m.h_own),
        _sum_lanes(m.h_other), _sum_lanes(m.linear), _sum_lanes(m.excess),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Between the walks: what a row's moments say, and what every entry needs to know of its row.


@triton.jit
def _log_ratio_of(x):
    log, _ = log_series(x)
    return tl.where(is_small(x), log, tl.log(1.0 + x))


@triton.jit
def _bounded_mean(mean):
    """An infinite mean (the teacher forbids what the student allows) is taken as the largest finite one: the forbidden
    entries' gradient is then +inf, never inf - inf."""
    return tl.where(mean > _LARGEST, _LARGEST, mean)


@triton.jit
def _log_sum(z, maximum, bits):
    """log Σ e^((s - base)/τ), of a z that was summed with the bias."""
    return tl.log(z) - tl.fma(base(maximum), bits, _bias(maximum, bits)) * LN_2


@triton.jit
def concluded(m: Moments, by: Numbers, objective: tl.constexpr):
    """`Values`, `Row` and `Mean` of a whole row; the reference is 0."""
    bits = by.inverse_temperature * LOG2_E
    log_own, log_other = _log_sum(m.z_own, m.max_own, bits), _log_sum(m.z_other, m.max_other, bits)
    x = (m.linear + m.excess) / m.z_own
    trusted = (x > -0.5) & (x < _TRUSTED)
    # log(Z_other / Z_own) of all entries, counted from centre
    apart = log_other - log_own + (base(m.max_other) - base(m.max_own) - m.centre) * by.inverse_temperature
    log_ratio = tl.where(trusted, _log_ratio_of(x), apart)
    zero = tl.zeros_like(x)
    mean, divergence = zero, zero
    if objective != JENSEN_SHANNON:
        _, curvature = log_series(x)
        eta = tl.where(trusted, tl.log(1.0 + x), apart)
        divergence = tl.where(is_small(x), m.excess / m.z_own - curvature, eta - m.linear / m.z_own)
        divergence = tl.where(divergence < 0, 0.0, divergence)
    # A NaN row is NaN throughout, even if its own entry's share has underflowed: both sums have kept it.
    divergence = tl.where((m.z_own == m.z_own) & (m.z_other == m.z_other), divergence, float("nan"))
    if objective == REVERSE:
        log_ratio = zero
        mean = _bounded_mean(-m.linear / m.z_own)
        mean = tl.where(divergence == divergence, mean, divergence)
    else:
        log_ratio = tl.where(divergence == divergence, log_ratio, divergence)
    inverse_own, inverse_other = 1.0 / m.z_own, 1.0 / m.z_other
    entropy = tl.log(m.z_own) - m.h_own * inverse_own * LN_2
    entropy_other = tl.log(m.z_other) - m.h_other * inverse_other * LN_2
    row = Row(_bias(m.max_own, bits), _bias(m.max_other, bits), inverse_own, inverse_other, m.centre, log_ratio)
    return Values(divergence, entropy, entropy_other, log_own, log_other), row, Mean(zero, mean, divergence > 0.5)


@triton.jit
def _inverse_of_lse(lse, by: Numbers):
    """A side's bias and inverse, of the log-sum-exp of its logits / τ in float64."""
    bits = by.inverse_temperature * LOG2_E
    around = tl.where(tl.abs(lse) < _INFINITY, lse / by.inverse_temperature, 0.0).to(tl.float32)
    bias = _bias(around, bits)
    rest = (around.to(tl.float64) * by.inverse_temperature - lse).to(tl.float32)
    return bias, exponential(rest - tl.fma(around, bits, bias) * LN_2)


@triton.jit
def row_of_lse(lse_own, lse_other, centre, log_ratio, by: Numbers):
    """A row whose statistics are known."""
    bias, inverse = _inverse_of_lse(lse_own, by)
    bias_other, inverse_other = _inverse_of_lse(lse_other, by)
    return Row(bias, bias_other, inverse, inverse_other, centre, log_ratio)


@triton.jit
def reference_score(row: Row, at_top, by: Numbers, objective: tl.constexpr):
    """The score of the student's likeliest entry. Counted from there, the mean score of a peaked row is a sum of small
    terms, where nothing cancels."""
    score = score_of((at_top - row.centre) * by.inverse_temperature - row.log_ratio, by.mixture, objective)
    return tl.where(tl.abs(score) < _INFINITY, score, 0.0)


@triton.jit
def _factors(at: Entries, row: Row, by: Numbers):
    """Both sides' factors, of p = e inverse, and d = log(other/own)."""
    bits = by.inverse_temperature * LOG2_E
    e = tl.exp2(tl.fma(at.own, bits, _spread(row.bias_own)))
    e_other = tl.exp2(tl.fma(at.other, bits, _spread(row.bias_other)))
    d = (at.difference - _spread(row.centre)) * by.inverse_temperature - _spread(row.log_ratio)
    return e, e_other, d


@triton.jit
def _probabilities(at: Entries, row: Row, by: Numbers):
    e, e_other, d = _factors(at, row, by)
    return e * _spread(row.inverse_own), e_other * _spread(row.inverse_other), d


# ---------------------------------------------------------------------------------------------------------------------
# Second walk, and the scores, of divergences from a mixture m = (1-β) p + β q, and of Jeffreys. With a = log(m/p) and
# y(u) = u - 1 - log(u) ≥ 0, an entry's term and score, of which ∂D/∂s = f p (score - mean score)/τ, are
#
#     Jensen-Shannon   (1-β) KL(p‖m) + β KL(q‖m)   f = 1-β      β q d - m a                   -a
#     skewed forward   KL(q‖m)                     f = (1-β)²   q y(m/q)                      (p - q)/m
#     skewed reverse   KL(p‖m)                     f = 1        p y(m/p)                      -a - (1-β)(p/m - 1)
#     Jeffreys         (1-β) KL(q‖p) + β KL(p‖q)   f = β        (1-β) q φ(-d) + β p φ(d)      -d, with (1-β)(p - q)/τ
#
# Where |d| < 1, a mixture's are polynomials of d. Beyond, the ratio of q and p is counted from the side that has most
# of the mixture, so that neither overflows nor cancels.


@triton.jit
def _far_mixture(d, mixture: Mixture, objective: tl.constexpr):
    """An entry's term over p or q, whether it is over q, and its score. Also where d is infinite or NaN."""
    turned = d > mixture.turn
    x = tl.maximum(tl.where(turned, -d, d), -120.0)
    share = tl.where(turned, mixture.student, mixture.teacher)
    rest = tl.where(turned, mixture.teacher, mixture.student)
    ratio = exponential(x)
    part = ratio * share
    u = part + rest
    log_u = log_one_plus(u, part - share)
    if objective == JENSEN_SHANNON:
        term, score = part * x - u * log_u, tl.where(turned, x, 0.0) - log_u
    else:
        below = below_linear(u, part - share)
        other = rest * (1.0 - ratio) + ratio * (x - log_u)  # the side that u is not counted from
        if objective == SKEWED_FORWARD:
            term = tl.where(turned, below, other)
            score = tl.where(turned, ratio - 1.0, 1.0 - ratio) * reciprocal(u)
        else:
            term = tl.where(turned, other, below)
            step = (part - share) * reciprocal(u)
            score = tl.where(turned, x - log_u - step * rest, below - step * part)
    return term, turned, score


@triton.jit
def _near_score(d, mixture: Mixture, objective: tl.constexpr):
    score = -d * polynomial(mixture.score, d)
    if objective == SKEWED_REVERSE:  # whose polynomials are over q / p
        score *= exponential(d)
    return score


@triton.jit
def score_of(d, mixture: Mixture, objective: tl.constexpr):
    if objective == JEFFREYS:
        score = -d
    else:
        _, _, far = _far_mixture(d, mixture, objective)
        score = tl.where(tl.abs(d) < 1, _near_score(d, mixture, objective), far)
    return score


@triton.jit
def _mixture_entry(p, q, d, mixture: Mixture, objective: tl.constexpr):
    """An entry's term and score."""
    far, turned, far_score = _far_mixture(d, mixture, objective)
    near = tl.abs(d) < 1
    term = tl.where(near, d * d * polynomial(mixture.divergence, d), far)
    score = tl.where(near, _near_score(d, mixture, objective), far_score)
    over_q = turned | near if objective == SKEWED_REVERSE else turned & ~near
    return tl.where(over_q, q, p) * term, score


@triton.jit
def added_terms(sums: Terms, at: Entries, row: Row, reference, by: Numbers, objective: tl.constexpr):
    """`Terms` with more entries. A mixture's lack a factor: see `finished_terms`."""
    if has_mixture(objective):
        e, e_other, d = _factors(at, row, by)
        q = e_other * _spread(row.inverse_other / row.inverse_own)
        term, score = _mixture_entry(e, q, d, by.mixture, objective)
        score = e * (score - _spread(reference))
        new = Terms(sums.divergence + total(term), sums.score + total(score), sums.unclipped, sums.plain)
    elif objective == CLIPPED:
        p, q, d = _probabilities(at, row, by)
        new = _added_clipped_terms(sums, p, q, d, by.entry_clip)
    elif objective == JEFFREYS:
        p, q, d = _probabilities(at, row, by)
        # q φ(-d), which is p (d e^d - (e^d - 1))
        forward = tl.where(tl.abs(d) < 1, q * phi(-d), p - q + times(q, d))
        term = forward * by.mixture.student + above_linear(p, q, d) * by.mixture.teacher
        score = times(p, -d - _spread(reference))
        new = Terms(sums.divergence + total(term), sums.score + total(score), sums.unclipped, sums.plain)
    else:
        own, other, d = _probabilities(at, row, by)
        term = above_linear(own, other, d)
        new = Terms(sums.divergence + total(term), sums.score, sums.unclipped, sums.plain)
    return new


@triton.jit
def _added_clipped_terms(sums: Terms, p, q, d, entry_clip):
    """Terms of the clipped KL(q‖p), Σ min(q d, c): its value, Q, 1 - Q, and its value again.

    Q is the clipped mass. As Σ q = Σ p, p - q may be added to every entry: q φ(-d) then, and p - q + c of the clipped
    ones, which is the value to take where Q is small; where it is large, nothing of the plain sum cancels.
    """
    term = times(q, d)
    clipped = term > entry_clip
    kept = tl.where(tl.abs(d) < 1, q * phi(-d), p - q + term)
    return Terms(
        sums.divergence + total(tl.where(clipped, p - q + entry_clip, kept)),
        sums.score + total(tl.where(clipped, q, 0.0)),
        sums.unclipped + total(tl.where(clipped, 0.0, q)),
        sums.plain + total(tl.where(clipped, entry_clip, term)),
    )


@triton.jit
def finished_terms(sums: Terms, row: Row, objective: tl.constexpr):
    """(1,) sums over lanes, with all their factors. A row's that is NaN are NaN throughout."""
    poison = tl.where(row.log_ratio == row.log_ratio, 0.0, row.log_ratio)
    factor = row.inverse_own if has_mixture(objective) else poison + 1.0
    return Terms(
        _sum_lanes(sums.divergence) * factor + poison, _sum_lanes(sums.score) * factor + poison,
        _sum_lanes(sums.unclipped) + poison, _sum_lanes(sums.plain) + poison,
    )  # fmt: skip


@triton.jit
def concluded_terms(terms: Terms, reference, objective: tl.constexpr):
    """A whole row's divergence, and `Mean`."""
    mostly_clipped = terms.score > 0.5
    if objective == CLIPPED:
        divergence = tl.where(mostly_clipped, terms.plain, terms.divergence)
        mean = tl.where(mostly_clipped, terms.unclipped, terms.score)
    else:
        divergence = tl.where(terms.divergence < 0, 0.0, terms.divergence)
        mean = divergence if objective == REVERSE else terms.score  # the mean of log(p/q) is the divergence itself
    mean = tl.where(divergence == divergence, mean, divergence).to(tl.float32)  # a NaN row is NaN throughout
    return divergence.to(tl.float32), Mean(reference, _bounded_mean(mean), mostly_clipped)


# ---------------------------------------------------------------------------------------------------------------------
# Gradient.


@triton.jit
def importance_ratio(logp, old_logp, clip):
    """By how much more likely the student finds a token than the policy that sampled it, bounded. NaN stays."""
    log_ratio = logp - old_logp
    log_ratio = tl.where(log_ratio > 20, 20.0, tl.where(log_ratio < -20, -20.0, log_ratio))
    ratio = tl.exp(log_ratio)
    return tl.where(ratio > clip, clip, ratio)


@triton.jit
def policy_terms(advantage, ratio, lowest, highest):
    """A policy's loss -min(r A, clip(r) A), 1 where it is clipped, and A r, or 0 where it is.

    No advantage: nothing of them, whatever r.
    """
    above, below = (advantage > 0) & (ratio > highest), (advantage < 0) & (ratio < lowest)
    counted = tl.where(above, highest, tl.where(below, lowest, ratio))
    product = tl.where(advantage == 0, 0.0, advantage * counted)
    return -product, tl.where(above | below, 1.0, 0.0), tl.where(above | below, 0.0, product)


@triton.jit
def beside_one(at: Entries, row: Row, m: Moments, by: Numbers, objective: tl.constexpr):
    """(1,) p - 1 of a (1, 1, 1) entry of the student, with what the sum of all e has kept beside it."""
    e, e_other, _ = _factors(at, row, by)
    z = m.z_own
    if objective == FORWARD:
        e, z = e_other, m.z_other
    return (e.reshape(1) - z) / z


@triton.jit
def minus_other(log_p):
    """p - 1 of a log-probability, with all its digits."""
    return tl.where(log_p > -1, log_p + phi(tl.maximum(log_p, -1.0)), exponential(log_p) - 1.0)


@triton.jit
def gradient_scale(weight, by: Numbers, objective: tl.constexpr):
    """(1,) what multiplies a row's `logit_gradient`."""
    scale = weight * by.inverse_temperature
    if objective == JENSEN_SHANNON:
        scale *= by.mixture.student
    elif objective == SKEWED_FORWARD:
        scale *= by.mixture.student * by.mixture.student
    return scale


@triton.jit
def logit_gradient(at: Entries, row: Row, mean: Mean, scale, pull, by: Numbers, objective: tl.constexpr):
    """weight · ∂D/∂s of entries. And `pull` · p, where it is there."""
    if has_mixture(objective):
        e, _, d = _factors(at, row, by)
        score = score_of(d, by.mixture, objective) - _spread(mean.reference) - _spread(mean.score)
        slope, scale = e * score, product(row.inverse_own, scale)
        p = e
        if pull is not None:
            pull = product(row.inverse_own, pull)
    else:
        own, other, d = _probabilities(at, row, by)
        p = other if objective == FORWARD else own
        if objective == FORWARD:
            slope = excess(own, other, d)
        elif objective == REVERSE:
            slope = times(own, -d - _spread(mean.score))
        elif objective == JEFFREYS:
            slope = times(own, -d - _spread(mean.reference) - _spread(mean.score)) * by.mixture.teacher
            slope -= excess(own, other, d) * by.mixture.student
        else:  # p (1 - Q), less q where an entry is not clipped
            clipped = times(other, d) > by.entry_clip
            share = own * _spread(mean.score)
            few = tl.where(clipped, own, -excess(own, other, d)) - share
            slope = tl.where(_spread(mean.mostly_clipped), tl.where(clipped, share, share - other), few)
    # Weight 0 means gradient 0 whatever the row holds.
    g = tl.where(_spread(scale) == 0, 0.0, slope) * _spread(scale)
    if pull is not None:
        g += tl.where(_spread(pull) == 0, 0.0, p * _spread(pull))
    return g
