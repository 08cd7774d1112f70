"""Schedule 1: matrix products per chunk of rows, the library's where it keeps fp32 sums, and one fused row kernel.

For each chunk of C rows whose weight is not 0, with two buffers of (C, V) that all chunks share:

    z_s = h_s W_sᵀ    z_t = h_t W_tᵀ    G = w ∂D/∂z_s over z_s (row kernel)    ∂h = G W_s    ∂W += Gᵀ h_s

Four products of 2 C V D operations. The logits are fp32 whatever the inputs' dtype, G has the dtype that the last two
products run in. Where student and teacher share an fp32 head, (h_t - h_s) Wᵀ is projected in place of z_t: the same
cost, and the divergence keeps its relative precision however close the teacher is.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from . import native
from .arguments import Head, Numbers
from .kernels import Kernels, kernels_of
from .rows import Rows
from .shards import Shard, divergence_on_part
from .support import divergence_on_support

# Both logit buffers together. A chunk never has fewer rows than MIN_ROWS, below which the products lose their speed;
# every chunk but the first reads and writes the head's gradient once more. On a GPU, 1024 rows of 151936 entries: not
# tuned on hardware.
BUFFER_BYTES = {"cpu": 448 * 2**20, "gpu": 1216 * 2**20}
MIN_ROWS = 256
# Rows of a head at a time where it has to be copied into another dtype, or its gradient out of one.
SLAB_ROWS = 8192
# A buffer's rows start at multiples of so many logits, so that every vocabulary has aligned loads.
ALIGNMENT = 64


def divergence_rows(
    student: Tensor,  # (M, D) hidden states
    student_head: Head,
    teacher: Tensor | None,  # (M_t, D_t); None: rows.support_logp
    teacher_head: Head,
    rows: Rows,
    numbers: Numbers,
    *,
    shard: Shard,  # the part of the vocabulary that these heads have
    teacher_is_difference: bool,  # which of shared fp32 heads are projected so
    grad_hidden: Tensor | None,  # (N, D) out: its kept rows are written. None: not wanted
    grad_head: tuple[torch.dtype | None, ...],  # of the head's weight, bias, A and B. None: not wanted
) -> tuple[Tensor, list[Tensor | None]]:  # (rows.scalars, K) fp32; gradients of weight, bias, A, B
    """Row scalars of the kept rows, and the gradients of Σ weight · importance ratio · divergence."""
    vocabulary, device = student_head.weight.shape[0], student.device
    kernels = kernels_of(device)
    chunks = list(_chunks(len(rows.weight), shard.longest, device))  # the same on every process
    scalars = torch.empty(rows.scalars, len(rows.weight), dtype=torch.float32, device=device)
    sums = _head_sums(student_head, grad_head, len(chunks))
    want_gradient = grad_hidden is not None or any(grad_head)
    fast = device.type != "cpu" or native.multiplies_bf16()
    gradient_dtype = torch.bfloat16 if student_head.weight.dtype == torch.bfloat16 and fast else torch.float32
    sides = 1 if teacher is None else 2
    stacked = sides == 2 and device.type != "cpu" and teacher_head.weight is student_head.weight
    stacked = stacked and teacher.dtype == student.dtype

    longest = chunks[0].stop if chunks else 0
    stride = max(1, -(-vocabulary // ALIGNMENT)) * ALIGNMENT
    buffers = _empty(sides * longest, stride, dtype=torch.float32, device=device)[:, :vocabulary]
    for chunk in chunks:
        of_chunk = rows.chunk(chunk)
        student_chunk, teacher_chunk = student[of_chunk.student], None
        length = len(student_chunk)
        student_logits, teacher_logits = buffers[:length], None
        if teacher is not None:
            teacher_chunk, teacher_logits = teacher[of_chunk.teacher], buffers[length : 2 * length]
            if teacher_is_difference:
                teacher_chunk = teacher_chunk - student_chunk
        if stacked:
            _project(torch.cat([student_chunk, teacher_chunk]), student_head.weight, buffers[: 2 * length])
        else:
            _project(student_chunk, student_head.weight, student_logits)
            if teacher is not None:
                _project(teacher_chunk, teacher_head.weight, teacher_logits)
        adapted = _finish(student_chunk, student_head, student_logits, kernels)
        if teacher is not None:
            head = teacher_head._replace(bias=None) if teacher_is_difference else teacher_head
            _finish(teacher_chunk, head, teacher_logits, kernels)

        logit_gradient = _over(student_logits, gradient_dtype) if want_gradient else None
        of_chunk = of_chunk._replace(weight=of_chunk.weight * student_head.logit_scale)
        values = _row_values(
            student_logits, teacher_logits, of_chunk, numbers, kernels, shard, teacher_is_difference, logit_gradient
        )
        scalars[:, chunk] = torch.stack(values[: len(scalars)])
        if want_gradient:
            _gradients(logit_gradient, student_chunk, adapted, student_head, of_chunk.kept, grad_hidden, sums)

    # The buffers and all views of them go before the head's gradient may need another copy.
    buffers = student_logits = teacher_logits = logit_gradient = None
    return scalars, [x if x is None else x.result() for x in sums]


def _row_values(
    student, teacher, rows: Rows, numbers: Numbers, kernels: Kernels, shard: Shard, teacher_is_difference, gradient
):
    """Row scalars of a chunk of logits, over the whole vocabulary, of which a part may be here, or on a support."""
    several = {"teacher_is_difference": teacher_is_difference, "gradient": gradient}
    if numbers.top_k or numbers.sampled_token or rows.support_ids is not None:
        return divergence_on_support(student, teacher, rows, numbers, kernels, shard, **several)
    if shard.group is not None:
        return divergence_on_part(student, teacher, rows, numbers, kernels, shard, **several)
    return kernels.row_divergence(
        student,
        teacher,
        rows.weight,
        rows.target,
        beta=numbers.beta,
        temperature=numbers.temperature,
        teacher_is_difference=teacher_is_difference,
        old_logp=rows.old_logp,
        importance_clip=numbers.importance_clip,
        entry_clip=numbers.entry_clip,
        student_softcap=numbers.student_softcap,
        gradient=gradient,
    )


def _finish(hidden: Tensor, head: Head, logits: Tensor, kernels: Kernels) -> Tensor | None:
    """What a head does beside its product, in place. Returns h Aᵀ (C, r) in fp32, if the head has an adapter."""
    adapted = None
    if head.lora_a is not None:
        adapted = torch.empty(len(hidden), len(head.lora_a), dtype=torch.float32, device=hidden.device)
        _project(hidden, head.lora_a, adapted)
        if hidden.device.type == "cpu":
            native.matmul(adapted * head.lora_scale, head.lora_b.t(), logits, add=True)
        else:
            for slab, lora_b in _slabs(head.lora_b):
                logits[:, slab].addmm_(adapted, lora_b.t(), alpha=head.lora_scale)
    if head.bias is not None or head.logit_scale != 1.0 or head.softcap:
        bias = None if head.bias is None else head.bias.float().contiguous()
        kernels.head_logits(logits, bias, scale=head.logit_scale, softcap=head.softcap)
    return adapted


def _gradients(logit_gradient, hidden, adapted, head: Head, kept, grad_hidden, sums) -> None:
    """A chunk's gradients of its hidden states, into grad_hidden[kept], and of the head, into `sums`."""
    weight_sum, bias_sum, lora_a_sum, lora_b_sum = sums
    grad_adapted = None
    if head.lora_a is not None and (grad_hidden is not None or lora_a_sum is not None):
        grad_adapted = _back_project(logit_gradient, head.lora_b.to(logit_gradient.dtype)).float() * head.lora_scale
    if grad_hidden is not None:
        of_chunk = _back_project(logit_gradient, head.weight)
        if grad_adapted is not None:
            of_chunk = of_chunk.float().addmm_(grad_adapted, head.lora_a.float())
        grad_hidden[kept] = of_chunk.to(grad_hidden.dtype)
    if weight_sum is not None:
        weight_sum.add(logit_gradient, hidden)
    if bias_sum is not None:
        bias_sum.add(logit_gradient)
    if lora_a_sum is not None:
        lora_a_sum.add(grad_adapted, hidden)
    if lora_b_sum is not None:
        lora_b_sum.add(logit_gradient, adapted * head.lora_scale)


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
    for start in range(0, weight.shape[0], max(1, size)):
        slab = slice(start, start + size)
        yield slab, weight[slab].float()


def _project(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """logits = hidden weightᵀ with fp32 sums, never rounded to the inputs' dtype."""
    if len(weight) == 0:  # a process without a part of the vocabulary
        return
    if hidden.device.type == "cpu":
        native.matmul(hidden, weight.t(), logits)
    elif hidden.dtype == weight.dtype:
        product = torch.mm if hidden.dtype == torch.float32 else _mm_fp32
        product(hidden, weight.t(), out=logits)
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
    if logit_gradient.device.type == "cpu":
        grad_hidden = logit_gradient.new_empty(logit_gradient.shape[0], weight.shape[1])
        native.matmul(logit_gradient, weight, grad_hidden)
        return grad_hidden
    grad_hidden = logit_gradient.new_zeros(logit_gradient.shape[0], weight.shape[1])
    for slab, weight_slab in _slabs(weight):
        grad_hidden.addmm_(logit_gradient[:, slab], weight_slab)
    return grad_hidden


def _head_sums(head: Head, dtypes: tuple[torch.dtype | None, ...], chunks: int) -> list:
    """Sums over chunks of the gradients of weight, bias, A and B; None where none is wanted."""
    kinds = _HeadGradient, _BiasGradient, _HeadGradient, _HeadGradient
    parts = zip(kinds, head[:4], dtypes, strict=True)
    return [None if dtype is None else kind(tensor, dtype, chunks) for kind, tensor, dtype in parts]


class _BiasGradient:
    """Σ over rows of G, in fp32, rounded at the end."""

    def __init__(self, bias: Tensor, dtype: torch.dtype, chunks: int):
        self.dtype = dtype
        self.sum = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)

    def add(self, logit_gradient: Tensor) -> None:
        for start in range(0, len(self.sum), SLAB_ROWS):  # a sum in fp32 copies what it sums
            slab = slice(start, start + SLAB_ROWS)
            self.sum[slab] += logit_gradient[:, slab].sum(0, dtype=torch.float32)

    def result(self) -> Tensor:
        return self.sum.to(self.dtype)


class _HeadGradient:
    """Σ over chunks of Gᵀ h. More than one chunk's are summed in fp32 and rounded at the end."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, chunks: int):
        self.dtype = dtype
        self.chunks = 0
        if chunks == 0:
            self.sum = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        else:
            accumulator = dtype if chunks == 1 and dtype != torch.float64 else torch.float32
            self.sum = _empty(*weight.shape, dtype=accumulator, device=weight.device)

    def add(self, logit_gradient: Tensor, hidden: Tensor) -> None:
        beta = min(self.chunks, 1)
        self.chunks += 1
        widened = hidden.device.type == "cpu" and hidden.dtype != logit_gradient.dtype == torch.float32
        if widened and self.sum.dtype == torch.float32:
            native.matmul(logit_gradient.t(), hidden, self.sum, add=beta > 0)
            return
        if not widened:
            hidden = hidden.to(logit_gradient.dtype)
        same = self.sum.dtype == logit_gradient.dtype
        if not same and hidden.device.type != "cpu" and hidden.dtype != torch.float32:
            _addmm_fp32(self.sum, logit_gradient.t(), hidden, beta=beta, out=self.sum)
            return
        size = self.sum.shape[0] if same else SLAB_ROWS  # what is added in another dtype exists a slab at a time
        for start in range(0, self.sum.shape[0], max(1, size)):
            slab = slice(start, start + size)
            transposed = logit_gradient[:, slab].t()
            if same:
                self.sum[slab].addmm_(transposed, hidden, beta=beta)
                continue
            product = logit_gradient.new_empty(len(transposed), hidden.shape[1])
            if widened:
                native.matmul(transposed, hidden, product)
            else:
                torch.mm(transposed, hidden, out=product)
            if beta == 0:
                self.sum[slab] = product
            else:
                self.sum[slab] += product

    def result(self) -> Tensor:
        return self.sum.to(self.dtype)
