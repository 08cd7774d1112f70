"""What rows know of their supports, in Triton, with the contracts of support_torch.py: a program a row, a launch each.

    likeliest           the k largest logits of a row                    4 bytes of a logit
    entries             both sides' logits at some columns
    support_values      log-probabilities, entropies, what a target has
    support_gradient    the dense gradient of the student's logits       4 bytes of a logit, and 2 or 4 of its gradient

Numbers of an entry are float64, as are the short rows that `support_values` writes for the row kernel.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import LEAST_LOG_TAIL, Logits, PerRow, RowStatistics, SupportLogits, SupportValues
from .divergence_triton import importance_ratio
from .elementary_triton import exponential, softcap_slope
from .row_divergence_triton import given_of, store_policy

# Entries of a row at a time, and warps.
BLOCK, WARPS = 4096, 8
# `likeliest` compares the largest logits of sets of so many neighbours first, and then the members of k sets. Neither
# has more than MOST numbers, which a program's threads hold without spilling: more than 256 of 151936 are left to
# torch.topk.
SET, MOST, LIKELIEST_BLOCK, LIKELIEST_WARPS = 64, 8192, 8192, 16

_LEAST_LOG_TAIL = tl.constexpr(LEAST_LOG_TAIL)
_INFINITY = tl.constexpr(float("inf"))


# ---------------------------------------------------------------------------------------------------------------------
# The largest of many.


@triton.jit
def _key(x):
    """uint32 in the order of fp32 numbers, NaN beyond both infinities. 0 is the least."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _largest(keys, k):
    """Which of the keys are the k largest, of equal ones the first; and how many of those there are up to each."""
    least = tl.full((1,), 0, tl.uint32)  # of the k largest, bit by bit
    for i in range(32):
        higher = least | (tl.full((1,), 1, tl.uint32) << (31 - i))
        least = tl.where(tl.sum((keys >= higher).to(tl.int32), 0) >= k, higher, least)
    above, equal = keys > least, (keys == least).to(tl.int32)
    room = k - tl.sum(above.to(tl.int32), 0)
    taken = above | ((equal != 0) & (tl.cumsum(equal, 0) <= room))
    return taken, tl.cumsum(taken.to(tl.int32), 0)


@triton.jit
def likeliest_kernel(
    logits, stride, vocabulary, k, maxima, sets, columns_out,
    SET: tl.constexpr, SETS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's k largest entries are in the k sets with the largest maxima. SETS, K: powers of 2 that are no less."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    maxima += row * SETS
    sets += row * K
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        keys = tl.where(inside, _key(tl.load(logits + columns, inside, 0.0)), 0)
        of_sets = tl.max(keys.reshape(BLOCK // SET, SET), 1)
        place = start // SET + tl.arange(0, BLOCK // SET)
        tl.store(maxima + place, of_sets.to(tl.int32, bitcast=True), place < SETS)
    tl.debug_barrier()
    count = (vocabulary + SET - 1) // SET
    place = tl.arange(0, SETS)
    keys = tl.load(maxima + place, place < count, 0).to(tl.uint32, bitcast=True)
    taken, rank = _largest(keys, tl.minimum(k, count))
    tl.store(sets + rank - 1, place, taken)
    tl.debug_barrier()
    slot = tl.arange(0, K * SET) // SET
    some = slot < tl.minimum(k, count)
    columns = tl.load(sets + slot, some, 0) * SET + tl.arange(0, K * SET) % SET
    some &= columns < vocabulary
    keys = tl.where(some, _key(tl.load(logits + columns, some, 0.0)), 0)
    taken, rank = _largest(keys, k)
    tl.store(columns_out + row * k + rank - 1, columns.to(tl.int64), taken)


def likeliest(logits: Tensor, k: int) -> Tensor:
    """As support_torch.likeliest; of equal logits the first ones."""
    rows, vocabulary = logits.shape
    padded, size = triton.next_power_of_2(k), SET
    while size > 1 and padded * size > MOST:
        size //= 2
    sets = triton.next_power_of_2(triton.cdiv(vocabulary, size))
    if max(padded * size, sets) > MOST:
        return logits.topk(k, sorted=False).indices
    scratch = torch.empty(rows, sets + padded, dtype=torch.int32, device=logits.device)
    columns = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    likeliest_kernel[(rows,)](
        logits, logits.stride(0), vocabulary, k, scratch, scratch.view(-1)[rows * sets :], columns,
        SET=size, SETS=sets, K=padded, BLOCK=LIKELIEST_BLOCK, num_warps=LIKELIEST_WARPS,
    )  # fmt: skip
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Logits at columns.


@triton.jit
def entries_kernel(
    student, teacher, student_stride, teacher_stride, vocabulary, columns, count, absent, student_out, teacher_out,
    difference: tl.constexpr, forbid: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < count
    column = tl.load(columns + row * count + lane, inside, -1)
    here = (column >= 0) & (column < vocabulary)
    at = student + row * student_stride + column
    s = tl.load(at, here, 0.0).to(tl.float64)
    tl.store(student_out + row * count + lane, tl.where(here, s, absent), inside)
    if teacher is not None:
        at_teacher = teacher + row * teacher_stride + column
        t = tl.load(at_teacher, here, 0.0).to(tl.float64)
        if difference:
            t += s
        tl.store(teacher_out + row * count + lane, tl.where(here, t, absent), inside)
    if forbid:
        tl.debug_barrier()  # a column may be there twice
        tl.store(at, tl.full((LANES,), -_INFINITY, tl.float32), here)
        if teacher is not None:
            tl.store(at_teacher, tl.full((LANES,), 0.0 if difference else -_INFINITY, tl.float32), here)


def entries(logits: Logits, columns: Tensor, absent: float, *, forbid: bool = False) -> Tensor:
    """As support_torch.entries."""
    assert columns.dtype == torch.int64 and columns.is_contiguous()
    student, teacher, difference, _ = logits
    found = torch.empty(1 if teacher is None else 2, *columns.shape, dtype=torch.float64, device=columns.device)
    entries_kernel[(len(columns),)](
        student, teacher, student.stride(0), 0 if teacher is None else teacher.stride(0), student.shape[1], columns,
        columns.shape[1], absent, found[0], None if teacher is None else found[1],
        difference=difference, forbid=forbid, LANES=triton.next_power_of_2(columns.shape[1]),
    )  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Values.


@triton.jit
def _log_sum(x, tail):
    """log(Σ e^x + e^tail), (1,)."""
    largest = tl.maximum(tl.max(x, 0, keep_dims=True), tail)
    largest = tl.where(tl.abs(largest) < _INFINITY, largest, 0.0)
    return tl.log(tl.sum(tl.exp(x - largest), 0, keep_dims=True) + tl.exp(tail - largest)) + largest


@triton.jit
def _information(log_p):
    """-p log p."""
    p = tl.exp(log_p)
    return tl.where(p == 0, 0.0, -p * log_p)


@triton.jit
def _entropy(log_p, log_tail, tail_entropy):
    tail = tl.exp(log_tail)
    within = tl.where(tail == 0, 0.0, tail * tail_entropy)
    return tl.sum(_information(log_p), 0, keep_dims=True) + _information(log_tail) + within


@triton.jit
def support_values_kernel(at, tail, given, importance_clip, out, few, few_teacher, rows, count, inverse_temperature,
                          renormalize: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    one = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    lane = tl.arange(0, LANES)
    inside, place = lane < count, one * count + lane
    exists = inside & (tl.load(at.ids + place, inside, -1) >= 0)
    x = tl.load(at.student + place, exists, -_INFINITY) * inverse_temperature
    rest = tl.load(tail.student_lse + one)
    lse = _log_sum(x, rest)
    log_p, log_rest = x - lse, rest - lse
    tl.store(out.scalars + rows + one, _entropy(log_p, log_rest, tl.load(tail.student_entropy + one)))
    if at.teacher is None:
        lse_other = tl.zeros((1,), tl.float64)
        log_q = tl.load(at.teacher_logp + place, exists, -_INFINITY).to(tl.float64)
        known = _log_sum(log_q, lse_other - _INFINITY)
        log_rest_other = tl.log(1.0 - tl.exp(tl.where(known > -1e-7, -1e-7, known)))
        tl.store(out.scalars + 2 * rows + one, tl.zeros((1,), tl.float32))
    else:
        y = tl.load(at.teacher + place, exists, -_INFINITY) * inverse_temperature
        rest_other = tl.load(tail.teacher_lse + one)
        lse_other = _log_sum(y, rest_other)
        log_q, log_rest_other = y - lse_other, rest_other - lse_other
        tl.store(out.scalars + 2 * rows + one, _entropy(log_q, log_rest_other, tl.load(tail.teacher_entropy + one)))

    weight = tl.load(given.weight + one)
    if at.target is not None:
        logp = tl.load(at.target + one) * inverse_temperature - lse
        logp_other = tl.zeros((1,), tl.float64)
        if at.teacher is not None:
            logp_other = tl.load(at.target + rows + one) * inverse_temperature - lse_other
        tl.store(out.scalars + 3 * rows + one, logp)
        tl.store(out.scalars + 4 * rows + one, logp_other)
    if given.advantage is not None:
        policy_ratio = tl.full((1,), 1.0, tl.float64)
        if given.ratio is not None:
            policy_ratio = tl.load(given.ratio + one).to(tl.float64)
        elif given.old_logp is not None:
            policy_ratio = tl.exp(logp - tl.load(given.old_logp + one))
        advantage, coefficient = tl.load(given.advantage + one), tl.load(given.coefficient + one)
        slope = store_policy(
            advantage, coefficient, policy_ratio, given.lowest, given.highest, logp, out.scalars, rows, one
        )
        tl.store(out.slope + one, slope)
    if given.old_logp is not None:
        ratio = importance_ratio(logp, tl.load(given.old_logp + one), importance_clip)
        tl.store(out.scalars + 5 * rows + one, ratio)
        weight = tl.where(weight == 0, 0.0, weight * ratio).to(tl.float32)  # the ratio may be NaN
    tl.store(out.weight + one, weight)

    tl.store(out.log_p + place, log_p, inside)
    tl.store(out.log_q + place, log_q, inside)
    tl.store(out.lse + one, lse)
    tl.store(out.log_tail + one, log_rest)
    if renormalize:  # an empty row diverges from nothing
        some = tl.max(exists.to(tl.int32), 0) != 0
        tl.store(few + place, tl.where(some, log_p, 0.0), inside)
        tl.store(few_teacher + place, tl.where(some, log_q, 0.0), inside)
    else:
        last = one * (count + 1) + count
        tl.store(few + one + place, log_p, inside)
        tl.store(few_teacher + one + place, log_q, inside)
        tl.store(few + last, tl.where(log_rest < _LEAST_LOG_TAIL, _LEAST_LOG_TAIL, log_rest))
        tl.store(few_teacher + last, tl.where(log_rest_other < _LEAST_LOG_TAIL, _LEAST_LOG_TAIL, log_rest_other))


def support_values(
    at: SupportLogits, tail: RowStatistics, given: PerRow, temperature: float, *, renormalize: bool
) -> SupportValues:
    """As support_torch.support_values."""
    assert at.ids.is_contiguous() and at.student.is_contiguous()
    assert at.teacher_logp is None or at.teacher_logp.is_contiguous()
    rows, count = at.ids.shape
    empty = partial(torch.empty, device=at.ids.device)
    log_p, log_q = empty(2, rows, count, dtype=torch.float64)
    short = Logits(*empty(2, rows, count if renormalize else count + 1, dtype=torch.float64), False, 0.0)
    of_rows = empty(2, rows, dtype=torch.float64)
    single = empty(2 + given.scalars, rows, dtype=torch.float32)
    slope = None if given.policy is None else single[-1]
    out = SupportValues(log_p, log_q, *of_rows, short, single[: given.scalars], single[-2], slope)
    support_values_kernel[(rows,)](
        at, tail, given_of(given), given.importance_clip, out._replace(few=None), short.student, short.teacher, rows,
        count, 1.0 / temperature, renormalize=renormalize, LANES=triton.next_power_of_2(count),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Gradient.


@triton.jit
def _capped(g, logit, inverse_softcap, has_softcap: tl.constexpr):
    if has_softcap:
        g = tl.where(g == 0, 0.0, g * softcap_slope(logit, inverse_softcap))
    return g


@triton.jit
def support_gradient_kernel(
    student, stride, vocabulary, columns, at, target_column, values, tail_lse, g, count, gradient_out, gradient_stride,
    inverse_temperature, inverse_softcap, is_bounded: tl.constexpr, has_softcap: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    one, lane = row + tl.arange(0, 1), tl.arange(0, LANES)
    inside, place = lane < count, one * count + lane
    own = tl.load(at.student + place, inside, -_INFINITY)
    lse, tail = tl.load(values.lse + one), tl.load(tail_lse + one)
    p = tl.exp(own * inverse_temperature - lse)
    is_zero = tl.load(values.weight + one) == 0  # the row may hold anything
    g_tail = tl.where(is_zero, 0.0, tl.load(g + one * (count + 1) + count).to(tl.float64))
    g = tl.where(is_zero, 0.0, tl.load(g + one + place, inside, 0.0).to(tl.float64))
    if is_bounded:  # the tail's mass may be below the least, and constant
        constant = tl.load(values.log_tail + one) < _LEAST_LOG_TAIL
        g = tl.where(constant, g + g_tail * p, g)
        g_tail = tl.where(constant, 0.0, g_tail)
    g_tail *= inverse_temperature
    base = tl.where(tl.abs(tail) < _INFINITY, tail / inverse_temperature, 0.0).to(tl.float32)
    apart = base.to(tl.float64) * inverse_temperature
    factor = tl.where(tail == -_INFINITY, 0.0 * g_tail, g_tail * tl.exp(apart - tail))
    factor = tl.where(is_zero, 0.0, factor)
    column = tl.load(columns + place, inside, -1)
    here = (column >= 0) & (column < vocabulary)
    if values.slope is not None:
        slope = tl.load(values.slope + one).to(tl.float64)
        target, logit = tl.load(target_column + one), tl.load(at.target + one)
        is_target = here & (column == target)
        of_tail = factor * tl.exp(logit * inverse_temperature - apart) / inverse_temperature
        within = tl.sum(tl.where(is_target, g, 0.0), 0, keep_dims=True)
        at_target = tl.where(tl.max(is_target.to(tl.int32), 0, keep_dims=True) != 0, within, of_tail)
        at_target += tl.where(slope == 0, 0.0, slope * (tl.exp(logit * inverse_temperature - lse) - 1.0))
        g += tl.where(slope == 0, 0.0, slope * p)
        own_factor = slope * inverse_temperature * tl.exp(apart - lse)
        factor += tl.where((tail == -_INFINITY) | (slope == 0), 0.0 * slope, own_factor)

    student += row * stride
    gradient_out += row * gradient_stride
    factor = factor.to(tl.float32)
    # One program a row, from its start to its end: a bf16 gradient that lies over the logits overwrites none unread.
    for start in range(0, vocabulary, BLOCK):
        of_block = start + tl.arange(0, BLOCK)
        z = tl.load(student + of_block, of_block < vocabulary, -_INFINITY)
        tl.debug_barrier()
        dense = exponential((z - base) * inverse_temperature) * factor
        if has_softcap:
            dense *= softcap_slope(z, inverse_softcap)
        dense = tl.where(factor == 0, 0.0, dense)
        tl.store(gradient_out + of_block, dense.to(gradient_out.dtype.element_ty), of_block < vocabulary)
    tl.debug_barrier()
    g = _capped(g, own, inverse_softcap, has_softcap) * inverse_temperature
    tl.store(gradient_out + column, g.to(gradient_out.dtype.element_ty), here)
    if values.slope is not None:
        tl.debug_barrier()
        g = _capped(at_target, logit, inverse_softcap, has_softcap) * inverse_temperature
        exists = (target >= 0) & (target < vocabulary)
        tl.store(gradient_out + target, g.to(gradient_out.dtype.element_ty), exists)


def support_gradient(
    logits: Logits,
    columns: Tensor,
    at: SupportLogits,
    target: Tensor | None,
    values: SupportValues,
    tail_lse: Tensor,
    g: Tensor,
    temperature: float,
    gradient: Tensor,
    *,
    is_bounded: bool,
) -> None:
    """As support_torch.support_gradient."""
    assert columns.is_contiguous() and g.is_contiguous() and gradient.stride(1) == 1
    student, softcap = logits.student, logits.softcap
    support_gradient_kernel[(len(columns),)](
        student, student.stride(0), student.shape[1], columns, at, target, values._replace(few=None), tail_lse, g,
        columns.shape[1], gradient, gradient.stride(0), 1.0 / temperature, 1.0 / softcap if softcap else 0.0,
        is_bounded=is_bounded, has_softcap=bool(softcap), LANES=triton.next_power_of_2(columns.shape[1]), BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
