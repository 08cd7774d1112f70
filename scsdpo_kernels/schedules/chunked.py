"""The operators' schedule: matrix products per chunk of tokens, with fp32 sums, and one fused row kernel.

For each chunk of C tokens whose weight is not 0, with two buffers of (C, V) that all chunks share:

    z_s = h_s W_sᵀ    z_t = h_t W_tᵀ    G = w ∂D/∂z_s (row kernel)        and for a group of chunks, G being (R, V),
    ∂h = G W_s        ∂W += Gᵀ h_s

Four products of 2 N V D operations. The logits are fp32 whatever the inputs' dtype, G has the dtype that the last two
products run in. Where it is 16 bits wide and ∂W is wanted, G is kept for groups of R tokens, and ∂W is read and written
once a group: for R ≤ 2D that takes no more memory than the fp32 sum of ∂W over chunks that it replaces. Otherwise a
group is a chunk, and G lies over z_s. Where student and teacher share an fp32 head, (h_t - h_s) Wᵀ is projected in
place of z_t: the same cost, and the divergence keeps its relative precision however close the teacher is.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import Kernels, kernels_of
from ..kernels.contract import Logits, PerRow
from ..problem import Gradients, Side, entries_of
from . import products
from .plan import Plan
from .row_values import row_values
from .rows import Rows

# Both logit buffers together: on a GPU, 262 tokens of 151936 entries. A chunk never has fewer tokens than MIN_ROWS,
# below which the products lose their speed, unless SCSDPO_BUFFER_MIB says how many MiB the buffers may have.
BUFFER_BYTES = {"cpu": 448 * 2**20, "gpu": 304 * 2**20}
MIN_ROWS = 256
if os.environ.get("SCSDPO_BUFFER_MIB"):
    BUFFER_BYTES = dict.fromkeys(BUFFER_BYTES, int(os.environ["SCSDPO_BUFFER_MIB"]) * 2**20)
    MIN_ROWS = 1
# A buffer's rows start at multiples of so many logits, so that every vocabulary has aligned loads.
ALIGNMENT = 64
# Tokens of a group where there are several, if 2D is as many: with fewer, the sums of ∂W cost more than its products.
GROUP_ROWS = 2048


class Buffers(NamedTuple):
    logits: Tensor  # (sides · C, V) fp32: a chunk's student's, then its teacher's
    kept: Tensor | None  # (R, V) a group's gradient. None: it lies over the student's logits


def run(plan: Plan) -> tuple[Tensor, Gradients]:  # (scalars, K) fp32
    """Row scalars of the kept rows, their metrics, gradients of Σ weight · importance ratio · divergence + policy's."""
    head, rows = plan.student.head, plan.rows
    count, device = len(rows.given.weight), plan.student.hidden.device
    kernels = kernels_of(device)
    if rows.beta is not None:
        rows = rows._replace(beta=kernels.shares(plan.objective.kind, rows.beta))
    if head.logit_scale != 1.0:
        rows = rows._replace(given=_scaled(rows.given, head.logit_scale))
    on_cpu = products.on_cpu(plan.student.hidden)
    in_bf16 = head.weight.dtype == torch.bfloat16 and products.multiplies_bf16(plan.student.hidden)
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    most = _chunk_rows(plan.shard.longest, device)  # the same on every process
    keeps = plan.wanted.weight is not None and dtype.itemsize == 2
    groups = _split(slice(0, count), _group_rows(count, head.weight.shape[1]) if keeps else most)
    known = rows.given.scalars + len(entries_of(plan.metrics))
    scalars = torch.empty(known, count, dtype=torch.float32, device=device)
    later = keeps and len(groups) == 1 and head.main_grad is not None
    sums = products.head_sums(plan.whole_head, plan.wanted, plan.grad_hidden, len(groups), plan.shard.size, later)
    buffers = _buffers(plan, groups, most, dtype, later)
    for group in groups:
        chosen = rows.chunk(group)
        states = plan.student.hidden[group if rows.are_all else chosen.student]
        gradient, adapted = buffers.kept, []
        for chunk in _split(group, most):
            inside = slice(chunk.start - group.start, chunk.stop - group.start)
            some = rows.chunk(chunk)
            logits, own = _project(plan, states[inside], some, chunk, buffers.logits, kernels)
            adapted.append(own)
            if buffers.kept is None:
                gradient, inside = view_as(logits.student, dtype), slice(None)
            written = gradient[inside] if any(x is not None for x in sums) else None
            values = row_values(logits, some, plan.objective, plan.support, kernels, plan.shard, written, plan.metrics)
            scalars[:, chunk] = torch.stack(values[: len(scalars)])
        if written is not None:
            gradient = gradient[: len(states)]
            if dtype.itemsize == 2 and on_cpu:
                _behind(gradient).zero_()
            adapted = None if head.lora is None else torch.cat(adapted)
            products.add_gradients(gradient, states, adapted, head, chosen.kept, sums)

    buffers = logits = gradient = written = None  # result() may copy the head's gradient
    return scalars, Gradients(plan.grad_hidden, *(x if x is None else x.result() for x in sums[1:]))


def _scaled(given: PerRow, by: float) -> PerRow:
    """With gradients times a number."""
    if (policy := given.policy) is not None:
        policy = policy._replace(coefficient=policy.coefficient * by)
    return given._replace(weight=given.weight * by, policy=policy)


def _project(
    plan: Plan, states: Tensor, rows: Rows, chunk: slice, buffer: Tensor, kernels: Kernels
) -> tuple[Logits, Tensor | None]:  # and h Aᵀ (C, r) of the student's adapter
    """A chunk's logits of both sides, the teacher's of each slice of it with the head of its own."""
    head, length = plan.student.head, len(states)
    logits = Logits(buffer[:length], None, plan.difference, head.softcap or 0.0)
    taught = []
    for side, which in plan.teachers:
        inside = slice(max(which.start, chunk.start) - chunk.start, min(which.stop, chunk.stop) - chunk.start)
        if inside.start < inside.stop:
            taught.append((side, inside))
    at_once = len(taught) == 1 and not products.on_cpu(states) and _has_head_of(taught[0][0], plan)
    if not at_once:
        products.project(states, head.weight, logits.student)
    if taught:
        logits = logits._replace(teacher=buffer[length : 2 * length])
    for (hidden, teacher_head), inside in taught:
        out = logits.teacher if len(taught) == 1 else logits.teacher[inside]
        teacher_states = hidden[chunk if rows.are_all else rows.teacher[inside]]
        if plan.difference:
            teacher_states = teacher_states - states
            teacher_head = teacher_head._replace(bias=None)
        if at_once:
            products.project(torch.cat([states, teacher_states]), head.weight, buffer[: 2 * length])
        else:
            products.project(teacher_states, teacher_head.weight, out)
        products.apply_head(teacher_states, teacher_head, out, kernels)
    return logits, products.apply_head(states, head, logits.student, kernels)


def _has_head_of(teacher: Side, plan: Plan) -> bool:
    """Whether the student's weight is a teacher's, for hidden states of one dtype."""
    return teacher.head.weight is plan.student.head.weight and teacher.hidden.dtype == plan.student.hidden.dtype


def _buffers(plan: Plan, groups: list[slice], most: int, dtype: torch.dtype, keeps: bool) -> Buffers:
    vocabulary, device = plan.student.head.weight.shape[0], plan.student.hidden.device
    stride = max(1, -(-vocabulary // ALIGNMENT)) * ALIGNMENT
    group = max((x.stop - x.start for x in groups), default=0)
    chunk = min(group, most)
    sides = 2 if plan.teachers else 1
    logits = products.empty(sides * chunk, stride, dtype=torch.float32, device=device)[:, :vocabulary]
    kept = None
    if group > chunk or keeps:
        kept = products.empty(group, stride + ALIGNMENT, dtype=dtype, device=device)[:, :vocabulary]
    return Buffers(logits, kept)


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    budget = BUFFER_BYTES["cpu" if device.type == "cpu" else "gpu"]
    return max(MIN_ROWS, budget // (2 * 4 * vocabulary))


def _group_rows(rows: int, width: int) -> int:
    most = 2 * width  # no more bytes than an fp32 sum of ∂W has
    return most if rows <= most else min(most, max(width, GROUP_ROWS))


def _split(rows: slice, most: int) -> list[slice]:
    """Slices of about equal length, the longest first."""
    count = rows.stop - rows.start
    size = -(-count // max(1, -(-count // most))) or 1
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def view_as(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A (C, V) of `dtype` whose rows start where the rows of fp32 logits start."""
    return logits.view(dtype)[:, : logits.shape[1]]


def _behind(gradient: Tensor) -> Tensor:
    """What stands behind its rows in their buffer: oneDNN's bf16 matmul reads it, and multiplies it by 0."""
    vocabulary = gradient.shape[1]
    return gradient.as_strided((len(gradient), ALIGNMENT), gradient.stride(), gradient.storage_offset() + vocabulary)
