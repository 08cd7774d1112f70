"""Functions of one number, in Triton, to the accuracy that each says."""

import os

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

LOG2_E, LN_2 = tl.constexpr(1.44269504), tl.constexpr(0.69314718)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def phi(x):
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
    return tl.exp2(x * LOG2_E)


@triton.jit
def log2(x):
    """The hardware's log2(x), to 3e-7 absolute about 1."""
    if is_cuda() and not _INTERPRETED:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def reciprocal(x):
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
    e = tl.where(y > -1, y + phi(y), exponential(y) - 1.0)
    z = e / (e + 2.0)
    return tl.where(x > 0, -z, z)


@triton.jit
def log_series(x):
    """(log(1 + x), x - log(1 + x)) for -0.3 ≤ x ≤ 0.45, both to 6e-7 relative: log(1 + x) = 2 artanh(x/(2 + x))."""
    z = x * reciprocal(x + 2.0)
    w = z * z
    series = w * ((w * 0.14790256 + 0.19994383) * w + 0.33333343)
    return 2.0 * z * (series + 1.0), z * x - 2.0 * z * series


@triton.jit
def is_small(x):
    return (x >= -0.3) & (x <= 0.45)


@triton.jit
def log_one_plus(u, x):
    """log(u), to 6e-7 relative, where u is 1 + x rounded, and x still has the digits that u lost."""
    z = x * reciprocal(x * 0.5 + 1.0)  # log(1 + x) = 2 artanh(z / 2)
    w = z * z
    series = w * ((w * 2.3109775e-3 + 1.2496489e-2) * w + 8.3333358e-2)
    return tl.where(tl.abs(x) < 0.29, z * series + z, log2(u) * LN_2)


@triton.jit
def below_linear(u, x):
    """x - log(u), alike: nothing cancels where x is small."""
    z = x * reciprocal(x * 0.5 + 1.0)
    w = z * z
    series = w * ((w * 2.3109775e-3 + 1.2496489e-2) * w + 8.3333358e-2)
    return tl.where(tl.abs(x) < 0.29, z * (x * 0.5 - series), x - log2(u) * LN_2)


@triton.jit
def polynomial(c, x):
    y = x * c[7] + c[6]
    for i in tl.static_range(6):
        y = y * x + c[5 - i]
    return y


@triton.jit
def times(p, x):
    """p x, where p = 0 wins over an infinite x."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def product(a, b):
    """a b, where a zero on either side wins."""
    return tl.where((a == 0) | (b == 0), 0.0, a * b)


@triton.jit
def excess(p, q, x):
    """p e^x - p, given q = p e^x: exact to rounding for small x, without overflow for large ones."""
    return tl.where(tl.abs(x) < 1, p * (x + phi(x)), q - p)


@triton.jit
def summed_excess(p, q, x):
    """As `_excess`, for sums: to 1e-6 of p |x|, with half as many instructions."""
    r = x * 8.3488478e-3 + 4.1775295e-2
    r = r * x + 1.6666642e-1
    r = r * x + 4.9999830e-1
    r = r * x + 1.0
    return tl.where(tl.abs(x) < 0.25, p * x * r, q - p)


@triton.jit
def above_linear(p, q, x):
    """p (e^x - 1 - x), given q = p e^x."""
    return tl.where(tl.abs(x) < 1, p * phi(x), q - p - times(p, x))


@triton.jit
def softcap_slope(z, inverse_softcap):
    """d (c tanh(x / c)) / dx = 1 - (z / c)² of a logit z = c tanh(x / c)."""
    x = z * inverse_softcap
    return tl.maximum(1.0 - x * x, 0.0)
