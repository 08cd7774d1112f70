"""What an LM head does to its product, in Triton: z = c tanh(s (x + b) / c), in place. csrc/logits.h has the contract.

Each logit is read and written once: 8 bytes of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary_triton import hyperbolic_tangent

BLOCK, WARPS = 4096, 4


@triton.jit
def head_logits_kernel(
    logits, logits_stride, vocabulary, bias, scale, softcap,
    has_bias: tl.constexpr, has_softcap: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = logits + tl.program_id(0).to(tl.int64) * logits_stride + columns, columns < vocabulary
    x = tl.load(at, inside, 0.0)
    if has_bias:
        x += tl.load(bias + columns, inside, 0.0)
    x *= scale
    if has_softcap:
        x = hyperbolic_tangent(x / softcap) * softcap
    tl.store(at, x, inside)


def head_logits(logits: Tensor, bias: Tensor | None, scale: float, softcap: float) -> None:
    """As native.head_logits."""
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    rows, vocabulary = logits.shape
    head_logits_kernel[rows, triton.cdiv(vocabulary, BLOCK)](
        logits, logits.stride(0), vocabulary, bias, scale, softcap,
        has_bias=bias is not None, has_softcap=bool(softcap), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
