"""Matrix products of a chunk of tokens with fp32 sums, and the sums over chunks of an LM head's gradients."""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import Kernels
from ..problem import Gradients, Head

# A head, or its gradient, is copied into another dtype so many rows at a time.
SLAB_ROWS = 8192
# The hidden gradient of a group is made in fp32 for so many tokens at a time.
HIDDEN_ROWS = 1024
# The fast kernels of GPU libraries take matrices whose sizes are multiples of this.
EVEN = 64
# A gradient with no more entries is summed in fp32, whatever its dtype.
SMALL = 2**24


def on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _native() -> ModuleType:
    """The compiled module's side, which a GPU does without: some builds have Triton's kernels only."""
    from ..kernels import native

    return native


def multiplies_bf16(tensor: Tensor) -> bool:
    """Whether there are fast products of bf16 numbers where the tensor is."""
    return not on_cpu(tensor) or _native().multiplies_bf16()


def cpu_matmul(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    _native().matmul(left, right, out, add=add)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return _native().empty(*shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def slabs(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head in fp32: itself, or slab by slab a copy."""
    size = weight.shape[0] if weight.dtype == torch.float32 else SLAB_ROWS
    for start in range(0, weight.shape[0], max(1, size)):
        slab = slice(start, start + size)
        yield slab, weight[slab].float()


def project(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """logits = hidden weightᵀ with fp32 sums, never rounded to the inputs' dtype."""
    if len(weight) == 0:  # a process without a part of the vocabulary
        return
    if on_cpu(hidden):
        cpu_matmul(hidden, weight.t(), logits)
    elif hidden.dtype == weight.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=logits)
    elif hidden.dtype == weight.dtype:
        for part in _parts(weight):
            mm_fp32(hidden, weight[part].t(), out=logits[:, part])
    else:
        hidden = hidden.float()
        for slab, weight_slab in slabs(weight):
            torch.mm(hidden, weight_slab.t(), out=logits[:, slab])


# Accelerators multiply 16-bit numbers to an fp32 result.
mm_fp32 = partial(torch.mm, out_dtype=torch.float32)
addmm_fp32 = partial(torch.addmm, out_dtype=torch.float32)


def _parts(weight: Tensor) -> list[slice]:
    """Rows of a head whose products are one call each.

    A GPU's library takes slow kernels for 16-bit operands of an odd size: two to six times the time at 50257 and 100278
    rows, nearly all of which a product of an even size takes.
    """
    rows = weight.shape[0]
    even = rows // EVEN * EVEN
    if even in (0, rows) or on_cpu(weight) or weight.dtype == torch.float32:
        return [slice(0, rows)]
    return [slice(0, even), slice(even, rows)]


def back_project(logit_gradient: Tensor, weight: Tensor) -> Tensor:
    """logit_gradient weight, (C, D). In fp32 on a GPU, whose library may sum up parts in the result's dtype."""
    if weight.dtype == logit_gradient.dtype:
        if on_cpu(weight) or weight.dtype == torch.float32:
            return torch.mm(logit_gradient, weight)
        first, *rest = _parts(weight)
        grad_hidden = mm_fp32(logit_gradient[:, first], weight[first])
        for part in rest:
            addmm_fp32(grad_hidden, logit_gradient[:, part], weight[part], out=grad_hidden)
        return grad_hidden
    if on_cpu(logit_gradient):
        grad_hidden = logit_gradient.new_empty(logit_gradient.shape[0], weight.shape[1])
        cpu_matmul(logit_gradient, weight, grad_hidden)
        return grad_hidden
    grad_hidden = logit_gradient.new_zeros(logit_gradient.shape[0], weight.shape[1])
    for slab, weight_slab in slabs(weight):
        grad_hidden.addmm_(logit_gradient[:, slab], weight_slab)
    return grad_hidden


def apply_head(hidden: Tensor, head: Head, logits: Tensor, kernels: Kernels) -> Tensor | None:
    """Adds what a head has beside its weight, in place. Returns h Aᵀ (C, r) in fp32, if the head has an adapter."""
    adapted = None
    if head.lora is not None:
        adapted = torch.empty(len(hidden), len(head.lora.a), dtype=torch.float32, device=hidden.device)
        project(hidden, head.lora.a, adapted)
        if on_cpu(hidden):
            cpu_matmul(adapted * head.lora.scale, head.lora.b.t(), logits, add=True)
        else:
            for slab, lora_b in slabs(head.lora.b):
                logits[:, slab].addmm_(adapted, lora_b.t(), alpha=head.lora.scale)
    if head.bias is not None or head.logit_scale != 1.0 or head.softcap:
        bias = None if head.bias is None else head.bias.float().contiguous()
        kernels.head_logits(logits, bias, head.logit_scale, head.softcap or 0.0)
    return adapted


def add_gradients(
    logit_gradient: Tensor,  # (R, V)
    hidden: Tensor,  # (R, D)
    adapted: Tensor | None,  # (R, r) from apply_head
    head: Head,
    kept: Tensor,  # (R,) where sums.hidden has these tokens
    sums: Gradients,  # from head_sums
) -> None:
    """Adds a group's gradients to those of its hidden states and of the head."""
    grad_adapted = None
    if head.lora is not None and (sums.hidden is not None or sums.lora_a is not None):
        grad_adapted = back_project(logit_gradient, head.lora.b.to(logit_gradient.dtype)).float() * head.lora.scale
    if sums.hidden is not None:
        for start in range(0, len(kept), HIDDEN_ROWS):
            some = slice(start, start + HIDDEN_ROWS)
            grad_hidden = back_project(logit_gradient[some], head.weight)
            if grad_adapted is not None:
                grad_hidden = grad_hidden.float().addmm_(grad_adapted[some], head.lora.a.float())
            sums.hidden[kept[some]] = grad_hidden.to(sums.hidden.dtype)
    if sums.weight is not None:
        sums.weight.add(logit_gradient, hidden)
    if sums.bias is not None:
        sums.bias.add(logit_gradient)
    if sums.lora_a is not None:
        sums.lora_a.add(grad_adapted, hidden)
    if sums.lora_b is not None:
        scaled = adapted * head.lora.scale
        if on_cpu(scaled):
            sums.lora_b.add(logit_gradient, scaled)
            return
        # Two parts, so that a product of 16-bit numbers keeps the 16 bits of them that count.
        upper = scaled.to(logit_gradient.dtype)
        sums.lora_b.add(logit_gradient, upper)
        if upper.dtype != scaled.dtype:
            sums.lora_b.add(logit_gradient, scaled - upper)


def head_sums(
    head: Head,  # as the caller has it
    wanted: Gradients,
    grad_hidden: Tensor | None,
    groups: int,
    vocabulary: int | None = None,  # its first rows, which alone count; None: all
    later: bool = False,  # one group's product for the weight is left to whoever takes the result
) -> Gradients:
    """Where gradients are summed over groups: grad_hidden, and a sum of each wanted dtype for a part of the head."""
    lora_a, lora_b = (None, None) if head.lora is None else head.lora[:2]

    def sum_of(kind: type, tensor: Tensor | None, dtype: torch.dtype | None, rows: int | None, terms: int = groups):
        return None if dtype is None else kind(tensor, dtype, terms, rows)

    return Gradients(
        hidden=grad_hidden,
        weight=LaterProduct() if later else sum_of(HeadGradient, head.weight, wanted.weight, vocabulary),
        bias=sum_of(BiasGradient, head.bias, wanted.bias, vocabulary),
        lora_a=sum_of(HeadGradient, lora_a, wanted.lora_a, None),
        lora_b=sum_of(HeadGradient, lora_b, wanted.lora_b, vocabulary, 2 * groups),
    )


class BiasGradient:
    """Σ over rows of G, in fp32, rounded at the end."""

    def __init__(self, bias: Tensor, dtype: torch.dtype, terms: int, rows: int | None):
        self.dtype = dtype
        self.whole = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        self.sum = self.whole[:rows]

    def add(self, logit_gradient: Tensor) -> None:
        for start in range(0, len(self.sum), SLAB_ROWS):  # a sum in fp32 copies what it sums
            slab = slice(start, start + SLAB_ROWS)
            self.sum[slab] += logit_gradient[:, slab].sum(0, dtype=torch.float32)

    def result(self) -> Tensor:
        return self.whole.to(self.dtype)


class HeadGradient:
    """Σ over groups of Gᵀ h. More than one group's are summed in fp32 and rounded at the end.

    Rows of `weight` beyond the first `rows` do not count: their gradient is 0, and lies behind the sum.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, terms: int, rows: int | None):
        self.dtype = dtype
        self.terms = 0
        if terms == 0:
            self.whole = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        else:
            # A GPU's library may add up parts of a sum in the result's dtype where the result has few tiles.
            alone = terms == 1 and dtype != torch.float64 and (on_cpu(weight) or weight.numel() > SMALL)
            self.whole = empty(*weight.shape, dtype=dtype if alone else torch.float32, device=weight.device)
        self.sum = self.whole[:rows]
        if rows is not None:
            self.whole[rows:] = 0

    def add(self, logit_gradient: Tensor, hidden: Tensor) -> None:
        beta = min(self.terms, 1)
        self.terms += 1
        # A CPU's library rounds a product of bf16 numbers to bf16.
        exact = self.dtype == torch.float32 and logit_gradient.dtype != torch.float32
        mixed = on_cpu(hidden) and (hidden.dtype != logit_gradient.dtype or exact)
        if not mixed:
            hidden = hidden.to(logit_gradient.dtype)
        if mixed and self.sum.dtype == torch.float32:
            cpu_matmul(logit_gradient.t(), hidden, self.sum, add=beta > 0)
        elif mixed:
            self._add_slabs(logit_gradient, hidden, beta, cpu_matmul, torch.float32)
        elif self.sum.dtype == logit_gradient.dtype:
            for part in _parts(logit_gradient.t()):
                self.sum[part].addmm_(logit_gradient[:, part].t(), hidden, beta=beta)
        elif not on_cpu(hidden) and logit_gradient.dtype != torch.float32:
            for part in _parts(logit_gradient.t()):
                total = self.sum[part]
                addmm_fp32(total, logit_gradient[:, part].t(), hidden, beta=beta, out=total)
        else:
            self._add_slabs(logit_gradient, hidden, beta, _mm, logit_gradient.dtype)

    def _add_slabs(
        self, logit_gradient: Tensor, hidden: Tensor, beta: int, matmul: Callable, dtype: torch.dtype
    ) -> None:
        """What is added in another dtype exists a slab at a time."""
        for start in range(0, self.sum.shape[0], SLAB_ROWS):
            slab = slice(start, start + SLAB_ROWS)
            product = torch.empty(len(self.sum[slab]), hidden.shape[1], dtype=dtype, device=hidden.device)
            matmul(logit_gradient[:, slab].t(), hidden, product)
            if beta == 0:
                self.sum[slab] = product
            else:
                self.sum[slab] += product

    def result(self) -> Tensor:
        return self.whole.to(self.dtype)


class Factors(NamedTuple):
    """What an LM head's gradient Gᵀ h is a product of."""

    logit_gradient: Tensor  # G, (N, V), 16 bits
    hidden: Tensor  # h, (N, D)


class LaterProduct:
    """The gradient of a head whose one group's factors wait for backward, which adds their product to `main_grad`.

    They take 2 N (V + D) bytes where an fp32 sum takes 4 V D: half of that for N = D tokens, and about as much for
    N = 2D, the most that a group has. The sum would stand beside G in the forward pass, too. In slabs, the product
    costs there what it costs here, and is scaled in fp32.
    """

    def add(self, logit_gradient: Tensor, hidden: Tensor) -> None:
        self.factors = Factors(logit_gradient, hidden.clone())  # the caller may change hidden states until then

    def result(self) -> Factors:
        return self.factors


def add_product(total: Tensor, factors: Factors, by: Tensor) -> None:
    """total += by · Gᵀ h, each entry of the product in fp32: a slab of it exists at a time."""
    for start in range(0, len(total), SLAB_ROWS):
        rows = total[start : start + SLAB_ROWS]
        product = HeadGradient(rows, torch.float32, 1, None)
        product.add(factors.logit_gradient[:, start : start + SLAB_ROWS], factors.hidden)
        rows.addcmul_(product.result(), by)


def _mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.mm(left, right, out=out)
