"""The operators' schedule: products per chunk of rows, the library's where it keeps fp32 sums, and a fused row kernel.

For each chunk of C rows whose weight is not 0, with two buffers of (C, V) that all chunks share:

    z_s = h_s W_sᵀ    z_t = h_t W_tᵀ    G = w ∂D/∂z_s over z_s (row kernel)    ∂h = G W_s    ∂W += Gᵀ h_s

Four products of 2 C V D operations. The logits are fp32 whatever the inputs' dtype, G has the dtype that the last two
products run in. Where student and teacher share an fp32 head, (h_t - h_s) Wᵀ is projected in place of z_t: the same
cost, and the divergence keeps its relative precision however close the teacher is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels import kernels_of, native
from ..kernels.contract import Logits
from ..problem import Gradients
from . import products
from .plan import Plan
from .row_values import row_values

# Both logit buffers together. A chunk never has fewer rows than MIN_ROWS, below which the products lose their speed;
# every chunk but the first reads and writes the head's gradient once more. On a GPU, 1024 rows of 151936 entries: not
# tuned on hardware.
BUFFER_BYTES = {"cpu": 448 * 2**20, "gpu": 1216 * 2**20}
MIN_ROWS = 256
# A buffer's rows start at multiples of so many logits, so that every vocabulary has aligned loads.
ALIGNMENT = 64


def run(plan: Plan) -> tuple[Tensor, Gradients]:  # (plan.rows.scalars, K) fp32
    """Row scalars of the kept rows, and the gradients of Σ weight · importance ratio · divergence."""
    student, teacher, head = plan.student.hidden, None, plan.student.head
    if plan.teacher is not None:
        teacher, teacher_head = plan.teacher
    vocabulary, device = head.weight.shape[0], student.device
    kernels = kernels_of(device)
    chunks = list(_chunks(len(plan.rows.weight), plan.shard.longest, device))  # the same on every process
    scalars = torch.empty(plan.rows.scalars, len(plan.rows.weight), dtype=torch.float32, device=device)
    sums = products.head_sums(head, plan.wanted, plan.grad_hidden, len(chunks))
    want_gradient = any(x is not None for x in sums)
    fast = device.type != "cpu" or native.multiplies_bf16()
    gradient_dtype = torch.bfloat16 if head.weight.dtype == torch.bfloat16 and fast else torch.float32
    stacked = teacher is not None and device.type != "cpu" and teacher_head.weight is head.weight
    stacked = stacked and teacher.dtype == student.dtype

    longest = chunks[0].stop if chunks else 0
    stride = max(1, -(-vocabulary // ALIGNMENT)) * ALIGNMENT
    sides = 1 if teacher is None else 2
    buffers = products.empty(sides * longest, stride, dtype=torch.float32, device=device)[:, :vocabulary]
    for chunk in chunks:
        rows = plan.rows.chunk(chunk)
        student_chunk, teacher_chunk = student[rows.student], None
        length = len(student_chunk)
        logits = Logits(buffers[:length], None, plan.difference, head.softcap or 0.0)
        if teacher is not None:
            teacher_chunk = teacher[rows.teacher]
            logits = logits._replace(teacher=buffers[length : 2 * length])
            if plan.difference:
                teacher_chunk = teacher_chunk - student_chunk
        if stacked:
            products.project(torch.cat([student_chunk, teacher_chunk]), head.weight, buffers[: 2 * length])
        else:
            products.project(student_chunk, head.weight, logits.student)
            if teacher is not None:
                products.project(teacher_chunk, teacher_head.weight, logits.teacher)
        adapted = products.apply_head(student_chunk, head, logits.student, kernels)
        if teacher is not None:
            applied = teacher_head._replace(bias=None) if plan.difference else teacher_head
            products.apply_head(teacher_chunk, applied, logits.teacher, kernels)

        gradient = view_as(logits.student, gradient_dtype) if want_gradient else None
        rows = rows._replace(weight=rows.weight * head.logit_scale)
        values = row_values(logits, rows, plan.objective, plan.support, kernels, plan.shard, gradient)
        scalars[:, chunk] = torch.stack(values[: len(scalars)])
        if want_gradient:
            if gradient_dtype != torch.float32 and device.type == "cpu":
                _behind(logits.student, gradient_dtype).zero_()
            products.add_gradients(gradient, student_chunk, adapted, head, rows.kept, sums)

    buffers = logits = gradient = None  # result() may copy the head's gradient
    return scalars, Gradients(plan.grad_hidden, *(x if x is None else x.result() for x in sums[1:]))


def _chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of about equal length, as long as the buffers allow, the longest first."""
    budget = BUFFER_BYTES["cpu" if device.type == "cpu" else "gpu"]
    most = max(MIN_ROWS, budget // (2 * 4 * vocabulary))
    size = -(-rows // max(1, -(-rows // most))) or 1
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def view_as(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A (C, V) of `dtype` whose rows start where the rows of fp32 logits start."""
    return logits.view(dtype)[:, : logits.shape[1]]


def _behind(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands behind the rows of `view_as`: oneDNN's bf16 matmul reads it, and multiplies it by 0."""
    vocabulary = logits.shape[1]
    return logits.view(dtype)[:, vocabulary : vocabulary + ALIGNMENT]
