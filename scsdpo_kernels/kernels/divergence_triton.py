"""The divergence in Triton: sums over vocabulary entries that any split can be merged from, values, and scores.

For p = softmax(s/τ), q = softmax(t/τ) the log-ratio of an entry, log(q/p) = d, is known up to the row's normalisers:

    y = (t - s - c)/τ = d + η        η = log Σ_p e^y        for any constant c of the row.

A first walk over the vocabulary sums, with e = e^((s - max s)/τ) and φ(y) = e^y - 1 - y ≥ 0,

    Z = Σ e      Y = Σ e y      Φ = Σ e φ(y)      and so      η = log(1 + x),  x = (Y + Φ)/Z
    KL(p‖q) = η - Y/Z = Φ/Z - (x - log(1 + x))

which has nothing left to cancel when c is the mean of t - s under p. Each set of entries takes its own mean; merging
two sets moves both to the mean of all, as the parallel variance does. A row whose student has more than half of its
mass in one entry takes that entry's own t - s instead: its y is then exactly 0, and so does not round what the
gradient of a peaked row is made of. KL(q‖p) is the same with the sides exchanged. The Jensen-Shannon divergence needs
both normalisers before its value: its first walk sums S = Σ e (e^y - 1), of which η = log(1 + S/Z), and a second one
the terms.

Every function takes blocks of rows × entries, so that one copy serves rows of resident logits and tiles that exist in
registers only. -inf logits contribute their limit; NaN and +inf come out as NaN.
"""

import triton
import triton.language as tl

from ..problem import KINDS

# The place of an objective's kind in problem.KINDS.
FORWARD = tl.constexpr(KINDS.index("forward"))
REVERSE = tl.constexpr(KINDS.index("reverse"))
JENSEN_SHANNON = tl.constexpr(KINDS.index("jensen_shannon"))
CLIPPED = tl.constexpr(KINDS.index("clipped"))  # its first walk is Jensen-Shannon's

_INFINITY = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(3.4028234e38)
# What x is compared with before log(1 + x) is trusted; beyond it the logarithms of Z_s and Z_t are far apart.
_TRUSTED = tl.constexpr(1e4)


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
    return tl.exp2(x * 1.44269504)


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
    root = tl.rsqrt(x + 2.0)  # its square is a reciprocal in two instructions
    z = x * root * root
    w = z * z
    series = w * ((w * 0.14790256 + 0.19994383) * w + 0.33333343)
    return 2.0 * z * (series + 1.0), z * x - 2.0 * z * series


@triton.jit
def _is_small(x):
    return (x >= -0.3) & (x <= 0.45)


@triton.jit
def _reduced(u, y):
    """(f, k ln 2, k = 0) with u = 2^k (1 + f), √½ ≤ 1 + f < √2, of normal u > 0. Where k = 0, f is y = u - 1 itself."""
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (k << 23)).to(tl.float32, bitcast=True)
    return tl.where(k == 0, y, mantissa - 1.0), k.to(tl.float32) * 0.69314718, k == 0


@triton.jit
def _max2(a, b):
    """Both maxima over axis 1 in one reduction, as the sums below."""
    return tl.max(tl.join(a, b), 1).split()


@triton.jit
def _sum2(a, b):
    return tl.sum(tl.join(a, b), 1).split()


@triton.jit
def _sum4(a, b, c, d):
    ab, cd = tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 1).split()
    a, b = ab.split()
    c, d = cd.split()
    return a, b, c, d


@triton.jit
def _times(p, x):
    """p x, where p = 0 wins over an infinite x."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def _excess(p, q, x):
    """p e^x - p, given q = p e^x: exact to rounding for small x, without overflow for large ones."""
    return tl.where(tl.abs(x) < 1, p * (x + _phi(x)), q - p)


@triton.jit
def _above_linear(p, q, x):
    """p (e^x - 1 - x), given q = p e^x."""
    return tl.where(tl.abs(x) < 1, p * _phi(x), q - p - _times(p, x))


# ---------------------------------------------------------------------------------------------------------------------
# First walk: the moments of a set of entries, and of the union of two sets.
#
# A set's moments are ten (R,) vectors, `side` being the student (the teacher for KL(q‖p)) and `other` the other one:
#
#   max_s, max_t    largest logits
#   own, centre     t - s at the side's largest logit, and c
#   z_s, z_t        Σ e^((s - max_s)/τ), Σ e^((t - max_t)/τ)
#   h_s, h_t        the same, times their exponents: entropy = log z - h/z
#   linear, above   Y and Φ (0 and S for Jensen-Shannon), weighted by the side's e and counted in its direction:
#                   y = ±(t - s - c)/τ is log(other/side)


@triton.jit
def _base(maximum):
    """A maximum to subtract: 0 where everything is forbidden."""
    return tl.where(maximum == -_INFINITY, 0.0, maximum)


@triton.jit
def _centre(z, own, mean):
    return tl.where((z <= 2) & (tl.abs(own) < _INFINITY), own, mean)


@triton.jit
def moments(s, t, difference, inverse_temperature, objective: tl.constexpr):
    """Moments of (R, B) logits. `difference` is t - s; entries beyond the vocabulary are -inf on both sides."""
    max_s, max_t = _max2(s, t)
    base_s, base_t = _base(max_s), _base(max_t)
    bits = inverse_temperature * 1.44269504  # exponents of 2
    u_s, u_t = (s - base_s[:, None]) * bits, (t - base_t[:, None]) * bits
    e_s, e_t = tl.exp2(u_s), tl.exp2(u_t)
    z_s, z_t, h_s, h_t = _sum4(e_s, e_t, e_s * tl.maximum(u_s, -1e4), e_t * tl.maximum(u_t, -1e4))
    h_s, h_t = h_s * 0.69314718, h_t * 0.69314718

    if objective == FORWARD:
        e, other, z, is_top, sign = e_t, e_s, z_t, t == max_t[:, None], -inverse_temperature
    else:
        e, other, z, is_top, sign = e_s, e_t, z_s, s == max_s[:, None], inverse_temperature
    comparable = tl.abs(difference) < _INFINITY
    own = tl.max(tl.where(is_top & comparable, difference, -_INFINITY), 1)
    mean = tl.sum(tl.where(comparable, e * difference, 0.0), 1) / tl.where(z == 0, 1.0, z)
    centre = _centre(z, own, mean)

    y = (difference - centre[:, None]) * sign
    other = other * exponential((base_t - base_s - centre) * sign)[:, None]  # on the footing of e e^y
    if objective == JENSEN_SHANNON:
        linear = tl.zeros_like(z)
        above = tl.sum(_excess(e, other, y), 1)
    else:
        linear, above = _sum2(_times(e, y), _above_linear(e, other, y))
    return max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above


@triton.jit
def _product(a, b):
    """a b, where a zero on either side wins."""
    return tl.where((a == 0) | (b == 0), 0.0, a * b)


@triton.jit
def _moved(maximum, z, h, to, inverse_temperature):
    """z and h of one side counted from another maximum, and the factor between."""
    shift = tl.where(maximum == -_INFINITY, 0.0, (maximum - to) * inverse_temperature)
    factor = exponential(shift)
    return factor, factor * z, factor * (h + z * tl.maximum(shift, -1e4))


@triton.jit
def _recentred(linear, above, z, factor, stretch, step, objective: tl.constexpr):
    """linear and above where every e becomes factor e and every y becomes y + step; stretch is factor e^step."""
    z_there, z = _product(z, stretch), _product(z, factor)
    linear_there, linear = _product(linear, stretch), _product(linear, factor)
    above = _product(above, stretch) + _excess(linear, linear_there, step)
    if objective == JENSEN_SHANNON:
        return linear, above + _excess(z, z_there, step)
    return linear + _times(z, step), above + _above_linear(z, z_there, step)


@triton.jit
def merged(
    max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above,
    max_s2, max_t2, own2, centre2, z_s2, z_t2, h_s2, h_t2, linear2, above2,
    inverse_temperature, objective: tl.constexpr,
):  # fmt: skip
    """Moments of the union of two disjoint sets. Not associative to the bit: callers fix the order."""
    new_s, new_t = tl.maximum(max_s, max_s2), tl.maximum(max_t, max_t2)
    if objective == FORWARD:
        top, top2, new, z, z2, sign = max_t, max_t2, new_t, z_t, z_t2, -inverse_temperature
    else:
        top, top2, new, z, z2, sign = max_s, max_s2, new_s, z_s, z_s2, inverse_temperature
    a_s, z_s, h_s = _moved(max_s, z_s, h_s, new_s, inverse_temperature)
    a_t, z_t, h_t = _moved(max_t, z_t, h_t, new_t, inverse_temperature)
    b_s, z_s2, h_s2 = _moved(max_s2, z_s2, h_s2, new_s, inverse_temperature)
    b_t, z_t2, h_t2 = _moved(max_t2, z_t2, h_t2, new_t, inverse_temperature)
    if objective == FORWARD:
        a, b, there, there2 = a_t, b_t, z_t, z_t2
    else:
        a, b, there, there2 = a_s, b_s, z_s, z_s2

    own = tl.where(top >= top2, own, own2)
    total = there + there2
    mean = centre + (centre2 - centre) * (there2 / tl.where(total == 0, 1.0, total))
    new_centre = _centre(total, own, mean)
    step, step2 = (centre - new_centre) * sign, (centre2 - new_centre) * sign
    stretch = exponential((_base(top) - _base(new)) * inverse_temperature + step)
    stretch2 = exponential((_base(top2) - _base(new)) * inverse_temperature + step2)
    linear, above = _recentred(linear, above, z, a, stretch, step, objective)
    linear2, above2 = _recentred(linear2, above2, z2, b, stretch2, step2, objective)
    return (
        new_s, new_t, own, new_centre, z_s + z_s2, z_t + z_t2, h_s + h_s2, h_t + h_t2, linear + linear2, above + above2
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Between the walks: what a row's moments say, and what every entry needs to know of its row.


@triton.jit
def _log_one_plus(x):
    log, _ = _log_series(x)
    return tl.where(_is_small(x), log, tl.log(1.0 + x))


@triton.jit
def bounded_mean(mean):
    """An infinite mean (the teacher forbids what the student allows) is taken as the largest finite one: the forbidden
    entries' gradient is then +inf, never inf - inf."""
    return tl.where(mean > _LARGEST, _LARGEST, mean)


@triton.jit
def concluded(max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above, inverse_temperature,
              objective: tl.constexpr):  # fmt: skip
    """(R,) of a whole row: KL (0 for Jensen-Shannon), both entropies, log z_s, log z_t, and its `Row`:

    base_s, base_t    subtracted from the logits
    centre, offset    d = (t - s - centre)/τ - offset; the reverse KL needs d up to a constant only, and has offset 0
    scale_s, scale_t  1/z_s, 1/z_t
    reference, mean   of the scores, which are counted from reference; the mean is the second walk's for Jensen-Shannon
    """
    log_s, log_t = tl.log(z_s), tl.log(z_t)
    base_s, base_t = _base(max_s), _base(max_t)
    z = z_t if objective == FORWARD else z_s
    x = (linear + above) / z
    trusted = (x > -0.5) & (x < _TRUSTED)
    # log(Z_t / Z_s) of all entries, counted from centre
    apart = log_t - log_s + (base_t - base_s - centre) * inverse_temperature
    if objective == FORWARD:
        offset = tl.where(trusted, -_log_one_plus(x), apart)
    else:
        offset = tl.where(trusted, _log_one_plus(x), apart)
    reference = tl.zeros_like(z)
    mean = tl.zeros_like(z)
    divergence = tl.zeros_like(z)
    if objective != JENSEN_SHANNON:
        _, curvature = _log_series(x)
        eta = tl.where(trusted, tl.log(1.0 + x), -apart if objective == FORWARD else apart)
        divergence = tl.where(_is_small(x), above / z - curvature, eta - linear / z)
        divergence = tl.where(divergence < 0, 0.0, divergence)
    # A NaN row is NaN throughout, even if its own entry's share has underflowed: both sums have kept it.
    divergence = tl.where((z_s == z_s) & (z_t == z_t), divergence, float("nan"))
    if objective == REVERSE:
        offset = tl.zeros_like(z)
        mean = -linear / z
        mean = bounded_mean(mean)
        mean = tl.where(divergence == divergence, mean, divergence)
    else:
        offset = tl.where(divergence == divergence, offset, divergence)
    return (
        divergence, log_s - h_s / z_s, log_t - h_t / z_t, log_s, log_t,
        base_s, base_t, centre, offset, 1.0 / z_s, 1.0 / z_t, reference, mean,
    )  # fmt: skip


@triton.jit
def probabilities(s, t, difference, base_s, base_t, centre, offset, scale_s, scale_t, inverse_temperature):
    """p, q and d of (R, B) entries, from (R,) of `concluded`."""
    bits = inverse_temperature * 1.44269504
    p = tl.exp2((s - base_s[:, None]) * bits) * scale_s[:, None]
    q = tl.exp2((t - base_t[:, None]) * bits) * scale_t[:, None]
    return p, q, (difference - centre[:, None]) * inverse_temperature - offset[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Second walk of the Jensen-Shannon divergence, D = (1-β) KL(p‖m) + β KL(q‖m) with m = (1-β) p + β q, and the scores.
#
# Whichever of p and q is the larger, the other is its e^-|d|-fold: nothing overflows, and
#
#     KL term of p = p (y - log(1 + y)),  y = m/p - 1        and q alike.


@triton.jit
def _mixture(d, share_s, share_t):
    """m/larger, m/larger - 1, m/smaller - 1, and the larger one's share in m."""
    up = d >= 0
    larger = tl.where(up, share_t, share_s)
    smaller = tl.where(up, share_s, share_t)
    distance = tl.abs(d)
    ratio = exponential(-distance)
    fall = tl.where(distance < 1, _phi(-distance) - distance, ratio - 1.0)
    return larger + smaller * ratio, smaller * fall, -larger * fall * exponential(distance), larger


@triton.jit
def _score(d, share_s, share_t, objective: tl.constexpr):
    """-log(m/p), or -d for the reverse KL."""
    if objective == JENSEN_SHANNON:
        u_larger, y_larger, y_smaller, _ = _mixture(d, share_s, share_t)
        f, exponent, _ = _reduced(u_larger, y_larger)
        up = d >= 0
        direct = up & _is_small(y_smaller)
        log, _ = _log_series(tl.where(direct, y_smaller, f))
        return -tl.where(direct, log, log + (exponent + tl.where(up, d, 0.0)))
    return -d


@triton.jit
def top_score(own, centre, offset, share_s, share_t, inverse_temperature, objective: tl.constexpr):
    """(R,) the score of the student's most likely entry, from which the scores of a peaked row are counted."""
    score = _score((own - centre) * inverse_temperature - offset, share_s, share_t, objective)
    return tl.where(tl.abs(score) < _INFINITY, score, 0.0)


@triton.jit
def divergence_terms(p, q, d, reference, share_s, share_t):
    """(R,) sums over (R, B) entries: KL(p‖m), KL(q‖m), and the mean score counted from reference."""
    u_larger, y_larger, y_smaller, share = _mixture(d, share_s, share_t)
    up = d >= 0
    larger, smaller = tl.where(up, q, p), tl.where(up, p, q)
    f, exponent, is_series = _reduced(u_larger, y_larger)
    log_larger, curve_larger = _log_series(f)
    log_larger += exponent
    series_smaller, curve_smaller = _log_series(y_smaller)
    direct = _is_small(y_smaller)
    log_smaller = tl.where(direct, series_smaller, log_larger + tl.abs(d))
    of_larger = tl.where(larger == 0, 0.0, larger * tl.where(is_series, curve_larger, y_larger - log_larger))
    of_smaller = tl.where(
        y_smaller < 4,
        smaller * tl.where(direct, curve_smaller, y_smaller - log_smaller),
        share * (larger - smaller) - _times(smaller, log_smaller),
    )
    log_p = tl.where(up, log_smaller, log_larger)
    of_p, of_q = tl.where(up, of_smaller, of_larger), tl.where(up, of_larger, of_smaller)
    score = _times(p, -log_p - reference[:, None])
    of_student, of_teacher, score, _ = _sum4(of_p, of_q, score, tl.zeros_like(score))
    return of_student, of_teacher, score


@triton.jit
def clipped_terms(p, q, d, entry_clip):
    """(R,) sums over (R, B) entries of the clipped KL(q‖p), Σ min(q d, c): its value, Q, 1 - Q, and its value again.

    Q is the clipped mass. As Σ q = Σ p, p - q may be added to every entry: q φ(-d) then, and p - q + c of the clipped
    ones, which is the value to take where Q is small; where it is large, nothing of the plain sum cancels.
    """
    term = _times(q, d)
    clipped = term > entry_clip
    kept = tl.where(tl.abs(d) < 1, q * _phi(-d), p - q + term)
    return _sum4(
        tl.where(clipped, p - q + entry_clip, kept),
        tl.where(clipped, q, 0.0),
        tl.where(clipped, 0.0, q),
        tl.where(clipped, entry_clip, term),
    )


@triton.jit
def clipped_gradient(p, q, d, scale, mean, mostly_clipped, entry_clip):
    """(R, B) weight · dD/ds: p (1 - Q), and of an entry that is not clipped -q. `mean` is Q or, where mostly, 1 - Q."""
    clipped = _times(q, d) > entry_clip
    share = p * mean[:, None]
    few = tl.where(clipped, p, -_excess(p, q, d)) - share
    most = tl.where(clipped, share, share - q)
    return tl.where(mostly_clipped[:, None], most, few) * scale[:, None]


@triton.jit
def kullback_leibler(p, q, d, objective: tl.constexpr):
    """(R,) sums over (R, B) entries of a KL divergence, each with its linear part: q φ(-d), or p φ(d)."""
    if objective == FORWARD:
        return tl.sum(_above_linear(q, p, -d), 1)
    return tl.sum(_above_linear(p, q, d), 1)


@triton.jit
def value(of_student, of_teacher, score, share_s, share_t):
    """The Jensen-Shannon divergence and the mean score from the sums of `divergence_terms`."""
    divergence = share_s * of_student + share_t * of_teacher
    mean = tl.where(divergence == divergence, score, divergence)  # a NaN row is NaN throughout
    return tl.where(divergence < 0, 0.0, divergence), mean


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
def gradient_scale(weight, share_s, inverse_temperature, objective: tl.constexpr):
    """(R,) what multiplies a row's `gradient`."""
    scale = weight * inverse_temperature
    return scale * share_s if objective == JENSEN_SHANNON else scale


@triton.jit
def gradient(p, q, d, scale, reference, mean, share_s, share_t, objective: tl.constexpr):
    """(R, B) weight · dD/ds of entries."""
    if objective == FORWARD:
        return -_excess(p, q, d) * scale[:, None]
    score = (_score(d, share_s, share_t, objective) - reference[:, None]) - mean[:, None]
    return _times(p, score) * scale[:, None]
