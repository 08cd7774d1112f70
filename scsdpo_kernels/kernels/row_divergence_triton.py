"""The row kernel in Triton: one program takes one row of resident logits from moments to weighted gradient.

    pass     reads            writes
    1        s, t (8 bytes)                  moments, online: maxima, normalisers, entropies; KL at beta 0 and 1
    2        s, t (8 bytes)                  Jensen-Shannon: its terms and the mean score; clipped KL alike
    3        s, t (8 bytes)   G (2 or 4)     weight · ∂D/∂s

18 bytes of a pair of logits at beta 0 and 1, 26 between, with a bf16 gradient. Jensen-Shannon's two more reads cannot
go: its terms need both normalisers, its gradient needs the mean score, and a row of both sides fits no multiprocessor.
Programs share nothing: no atomics, the same bits from run to run. A row whose entries are spread over processes takes
the same walks in three launches, with what the processes tell each other in between (shards.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import KINDS, Objective
from .contract import Logits, PerRow, RowStatistics, Scalars
from .divergence_triton import (
    CLIPPED,
    JENSEN_SHANNON,
    REVERSE,
    bounded_mean,
    clipped_gradient,
    clipped_terms,
    concluded,
    divergence_terms,
    gradient,
    gradient_scale,
    importance_ratio,
    kullback_leibler,
    merged,
    moments,
    probabilities,
    softcap_slope,
    top_score,
    value,
)

# Entries of a row at a time, warps, and, in the passes that only read, stages of the loads' pipeline. 16 entries a
# thread; three programs of 33 KiB fit a multiprocessor's registers. Without a cap on these, ptxas spills to fit four.
# Not timed on hardware yet: SASS for sm_90 has 235 instructions an entry for Jensen-Shannon with a bf16 gradient, 99
# and 87 at beta 0 and 1, where copying the bytes above leaves an H200 room for about 180 and 124.
BLOCK, WARPS = 2048, 4
STAGES = tl.constexpr(3)


def options(device_type: str) -> dict[str, int | bool]:
    """Compiler options of the launch."""
    registers = {"maxnreg": 208} if device_type == "cuda" and torch.version.hip is None else {}
    return {"num_warps": WARPS, "enable_fp_fusion": True, **registers}


@triton.jit
def _entries(student, teacher, start, vocabulary, difference: tl.constexpr, BLOCK: tl.constexpr):
    """(1, BLOCK) of s, t, t - s and their columns; -inf beyond the vocabulary."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    inside = columns < vocabulary
    s = tl.load(student + columns, inside, float("-inf"))
    if difference:
        s, x = s.to(tl.float32), tl.load(teacher + columns, inside, 0.0).to(tl.float32)
        return s, s + x, x, columns, inside
    t = tl.load(teacher + columns, inside, float("-inf"))
    if student.dtype.element_ty == tl.float64:
        d = (t - s).to(tl.float32)
        s, t = s.to(tl.float32), t.to(tl.float32)
    else:
        s, t = s.to(tl.float32), t.to(tl.float32)
        d = t - s
    d = tl.where(tl.abs(d) < 1e30, d, d * float("inf"))  # a token forbidden by the lowest number, as by -inf
    return s, t, d, columns, inside


@triton.jit
def _row_moments(student, teacher, vocabulary, inverse_temperature, objective: tl.constexpr, difference: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Pass 1."""
    s, t, d, _, _ = _entries(student, teacher, 0, vocabulary, difference, BLOCK)
    m = moments(s, t, d, inverse_temperature, objective)
    max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above = m
    for start in tl.range(BLOCK, vocabulary, BLOCK, num_stages=STAGES):
        s, t, d, _, _ = _entries(student, teacher, start, vocabulary, difference, BLOCK)
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9 = moments(s, t, d, inverse_temperature, objective)
        max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above = merged(
            max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above,
            a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, inverse_temperature, objective,
        )  # fmt: skip
    return max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above


@triton.jit
def row_statistics_kernel(
    student, teacher, lse, others, student_stride, teacher_stride, rows, vocabulary, inverse_temperature,
    difference: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above = _row_moments(
        student, teacher, vocabulary, inverse_temperature, JENSEN_SHANNON, difference, BLOCK
    )
    (
        _, entropy_s, entropy_t, log_s, log_t, base_s, base_t, centre, offset, _, _, _, _,
    ) = concluded(
        max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above, inverse_temperature, JENSEN_SHANNON
    )  # fmt: skip
    lse_s = base_s.to(tl.float64) * inverse_temperature + log_s
    apart = centre.to(tl.float64) * inverse_temperature + offset  # keeps its digits, unless a side has nothing
    own_t = base_t.to(tl.float64) * inverse_temperature + log_t
    one = tl.arange(0, 1)
    tl.store(lse + row + one, lse_s)
    tl.store(lse + rows + row + one, tl.where(tl.abs(offset) < float("inf"), lse_s + apart, own_t))
    tl.store(others + row + one, max_s)
    tl.store(others + rows + row + one, centre)
    tl.store(others + 2 * rows + row + one, offset)
    tl.store(others + 3 * rows + row + one, entropy_s)
    tl.store(others + 4 * rows + row + one, entropy_t)


@triton.jit
def _known(student_lse, teacher_lse, centre, log_ratio, row, inverse_temperature, share_s, share_t,
           objective: tl.constexpr):  # fmt: skip
    """(1,) of a row whose statistics are known: base_s, base_t, centre, offset, scale_s, scale_t, reference."""
    one = row + tl.arange(0, 1)
    lse_s, lse_t = tl.load(student_lse + one), tl.load(teacher_lse + one)
    base_s = tl.where(tl.abs(lse_s) < float("inf"), lse_s / inverse_temperature, 0.0).to(tl.float32)
    base_t = tl.where(tl.abs(lse_t) < float("inf"), lse_t / inverse_temperature, 0.0).to(tl.float32)
    scale_s = tl.exp((base_s.to(tl.float64) * inverse_temperature - lse_s).to(tl.float32))
    scale_t = tl.exp((base_t.to(tl.float64) * inverse_temperature - lse_t).to(tl.float32))
    centre, offset = tl.load(centre + one), tl.load(log_ratio + one)
    reference = top_score(centre, centre, offset, share_s, share_t, inverse_temperature, objective)
    return base_s, base_t, centre, offset, scale_s, scale_t, reference


@triton.jit
def row_terms_kernel(
    student, teacher, student_lse, teacher_lse, centre, log_ratio, terms,
    student_stride, teacher_stride, rows, vocabulary, inverse_temperature, share_s, share_t, entry_clip,
    objective: tl.constexpr, difference: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    base_s, base_t, centre, offset, scale_s, scale_t, reference = _known(
        student_lse, teacher_lse, centre, log_ratio, row, inverse_temperature, share_s, share_t, objective
    )
    divergence, mean = tl.zeros_like(centre), tl.zeros_like(centre)
    unclipped, plain = tl.zeros_like(centre), tl.zeros_like(centre)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        s, t, d, _, _ = _entries(student, teacher, start, vocabulary, difference, BLOCK)
        p, q, d = probabilities(s, t, d, base_s, base_t, centre, offset, scale_s, scale_t, inverse_temperature)
        if objective == JENSEN_SHANNON:
            of_student, of_teacher, score = divergence_terms(p, q, d, reference, share_s, share_t)
            divergence += share_s * of_student + share_t * of_teacher
            mean += score
        elif objective == CLIPPED:
            value_sum, clipped_sum, unclipped_sum, plain_sum = clipped_terms(p, q, d, entry_clip)
            divergence += value_sum
            mean += clipped_sum
            unclipped += unclipped_sum
            plain += plain_sum
        else:
            divergence += kullback_leibler(p, q, d, objective)
    one = row + tl.arange(0, 1)
    tl.store(terms + one, divergence.to(tl.float64))
    tl.store(terms + rows + one, mean.to(tl.float64))
    tl.store(terms + 2 * rows + one, unclipped.to(tl.float64))
    tl.store(terms + 3 * rows + one, plain.to(tl.float64))


@triton.jit
def row_gradient_kernel(
    student, teacher, student_lse, teacher_lse, centre, log_ratio, terms, weight, divergence_out, gradient_out,
    student_stride, teacher_stride, gradient_stride, rows, vocabulary,
    inverse_temperature, share_s, share_t, entry_clip, inverse_softcap,
    objective: tl.constexpr, difference: tl.constexpr, has_gradient: tl.constexpr, has_softcap: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    base_s, base_t, centre, offset, scale_s, scale_t, reference = _known(
        student_lse, teacher_lse, centre, log_ratio, row, inverse_temperature, share_s, share_t, objective
    )
    one = row + tl.arange(0, 1)
    divergence, mean = tl.load(terms + one), tl.load(terms + rows + one)
    mostly_clipped = mean > 0.5
    if objective == CLIPPED:
        divergence = tl.where(mostly_clipped, tl.load(terms + 3 * rows + one), divergence)
        mean = tl.where(mostly_clipped, tl.load(terms + 2 * rows + one), mean)
    else:
        divergence = tl.where(divergence < 0, 0.0, divergence)
    if objective == REVERSE:  # its scores' mean is the divergence itself
        mean = divergence - reference
    mean = tl.where(divergence == divergence, mean, divergence).to(tl.float32)  # a NaN row is NaN throughout
    mean = bounded_mean(mean)
    tl.store(divergence_out + one, divergence.to(tl.float32))

    if has_gradient:
        gradient_out += row * gradient_stride
        scale = gradient_scale(tl.load(weight + one), share_s, inverse_temperature, objective)
        for start in range(0, vocabulary, BLOCK):
            s, t, d, columns, inside = _entries(student, teacher, start, vocabulary, difference, BLOCK)
            tl.debug_barrier()  # a bf16 block is written over logits that another warp reads in this round
            p, q, d = probabilities(s, t, d, base_s, base_t, centre, offset, scale_s, scale_t, inverse_temperature)
            if objective == CLIPPED:
                g = clipped_gradient(p, q, d, scale, mean, mostly_clipped, entry_clip)
            else:
                g = gradient(p, q, d, scale, reference, mean, share_s, share_t, objective)
            if has_softcap:
                g *= softcap_slope(s, inverse_softcap)
            g = tl.where(scale[:, None] == 0, 0.0, g)  # whatever the row holds
            tl.store(gradient_out + columns, g.to(gradient_out.dtype.element_ty), inside)


@triton.jit
def row_divergence_kernel(
    student, teacher, weight, target, old_logp, scalars, gradient_out,
    student_stride, teacher_stride, gradient_stride, rows, vocabulary,
    inverse_temperature, share_s, share_t, importance_clip, entry_clip, inverse_softcap,
    objective: tl.constexpr, difference: tl.constexpr, has_target: tl.constexpr, has_old_logp: tl.constexpr,
    has_gradient: tl.constexpr, has_softcap: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    first_walk: tl.constexpr = JENSEN_SHANNON if objective == CLIPPED else objective
    max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above = _row_moments(
        student, teacher, vocabulary, inverse_temperature, first_walk, difference, BLOCK
    )
    (
        divergence, entropy_s, entropy_t, log_s, log_t,
        base_s, base_t, centre, offset, scale_s, scale_t, reference, mean,
    ) = concluded(
        max_s, max_t, own, centre, z_s, z_t, h_s, h_t, linear, above, inverse_temperature, first_walk
    )  # fmt: skip

    if objective == JENSEN_SHANNON:
        reference = top_score(own, centre, offset, share_s, share_t, inverse_temperature, objective)
        of_student, of_teacher = tl.zeros_like(z_s), tl.zeros_like(z_s)
        for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            s, t, d, _, _ = _entries(student, teacher, start, vocabulary, difference, BLOCK)
            p, q, d = probabilities(s, t, d, base_s, base_t, centre, offset, scale_s, scale_t, inverse_temperature)
            student_sum, teacher_sum, score_sum = divergence_terms(p, q, d, reference, share_s, share_t)
            of_student += student_sum
            of_teacher += teacher_sum
            mean += score_sum
        divergence, mean = value(of_student, of_teacher, mean, share_s, share_t)
    if objective == CLIPPED:
        divergence, plain, unclipped = tl.zeros_like(z_s), tl.zeros_like(z_s), tl.zeros_like(z_s)
        for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            s, t, d, _, _ = _entries(student, teacher, start, vocabulary, difference, BLOCK)
            p, q, d = probabilities(s, t, d, base_s, base_t, centre, offset, scale_s, scale_t, inverse_temperature)
            value_sum, clipped_sum, unclipped_sum, plain_sum = clipped_terms(p, q, d, entry_clip)
            divergence += value_sum
            mean += clipped_sum
            unclipped += unclipped_sum
            plain += plain_sum
        mostly_clipped = mean > 0.5
        divergence = tl.where(mostly_clipped, plain, divergence)
        mean = tl.where(mostly_clipped, unclipped, mean)
        mean = tl.where(divergence == divergence, mean, divergence)  # a NaN row is NaN throughout

    one = tl.arange(0, 1)
    tl.store(scalars + row + one, divergence)
    tl.store(scalars + rows + row + one, entropy_s)
    tl.store(scalars + 2 * rows + row + one, entropy_t)
    if has_target:
        column = tl.load(target + row)
        exists = (column >= 0) & (column < vocabulary)  # any other id has no probability: NaN
        column = tl.where(exists, column, 0)
        target_s = tl.where(exists, tl.load(student + column + one).to(tl.float32), float("nan"))
        target_t = tl.where(exists, tl.load(teacher + column + one).to(tl.float32), float("nan"))
        if difference:
            target_t += target_s
        logp = (target_s - base_s) * inverse_temperature - log_s
        tl.store(scalars + 3 * rows + row + one, logp)
        tl.store(scalars + 4 * rows + row + one, (target_t - base_t) * inverse_temperature - log_t)

        if has_old_logp:
            ratio = importance_ratio(logp, tl.load(old_logp + row + one), importance_clip)
            tl.store(scalars + 5 * rows + row + one, ratio)

    if has_gradient:
        gradient_out += row * gradient_stride
        scale = gradient_scale(tl.load(weight + row + one), share_s, inverse_temperature, objective)
        if has_old_logp:
            scale *= ratio
        for start in range(0, vocabulary, BLOCK):
            s, t, d, columns, inside = _entries(student, teacher, start, vocabulary, difference, BLOCK)
            tl.debug_barrier()  # a bf16 block is written over logits that another warp reads in this round
            p, q, d = probabilities(s, t, d, base_s, base_t, centre, offset, scale_s, scale_t, inverse_temperature)
            if objective == CLIPPED:
                g = clipped_gradient(p, q, d, scale, mean, mostly_clipped, entry_clip)
            else:
                g = gradient(p, q, d, scale, reference, mean, share_s, share_t, objective)
            if has_softcap:
                g *= softcap_slope(s, inverse_softcap)
            g = tl.where(scale[:, None] == 0, 0.0, g)  # whatever the row holds
            tl.store(gradient_out + columns, g.to(gradient_out.dtype.element_ty), inside)


def row_divergence(logits: Logits, rows: PerRow, objective: Objective, gradient: Tensor | None = None) -> Scalars:
    """As native.row_divergence, on the tensors' device and its current stream; ids outside [0, V) give NaN."""
    student, (weight, target, old_logp, importance_clip) = logits.student, rows
    assert gradient is None or (gradient.shape == student.shape and gradient.stride(1) == 1)
    assert weight.dtype == torch.float32 and weight.is_contiguous()
    assert target is None or (target.dtype == torch.int64 and target.is_contiguous())
    assert old_logp is None or (target is not None and old_logp.dtype == torch.float32 and old_logp.is_contiguous())
    scalars = torch.empty(rows.scalars, len(weight), dtype=torch.float32, device=student.device)
    row_divergence_kernel[(len(weight),)](
        student, logits.teacher, weight, target, old_logp, scalars, gradient,
        student.stride(0), logits.teacher.stride(0), 0 if gradient is None else gradient.stride(0),
        *student.shape, 1.0 / objective.temperature, 1.0 - objective.beta, objective.beta, importance_clip,
        objective.entry_clip, 1.0 / logits.softcap if logits.softcap else 0.0,
        objective=KINDS.index(objective.kind), difference=logits.difference, has_target=target is not None,
        has_old_logp=old_logp is not None, has_gradient=gradient is not None, has_softcap=bool(logits.softcap),
        BLOCK=BLOCK, **options(student.device.type),
    )  # fmt: skip
    return Scalars(*scalars.unbind(), *[None] * (len(Scalars._fields) - len(scalars)))


def row_statistics(logits: Logits, temperature: float) -> RowStatistics:
    """As native.row_statistics."""
    student = logits.student
    lse = torch.empty(2, len(student), dtype=torch.float64, device=student.device)
    others = torch.empty(5, len(student), dtype=torch.float32, device=student.device)
    row_statistics_kernel[(len(student),)](
        student, logits.teacher, lse, others, student.stride(0), logits.teacher.stride(0), *student.shape,
        1.0 / temperature, difference=logits.difference, BLOCK=BLOCK, **options(student.device.type),
    )  # fmt: skip
    return RowStatistics(*lse.unbind(), *others.unbind())


def row_terms(logits: Logits, objective: Objective, statistics: RowStatistics) -> Tensor:  # (4, C) float64
    """As native.row_terms."""
    student = logits.student
    terms = torch.empty(4, len(student), dtype=torch.float64, device=student.device)
    row_terms_kernel[(len(student),)](
        student, logits.teacher, statistics.student_lse, statistics.teacher_lse, statistics.centre,
        statistics.log_ratio, terms, student.stride(0), logits.teacher.stride(0), *student.shape,
        1.0 / objective.temperature, 1.0 - objective.beta, objective.beta, objective.entry_clip,
        objective=KINDS.index(objective.kind), difference=logits.difference, BLOCK=BLOCK,
        **options(student.device.type),
    )  # fmt: skip
    return terms


def row_gradient(
    logits: Logits,
    objective: Objective,
    statistics: RowStatistics,
    terms: Tensor,
    weight: Tensor,
    gradient: Tensor | None = None,
) -> Tensor:  # (C,) fp32
    """As native.row_gradient."""
    student = logits.student
    divergence = torch.empty(len(student), dtype=torch.float32, device=student.device)
    row_gradient_kernel[(len(student),)](
        student, logits.teacher, statistics.student_lse, statistics.teacher_lse, statistics.centre,
        statistics.log_ratio, terms, weight, divergence, gradient,
        student.stride(0), logits.teacher.stride(0), 0 if gradient is None else gradient.stride(0), *student.shape,
        1.0 / objective.temperature, 1.0 - objective.beta, objective.beta, objective.entry_clip,
        1.0 / logits.softcap if logits.softcap else 0.0,
        objective=KINDS.index(objective.kind), difference=logits.difference, has_gradient=gradient is not None,
        has_softcap=bool(logits.softcap), BLOCK=BLOCK, **options(student.device.type),
    )  # fmt: skip
    return divergence
