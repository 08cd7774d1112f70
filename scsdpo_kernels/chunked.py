"""Schedule 1: matrix products per chunk of rows, the library's where it keeps fp32 sums, and one fused row kernel.

For each chunk of C rows whose weight is not 0, with two buffers of (C, V) that all chunks share:

    z_s = h_s W_sᵀ    z_t = h_t W_tᵀ    G = w ∂D/∂z_s over z_s (row kernel)    ∂h = G W_s    ∂W += Gᵀ h_s

Four products of 2 C V D operations. The logits are fp32 whatever the inputs' dtype, G has the dtype that the last two
products run in. Where student and teacher share an fp32 head, (h_t - h_s) Wᵀ is projected in place of z_t: the same
cost, and the divergence keeps its relative precision however close the teacher is.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import native
from .rows import Rows

# Both logit buffers together. A chunk never has fewer rows than MIN_ROWS, below which the products lose their speed;
# every chunk but the first reads and writes the head's gradient once more. On a GPU, 1024 rows of 151936 entries: not
# tuned on hardware.
BUFFER_BYTES = {"cpu": 448 * 2**20, "gpu": 1216 * 2**20}
MIN_ROWS = 256
# Which kernel takes the rows on a GPU, and what CUDA's is told: a cluster of blocks to a row or one that streams it.
# auto is CUDA's where this package was built with it, on NVIDIA GPUs from compute capability 8.0, else Triton's.
ROW_KERNELS = {"auto": "auto", "cuda": "auto", "cuda-cluster": "cluster", "cuda-streaming": "streaming", "triton": None}
ROW_KERNEL = os.environ.get("SCSDPO_ROW_KERNEL", "auto")
# Rows of a head at a time where it has to be copied into another dtype, or its gradient out of one.
SLAB_ROWS = 8192
# A buffer's rows start at multiples of so many logits, so that every vocabulary has aligned loads.
ALIGNMENT = 64


def divergence_rows(
    student: Tensor,  # (M, D) hidden states
    student_weight: Tensor,  # (V, D)
    teacher: Tensor,  # (M_t, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    rows: Rows,
    *,
    beta: float,
    temperature: float,
    importance_clip: float,
    teacher_is_difference: bool,  # which of shared fp32 heads are projected so
    score_dtype: torch.dtype,  # of G
    grad_hidden: Tensor | None,  # (N, D) out: its kept rows are written. None: not wanted
    grad_weight_dtype: torch.dtype | None,  # None: not wanted
) -> tuple[Tensor, Tensor | None]:  # (rows.scalars, K) fp32; (V, D)
    """Row scalars of the kept rows, and the gradients of Σ weight · importance ratio · divergence."""
    vocabulary, device = student_weight.shape[0], student.device
    row_divergence = row_kernel(device)
    chunks = list(_chunks(len(rows.weight), vocabulary, device))
    scalars = torch.empty(rows.scalars, len(rows.weight), dtype=torch.float32, device=device)
    head_gradient = _HeadGradient(student_weight, grad_weight_dtype, len(chunks))
    want_gradient = grad_hidden is not None or grad_weight_dtype is not None
    stacked = device.type != "cpu" and teacher_weight is student_weight and teacher.dtype == student.dtype

    longest = chunks[0].stop if chunks else 0
    stride = -(-vocabulary // ALIGNMENT) * ALIGNMENT
    buffers = _empty(2 * longest, stride, dtype=torch.float32, device=device)[:, :vocabulary]
    for chunk in chunks:
        student_chunk, teacher_chunk = student[rows.student[chunk]], teacher[rows.teacher[chunk]]
        if teacher_is_difference:
            teacher_chunk = teacher_chunk - student_chunk
        length = len(student_chunk)
        student_logits, teacher_logits = buffers[:length], buffers[length : 2 * length]
        if stacked:
            _project(torch.cat([student_chunk, teacher_chunk]), student_weight, buffers[: 2 * length])
        else:
            _project(student_chunk, student_weight, student_logits)
            _project(teacher_chunk, teacher_weight, teacher_logits)

        logit_gradient = _over(student_logits, score_dtype) if want_gradient else None
        scalars[:, chunk] = torch.stack(
            row_divergence(
                student_logits,
                teacher_logits,
                rows.weight[chunk],
                None if rows.target is None else rows.target[chunk],
                beta=beta,
                temperature=temperature,
                teacher_is_difference=teacher_is_difference,
                old_logp=None if rows.old_logp is None else rows.old_logp[chunk],
                importance_clip=importance_clip,
                gradient=logit_gradient,
            )[: len(scalars)]
        )
        if grad_hidden is not None:
            grad_hidden[rows.kept[chunk]] = _back_project(logit_gradient, student_weight).to(grad_hidden.dtype)
        if grad_weight_dtype is not None:
            head_gradient.add(logit_gradient, student_chunk)

    # The buffers and all views of them go before the head's gradient may need another copy.
    buffers = student_logits = teacher_logits = logit_gradient = None
    return scalars, None if grad_weight_dtype is None else head_gradient.result()


def row_kernel(device: torch.device, name: str | None = None) -> Callable:
    """The row kernel of a device, with the contract of csrc/row_divergence.h: `name`, or what ROW_KERNEL says."""
    name = name or ROW_KERNEL
    if name not in ROW_KERNELS:
        raise ValueError(f"SCSDPO_ROW_KERNEL: expected one of {', '.join(ROW_KERNELS)}, got {name!r}")
    if device.type == "cpu":
        return native.row_divergence
    why = native.why_not_cuda(device)
    if why and name.startswith("cuda"):
        raise ValueError(f"SCSDPO_ROW_KERNEL={name} cannot run: {why}")
    if why or name == "triton":
        from .row_divergence_triton import row_divergence

        return row_divergence
    return partial(native.row_divergence_cuda, row_schedule=ROW_KERNELS[name])


def _empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return native.empty(*shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of about equal length, as long as the buffers allow, the longest first."""
    budget = BUFFER_BYTES["cpu" if device.type == "cpu" else "gpu"]
    most = max(MIN_ROWS, budget // (2 * 4 * vocabulary))
    size = -(-rows // max(1, -(-rows // most))) or 1
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


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
    if hidden.dtype == weight.dtype and hidden.device.type != "cpu":
        product = torch.mm if hidden.dtype == torch.float32 else _mm_fp32
        product(hidden, weight.t(), out=logits)
    elif hidden.dtype == weight.dtype and weight.stride(1) == 1 and native.has_project(weight.dtype):
        native.project(hidden, weight, logits)
    else:
        hidden = hidden.float()
        for slab, weight_slab in _slabs(weight):
            torch.mm(hidden, weight_slab.t(), out=logits[:, slab])


# The accelerators' products of 16-bit numbers with an fp32 result.
_mm_fp32 = partial(torch.mm, out_dtype=torch.float32)
_addmm_fp32 = partial(torch.addmm, out_dtype=torch.float32)


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
        if dtype is not None and chunks == 0:
            self.sum = torch.zeros_like(weight, dtype=dtype)
        elif dtype is not None:
            accumulator = dtype if chunks == 1 else torch.float32
            self.sum = _empty(*weight.shape, dtype=accumulator, device=weight.device)

    def add(self, logit_gradient: Tensor, hidden: Tensor) -> None:
        hidden = hidden.to(logit_gradient.dtype)
        same = self.sum.dtype == logit_gradient.dtype
        beta = min(self.chunks, 1)
        self.chunks += 1
        if not same and hidden.device.type != "cpu":
            _addmm_fp32(self.sum, logit_gradient.t(), hidden, beta=beta, out=self.sum)
            return
        size = self.sum.shape[0] if same else SLAB_ROWS  # what is added in another dtype exists a slab at a time
        for start in range(0, self.sum.shape[0], size):
            slab = slice(start, start + size)
            if same:
                self.sum[slab].addmm_(logit_gradient[:, slab].t(), hidden, beta=beta)
            elif beta == 0:
                self.sum[slab] = torch.mm(logit_gradient[:, slab].t(), hidden)
            else:
                self.sum[slab] += torch.mm(logit_gradient[:, slab].t(), hidden)

    def result(self) -> Tensor:
        return self.sum.to(self.dtype)
