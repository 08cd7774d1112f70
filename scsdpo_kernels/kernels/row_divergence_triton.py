"""The row kernel in Triton: one program takes one row of resident logits from moments to weighted gradient.

    pass     reads            writes
    1        s, t (8 bytes)                  moments, online: maxima, normalisers, entropies; KL at beta 0 and 1
    2        s, t (8 bytes)                  Jensen-Shannon: its terms and the mean score; others but the KLs alike
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

from ..problem import ENDS, KINDS, Objective
from .contract import Logits, PerRow, RowStatistics, Scalars
from .divergence_triton import (
    CLIPPED,
    FORWARD,
    Entries,
    Mean,
    Moments,
    Numbers,
    Row,
    Terms,
    added_terms,
    base,
    beside_one,
    concluded,
    concluded_terms,
    extended,
    finished_terms,
    first_moments,
    first_walk,
    gradient_scale,
    has_mixture,
    has_terms,
    importance_ratio,
    largest,
    logit_gradient,
    merged_lanes,
    minus_other,
    policy_terms,
    reference_score,
    row_of_lse,
)
from .elementary_triton import softcap_slope
from .mixture import SIZE, Mixture, mixture, mixtures

# Entries of a row at a time, warps, and, in the passes that only read, stages of the loads' pipeline.
#
# On an H200 a launch that fills it takes little more than the bytes above do (benchmarks/results/row_kernels-*.json).
# What is counted here are instructions of sm_90's SASS in the loops over whole blocks, divided by the entries that a
# thread takes in a round (tests/compile_triton.py). Jensen-Shannon with a bf16 gradient has 139 to 144 an entry, of
# which 32 to 35, 63 and 44 are in its three walks. 11 of them are 2^x, 1/x and log2, which issue at an eighth of the
# rate. There are 75 and 64 at beta 0 and 1, and 108 with clipped entries; copying the bytes above leaves an H200 room
# for about 180 and 124. Registers leave room for four programs on a multiprocessor of sm_90 where the vocabulary is a
# multiple of 16, and for three else; for two on sm_80. Caps that would fit more make some kernels spill.
# Jeffreys has 131 to 138 instructions an entry, the skewed KLs 138 to 171, and both leave room for three programs or
# four; rows with a β of their own, for two or three.
BLOCK, WARPS = 2048, 4
STAGES = tl.constexpr(3)
# Lanes of a program, one a thread, and how many neighbouring entries a lane takes with one access.
MAX_LANES, PACK = 128, tl.constexpr(4)
_SIZE = tl.constexpr(SIZE)


def options(device_type: str) -> dict[str, int | bool]:
    """Compiler options of the launch."""
    if device_type == "hip" or torch.version.hip is not None:
        return {"num_warps": WARPS // 2, "enable_fp_fusion": True}  # a warp has 64 lanes
    registers = {"maxnreg": 208} if device_type == "cuda" else {}
    return {"num_warps": WARPS, "enable_fp_fusion": True, **registers}


class Chunk(NamedTuple):
    """What a kernel is told of a chunk's logits."""

    student: tl.tensor  # pointers to the first logit
    teacher: tl.tensor
    student_stride: int
    teacher_stride: int
    rows: int
    vocabulary: int


class Given(NamedTuple):
    """What is given of each row: `PerRow`'s tensors, and its policy's numbers. Flat, as old compilers want it."""

    weight: tl.tensor
    target: tl.tensor | None
    old_logp: tl.tensor | None
    advantage: tl.tensor | None
    coefficient: tl.tensor | None
    ratio: tl.tensor | None
    lowest: float | None
    highest: float | None


class Output(NamedTuple):
    gradient: tl.tensor
    stride: int


class Pull(NamedTuple):
    """What a policy adds to a row's gradient: pull (p - [v = y]) of its target y. (1,)."""

    pull: tl.tensor
    column: tl.tensor  # y, or negative: it is not here
    target: Entries  # its logits, read before the gradient is written over them
    above: tl.tensor  # p_y - 1, with all its digits


class Known(NamedTuple):
    """`RowStatistics` that a row's terms and gradient are made of."""

    student_lse: tl.tensor
    teacher_lse: tl.tensor
    centre: tl.tensor
    log_ratio: tl.tensor


class Form(NamedTuple):
    """What a kernel is compiled for."""

    objective: int  # its place in problem.KINDS; statistics take Jensen-Shannon
    difference: bool  # the second logits are teacher - student
    softcap: bool
    block: int  # entries at a time
    lanes: int


class Ends(NamedTuple):
    """Rows of β 0 and 1, where each row has its own."""

    at_0: Form
    at_1: Form


class Pair(NamedTuple):
    """One row of both sides."""

    student: tl.tensor  # pointers to the first logit
    teacher: tl.tensor  # its logits, or teacher - student
    vocabulary: tl.tensor


@triton.jit
def _row_of(chunk: Chunk):
    """A program's row, for loads and stores of (1,), and its logits."""
    row = tl.program_id(0).to(tl.int64)
    student, teacher = chunk.student + row * chunk.student_stride, chunk.teacher + row * chunk.teacher_stride
    return row + tl.arange(0, 1), Pair(student, teacher, chunk.vocabulary)


@triton.jit
def _columns(start, size: tl.constexpr):
    """start, start + 1, ... No thread shall take more than a pack of them at a time, whatever the gradient's dtype."""
    return tl.max_contiguous(start + tl.arange(0, size), PACK)


@triton.jit
def _load(pair: Pair, start, masked: tl.constexpr, form: tl.constexpr, size: tl.constexpr):
    """Entries start, start + 1, ... as (packs of a lane, lanes, entries of a pack), so that each lane's are what its
    thread loads. Where masked, -inf beyond the vocabulary."""
    columns = _columns(start, size)
    if masked:
        inside = columns < pair.vocabulary
        s = tl.load(pair.student + columns, inside, float("-inf"))
        t = tl.load(pair.teacher + columns, inside, 0.0 if form.difference else float("-inf"))
    else:
        s, t = tl.load(pair.student + columns), tl.load(pair.teacher + columns)
    lanes: tl.constexpr = form.lanes
    packs: tl.constexpr = size // (lanes * PACK)
    return _entries(s.reshape(packs, lanes, PACK), t.reshape(packs, lanes, PACK), form)


@triton.jit
def _entries(s, t, form: tl.constexpr):
    """What was loaded, as own and other side."""
    if form.difference:
        s, d = s.to(tl.float32), t.to(tl.float32)
        t = s + d
    else:
        if s.dtype == tl.float64:
            d = (t - s).to(tl.float32)
            s, t = s.to(tl.float32), t.to(tl.float32)
        else:
            s, t = s.to(tl.float32), t.to(tl.float32)
            d = t - s
        if not has_mixture(form.objective):  # a token forbidden by the lowest number, as by -inf
            d = tl.where(tl.abs(d) < 1e30, d, d * float("inf"))
    return Entries(t, s, -d) if form.objective == FORWARD else Entries(s, t, d)


# ---------------------------------------------------------------------------------------------------------------------
# The three walks. Each takes whole blocks, then what is left, a pack a lane at a time.


@triton.jit
def _extended(m: Moments, top_block, pair: Pair, start, by: Numbers, masked: tl.constexpr, form: tl.constexpr,
              size: tl.constexpr):  # fmt: skip
    """Moments with a block more, and which block has each lane's largest logit."""
    before = m.max_own
    at = _load(pair, start, masked, form, size)
    m = extended(m, at, by, form.objective, form.difference)
    return m, tl.where(m.max_own > before, start, top_block)


@triton.jit
def _row_moments(pair: Pair, by: Numbers, form: tl.constexpr):
    """Walk 1: a row's moments."""
    lanes: tl.constexpr = form.lanes
    rest: tl.constexpr = lanes * PACK
    m = first_moments(_load(pair, 0, True, form, rest), tl.zeros((lanes,), tl.float32))
    top_block = tl.zeros((lanes,), tl.int32)
    whole = pair.vocabulary // form.block * form.block
    for start in tl.range(0, whole, form.block, num_stages=STAGES):
        m, top_block = _extended(m, top_block, pair, start, by, False, form, form.block)
    for start in tl.range(whole, pair.vocabulary, rest, num_stages=1):
        m, top_block = _extended(m, top_block, pair, start, by, True, form, rest)
    top = tl.max(m.max_own, 0)
    top_block = tl.min(tl.where(m.max_own == top, top_block, pair.vocabulary), 0)
    return merged_lanes(m, _at_top(pair, top_block, top, form), by, form.objective)


@triton.jit
def _at_top(pair: Pair, top_block, top, form: tl.constexpr):
    """(1,) other - own at the largest logit, found again in its block; -inf if there is none."""
    lanes: tl.constexpr = form.lanes
    rest: tl.constexpr = lanes * PACK
    at_top = tl.full((lanes,), float("-inf"), tl.float32)
    for start in tl.range(top_block, top_block + form.block, rest, num_stages=1):
        at = _load(pair, start, True, form, rest)
        at_top = tl.maximum(at_top, largest(tl.where(at.own == top, at.difference, float("-inf"))))
    return tl.max(at_top, 0, keep_dims=True)


@triton.jit
def _row_terms(pair: Pair, row: Row, reference, by: Numbers, form: tl.constexpr):
    """Walk 2: (1,) sums of a row's terms."""
    lanes: tl.constexpr = form.lanes
    rest: tl.constexpr = lanes * PACK
    zero = tl.zeros((lanes,), tl.float32)
    sums = Terms(zero, zero, zero, zero)
    whole = pair.vocabulary // form.block * form.block
    for start in tl.range(0, whole, form.block, num_stages=STAGES):
        at = _load(pair, start, False, form, form.block)
        sums = added_terms(sums, at, row, reference, by, form.objective)
    for start in tl.range(whole, pair.vocabulary, rest, num_stages=1):
        at = _load(pair, start, True, form, rest)
        sums = added_terms(sums, at, row, reference, by, form.objective)
    return finished_terms(sums, row, form.objective)


@triton.jit
def _capped(g, at: Entries, by: Numbers, form: tl.constexpr):
    """A gradient through the student's softcap, if there is one."""
    if form.softcap:
        g *= softcap_slope(at.other if form.objective == FORWARD else at.own, by.inverse_softcap)
    return g


@triton.jit
def _write_block(to, pair: Pair, start, row: Row, mean: Mean, scale, pull, by: Numbers, masked: tl.constexpr,
                 form: tl.constexpr, size: tl.constexpr):  # fmt: skip
    at = _load(pair, start, masked, form, size)
    tl.debug_barrier()  # see _write_gradient
    g = _capped(logit_gradient(at, row, mean, scale, pull, by, form.objective), at, by, form)
    columns = _columns(start, size)
    g = g.to(to.dtype.element_ty).reshape(size)
    if masked:
        tl.store(to + columns, g, columns < pair.vocabulary)
    else:
        tl.store(to + columns, g)


@triton.jit
def _write_gradient(out: Output, pair: Pair, row: Row, mean: Mean, scale, of_policy, by: Numbers, form: tl.constexpr):
    """Walk 3. A bf16 gradient may lie over the student's logits: a block is written to where logits of this block or of
    one before it were, and the barrier between lets all warps have read theirs. A policy's target is written once more
    and alone: p_y - 1 would have lost its digits."""
    rest: tl.constexpr = form.lanes * PACK
    pull = None
    if of_policy is not None:
        pull = of_policy.pull
    to = out.gradient + tl.program_id(0).to(tl.int64) * out.stride
    whole = pair.vocabulary // form.block * form.block
    for start in tl.range(0, whole, form.block):
        _write_block(to, pair, start, row, mean, scale, pull, by, False, form, form.block)
    for start in tl.range(whole, pair.vocabulary, rest, num_stages=1):
        _write_block(to, pair, start, row, mean, scale, pull, by, True, form, rest)
    if of_policy is not None:
        g = logit_gradient(of_policy.target, row, mean, scale, None, by, form.objective)
        g += (of_policy.pull * of_policy.above)[None, :, None]
        g = _capped(g, of_policy.target, by, form).to(to.dtype.element_ty).reshape(1)
        tl.debug_barrier()  # after what the blocks have written there
        tl.store(to + of_policy.column, g, (of_policy.column >= 0) & (of_policy.pull != 0))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels.


@triton.jit
def row_statistics_kernel(chunk, lse, others, by, form: tl.constexpr):
    one, pair = _row_of(chunk)
    m = _row_moments(pair, by, form)
    values, row, _ = concluded(m, by, form.objective)
    lse_own = base(m.max_own).to(tl.float64) * by.inverse_temperature + values.log_own
    lse_other = base(m.max_other).to(tl.float64) * by.inverse_temperature + values.log_other
    # keeps its digits, unless a side has nothing
    apart = m.centre.to(tl.float64) * by.inverse_temperature + row.log_ratio
    tl.store(lse + one, lse_own)
    tl.store(lse + chunk.rows + one, tl.where(tl.abs(row.log_ratio) < float("inf"), lse_own + apart, lse_other))
    tl.store(others + one, m.max_own)
    tl.store(others + chunk.rows + one, m.centre)
    tl.store(others + 2 * chunk.rows + one, row.log_ratio)
    tl.store(others + 3 * chunk.rows + one, values.own_entropy)
    tl.store(others + 4 * chunk.rows + one, values.other_entropy)


@triton.jit
def _load_row(known: Known, one, by: Numbers, form: tl.constexpr):
    """A row whose statistics are known, and its reference."""
    student_lse, teacher_lse = tl.load(known.student_lse + one), tl.load(known.teacher_lse + one)
    centre, log_ratio = tl.load(known.centre + one), tl.load(known.log_ratio + one)
    if form.objective == FORWARD:
        row = row_of_lse(teacher_lse, student_lse, -centre, -log_ratio, by)
    else:
        row = row_of_lse(student_lse, teacher_lse, centre, log_ratio, by)
    reference = tl.zeros_like(centre)
    if has_terms(form.objective) and form.objective != CLIPPED:
        reference = reference_score(row, centre, by, form.objective)
    return row, reference


@triton.jit
def _own_numbers(by: Numbers, shares):
    """A row's, of a table of `mixtures`."""
    at = shares + tl.program_id(0).to(tl.int64) * _SIZE
    score = (
        tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8),
        tl.load(at + 9), tl.load(at + 10),
    )  # fmt: skip
    divergence = (
        tl.load(at + 11), tl.load(at + 12), tl.load(at + 13), tl.load(at + 14), tl.load(at + 15), tl.load(at + 16),
        tl.load(at + 17), tl.load(at + 18),
    )  # fmt: skip
    own = Mixture(tl.load(at), tl.load(at + 1), tl.load(at + 2), score, divergence)
    return Numbers(by.inverse_temperature, by.entry_clip, by.importance_clip, by.inverse_softcap, own)


@triton.jit
def row_terms_kernel(chunk, known, terms, by, shares, form: tl.constexpr, ends: tl.constexpr):
    if shares is None:
        _row_terms_of(chunk, known, terms, by, form)
    else:
        at_0: tl.constexpr = ends.at_0
        at_1: tl.constexpr = ends.at_1
        own = _own_numbers(by, shares)
        if own.mixture.teacher == 0:
            _row_terms_of(chunk, known, terms, own, at_0)
        elif own.mixture.student == 0:
            _row_terms_of(chunk, known, terms, own, at_1)
        else:
            _row_terms_of(chunk, known, terms, own, form)


@triton.jit
def _row_terms_of(chunk, known, terms, by: Numbers, form: tl.constexpr):
    one, pair = _row_of(chunk)
    row, reference = _load_row(known, one, by, form)
    sums = _row_terms(pair, row, reference, by, form)
    tl.store(terms + one, sums.divergence.to(tl.float64))
    tl.store(terms + chunk.rows + one, sums.score.to(tl.float64))
    tl.store(terms + 2 * chunk.rows + one, sums.unclipped.to(tl.float64))
    tl.store(terms + 3 * chunk.rows + one, sums.plain.to(tl.float64))


@triton.jit
def row_gradient_kernel(chunk, known, terms, given, divergence_out, out, by, shares, form: tl.constexpr,
                        ends: tl.constexpr):  # fmt: skip
    if shares is None:
        _row_gradient_of(chunk, known, terms, given, divergence_out, out, by, form)
    else:
        at_0: tl.constexpr = ends.at_0
        at_1: tl.constexpr = ends.at_1
        own = _own_numbers(by, shares)
        if own.mixture.teacher == 0:
            _row_gradient_of(chunk, known, terms, given, divergence_out, out, own, at_0)
        elif own.mixture.student == 0:
            _row_gradient_of(chunk, known, terms, given, divergence_out, out, own, at_1)
        else:
            _row_gradient_of(chunk, known, terms, given, divergence_out, out, own, form)


@triton.jit
def _row_gradient_of(chunk, known, terms, given, divergence_out, out, by: Numbers, form: tl.constexpr):
    one, pair = _row_of(chunk)
    row, reference = _load_row(known, one, by, form)
    sums = Terms(
        tl.load(terms + one), tl.load(terms + chunk.rows + one), tl.load(terms + 2 * chunk.rows + one),
        tl.load(terms + 3 * chunk.rows + one),
    )  # fmt: skip
    divergence, mean = concluded_terms(sums, reference, form.objective)
    tl.store(divergence_out + one, divergence)
    if out is not None:
        scale = gradient_scale(tl.load(given.weight + one), by, form.objective)
        of_policy = None
        if given.coefficient is not None:
            column = tl.load(given.target + one)
            target, _ = _target_entry(pair, column, form)
            lse = tl.load(known.student_lse + one)
            student = target.other if form.objective == FORWARD else target.own
            logp = (student.reshape(1).to(tl.float64) * by.inverse_temperature - lse).to(tl.float32)
            pull = tl.load(given.coefficient + one) * by.inverse_temperature
            of_policy = Pull(pull, column, target, minus_other(logp))
        _write_gradient(out, pair, row, mean, scale, of_policy, by, form)


@triton.jit
def _target_entry(pair: Pair, column, form: tl.constexpr):
    """The (1, 1, 1) entry of a row's target, and whether it is here."""
    exists = (column >= 0) & (column < pair.vocabulary)
    column = tl.where(exists, column, 0)
    s, t = tl.load(pair.student + column, exists, 0.0), tl.load(pair.teacher + column, exists, 0.0)
    return _entries(s.reshape(1, 1, 1), t.reshape(1, 1, 1), form), exists


@triton.jit
def store_policy(advantage, coefficient, ratio, lowest, highest, logp, scalars, rows, one):
    """Stores a row's policy loss and whether it is clipped, and returns coefficient A r, 0 where it is."""
    ratio = tl.where(logp == logp, ratio, logp)  # a NaN row is NaN throughout
    loss, clipped, slope = policy_terms(advantage, ratio, lowest, highest)
    tl.store(scalars + 5 * rows + one, tl.full((1,), 1.0, tl.float32))
    tl.store(scalars + 6 * rows + one, loss)
    tl.store(scalars + 7 * rows + one, clipped)
    return tl.where(coefficient == 0, 0.0, coefficient * slope)


@triton.jit
def _store_target(pair: Pair, column, scalars, rows, one, s_zero, t_zero, by: Numbers, form: tl.constexpr):
    """Both sides' log-probability of the row's target, and the student's. Ids outside the vocabulary have none: NaN.

    A side's zero is the logit / τ whose probability is 1, in two parts.
    """
    exists = (column >= 0) & (column < pair.vocabulary)
    column = tl.where(exists, column, 0)
    s = tl.where(exists, tl.load(pair.student + column).to(tl.float32), float("nan"))
    t = tl.where(exists, tl.load(pair.teacher + column).to(tl.float32), float("nan"))
    if form.difference:
        t += s
    logp = (s - s_zero[0]) * by.inverse_temperature - s_zero[1]
    tl.store(scalars + 3 * rows + one, logp)
    tl.store(scalars + 4 * rows + one, (t - t_zero[0]) * by.inverse_temperature - t_zero[1])
    return logp


@triton.jit
def row_divergence_kernel(chunk, given, scalars, out, by, shares, form: tl.constexpr, walk: tl.constexpr,
                          ends: tl.constexpr):  # fmt: skip
    """`walk`: the form of the first walk. `shares`: a table of `mixtures`, one of each row, or None; `ends` then."""
    if shares is None:
        _whole_row(chunk, given, scalars, out, by, form, walk)
    else:
        at_0: tl.constexpr = ends.at_0
        at_1: tl.constexpr = ends.at_1
        own = _own_numbers(by, shares)
        if own.mixture.teacher == 0:
            _whole_row(chunk, given, scalars, out, own, at_0, at_0)
        elif own.mixture.student == 0:
            _whole_row(chunk, given, scalars, out, own, at_1, at_1)
        else:
            _whole_row(chunk, given, scalars, out, own, form, walk)


@triton.jit
def _whole_row(chunk, given, scalars, out, by: Numbers, form: tl.constexpr, walk: tl.constexpr):
    one, pair = _row_of(chunk)
    m = _row_moments(pair, by, walk)
    values, row, mean = concluded(m, by, walk.objective)
    divergence = values.divergence
    if has_terms(form.objective):
        reference = mean.reference
        if form.objective != CLIPPED:
            reference = reference_score(row, m.at_top, by, form.objective)
        sums = _row_terms(pair, row, reference, by, form)
        divergence, mean = concluded_terms(sums, reference, form.objective)

    zero, zero_other = (base(m.max_own), values.log_own), (base(m.max_other), values.log_other)
    entropy, other_entropy = values.own_entropy, values.other_entropy
    if form.objective == FORWARD:
        zero, zero_other = zero_other, zero
        entropy, other_entropy = other_entropy, entropy
    tl.store(scalars + one, divergence)
    tl.store(scalars + chunk.rows + one, entropy)
    tl.store(scalars + 2 * chunk.rows + one, other_entropy)
    if given.target is not None:
        target = tl.load(given.target + one)
        logp = _store_target(pair, target, scalars, chunk.rows, one, zero, zero_other, by, form)
    of_policy = None
    if given.advantage is not None:
        policy_ratio = tl.full((1,), 1.0, tl.float32)
        if given.ratio is not None:
            policy_ratio = tl.load(given.ratio + one)
        elif given.old_logp is not None:
            policy_ratio = tl.exp(logp - tl.load(given.old_logp + one))
        advantage, coefficient = tl.load(given.advantage + one), tl.load(given.coefficient + one)
        pull = store_policy(
            advantage, coefficient, policy_ratio, given.lowest, given.highest, logp, scalars, chunk.rows, one
        )
        pull *= by.inverse_temperature
        entry, exists = _target_entry(pair, target, form)
        above = beside_one(entry, row, m, by, form.objective)
        of_policy = Pull(pull, tl.where(exists, target, -1), entry, above)
    if given.old_logp is not None:
        ratio = importance_ratio(logp, tl.load(given.old_logp + one), by.importance_clip)
        tl.store(scalars + 5 * chunk.rows + one, ratio)
    if out is not None:
        scale = gradient_scale(tl.load(given.weight + one), by, form.objective)
        if given.old_logp is not None:
            scale = tl.where(scale == 0, 0.0, scale * ratio)  # which may be NaN
        _write_gradient(out, pair, row, mean, scale, of_policy, by, form)


# ---------------------------------------------------------------------------------------------------------------------
# Launches.


def _chunk(logits: Logits) -> Chunk:
    student, teacher = logits.student, logits.teacher
    return Chunk(student, teacher, student.stride(0), teacher.stride(0), *student.shape)


def _numbers(objective: Objective, importance_clip: float, softcap: float) -> Numbers:
    inverse_softcap = 1.0 / softcap if softcap else 0.0
    constants = mixture(objective.kind, objective.beta)
    return Numbers(1.0 / objective.temperature, objective.entry_clip, importance_clip, inverse_softcap, constants)


def shares(kind: str, beta: Tensor) -> Tensor:
    """The constants of (K,) float64: a table of `mixtures`, whose rows an objective may have as its token_beta."""
    return mixtures(kind, beta)


def _shares(objective: Objective) -> Tensor | None:
    beta = objective.token_beta
    return beta if beta is None or beta.dim() == 2 else shares(objective.kind, beta)


def _ends(logits: Logits, objective: Objective) -> Ends | None:
    """An end that the objective does not have is the objective itself, which no row takes it for."""
    if objective.token_beta is None:
        return None
    return Ends(*(_form(logits, kind or objective.kind) for kind in ENDS[objective.kind]))


def _form(logits: Logits, kind: str) -> Form:
    lanes = min(MAX_LANES, BLOCK // PACK.value)
    return Form(KINDS.index(kind), logits.difference, bool(logits.softcap), BLOCK, lanes)


def given_of(rows: PerRow) -> Given:
    return Given(rows.weight, rows.target, rows.old_logp, *(rows.policy or [None] * 5))


def _output(gradient: Tensor | None) -> Output | None:
    return None if gradient is None else Output(gradient, gradient.stride(0))


def row_divergence(logits: Logits, rows: PerRow, objective: Objective, gradient: Tensor | None = None) -> Scalars:
    """As native.row_divergence, on the tensors' device and its current stream; ids outside [0, V) give NaN."""
    student, (weight, target, old_logp, importance_clip, _) = logits.student, rows
    assert gradient is None or (gradient.shape == student.shape and gradient.stride(1) == 1)
    assert weight.dtype == torch.float32 and weight.is_contiguous()
    assert target is None or (target.dtype == torch.int64 and target.is_contiguous())
    assert old_logp is None or (target is not None and old_logp.dtype == torch.float32 and old_logp.is_contiguous())
    scalars = torch.empty(rows.scalars, len(weight), dtype=torch.float32, device=student.device)
    row_divergence_kernel[(len(weight),)](
        _chunk(logits), given_of(rows), scalars, _output(gradient),
        _numbers(objective, importance_clip, logits.softcap), _shares(objective), form=_form(logits, objective.kind),
        walk=_form(logits, first_walk(objective.kind)), ends=_ends(logits, objective), **options(student.device.type),
    )  # fmt: skip
    return Scalars.of(scalars.unbind())


def row_statistics(logits: Logits, temperature: float) -> RowStatistics:
    """As native.row_statistics."""
    student = logits.student
    lse = torch.empty(2, len(student), dtype=torch.float64, device=student.device)
    others = torch.empty(5, len(student), dtype=torch.float32, device=student.device)
    numbers = _numbers(Objective("jensen_shannon", 0.5, temperature, 0.0), 0.0, 0.0)
    row_statistics_kernel[(len(student),)](
        _chunk(logits), lse, others, numbers, form=_form(logits, "jensen_shannon"), **options(student.device.type)
    )
    return RowStatistics(*lse.unbind(), *others.unbind())


def _known(statistics: RowStatistics) -> Known:
    return Known(*(getattr(statistics, name) for name in Known._fields))


def row_terms(logits: Logits, objective: Objective, statistics: RowStatistics) -> Tensor:  # (4, C) float64
    """As native.row_terms."""
    student = logits.student
    terms = torch.empty(4, len(student), dtype=torch.float64, device=student.device)
    row_terms_kernel[(len(student),)](
        _chunk(logits), _known(statistics), terms, _numbers(objective, 0.0, 0.0), _shares(objective),
        form=_form(logits, objective.kind), ends=_ends(logits, objective), **options(student.device.type),
    )  # fmt: skip
    return terms


def row_gradient(
    logits: Logits,
    objective: Objective,
    statistics: RowStatistics,
    terms: Tensor,
    rows: PerRow,
    gradient: Tensor | None = None,
) -> Tensor:  # (C,) fp32
    """As native.row_gradient."""
    student = logits.student
    divergence = torch.empty(len(student), dtype=torch.float32, device=student.device)
    row_gradient_kernel[(len(student),)](
        _chunk(logits), _known(statistics), terms, given_of(rows), divergence, _output(gradient),
        _numbers(objective, 0.0, logits.softcap), _shares(objective), form=_form(logits, objective.kind),
        ends=_ends(logits, objective), **options(student.device.type),
    )  # fmt: skip
    return divergence
