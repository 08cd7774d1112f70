"""The row kernel in Triton: one program takes one row of resident logits from moments to weighted gradient.

    pass     reads            writes
    1        s, t (8 bytes)                  moments, online: maxima, normalisers, entropies; KL at beta 0 and 1
    2        s, t (8 bytes)                  Jensen-Shannon: its terms and the mean score; clipped KL alike
    3        s, t (8 bytes)   G (2 or 4)     weight · ∂D/∂s

18 bytes of a pair of logits at beta 0 and 1, 26 between, with a bf16 gradient. Jensen-Shannon's two more reads cannot
go: its terms need both normalisers, its gradient needs the mean score, and a row of both sides fits no multiprocessor.
Programs share nothing: no atomics, the same bits from run to run. A row whose entries are spread over processes takes
the same walks in three launches, with what the processes tell each other in between (shards.py).

A walk is a loop over whole blocks, whose accesses need no mask and so are 16 bytes wide whatever the vocabulary, and
one over the rest. A program's lanes keep sums of their own: what crosses them, does so once a walk.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import KINDS, Objective
from .contract import Logits, PerRow, RowStatistics, Scalars
from .divergence_triton import (
    CLIPPED,
    FORWARD,
    JENSEN_SHANNON,
    REVERSE,
    Entries,
    Mixture,
    Moments,
    Row,
    Terms,
    added_terms,
    base,
    bounded_mean,
    concluded,
    extended,
    finished_terms,
    first_moments,
    gradient_scale,
    importance_ratio,
    largest,
    logit_gradient,
    merged_lanes,
    mixture,
    no_terms,
    row_of_lse,
    softcap_slope,
    sum_lanes_of_terms,
    with_mean,
    with_reference,
)

# Entries of a row at a time, warps, and, in the passes that only read, stages of the loads' pipeline.
#
# On an H200 a launch that fills it takes little more than the bytes above do (benchmarks/results/row_kernels-*.json).
# What is counted here are instructions of sm_90's SASS in the loops over whole blocks, divided by the entries that a
# thread takes in a round (tests/compile_triton.py). Jensen-Shannon with a bf16 gradient has 139 to 144 an entry, of
# which 32 to 35, 63 and 44 are in its three walks. 11 of them are 2^x, 1/x and log2, which issue at an eighth of the
# rate. There are 75 and 64 at beta 0 and 1, and 108 with clipped entries; copying the bytes above leaves an H200 room
# for about 180 and 124. Registers leave room for four programs on a multiprocessor of sm_90 where the vocabulary is a
# multiple of 16, and for three else; for two on sm_80. Caps that would fit more make some kernels spill.
BLOCK, WARPS = 2048, 4
STAGES = tl.constexpr(3)
# Lanes of a program, one a thread, and how many neighbouring entries a lane takes with one access.
MAX_LANES, PACK = tl.constexpr(128), tl.constexpr(4)


def options(device_type: str) -> dict[str, int | bool]:
    """Compiler options of the launch."""
    if device_type == "hip" or torch.version.hip is not None:
        return {"num_warps": WARPS // 2, "enable_fp_fusion": True}  # of 64 lanes
    registers = {"maxnreg": 208} if device_type == "cuda" else {}
    return {"num_warps": WARPS, "enable_fp_fusion": True, **registers}


class Pair(NamedTuple):
    """One row of both sides."""

    student: tl.tensor  # pointers to the first logit
    teacher: tl.tensor  # its logits, or teacher - student
    vocabulary: tl.tensor


@triton.jit
def _pair(student, teacher, row, student_stride, teacher_stride, vocabulary):
    return Pair(student + row * student_stride, teacher + row * teacher_stride, vocabulary)


@triton.jit
def _columns(start, BLOCK: tl.constexpr):
    """start, start + 1, ... No thread shall take more than a pack of them at a time, whatever the gradient's dtype."""
    return tl.max_contiguous(start + tl.arange(0, BLOCK), PACK)


@triton.jit
def _load(pair: Pair, start, masked: tl.constexpr, objective: tl.constexpr, difference: tl.constexpr,
          LANES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Entries start, start + 1, ... as (packs of a lane, lanes, entries of a pack), so that each lane's are what its
    thread loads. Where masked, -inf beyond the vocabulary."""
    columns = _columns(start, BLOCK)
    if masked:
        inside = columns < pair.vocabulary
        s = tl.load(pair.student + columns, inside, float("-inf"))
        t = tl.load(pair.teacher + columns, inside, 0.0 if difference else float("-inf"))
    else:
        s, t = tl.load(pair.student + columns), tl.load(pair.teacher + columns)
    s, t = s.reshape(BLOCK // (LANES * PACK), LANES, PACK), t.reshape(BLOCK // (LANES * PACK), LANES, PACK)
    if difference:
        s, d = s.to(tl.float32), t.to(tl.float32)
        t = s + d
    elif pair.student.dtype.element_ty == tl.float64:
        d = (t - s).to(tl.float32)
        s, t = s.to(tl.float32), t.to(tl.float32)
    else:
        s, t = s.to(tl.float32), t.to(tl.float32)
        d = t - s
    if objective != JENSEN_SHANNON and not difference:  # a token forbidden by the lowest number, as by -inf
        d = tl.where(tl.abs(d) < 1e30, d, d * float("inf"))
    return Entries(s, t, d)


# ---------------------------------------------------------------------------------------------------------------------
# The three walks. Each takes whole blocks, then what is left, a pack a lane at a time.


@triton.jit
def _extended(m: Moments, top_block, pair: Pair, start, inverse_temperature, masked: tl.constexpr,
              objective: tl.constexpr, difference: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Moments with a block more, and which block has each lane's largest logit."""
    before = m.max_teacher if objective == FORWARD else m.max_student
    at = _load(pair, start, masked, objective, difference, LANES, BLOCK)
    m = extended(m, at, inverse_temperature, objective, difference)
    after = m.max_teacher if objective == FORWARD else m.max_student
    return m, tl.where(after > before, start, top_block)


@triton.jit
def _row_moments(pair: Pair, inverse_temperature, objective: tl.constexpr, difference: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Walk 1: a row's moments."""
    lanes: tl.constexpr = MAX_LANES if BLOCK > MAX_LANES * PACK else BLOCK // PACK
    rest: tl.constexpr = lanes * PACK
    first = _load(pair, 0, True, objective, difference, lanes, rest)
    m = first_moments(first, tl.zeros((lanes,), tl.float32), objective)
    top_block = tl.zeros((lanes,), tl.int32)
    whole = pair.vocabulary // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        m, top_block = _extended(m, top_block, pair, start, inverse_temperature, False, objective, difference, lanes,
                                 BLOCK)  # fmt: skip
    for start in tl.range(whole, pair.vocabulary, rest, num_stages=1):
        m, top_block = _extended(m, top_block, pair, start, inverse_temperature, True, objective, difference, lanes,
                                 rest)  # fmt: skip
    lane_top = m.max_teacher if objective == FORWARD else m.max_student
    top = tl.max(lane_top, 0)
    top_block = tl.min(tl.where(lane_top == top, top_block, pair.vocabulary), 0)
    own = _own(pair, top_block, top, objective, difference, lanes, BLOCK)
    return merged_lanes(m, own, inverse_temperature, objective)


@triton.jit
def _own(pair: Pair, top_block, top, objective: tl.constexpr, difference: tl.constexpr, LANES: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """(1,) t - s at the side's largest logit, found again in its block; -inf if there is none."""
    own = tl.full((LANES,), float("-inf"), tl.float32)
    for start in tl.range(top_block, top_block + BLOCK, LANES * PACK, num_stages=1):
        at = _load(pair, start, True, objective, difference, LANES, LANES * PACK)
        is_top = (at.t if objective == FORWARD else at.s) == top
        own = tl.maximum(own, largest(tl.where(is_top, at.difference, float("-inf"))))
    return tl.max(own, 0, keep_dims=True)


@triton.jit
def _row_terms(pair: Pair, row: Row, inverse_temperature, mixture: Mixture, entry_clip, objective: tl.constexpr,
               difference: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Walk 2: (1,) sums of a row's terms."""
    lanes: tl.constexpr = MAX_LANES if BLOCK > MAX_LANES * PACK else BLOCK // PACK
    rest: tl.constexpr = lanes * PACK
    sums = no_terms(tl.zeros((lanes,), tl.float32))
    whole = pair.vocabulary // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        at = _load(pair, start, False, objective, difference, lanes, BLOCK)
        sums = added_terms(sums, at, row, inverse_temperature, mixture, entry_clip, objective)
    for start in tl.range(whole, pair.vocabulary, rest, num_stages=1):
        at = _load(pair, start, True, objective, difference, lanes, rest)
        sums = added_terms(sums, at, row, inverse_temperature, mixture, entry_clip, objective)
    return finished_terms(sum_lanes_of_terms(sums), row, objective)


@triton.jit
def _write_block(to, pair: Pair, start, row: Row, mostly_clipped, scale, inverse_temperature, mixture: Mixture,
                 entry_clip, inverse_softcap, masked: tl.constexpr, objective: tl.constexpr, difference: tl.constexpr,
                 has_softcap: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = _load(pair, start, masked, objective, difference, LANES, BLOCK)
    tl.debug_barrier()  # see _write_gradient
    g = logit_gradient(at, row, mostly_clipped, scale, inverse_temperature, mixture, entry_clip, objective)
    if has_softcap:
        g *= softcap_slope(at.s, inverse_softcap)
    columns = _columns(start, BLOCK)
    g = g.to(to.dtype.element_ty).reshape(BLOCK)
    if masked:
        tl.store(to + columns, g, columns < pair.vocabulary)
    else:
        tl.store(to + columns, g)


@triton.jit
def _write_gradient(to, pair: Pair, row: Row, mostly_clipped, scale, inverse_temperature, mixture: Mixture, entry_clip,
                    inverse_softcap, objective: tl.constexpr, difference: tl.constexpr, has_softcap: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """Walk 3. A bf16 gradient may lie over the student's logits: a block is written to where logits of this block or of
    one before it were, and the barrier between lets all warps have read theirs."""
    lanes: tl.constexpr = MAX_LANES if BLOCK > MAX_LANES * PACK else BLOCK // PACK
    rest: tl.constexpr = lanes * PACK
    whole = pair.vocabulary // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        _write_block(to, pair, start, row, mostly_clipped, scale, inverse_temperature, mixture, entry_clip,
                     inverse_softcap, False, objective, difference, has_softcap, lanes, BLOCK)  # fmt: skip
    for start in tl.range(whole, pair.vocabulary, rest, num_stages=1):
        _write_block(to, pair, start, row, mostly_clipped, scale, inverse_temperature, mixture, entry_clip,
                     inverse_softcap, True, objective, difference, has_softcap, lanes, rest)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Kernels.


@triton.jit
def row_statistics_kernel(
    student, teacher, lse, others, student_stride, teacher_stride, rows, vocabulary, inverse_temperature,
    difference: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = _pair(student, teacher, row, student_stride, teacher_stride, vocabulary)
    m = _row_moments(pair, inverse_temperature, JENSEN_SHANNON, difference, BLOCK)
    values, of_row = concluded(m, inverse_temperature, JENSEN_SHANNON)
    base_s = base(m.max_student).to(tl.float64)
    base_t = base(m.max_teacher).to(tl.float64)
    lse_s = base_s * inverse_temperature + values.log_student
    # keeps its digits, unless a side has nothing
    apart = m.centre.to(tl.float64) * inverse_temperature + of_row.log_ratio
    own_t = base_t * inverse_temperature + values.log_teacher
    one = row + tl.arange(0, 1)
    tl.store(lse + one, lse_s)
    tl.store(lse + rows + one, tl.where(tl.abs(of_row.log_ratio) < float("inf"), lse_s + apart, own_t))
    tl.store(others + one, m.max_student)
    tl.store(others + rows + one, m.centre)
    tl.store(others + 2 * rows + one, of_row.log_ratio)
    tl.store(others + 3 * rows + one, values.student_entropy)
    tl.store(others + 4 * rows + one, values.teacher_entropy)


@triton.jit
def _load_row(student_lse, teacher_lse, centre, log_ratio, one, inverse_temperature, mixture: Mixture,
              objective: tl.constexpr):  # fmt: skip
    """A row whose statistics are known."""
    return row_of_lse(
        tl.load(student_lse + one), tl.load(teacher_lse + one), tl.load(centre + one), tl.load(log_ratio + one),
        inverse_temperature, mixture, objective,
    )  # fmt: skip


@triton.jit
def row_terms_kernel(
    student, teacher, student_lse, teacher_lse, centre, log_ratio, terms,
    student_stride, teacher_stride, rows, vocabulary, inverse_temperature, mixture, entry_clip,
    objective: tl.constexpr, difference: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    one = row + tl.arange(0, 1)
    pair = _pair(student, teacher, row, student_stride, teacher_stride, vocabulary)
    of_row = _load_row(student_lse, teacher_lse, centre, log_ratio, one, inverse_temperature, mixture, objective)
    sums = _row_terms(pair, of_row, inverse_temperature, mixture, entry_clip, objective, difference, BLOCK)
    tl.store(terms + one, sums.divergence.to(tl.float64))
    tl.store(terms + rows + one, sums.score.to(tl.float64))
    tl.store(terms + 2 * rows + one, sums.unclipped.to(tl.float64))
    tl.store(terms + 3 * rows + one, sums.plain.to(tl.float64))


@triton.jit
def _finished(sums: Terms, objective: tl.constexpr):
    """A whole row's divergence, the mean of its scores, and whether most of the teacher is clipped."""
    mostly_clipped = sums.score > 0.5
    if objective == CLIPPED:
        divergence = tl.where(mostly_clipped, sums.plain, sums.divergence)
        mean = tl.where(mostly_clipped, sums.unclipped, sums.score)
    else:
        divergence = tl.where(sums.divergence < 0, 0.0, sums.divergence)
        mean = sums.score
    mean = tl.where(divergence == divergence, mean, divergence).to(tl.float32)  # a NaN row is NaN throughout
    return divergence.to(tl.float32), mean, mostly_clipped


@triton.jit
def row_gradient_kernel(
    student, teacher, student_lse, teacher_lse, centre, log_ratio, terms, weight, divergence_out, gradient_out,
    student_stride, teacher_stride, gradient_stride, rows, vocabulary,
    inverse_temperature, mixture, entry_clip, inverse_softcap,
    objective: tl.constexpr, difference: tl.constexpr, has_gradient: tl.constexpr, has_softcap: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    one = row + tl.arange(0, 1)
    pair = _pair(student, teacher, row, student_stride, teacher_stride, vocabulary)
    of_row = _load_row(student_lse, teacher_lse, centre, log_ratio, one, inverse_temperature, mixture, objective)
    sums = Terms(
        tl.load(terms + one), tl.load(terms + rows + one), tl.load(terms + 2 * rows + one),
        tl.load(terms + 3 * rows + one),
    )  # fmt: skip
    divergence, mean, mostly_clipped = _finished(sums, objective)
    if objective == REVERSE:  # its scores' mean is the divergence itself
        mean = divergence
    tl.store(divergence_out + one, divergence)
    if has_gradient:
        scale = gradient_scale(tl.load(weight + one), mixture, inverse_temperature, objective)
        _write_gradient(
            gradient_out + row * gradient_stride, pair, with_mean(of_row, bounded_mean(mean)), mostly_clipped, scale,
            inverse_temperature, mixture, entry_clip, inverse_softcap, objective, difference, has_softcap, BLOCK,
        )  # fmt: skip


@triton.jit
def _store_target(pair: Pair, column, scalars, rows, one, m, values, inverse_temperature, difference: tl.constexpr):
    """Both sides' log-probability of the row's target, and the student's. Ids outside the vocabulary have none: NaN."""
    exists = (column >= 0) & (column < pair.vocabulary)
    column = tl.where(exists, column, 0)
    s = tl.where(exists, tl.load(pair.student + column).to(tl.float32), float("nan"))
    t = tl.where(exists, tl.load(pair.teacher + column).to(tl.float32), float("nan"))
    if difference:
        t += s
    base_s = base(m.max_student)
    base_t = base(m.max_teacher)
    logp = (s - base_s) * inverse_temperature - values.log_student
    tl.store(scalars + 3 * rows + one, logp)
    tl.store(scalars + 4 * rows + one, (t - base_t) * inverse_temperature - values.log_teacher)
    return logp


@triton.jit
def row_divergence_kernel(
    student, teacher, weight, target, old_logp, scalars, gradient_out,
    student_stride, teacher_stride, gradient_stride, rows, vocabulary,
    inverse_temperature, mixture, importance_clip, entry_clip, inverse_softcap,
    objective: tl.constexpr, difference: tl.constexpr, has_target: tl.constexpr, has_old_logp: tl.constexpr,
    has_gradient: tl.constexpr, has_softcap: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    one = row + tl.arange(0, 1)
    pair = _pair(student, teacher, row, student_stride, teacher_stride, vocabulary)
    first_walk: tl.constexpr = JENSEN_SHANNON if objective == CLIPPED else objective
    m = _row_moments(pair, inverse_temperature, first_walk, difference, BLOCK)
    values, of_row = concluded(m, inverse_temperature, first_walk)
    divergence, mostly_clipped = values.divergence, values.divergence > 0.5
    if objective == JENSEN_SHANNON or objective == CLIPPED:  # noqa: SIM109
        if objective == JENSEN_SHANNON:
            of_row = with_reference(of_row, m.own, inverse_temperature, mixture)
        sums = _row_terms(pair, of_row, inverse_temperature, mixture, entry_clip, objective, difference, BLOCK)
        divergence, mean, mostly_clipped = _finished(sums, objective)
        of_row = with_mean(of_row, mean)

    tl.store(scalars + one, divergence)
    tl.store(scalars + rows + one, values.student_entropy)
    tl.store(scalars + 2 * rows + one, values.teacher_entropy)
    if has_target:
        logp = _store_target(
            pair, tl.load(target + one), scalars, rows, one, m, values, inverse_temperature, difference
        )
        if has_old_logp:
            ratio = importance_ratio(logp, tl.load(old_logp + one), importance_clip)
            tl.store(scalars + 5 * rows + one, ratio)
    if has_gradient:
        scale = gradient_scale(tl.load(weight + one), mixture, inverse_temperature, objective)
        if has_old_logp:
            scale *= ratio
        _write_gradient(
            gradient_out + row * gradient_stride, pair, of_row, mostly_clipped, scale, inverse_temperature, mixture,
            entry_clip, inverse_softcap, objective, difference, has_softcap, BLOCK,
        )  # fmt: skip


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
        *student.shape, 1.0 / objective.temperature, mixture(objective.beta), importance_clip,
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
        1.0 / objective.temperature, mixture(objective.beta), objective.entry_clip,
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
        1.0 / objective.temperature, mixture(objective.beta), objective.entry_clip,
        1.0 / logits.softcap if logits.softcap else 0.0,
        objective=KINDS.index(objective.kind), difference=logits.difference, has_gradient=gradient is not None,
        has_softcap=bool(logits.softcap), BLOCK=BLOCK, **options(student.device.type),
    )  # fmt: skip
    return divergence
