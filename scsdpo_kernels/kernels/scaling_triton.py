"""A gradient times the loss's own gradient, which is 1 where nobody scales the loss: then nothing is read but that."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS, PROGRAMS = 4096, 8, 1024


@triton.jit
def multiply_kernel(gradient, by, count, BLOCK: tl.constexpr):
    factor = tl.load(by).to(tl.float32)
    if factor != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            at = tl.full((), BLOCK, tl.int64) * block + tl.arange(0, BLOCK)
            inside = at < count
            product = tl.load(gradient + at, inside).to(tl.float32) * factor
            tl.store(gradient + at, product.to(gradient.dtype.element_ty), inside)


def multiply(gradient: Tensor, by: Tensor) -> Tensor:
    """gradient · by, in place.

    Args:
        gradient: contiguous, fp32, bf16 or fp16.
        by: () floating point, on the same device.
    """
    assert gradient.is_contiguous()
    count = gradient.numel()
    if count:
        programs = min(PROGRAMS, triton.cdiv(count, BLOCK))
        multiply_kernel[programs,](gradient, by, count, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True)
    return gradient
