"""Schedule 1: matrix products per chunk of rows, the library's where it keeps fp32 sums, and one fused row kernel.

For each chunk of C rows whose weight is not 0, with two buffers of (C, V) that all chunks share:

    z_s = h_s W_sᵀ    z_t = h_t W_tᵀ    G = w ∂D/∂z_s over z_s (row kernel)    ∂h = G W_s    ∂W += Gᵀ h_s

Four products of 2 C V D operations. The logits are fp32 whatever the inputs' dtype, G has the dtype that the last two
products run in. Where student and teacher share an fp32 head, (h_t - h_s) Wᵀ is projected in place of z_t: the same
cost, and the divergence keeps its relative precision however close the teacher is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import native

# Both logit buffers together. A chunk never has fewer rows than MIN_ROWS, below which the products lose their speed;
# every chunk but the first reads and writes the head's gradient once more.
BUFFER_BYTES = 448 * 2**20
MIN_ROWS = 256
# Rows of a head at a time where it has to be copied into another dtype, or its gradient out of one.
SLAB_ROWS = 8192


def linear_divergence(
    student_hidden: Tensor,  # (..., D)
    student_weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (..., D_t)
    teacher_weight: Tensor | None,  # (V, D_t)
    token_weight: Tensor,  # (...,)
    target_ids: Tensor | None,  # (...,)
    *,
    beta: float,
    temperature: float,
    grad_hidden_dtype: torch.dtype | None,  # None: not wanted
    grad_weight_dtype: torch.dtype | None,
):
    """The operator's outputs, in its order."""
    vocabulary = student_weight.shape[0]
    shared = teacher_weight is None or _same_storage(teacher_weight, student_weight)
    teacher_weight = student_weight if shared else teacher_weight

    kept = torch.nonzero(token_weight, as_tuple=True)
    fields = 3 if target_ids is None else 5
    scalars = [_zeros(token_weight, torch.float32) for _ in range(fields)]
    grad_hidden = _zeros(student_hidden, grad_hidden_dtype)
    chunks = list(_chunks(kept[0].numel(), vocabulary))
    head_gradient = _HeadGradient(student_weight, grad_weight_dtype, len(chunks))
    want_gradient = grad_hidden_dtype is not None or grad_weight_dtype is not None

    longest = chunks[0].stop if chunks else 0
    buffers = native.empty(2, longest, vocabulary, dtype=torch.float32)
    for chunk in chunks:
        rows = tuple(index[chunk] for index in kept)
        student, teacher = student_hidden[rows], teacher_hidden[rows]
        student_logits, teacher_logits = buffers[:, : len(student)].unbind()
        _project(student, student_weight, student_logits)
        if chunk.start == 0:
            teacher_is_difference = (
                shared
                and student_weight.dtype == teacher_hidden.dtype == torch.float32
                and _is_finite(student_weight, student_logits)
            )
        _project(teacher - student if teacher_is_difference else teacher, teacher_weight, teacher_logits)

        logit_gradient = _over(student_logits, _product_dtype(student_weight)) if want_gradient else None
        row_scalars = native.row_divergence(
            student_logits,
            teacher_logits,
            token_weight[rows].float(),
            None if target_ids is None else target_ids[rows].long(),
            beta=beta,
            temperature=temperature,
            teacher_is_difference=teacher_is_difference,
            gradient=logit_gradient,
        )
        for out, values in zip(scalars, row_scalars, strict=False):
            out[rows] = values
        if grad_hidden_dtype is not None:
            grad_hidden[rows] = _back_project(logit_gradient, student_weight).to(grad_hidden.dtype)
        if grad_weight_dtype is not None:
            head_gradient.add(logit_gradient, student)

    loss = (token_weight.double() * scalars[0].double()).sum().float()
    logps = scalars[3:] or [scalars[0].new_empty(0), scalars[0].new_empty(0)]
    # The buffers and all views of them go before the head's gradient may need another copy.
    buffers = student_logits = teacher_logits = logit_gradient = None
    return loss, *scalars[:3], *logps, grad_hidden, head_gradient.result()


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of about equal length, as long as the buffers allow, the longest first."""
    most = max(MIN_ROWS, BUFFER_BYTES // (2 * 4 * vocabulary))
    size = -(-rows // max(1, -(-rows // most))) or 1
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _zeros(like: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Zeros for a gradient of `like`, or where none is wanted an empty tensor."""
    if dtype is None:
        return like.new_empty(0, dtype=torch.float32)
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def _is_finite(weight: Tensor, logits: Tensor) -> bool:
    """Whether a head forbids no token by an infinite entry, which would meet a difference of 0: 0 · inf is no logit.

    Such an entry shows in the logits of every row, so one finite row saves a pass over the head.
    """
    return bool(torch.isfinite(logits[0]).all() or torch.isfinite(weight.sum()))


def _product_dtype(weight: Tensor) -> torch.dtype:
    """dtype of the products with a gradient of logits: bf16 heads' own, fp32 for the rest."""
    return torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32


def _over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A (C, V) of `dtype` whose rows start where the rows of fp32 logits start."""
    return logits.view(dtype)[:, : logits.shape[1]]


def _slabs(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head in fp32: itself, or slab by slab a copy."""
    size = weight.shape[0] if weight.dtype == torch.float32 else SLAB_ROWS
    for start in range(0, weight.shape[0], size):
        slab = slice(start, start + size)
        yield slab, weight[slab].float()


def _project(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """logits = hidden weightᵀ with fp32 sums, never rounded to the inputs' dtype."""
    if hidden.dtype == weight.dtype and weight.stride(1) == 1 and native.has_project(weight.dtype):
        return native.project(hidden, weight, logits)
    hidden = hidden.float()
    for slab, weight_slab in _slabs(weight):
        torch.mm(hidden, weight_slab.t(), out=logits[:, slab])


def _back_project(logit_gradient: Tensor, weight: Tensor) -> Tensor:
    """logit_gradient weight, (C, D)."""
    if weight.dtype == logit_gradient.dtype:
        return torch.mm(logit_gradient, weight)
    grad_hidden = logit_gradient.new_zeros(logit_gradient.shape[0], weight.shape[1])
    for slab, weight_slab in _slabs(weight):
        grad_hidden.addmm_(logit_gradient[:, slab], weight_slab)
    return grad_hidden


class _HeadGradient:
    """Σ over chunks of Gᵀ h. More than one chunk's are summed in fp32 and rounded at the end."""

    def __init__(self, weight: Tensor, dtype: torch.dtype | None, chunks: int):
        self.dtype = dtype
        self.chunks = 0
        if dtype is None or chunks == 0:
            self.sum = _zeros(weight, dtype)
        else:
            self.sum = native.empty(*weight.shape, dtype=dtype if chunks == 1 else torch.float32)

    def add(self, logit_gradient: Tensor, hidden: Tensor) -> None:
        hidden = hidden.to(logit_gradient.dtype)
        same = self.sum.dtype == logit_gradient.dtype
        size = self.sum.shape[0] if same else SLAB_ROWS  # what is added in another dtype exists a slab at a time
        for start in range(0, self.sum.shape[0], size):
            slab = slice(start, start + size)
            if same:
                self.sum[slab].addmm_(logit_gradient[:, slab].t(), hidden, beta=min(self.chunks, 1))
            elif self.chunks == 0:
                self.sum[slab] = torch.mm(logit_gradient[:, slab].t(), hidden)
            else:
                self.sum[slab] += torch.mm(logit_gradient[:, slab].t(), hidden)
        self.chunks += 1

    def result(self) -> Tensor:
        return self.sum if self.dtype is None else self.sum.to(self.dtype)
