"""Schedule 2: Triton from end to end, with logits in registers only, tile by tile of rows × vocabulary.

    walk 1   z_s = h_s W_sᵀ, z_t = h_t W_tᵀ of a tile in fp32, its moments, merged along the vocabulary
    walk 2   the Jensen-Shannon terms of every tile (at beta 0 and 1 walk 1 has the value already)
    walk 3   G = w ∂D/∂z_s of all rows and one slab of the vocabulary, a few megabytes, and from it
             ∂W[slab] = Gᵀ h_s    (the library's product: every entry is written once)
             ∂h      += G W[slab] (a kernel: fp32 sums, kept between slabs in 24 bits: see `grad_hidden_kernel`)

A tile of a shared head is loaded once for both sides. Without gradients, walk 3 is left out and nothing of the size of
anything but rows is allocated. Each row's vocabulary is walked by a few programs, whose moments are merged in the order
of their columns; every entry of every result is written by one program: no atomics, the same bits from run to run.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.divergence_triton import (
    JENSEN_SHANNON,
    Logits,
    Moments,
    Row,
    Terms,
    added_terms,
    base,
    concluded,
    finished_terms,
    gradient_scale,
    importance_ratio,
    logit_gradient,
    merged,
    mixture,
    moments,
    no_terms,
    objective,
    with_reference,
)
from ..problem import Gradients
from .plan import Plan

# Bytes of G, the slab of weighted scores.
SLAB_BYTES = 16 * 2**20
# Numbers a row has between kernels: moments, for every range that its vocabulary is split into, and what every entry
# needs to know of its row.
MOMENTS, ROW = 10, 8
# A tile's columns are taken in so many parts, one after the other. Both sides' logits of a tile fill half of the
# registers; what an eighth of them needs fits into the rest.
PARTS = 8
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Tile(NamedTuple):
    """Blocks of rows, vocabulary and width, warps, and stages of the loads' pipeline.

    maxnreg is a cap on registers: with one, ptxas does not spill to fit a second program.
    """

    ROWS: int
    COLUMNS: int
    WIDTH: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def blocks(self) -> dict[str, int]:
        return {"ROWS": self.ROWS, "COLUMNS": self.COLUMNS, "WIDTH": self.WIDTH}

    def options(self) -> dict[str, int]:
        cap = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **cap}

    def config(self) -> triton.Config:
        return triton.Config(self.blocks(), **self.options())


# Tiles by target and bytes of an element. Those of one target differ in what does not round, so that the choice among
# them, measured on the first call and kept in Triton's cache on disk, changes no bit of any result. All compile without
# spills (tests/test_triton_targets.py); none has been timed on hardware yet.
TILES = {
    ("sm_80", 2): [Tile(64, 128, 64, 8, 3), Tile(64, 128, 32, 8, 3)],
    ("sm_90", 2): [Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 2), Tile(128, 128, 32, 8, 3)],
    ("sm_100", 2): [Tile(128, 64, 64, 8, 3), Tile(128, 64, 64, 8, 4)],
    ("gfx942", 2): [Tile(64, 64, 64, 8, 2), Tile(64, 64, 32, 8, 2)],
    ("sm_80", 4): [Tile(64, 64, 16, 8, 2, 255)],
    ("sm_90", 4): [Tile(64, 64, 16, 8, 2, 255)],
    ("sm_100", 4): [Tile(64, 32, 16, 8, 2, 255)],
    ("gfx942", 4): [Tile(64, 64, 16, 8, 2)],
    ("interpreter", 2): [Tile(32, 64, 16, 1, 1)],
    ("interpreter", 4): [Tile(32, 64, 16, 1, 1)],
}


def target(device: torch.device) -> str:
    """The key of TILES for a device: the newest one that it can run."""
    if device.type == "cpu":
        return "interpreter"
    if device.type == "cuda" and torch.version.hip is None:
        major = torch.cuda.get_device_capability(device)[0]
        return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"
    return "gfx942" if device.type == "cuda" else "sm_80"


def tiles(student: Tensor, teacher: Tensor, width: int, teacher_width: int) -> list[Tile]:
    """The configurations for two sides' hidden states. Widths that no model has would spill in the large tiles."""
    large = student.element_size() == teacher.element_size() == 2 and width % 64 == teacher_width % 64 == 0
    return TILES[target(student.device), 2 if large else 4]


# `grad_hidden_kernel` adds in place and so is not tuned by running it. Its COLUMNS are the slab's, walked inside.
GRAD_HIDDEN_TILES = {
    ("sm_80", 2): Tile(128, 32, 128, 8, 3),
    ("sm_90", 2): Tile(128, 64, 128, 8, 3),
    ("sm_100", 2): Tile(128, 64, 128, 8, 3),
    ("gfx942", 2): Tile(128, 32, 64, 8, 2),
    ("sm_80", 4): Tile(64, 32, 64, 8, 2),
    ("sm_90", 4): Tile(64, 32, 64, 8, 2),
    ("sm_100", 4): Tile(64, 32, 64, 8, 2),
    ("gfx942", 4): Tile(64, 32, 64, 8, 2),
    ("interpreter", 2): Tile(32, 32, 32, 1, 1),
    ("interpreter", 4): Tile(32, 32, 32, 1, 1),
}

_tuned = triton.autotune(
    [tile.config() for tile in dict.fromkeys(tile for choice in TILES.values() for tile in choice)],
    key=["width", "teacher_width", "magnitude", "shared", "difference", "descriptors"],
    prune_configs_by={
        "early_config_prune": lambda configs, arguments, **_: [
            tile.config()
            for tile in tiles(*(arguments[name] for name in ("student", "teacher", "width", "teacher_width")))
        ]
    },
    cache_results=True,
)


@triton.jit
def _matrix_tile(pointer, rows, stride, columns, width, inside, EVEN: tl.constexpr):
    """(R, B) of a row-major matrix; 0 beyond its width and where `inside` is false."""
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask, 0.0)


@triton.jit
def _dot(a, b, total, precision: tl.constexpr):
    """total + a b with fp32 sums."""
    if INTERPRETED:  # Triton's interpreter would multiply the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=precision)


@triton.jit
def _head(pointer, stride, vocabulary, width, descriptors: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """A head as `_head_tile` takes it: a tensor descriptor, or the pointer itself."""
    if descriptors:
        head = tl.make_tensor_descriptor(pointer, [vocabulary, width], [stride, 1], [COLUMNS, WIDTH])
    else:
        head = pointer
    return head


@triton.jit
def _head_tile(
    head, stride, first_column, start, vocabulary, width,
    descriptors: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(WIDTH, COLUMNS) of Wᵀ, by the copy engine where `head` is a tensor descriptor."""
    if descriptors:
        w = head.load([first_column, start])
    else:
        columns = first_column + tl.arange(0, COLUMNS)
        k = start + tl.arange(0, WIDTH)
        w = _matrix_tile(head, columns.to(tl.int64), stride, k, width, columns < vocabulary, EVEN)
    return w.T


@triton.jit
def _logits(
    student, student_stride, student_head, student_head_stride, width,
    teacher, teacher_stride, teacher_head, teacher_head_stride, teacher_width,
    student_rows, teacher_rows, inside, first_column, vocabulary,
    shared: tl.constexpr, difference: tl.constexpr, descriptors: tl.constexpr, EVEN: tl.constexpr,
    precision: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile's (ROWS, COLUMNS) of student logits, and of the teacher's or teacher's minus student's."""
    s = tl.zeros((ROWS, COLUMNS), tl.float32)
    t = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        h = _matrix_tile(student, student_rows, student_stride, k, width, inside, EVEN)
        w = _head_tile(student_head, student_head_stride, first_column, start, vocabulary, width, descriptors, EVEN,
                       COLUMNS, WIDTH)  # fmt: skip
        s = _dot(h, w, s, precision)
        if shared:
            x = _matrix_tile(teacher, teacher_rows, teacher_stride, k, width, inside, EVEN)
            if difference:
                x -= h
            t = _dot(x, w, t, precision)
    if not shared:
        for start in range(0, teacher_width, WIDTH):
            k = start + tl.arange(0, WIDTH)
            x = _matrix_tile(teacher, teacher_rows, teacher_stride, k, teacher_width, inside, EVEN)
            w = _head_tile(teacher_head, teacher_head_stride, first_column, start, vocabulary, teacher_width,
                           descriptors, EVEN, COLUMNS, WIDTH)  # fmt: skip
            t = _dot(x, w, t, precision)
    return s, t


@triton.jit
def _half(x, right):
    """The left half of a tile's columns, or the right one, chosen at run time."""
    a, b = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
    return tl.where(right, b, a)


@triton.jit
def _part(s, t, part, first_column, vocabulary, difference: tl.constexpr):
    """One eighth of a tile's columns, -inf beyond the vocabulary, and these columns.

    `part` is a run-time number: with constants, the compiler would keep all parts' intermediates at once and spill.
    """
    s = _half(_half(_half(s, part // 4 == 1), part // 2 % 2 == 1), part % 2 == 1)
    t = _half(_half(_half(t, part // 4 == 1), part // 2 % 2 == 1), part % 2 == 1)
    columns = first_column + part * s.shape[1] + tl.arange(0, s.shape[1])
    exists = (columns < vocabulary)[None, :]
    s = tl.where(exists, s, float("-inf"))
    if difference:
        d = tl.where(exists, t, 0.0)
        t = s + d
    else:
        t = tl.where(exists, t, float("-inf"))
        d = t - s
    return Logits(s, t, d), columns


@triton.jit
def _block_of_rows(student_rows, teacher_rows, count, ROWS: tl.constexpr):
    """This program's numbers among the kept rows, which of them exist, and their rows in both hidden states."""
    numbers = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = numbers < count
    return numbers, inside, tl.load(student_rows + numbers, inside, 0), tl.load(teacher_rows + numbers, inside, 0)


@triton.jit
def _load_row(row, numbers, count, inside):
    """What `_store_row` left for each row."""
    return Row(
        tl.load(row + numbers, inside, 0.0),
        tl.load(row + count + numbers, inside, 0.0),
        tl.load(row + 2 * count + numbers, inside, 0.0),
        tl.load(row + 3 * count + numbers, inside, 0.0),
        tl.load(row + 4 * count + numbers, inside, 0.0),
        tl.load(row + 5 * count + numbers, inside, 0.0),
        tl.load(row + 6 * count + numbers, inside, 0.0),
        tl.load(row + 7 * count + numbers, inside, 0.0),
    )


@triton.jit
def _store_row(row, numbers, count, inside, of_row: Row):
    tl.store(row + numbers, of_row.bias_student, inside)
    tl.store(row + count + numbers, of_row.bias_teacher, inside)
    tl.store(row + 2 * count + numbers, of_row.centre, inside)
    tl.store(row + 3 * count + numbers, of_row.log_ratio, inside)
    tl.store(row + 4 * count + numbers, of_row.inverse_student, inside)
    tl.store(row + 5 * count + numbers, of_row.inverse_teacher, inside)
    tl.store(row + 6 * count + numbers, of_row.reference, inside)
    tl.store(row + 7 * count + numbers, of_row.mean_score, inside)


@triton.jit
def _load_moments(partial, at, step, inside):
    return Moments(
        tl.load(partial + at, inside, float("-inf")),
        tl.load(partial + at + step, inside, float("-inf")),
        tl.load(partial + at + 2 * step, inside, float("-inf")),
        tl.load(partial + at + 3 * step, inside, 0.0),
        tl.load(partial + at + 4 * step, inside, 0.0),
        tl.load(partial + at + 5 * step, inside, 0.0),
        tl.load(partial + at + 6 * step, inside, 0.0),
        tl.load(partial + at + 7 * step, inside, 0.0),
        tl.load(partial + at + 8 * step, inside, 0.0),
        tl.load(partial + at + 9 * step, inside, 0.0),
    )


@triton.jit
def _store_moments(partial, at, step, inside, m: Moments):
    tl.store(partial + at, m.max_student, inside)
    tl.store(partial + at + step, m.max_teacher, inside)
    tl.store(partial + at + 2 * step, m.own, inside)
    tl.store(partial + at + 3 * step, m.centre, inside)
    tl.store(partial + at + 4 * step, m.z_student, inside)
    tl.store(partial + at + 5 * step, m.z_teacher, inside)
    tl.store(partial + at + 6 * step, m.h_student, inside)
    tl.store(partial + at + 7 * step, m.h_teacher, inside)
    tl.store(partial + at + 8 * step, m.linear, inside)
    tl.store(partial + at + 9 * step, m.excess, inside)


@_tuned
@triton.jit
def moments_kernel(
    student, student_stride, student_head, student_head_stride, width,
    teacher, teacher_stride, teacher_head, teacher_head_stride, teacher_width,
    student_rows, teacher_rows, count, vocabulary, magnitude, parts,
    scratch, partial, tiles_each, inverse_temperature,
    objective: tl.constexpr, shared: tl.constexpr, difference: tl.constexpr, descriptors: tl.constexpr,
    EVEN: tl.constexpr, precision: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Walk 1 over `tiles_each` tiles of the vocabulary: moments into partial[:, split, rows].

    Moments wait in memory while the next tile is multiplied, not in registers; `scratch` has a tile's, part by part.
    """
    numbers, inside, rows_s, rows_t = _block_of_rows(student_rows, teacher_rows, count, ROWS)
    head_s = _head(student_head, student_head_stride, vocabulary, width, descriptors, COLUMNS, WIDTH)
    head_t = _head(teacher_head, teacher_head_stride, vocabulary, teacher_width, descriptors, COLUMNS, WIDTH)
    split, splits = tl.program_id(0), tl.num_programs(0)
    first = split * tiles_each * COLUMNS
    last = tl.minimum(first + tiles_each * COLUMNS, vocabulary)
    at, step = split * count + numbers, splits * count
    for column in range(first, last, COLUMNS):
        s, t = _logits(
            student, student_stride, head_s, student_head_stride, width,
            teacher, teacher_stride, head_t, teacher_head_stride, teacher_width,
            rows_s, rows_t, inside, column, vocabulary,
            shared, difference, descriptors, EVEN, precision, ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        for part in range(parts):
            entries, _ = _part(s, t, part, column, vocabulary, difference)
            m = moments(entries, inverse_temperature, objective)
            _store_moments(scratch, part * step + at, parts * step, inside, m)
        tl.debug_barrier()
        m = _load_moments(partial, at, step, inside & (tl.full((ROWS,), column, tl.int32) > first))
        for part in range(parts):
            more = _load_moments(scratch, part * step + at, parts * step, inside)
            m = merged(m, more, inverse_temperature, objective)
        _store_moments(partial, at, step, inside, m)
        tl.debug_barrier()  # before the next tile's parts are written to scratch


@triton.jit
def target_kernel(
    student, student_stride, student_head, student_head_stride, width,
    teacher, teacher_stride, teacher_head, teacher_head_stride, teacher_width,
    student_rows, teacher_rows, count, vocabulary, target, target_logits, WIDTH: tl.constexpr,
):  # fmt: skip
    """target_logits[:, row]: both sides' logit of the row's target; NaN if that is outside the vocabulary."""
    number = tl.program_id(0)
    row_s, row_t = tl.load(student_rows + number), tl.load(teacher_rows + number)
    column = tl.load(target + number)
    exists = (column >= 0) & (column < vocabulary)
    column = tl.where(exists, column, 0)
    s, t = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for start in range(0, width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        h = tl.load(student + row_s * student_stride + k, k < width, 0.0).to(tl.float32)
        w = tl.load(student_head + column * student_head_stride + k, k < width, 0.0).to(tl.float32)
        s += h * w
    for start in range(0, teacher_width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        x = tl.load(teacher + row_t * teacher_stride + k, k < teacher_width, 0.0).to(tl.float32)
        w = tl.load(teacher_head + column * teacher_head_stride + k, k < teacher_width, 0.0).to(tl.float32)
        t += x * w
    tl.store(target_logits + number, tl.where(exists, tl.sum(s, 0), float("nan")))
    tl.store(target_logits + count + number, tl.where(exists, tl.sum(t, 0), float("nan")))


@triton.jit
def conclude_kernel(
    partial, splits, count, target_logits, old_logp, scalars, row,
    inverse_temperature, mixture, importance_clip,
    objective: tl.constexpr, has_target: tl.constexpr, has_old_logp: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merges the splits' moments in the order of their columns: scalars[:, rows] and row[:, rows]."""
    numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = numbers < count
    step = splits * count
    m = _load_moments(partial, numbers, step, inside)
    for split in range(1, splits):
        more = _load_moments(partial, split * count + numbers, step, inside)
        m = merged(m, more, inverse_temperature, objective)
    values, of_row = concluded(m, inverse_temperature, objective)
    if objective == JENSEN_SHANNON:
        of_row = with_reference(of_row, m.own, inverse_temperature, mixture)
    tl.store(scalars + numbers, values.divergence, inside)
    tl.store(scalars + count + numbers, values.student_entropy, inside)
    tl.store(scalars + 2 * count + numbers, values.teacher_entropy, inside)
    if has_target:
        s = tl.load(target_logits + numbers, inside, 0.0)
        t = tl.load(target_logits + count + numbers, inside, 0.0)
        logp = (s - base(m.max_student)) * inverse_temperature - values.log_student
        teacher_logp = (t - base(m.max_teacher)) * inverse_temperature - values.log_teacher
        tl.store(scalars + 3 * count + numbers, logp, inside)
        tl.store(scalars + 4 * count + numbers, teacher_logp, inside)
        if has_old_logp:
            ratio = importance_ratio(logp, tl.load(old_logp + numbers, inside, 0.0), importance_clip)
            tl.store(scalars + 5 * count + numbers, ratio, inside)
    _store_row(row, numbers, count, inside, of_row)


@_tuned
@triton.jit
def terms_kernel(
    student, student_stride, student_head, student_head_stride, width,
    teacher, teacher_stride, teacher_head, teacher_head_stride, teacher_width,
    student_rows, teacher_rows, count, vocabulary, magnitude, parts,
    row, partial, tiles_each, inverse_temperature, mixture,
    shared: tl.constexpr, difference: tl.constexpr, descriptors: tl.constexpr,
    EVEN: tl.constexpr, precision: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Walk 2: sums of the Jensen-Shannon terms over `tiles_each` tiles, into partial[:, part, split, rows].

    As the moments, the sums wait in memory.
    """
    numbers, inside, rows_s, rows_t = _block_of_rows(student_rows, teacher_rows, count, ROWS)
    head_s = _head(student_head, student_head_stride, vocabulary, width, descriptors, COLUMNS, WIDTH)
    head_t = _head(teacher_head, teacher_head_stride, vocabulary, teacher_width, descriptors, COLUMNS, WIDTH)
    split, splits = tl.program_id(0), tl.num_programs(0)
    first = split * tiles_each * COLUMNS
    last = tl.minimum(first + tiles_each * COLUMNS, vocabulary)
    step = parts * splits * count
    for column in range(first, last, COLUMNS):
        s, t = _logits(
            student, student_stride, head_s, student_head_stride, width,
            teacher, teacher_stride, head_t, teacher_head_stride, teacher_width,
            rows_s, rows_t, inside, column, vocabulary,
            shared, difference, descriptors, EVEN, precision, ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        earlier = inside & (tl.full((ROWS,), column, tl.int32) > first)
        for part in range(parts):
            entries, _ = _part(s, t, part, column, vocabulary, difference)
            of_row = _load_row(row, numbers, count, inside)
            like = tl.zeros((ROWS,), tl.float32)
            sums = added_terms(no_terms(like), entries, of_row, inverse_temperature, mixture, 0.0, JENSEN_SHANNON)
            to = partial + (part * splits + split) * count + numbers
            tl.store(to, sums.divergence + tl.load(to, earlier, 0.0), inside)
            tl.store(to + step, sums.score + tl.load(to + step, earlier, 0.0), inside)
        tl.debug_barrier()  # before the next tile reads the sums


@triton.jit
def value_kernel(partial, parts, count, scalars, row, ROWS: tl.constexpr):
    """Sums all parts' terms, always in one order: the divergence, and the mean score of row[:, rows]."""
    numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = numbers < count
    divergence, score = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for part in range(0, parts):
        at = partial + part * count + numbers
        divergence += tl.load(at, inside, 0.0)
        score += tl.load(at + parts * count, inside, 0.0)
    of_row = _load_row(row, numbers, count, inside)
    sums = finished_terms(Terms(divergence, score, score, score), of_row, JENSEN_SHANNON)
    tl.store(scalars + numbers, tl.where(sums.divergence < 0, 0.0, sums.divergence), inside)
    tl.store(row + 7 * count + numbers, sums.score, inside)


@_tuned
@triton.jit
def gradient_kernel(
    student, student_stride, student_head, student_head_stride, width,
    teacher, teacher_stride, teacher_head, teacher_head_stride, teacher_width,
    student_rows, teacher_rows, count, vocabulary, magnitude, parts,
    row, weight, slab, first_column, slab_columns, inverse_temperature, mixture,
    objective: tl.constexpr, shared: tl.constexpr, difference: tl.constexpr, descriptors: tl.constexpr,
    EVEN: tl.constexpr, precision: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Walk 3: one tile of G, slab[rows, columns - first_column]."""
    numbers, inside, rows_s, rows_t = _block_of_rows(student_rows, teacher_rows, count, ROWS)
    head_s = _head(student_head, student_head_stride, vocabulary, width, descriptors, COLUMNS, WIDTH)
    head_t = _head(teacher_head, teacher_head_stride, vocabulary, teacher_width, descriptors, COLUMNS, WIDTH)
    column = first_column + tl.program_id(0) * COLUMNS
    s, t = _logits(
        student, student_stride, head_s, student_head_stride, width,
        teacher, teacher_stride, head_t, teacher_head_stride, teacher_width,
        rows_s, rows_t, inside, column, vocabulary,
        shared, difference, descriptors, EVEN, precision, ROWS, COLUMNS, WIDTH,
    )  # fmt: skip
    of_row = _load_row(row, numbers, count, inside)
    scale = gradient_scale(tl.load(weight + numbers, inside, 0.0), mixture, inverse_temperature, objective)
    to = slab + numbers.to(tl.int64)[:, None] * slab_columns - first_column
    for part in range(parts):
        entries, columns = _part(s, t, part, column, vocabulary, difference)
        g = logit_gradient(entries, of_row, inside, scale, inverse_temperature, mixture, 0.0, objective)
        tl.store(to + columns[None, :], g.to(slab.dtype.element_ty), inside[:, None] & (columns < vocabulary)[None, :])


@triton.jit
def grad_hidden_kernel(
    slab, slab_columns, head, head_stride, width, kept, count, columns, grad_hidden, grad_stride, low, first, last,
    halves: tl.constexpr, EVEN: tl.constexpr, precision: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """grad_hidden[kept] += slab · head, tile by tile of rows × width, with fp32 sums.

    A bf16 gradient is summed in 24 bits between slabs (`halves`): its own 16 hold the upper half of the fp32 number,
    `low` (rows, width) the next 8 bits, rounded. That keeps 2⁻¹⁶ of a sum at a byte an entry. The last slab rounds to
    bf16.
    """
    numbers, inside, rows, _ = _block_of_rows(kept, kept, count, ROWS)
    k = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    mask = inside[:, None] & (k < width)[None, :]
    at = grad_hidden + rows[:, None] * grad_stride + k[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    if halves:
        low += numbers.to(tl.int64)[:, None] * width + k[None, :]
    if first == 0:
        if halves:
            bits = (tl.load(at, mask, 0).to(tl.int32) << 16) | (tl.load(low, mask, 0).to(tl.int32) << 8)
            total = bits.to(tl.float32, bitcast=True)
        else:
            total = tl.load(at, mask, 0.0)
    for start in range(0, columns, COLUMNS):
        v = start + tl.arange(0, COLUMNS)
        g = _matrix_tile(slab, numbers.to(tl.int64), slab_columns, v, columns, inside, False)
        w = _matrix_tile(head, v.to(tl.int64), head_stride, k, width, v < columns, EVEN)
        total = _dot(g, w.to(g.dtype), total, precision)
    if halves:
        if last == 1:
            tl.store(at, total.to(tl.bfloat16).to(tl.int16, bitcast=True), mask)
        else:
            bits = tl.where(total == total, total.to(tl.int32, bitcast=True) + 0x80, 0x7FC00000)
            tl.store(at, (bits >> 16).to(tl.int16), mask)
            tl.store(low, ((bits >> 8) & 0xFF).to(tl.uint8), mask)
    else:
        tl.store(at, total, mask)


# ---------------------------------------------------------------------------------------------------------------------
# The schedule.


def run(plan: Plan) -> tuple[Tensor, Gradients]:  # (rows.scalars, K) fp32
    """Row scalars of the kept rows, and the gradients of Σ weight · importance ratio · divergence."""
    assert plan.shard.group is None and plan.support is None
    (student, student_head), (teacher, teacher_head), rows = plan.student, plan.teacher, plan.rows
    shared = teacher_head.weight is student_head.weight
    student_weight = _unit_stride(student_head.weight)
    teacher_weight = student_weight if shared else _unit_stride(teacher_head.weight)
    grad_hidden, grad_weight_dtype = plan.grad_hidden, plan.wanted.weight
    nothing = Gradients(grad_hidden, None, None, None, None)
    count, vocabulary, device = len(rows.weight), student_weight.shape[0], student.device
    scalars = torch.empty(rows.scalars, count, dtype=torch.float32, device=device)
    if count == 0:
        empty = (
            None
            if grad_weight_dtype is None
            else torch.zeros(student_weight.shape, dtype=grad_weight_dtype, device=device)
        )
        return scalars, nothing._replace(weight=empty)
    choice = tiles(student, teacher, student.shape[1], teacher.shape[1])
    tile = choice[0]
    blocks = triton.cdiv(count, tile.ROWS)
    if MOMENTS * PARTS * count * 128 >= 2**31:  # the kernels count moments in 32 bits
        raise ValueError(f"schedule='tiled': expected fewer than 200000 rows in one call, got {count}; split the call")
    processors, cache = _processors(device)
    resident = cache // 2 // (tile.ROWS * (student.shape[1] + teacher.shape[1]) * student.element_size())
    splits, each = splits_of(triton.cdiv(vocabulary, tile.COLUMNS), blocks, processors, resident)
    beta = plan.objective.beta
    which, constants = objective(beta), (1.0 / plan.objective.temperature, mixture(beta))
    problem = (
        student, student.stride(0), student_weight, student_weight.stride(0), student.shape[1],
        teacher, teacher.stride(0), teacher_weight, teacher_weight.stride(0), teacher.shape[1],
        rows.student, rows.teacher, count, vocabulary,
    )  # fmt: skip
    # What configurations are chosen by, beside the widths: programs for a few rows are not those for many.
    magnitude = min(blocks.bit_length(), 7)
    variant = {
        "shared": shared,
        "difference": plan.difference,
        "descriptors": tile in TILES[target(device), 2] and _has_descriptors(student_weight, teacher_weight),
        "EVEN": all(x.shape[1] % tile.WIDTH == 0 for x in (student, teacher) for tile in choice),
        "precision": _precision(student.dtype),
        "enable_fp_fusion": True,
    }
    if variant["descriptors"]:
        triton.set_allocator(_descriptor_memory)

    row = torch.empty(ROW, count, dtype=torch.float32, device=device)
    partial = torch.empty(MOMENTS, splits, count, dtype=torch.float32, device=device)
    scratch = torch.empty(MOMENTS, PARTS, splits, count, dtype=torch.float32, device=device)
    moments_kernel[splits, blocks](
        *problem, magnitude, PARTS, scratch, partial, each, constants[0], objective=which, **variant
    )
    target_logits = None
    if rows.target is not None:
        target_logits = torch.empty(2, count, dtype=torch.float32, device=device)
        target_kernel[count,](*problem, rows.target, target_logits, WIDTH=1024)
    by_row = {"ROWS": 128, "enable_fp_fusion": True}
    conclude_kernel[triton.cdiv(count, 128),](
        partial, splits, count, target_logits, rows.old_logp, scalars, row, *constants, rows.importance_clip,
        objective=which, has_target=rows.target is not None, has_old_logp=rows.old_logp is not None, **by_row,
    )  # fmt: skip
    if which == JENSEN_SHANNON.value:
        terms_kernel[splits, blocks](*problem, magnitude, PARTS, row, scratch, each, *constants, **variant)
        value_kernel[triton.cdiv(count, 128),](scratch, PARTS * splits, count, scalars, row, **by_row)
    del partial, scratch
    if grad_hidden is None and grad_weight_dtype is None:
        return scalars, nothing

    weight = rows.weight
    if rows.old_logp is not None:
        *_, importance_ratio_of_rows = scalars
        weight = weight * importance_ratio_of_rows
    gradient_dtype = torch.bfloat16 if student_weight.dtype == torch.bfloat16 else torch.float32
    columns = slab_columns(count, vocabulary, gradient_dtype.itemsize, tile.COLUMNS)
    slab = torch.empty(count, columns, dtype=gradient_dtype, device=device)
    grad_weight = hidden = None
    if grad_weight_dtype is not None:
        grad_weight = torch.empty_like(student_weight, dtype=grad_weight_dtype)
        hidden = (student if rows.are_all else student[rows.student]).to(gradient_dtype)
    low = None
    if grad_hidden is not None and grad_hidden.dtype == torch.bfloat16:
        low = torch.empty(count, student.shape[1], dtype=torch.uint8, device=device)
    for first in range(0, vocabulary, columns):
        here = min(columns, vocabulary - first)
        gradient_kernel[triton.cdiv(here, tile.COLUMNS), blocks](
            *problem, magnitude, PARTS, row, weight, slab, first, columns, *constants, objective=which, **variant
        )
        if grad_weight is not None:
            torch.mm(slab[:, :here].t(), hidden, out=grad_weight[first : first + here])
        if grad_hidden is not None:
            _add_grad_hidden(
                slab, here, student_weight[first:], rows.kept, grad_hidden, low, first == 0,
                first + here == vocabulary,
            )  # fmt: skip
    return scalars, nothing._replace(weight=grad_weight)


def _add_grad_hidden(slab, columns, head, rows, grad_hidden, low, first: bool, last: bool) -> None:
    halves = low is not None
    width = head.shape[1]
    tile = GRAD_HIDDEN_TILES[target(slab.device), slab.element_size() if width % 64 == 0 else 4]
    grad_hidden_kernel[triton.cdiv(width, tile.WIDTH), triton.cdiv(len(rows), tile.ROWS)](
        slab, slab.stride(0), head, head.stride(0), width, rows, len(rows), columns,
        grad_hidden.view(torch.int16) if halves else grad_hidden, grad_hidden.stride(0), low, int(first), int(last),
        halves=halves, EVEN=width % tile.WIDTH == 0, precision=_precision(slab.dtype), enable_fp_fusion=True,
        **tile.blocks(), **tile.options(),
    )  # fmt: skip


def splits_of(tiles: int, blocks: int, processors: int, resident: int) -> tuple[int, int]:
    """Into how many ranges of how many tiles the vocabulary is cut: one program for each range and block of rows.

    Programs start range by range, so that about processors / ranges blocks of rows run at once. That is at most
    `resident`, blocks whose hidden states stay in the cache while all of them walk the vocabulary. Among such numbers
    of ranges, few, since each costs the moments of all rows once more, and such that the last programs end together.
    """

    def idle(splits: int) -> float:  # share of the processors' time, by whole waves of programs of equal length
        each = -(-tiles // splits)
        waves = -(-blocks * -(-tiles // each) // processors)
        return 1 - blocks * tiles / (waves * processors * each)

    least = min(tiles, -(-processors // max(1, min(resident, blocks))))
    splits = min(range(least, min(tiles, least + 8) + 1), key=lambda splits: (round(idle(splits), 2), splits))
    each = -(-tiles // splits)
    return -(-tiles // each), each


def slab_columns(rows: int, vocabulary: int, itemsize: int, step: int) -> int:
    """Columns of the slab of weighted scores: SLAB_BYTES of them, in whole tiles, and at least one tile."""
    return min(max(SLAB_BYTES // (rows * itemsize) // step, 1), -(-vocabulary // step)) * step


def _unit_stride(head: Tensor) -> Tensor:
    return head if head.stride(1) == 1 else head.contiguous()


def _processors(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of the cache that they share."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.multi_processor_count, properties.L2_cache_size
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count, 64 * 2**20
    return 6, 2**20


def _has_descriptors(*heads: Tensor) -> bool:
    """Whether the copy engine fetches the heads' tiles.

    That takes a device that has one, 16-byte alignment, and 16-bit entries: with fp32 ones the kernels would spill.
    """
    if target(heads[0].device) not in ("sm_90", "sm_100", "interpreter") or any(x.element_size() != 2 for x in heads):
        return False
    return all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in heads)


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _precision(dtype: torch.dtype) -> str:
    """Of a product: fp32 on matrix units only where PyTorch's own setting allows that."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
