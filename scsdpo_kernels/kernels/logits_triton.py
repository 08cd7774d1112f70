"""Passes over logits in memory, in Triton, with the contracts of csrc/logits.h.

    head_logits      z = c tanh(s (x + b) / c), in place: what a head does to its product
    tail_gradient    G = factor e^((z - base)/τ): of entries whose objective knows them only by their sum

Both read and write each logit once: 8 bytes of an fp32 logit, and 4 + 2 with a bf16 gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Logits
from .elementary_triton import exponential, hyperbolic_tangent, softcap_slope

BLOCK, WARPS = 4096, 4


@triton.jit
def _block(logits, stride, vocabulary, BLOCK: tl.constexpr):
    """Addresses of a program's logits, their columns, and which of them exist."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return logits + tl.program_id(0).to(tl.int64) * stride + columns, columns, columns < vocabulary


@triton.jit
def head_logits_kernel(
    logits, logits_stride, vocabulary, bias, scale, softcap,
    has_bias: tl.constexpr, has_softcap: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, columns, inside = _block(logits, logits_stride, vocabulary, BLOCK)
    x = tl.load(at, inside, 0.0)
    if has_bias:
        x += tl.load(bias + columns, inside, 0.0)
    x *= scale
    if has_softcap:
        x = hyperbolic_tangent(x / softcap) * softcap
    tl.store(at, x, inside)


@triton.jit
def tail_gradient_kernel(
    logits, logits_stride, vocabulary, base, factor, gradient_out, gradient_stride,
    inverse_temperature, inverse_softcap, has_softcap: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    gradient_out += row * gradient_stride
    base, factor = tl.load(base + row), tl.load(factor + row)
    # One program a row, from its start to its end: a bf16 gradient that lies over the logits overwrites none unread.
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = tl.load(logits + columns, inside, float("-inf"))
        tl.debug_barrier()
        g = exponential((z - base) * inverse_temperature) * factor
        if has_softcap:
            g *= softcap_slope(z, inverse_softcap)
        g = tl.where(factor == 0, 0.0, g)  # the row may hold anything
        tl.store(gradient_out + columns, g.to(gradient_out.dtype.element_ty), inside)


def head_logits(logits: Tensor, bias: Tensor | None, scale: float, softcap: float) -> None:
    """As native.head_logits."""
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    rows, vocabulary = logits.shape
    head_logits_kernel[rows, triton.cdiv(vocabulary, BLOCK)](
        logits, logits.stride(0), vocabulary, bias, scale, softcap,
        has_bias=bias is not None, has_softcap=bool(softcap), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def tail_gradient(logits: Logits, base: Tensor, factor: Tensor, temperature: float, gradient: Tensor) -> None:
    """As native.tail_gradient."""
    assert base.dtype == factor.dtype == torch.float32 and base.is_contiguous() and factor.is_contiguous()
    student, softcap = logits.student, logits.softcap
    tail_gradient_kernel[(len(base),)](
        student, student.stride(0), student.shape[1], base, factor, gradient, gradient.stride(0),
        1.0 / temperature, 1.0 / softcap if softcap else 0.0,
        has_softcap=bool(softcap), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
