"""Runs PTX on a CPU: all threads of a grid at once, instruction by instruction, in NumPy.

What Triton's compiler makes of the kernels is PTX, and differs from their Python: products are fused into sums in some
places and not in others, loads are pipelined through shared memory, reductions are shuffles. Here that PTX runs. An
instruction that the kernels have no use for raises.

    add, mul, fma, div.rn, ...         rounded once, as IEEE 754 has them
    ex2, lg2, rcp.approx, div.full     likewise, or with a seed off by as much as PTX's manual allows
    memory                             within the tensors given and aligned, or it raises; so it does if two threads
                                       touch the same place, one to write, and no barrier of their block lies between
    cp.async                           as late as cp.async.wait_group lets it be; till then there is NaN

Registers are arrays (blocks of the grid, threads of a block), or of length 1 where a value is the same throughout.
Threads that went different ways wait for each other at the block of code that comes first in the text.

What is not modelled: tensor cores, clusters, atomics, any order of memory but by barriers of a block, two threads that
write to one place with one instruction, time; and what ptxas makes of PTX, which may fuse a product and a sum that PTX
has apart.
"""

import ctypes
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

WARP = 32
TYPES = {
    "pred": np.bool_,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "bf16x2": np.uint32,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic.


def to_odd(x, y):
    """x + y in float64; of two neighbours of an inexact sum, the one with an odd last bit. Its next rounding, to fewer
    digits, is then that of the exact sum."""
    s = x + y
    of_x = s - y
    error = (x - of_x) + (y - (s - of_x))
    bits = s.view(np.int64)
    step = np.where((error > 0) == (s > 0), 1, -1)
    inexact = (error != 0) & np.isfinite(s) & (bits & 1 == 0)
    return np.where(inexact, bits + step, bits).view(np.float64)


def fma(a, b, c):
    """a b + c, rounded once."""
    if a.dtype == np.float32:  # a product of two is exact in float64
        a, b, c = (x.astype(np.float64) for x in (a, b, c))
        return to_odd(a * b, c).astype(np.float32)
    # Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd"
    high, low = _exact_product(a, b)
    plain = high + c
    sum_low, rest_low = _exact_sum(c, low)
    sum_high, rest_high = _exact_sum(high, sum_low)
    fused = sum_high + to_odd(rest_low, rest_high)
    return np.where(np.isfinite(fused), fused, plain)


def _exact_sum(x, y):
    s = x + y
    of_x = s - y
    return s, (x - of_x) + (y - (s - of_x))


def _exact_product(a, b):
    """Dekker's: a b as a sum of two, unless a half overflows."""
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    product = a * b
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(x):
    large = x * 134217729.0  # 2^27 + 1
    high = large - (large - x)
    return high, x - high


def flushed(x):
    """Subnormal numbers are 0 of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def to_bf16(x):
    """To nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def sign_of(arguments, seed):
    """+1 or -1, the same for the same arguments."""
    mixed = np.uint32(seed * 0x9E3779B1 & 0xFFFFFFFF)
    for x in arguments:
        for shift in range(0, 8 * x.itemsize, 32):
            part = (x.view(UNSIGNED[x.itemsize]) >> UNSIGNED[x.itemsize](shift)).astype(np.uint32)
            mixed = (mixed ^ part) * np.uint32(0x85EBCA77)
            mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0xC2B2AE3D)
    return 1.0 - 2.0 * (mixed >> np.uint32(31))


def _log2_bound(y):
    """2^-22 absolute of log2 between -1 and 1, relative else."""
    return 2.0**-22 * np.maximum(np.abs(y), 1)


# Exact functions in float64, and how far off the PTX manual lets their instructions be.
APPROXIMATE = {
    "ex2.approx": (np.exp2, lambda y: 2.0**-22 * y * (y != 1)),
    "lg2.approx": (np.log2, _log2_bound),
    "rcp.approx": (np.reciprocal, lambda y: 2.0**-23 * np.abs(y)),
    "div.full": (np.divide, lambda y: 2.0**-22 * np.abs(y)),
}


def approximate(name: str, seed: int | None) -> Callable:
    exact, bound = APPROXIMATE[name]

    def function(*arguments):
        y = exact(*(x.astype(np.float64) for x in arguments))
        if seed is not None:
            y = y + np.where(np.isfinite(y), bound(y) * sign_of(arguments, seed), 0)
        return y.astype(arguments[0].dtype)

    return function


def _shifted(shift: Callable, x, by):
    """By as many bits as there are, or more, as by all of them."""
    width = 8 * x.itemsize
    by = np.minimum(by, width - 1).astype(x.dtype) if x.dtype.kind == "i" else by.astype(x.dtype)
    return shift(x, by) if x.dtype.kind == "i" else np.where(by < width, shift(x, by), 0).astype(x.dtype)


def _wide(x):
    return x.astype({np.dtype(np.int32): np.int64, np.dtype(np.uint32): np.uint64}[x.dtype])


EXACT = {
    "add": np.add, "add.rn": np.add, "sub": np.subtract, "sub.rn": np.subtract, "mul": np.multiply,
    "mul.rn": np.multiply, "mul.lo": np.multiply, "fma.rn": fma, "div.rn": np.divide, "sqrt.rn": np.sqrt,
    "neg": np.negative, "abs": np.abs, "max": np.fmax, "min": np.fmin, "max.NaN": np.maximum, "min.NaN": np.minimum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "mov": np.copy,
    "mad.lo": lambda a, b, c: a * b + c,
    "mul.wide": lambda a, b: _wide(a) * _wide(b),
    "mad.wide": lambda a, b, c: _wide(a) * _wide(b) + c,
    "shl": lambda x, by: _shifted(np.left_shift, x, by),
    "shr": lambda x, by: _shifted(np.right_shift, x, by),
    "bfe": lambda x, start, length: (x >> start) & ((np.uint32(1) << length) - np.uint32(1)),
    "selp": lambda a, b, p: np.where(p, a, b),
}  # fmt: skip
# False where one is NaN, but for those that end in u.
COMPARISONS = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a < b) | (a > b), "num": lambda a, b: (a == a) & (b == b),
    "neu": np.not_equal, "equ": lambda a, b: ~((a < b) | (a > b)), "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip


class Operation(NamedTuple):
    function: Callable
    result: type
    operands: Sequence[type]


def operation(opcode: str, operands: int, seed: int | None) -> Operation:
    """What an opcode of so many operands computes."""
    name, *modifiers = opcode.split(".")
    if name == "cvt":
        return _conversion(opcode)
    ftz = "ftz" in modifiers
    *modifiers, kind = (x for x in modifiers if x != "ftz")
    key, element = ".".join([name, *modifiers]), TYPES.get(kind)
    if name == "setp":
        function = COMPARISONS.get(".".join(modifiers))
    elif key in APPROXIMATE:
        function = approximate(key, seed)
    else:
        function = EXACT.get(key)
    if function is None or element is None:
        raise NotImplementedError(opcode)
    if ftz:
        function = _flushing(function)
    types, result = [element] * operands, np.bool_ if name == "setp" else element
    if name in ("shl", "shr"):
        types[1] = np.uint32
    elif name == "bfe":
        types[1:] = np.uint32, np.uint32
    elif name == "selp":
        types[2] = np.bool_
    elif "wide" in modifiers:
        result = {np.int32: np.int64, np.uint32: np.uint64}[element]
        types[2:] = [result] * (operands - 2)
    return Operation(function, result, types)


def _flushing(function: Callable) -> Callable:
    def flushing(*arguments):
        y = function(*map(flushed, arguments))
        return y if y.dtype == np.bool_ else flushed(y)

    return flushing


def _conversion(opcode: str) -> Operation:
    _, *modifiers, to, of = opcode.split(".")
    ftz = "ftz" in modifiers
    rounding = [x for x in modifiers if x != "ftz"]
    target, source = TYPES[to], TYPES[of]
    if (to, of, rounding) == ("bf16", "f32", ["rn"]):
        return Operation(to_bf16, target, (source,))
    if (to, of, rounding) == ("bf16x2", "f32", ["rn"]):
        pair = lambda high, low: to_bf16(high).astype(np.uint32) << np.uint32(16) | to_bf16(low)  # noqa: E731
        return Operation(pair, target, (source, source))
    if (to, of, rounding) == ("f32", "bf16", []):
        widen = lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32)  # noqa: E731
        return Operation(widen, target, (source,))
    if to == of and rounding in (["rmi"], ["rpi"]):
        function = np.floor if rounding == ["rmi"] else np.ceil
        return Operation(_flushing(function) if ftz else function, target, (source,))
    integers = np.dtype(target).kind in "iu" and np.dtype(source).kind in "iu" and not rounding
    nearest = np.dtype(target).kind == "f" and rounding == ["rn"]
    widened = np.dtype(target).kind == np.dtype(source).kind == "f" and not rounding
    if ftz or "bf16" in opcode or not (integers or nearest or widened):
        raise NotImplementedError(opcode)
    return Operation(lambda x: x.astype(target), target, (source,))


# ---------------------------------------------------------------------------------------------------------------------
# Memory.


class RaceError(Exception):
    """Two threads touched the same place, one to write, and nothing orders them."""


class Touches:
    """Who touched each pair of bytes last, and in which of its block's intervals between barriers.

    Somebody is block · (threads + 1) + thread, or with thread = threads several of a block.
    """

    NOBODY, ANYBODY = -1, -2

    def __init__(self, pairs: int, threads: int):
        self.by = np.full(pairs, self.NOBODY, np.int32)
        self.at = np.zeros(pairs, np.int32)
        self.threads = threads

    def unordered(self, place, me, at):
        """Whether the last touch is of somebody else, with no barrier between."""
        by = self.by[place]
        return (by != self.NOBODY) & (by != me) & ((self.at[place] == at) | (self._block(by) != self._block(me)))

    def _block(self, somebody):
        return somebody // (self.threads + 1)

    def note(self, place, me, at):
        others = self.unordered(place, me, at)
        new = np.where(others, self._all(self.by[place], me), me)
        self.by[place], self.at[place] = new, at
        kept = self.by[place]  # one of those who touched it with this instruction
        twice = kept != new
        self.by[place[twice]] = self._all(kept, me)[twice]

    def _all(self, somebody, me):
        block = self._block(me)
        return np.where(self._block(somebody) == block, block * (self.threads + 1) + self.threads, self.ANYBODY)


class Memory:
    """Bytes at offsets from 0, and the order in which threads touch them."""

    def __init__(self, data: np.ndarray, threads: int):
        self.data = data
        self.reads, self.writes = (Touches(-(-len(data) // 2), threads) for _ in range(2))

    def touch(self, offset, width: int, me, at, write: bool) -> None:
        place = offset[:, None] // 2 + np.arange(max(width // 2, 1))
        me, at = (np.broadcast_to(x[:, None], place.shape) for x in (me, at))
        race = self.writes.unordered(place, me, at)
        if write:
            race |= self.reads.unordered(place, me, at)
        if race.any():
            raise RaceError(f"{race.any(axis=1).sum()} {'writes' if write else 'reads'} of {width} bytes")
        (self.writes if write else self.reads).note(place, me, at)

    def read(self, offset, width: int) -> np.ndarray:
        return self.data[offset[:, None] + np.arange(width)]

    def write(self, offset, values: np.ndarray) -> None:
        self.data[offset[:, None] + np.arange(values.shape[1])] = values


class Tensors:
    """The bytes of tensors at their addresses, as one memory; some may lie over each other."""

    def __init__(self, spans: Sequence[tuple[int, int]]):
        """spans: address and length in bytes of each."""
        self.starts, self.ends = [], []
        for start, length in sorted(spans):
            if self.starts and start < self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], start + length)
            else:
                self.starts.append(start)
                self.ends.append(start + length)
        sizes = [-(-(end - start) // 2) * 2 for start, end in zip(self.starts, self.ends, strict=True)]
        self.offsets = np.cumsum([0, *sizes])
        self.views = [
            np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
            for start, end in zip(self.starts, self.ends, strict=True)
        ]
        self.data = np.zeros(self.offsets[-1], np.uint8)
        for view, offset in zip(self.views, self.offsets, strict=False):
            self.data[offset : offset + len(view)] = view

    def store(self) -> None:
        for view, offset in zip(self.views, self.offsets, strict=False):
            view[:] = self.data[offset : offset + len(view)]

    def offset(self, address, width: int):
        address = address.astype(np.int64)
        span = np.searchsorted(self.starts, address, side="right") - 1
        end = np.take(self.ends or [0], span)
        inside = (span >= 0) & (address + width <= end)
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} accesses of {width} bytes outside of the tensors")
        if (address % width).any():
            raise IndexError(f"unaligned accesses of {width} bytes")
        return address - np.take(self.starts, span) + self.offsets[span]


# ---------------------------------------------------------------------------------------------------------------------
# Text to instructions.


class Instruction(NamedTuple):
    guard: str | None  # a predicate, with ! if it is to be false
    opcode: str
    operands: tuple[str | tuple[str, ...], ...]  # the first is the result, where there is one

    def __str__(self) -> str:
        return f"{self.guard or ''} {self.opcode} {self.operands}"


class Address(NamedTuple):
    base: str
    offset: int


def parsed(text: str) -> tuple[list[str], list[Instruction | str], dict[str, str]]:
    """A function's parameters' types by name, instructions and labels in order, and registers' types by prefix."""
    text = re.sub(r"//.*", "", text)
    header, body = text.split("\n{\n", 1)
    body = body.split("\n}", 1)[0]
    parameters = {name: kind for kind, name in re.findall(r"\.param \.(\w+)[^,)]*?(\w+)(?=[,\n)])", header)}
    registers, code = {}, []
    for line in (x.strip() for x in body.splitlines()):
        if re.fullmatch(r"[$\w]+:", line):
            code.append(line[:-1])
        elif not line.startswith(".") or line.startswith(".reg"):
            for statement in (x.strip(" \t{}") if x.strip(" \t")[:1] in "{}" else x.strip() for x in line.split(";")):
                if statement.startswith(".reg"):
                    kind, name = re.fullmatch(r"\.reg \.(\w+)\s+([%\w]+?)(?:<\d+>)?", statement).groups()
                    registers[name] = kind
                elif statement:
                    code.append(_instruction(statement))
    return parameters, code, registers


def _instruction(statement: str) -> Instruction:
    guard, opcode, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([\w.:]+)\s*(.*)", statement).groups()
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", rest)
    return Instruction(guard, opcode, tuple(map(_operand, operands)))


def _operand(text: str):
    if text[0] == "{":
        return tuple(text[1:-1].replace(",", " ").split())
    if text[0] == "[":
        base, offset = re.fullmatch(r"\[\s*([\w%$]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text).groups()
        return Address(base, int(offset or 0))
    return text


def _registers(operand) -> tuple[str, ...]:
    return (operand,) if isinstance(operand, str) else operand


# ---------------------------------------------------------------------------------------------------------------------
# Instructions to steps, and steps over all threads of a grid.


class Block(NamedTuple):
    """Steps, and where those threads go then of which the guard is true; the others go to the next block."""

    steps: list[Callable]
    guard: str | None
    target: int | None


class Program:
    """A compiled kernel.

    Args:
        text: PTX, with one function.
        seed: of the errors of approximate instructions; None: they have none.
    """

    def __init__(self, text: str, seed: int | None = None):
        self.parameters, code, self.registers = parsed(text)
        self.threads = int(re.search(r"\.reqntid (\d+)", text)[1])
        self.seed = seed
        targets = {x.operands[0] for x in code if isinstance(x, Instruction) and x.opcode.startswith("bra")}
        pieces, names = [[]], {}
        for item in code:
            if isinstance(item, Instruction):
                pieces[-1].append(item)
            if item in targets:
                if pieces[-1]:
                    pieces.append([])
                names[item] = len(pieces) - 1
            elif isinstance(item, Instruction) and item.opcode.split(".")[0] in ("bra", "ret"):
                pieces.append([])
        names["the end"] = len(pieces)
        self.blocks = []
        for piece in pieces:
            guard, target = None, None
            if piece and piece[-1].opcode in ("bra", "bra.uni", "ret"):
                guard, opcode, operands = piece.pop()
                target = names["the end" if opcode == "ret" else operands[0]]
            self.blocks.append(Block([self._step(x) for x in piece], guard, target))

    def run(self, grid: tuple[int, int, int], arguments: Sequence, spans: Sequence[tuple[int, int]], shared: int):
        """Runs all blocks of a grid.

        Args:
            arguments: numbers, and pointers as numbers, in the order of the parameters.
            spans: address and bytes of each tensor that the kernel may touch.
            shared: bytes of a block's shared memory.
        """
        if len(arguments) != len(self.parameters):
            raise TypeError(f"arguments: expected {len(self.parameters)}, got {len(arguments)}")
        with np.errstate(all="ignore"):
            threads = Threads(self, grid, arguments, Tensors(spans), shared)
            threads.run(self.blocks)
            threads.tensors.store()

    # Each of the following returns a step: what an instruction does to threads, of which some are active (None: all).

    def _step(self, instruction: Instruction) -> Callable:
        guard, opcode, operands = instruction
        try:
            step = self._unguarded(opcode, operands)
        except (NotImplementedError, ValueError, KeyError, AssertionError) as error:
            raise NotImplementedError(f"{instruction}") from error
        if guard is None:
            return step

        def guarded(threads, active):
            chosen = threads.predicate(guard)
            step(threads, chosen if active is None else chosen & active)

        return guarded

    def _unguarded(self, opcode: str, operands: tuple) -> Callable:
        name, *modifiers = opcode.split(".")
        if name in ("ld", "st"):
            return self._memory(name, modifiers, operands)
        if name == "cp":
            return self._copy(opcode, operands)
        if name == "bar":
            assert (opcode, operands) == ("bar.sync", ("0",))
            return Threads.barrier
        if name == "ldmatrix":
            return self._matrices(opcode, operands)
        if name in ("shfl", "redux"):
            return self._warp(opcode, operands)
        if name == "mov" and any(isinstance(x, tuple) for x in operands):
            return self._parts(operands, TYPES[modifiers[-1]])
        to, *of = operands
        function, result, types = operation(opcode, len(of), self.seed)
        sources = [self._source(x, t) for x, t in zip(of, types, strict=True)]
        self._check(to, result)

        def compute(threads, active):
            threads.write(to, function(*[source(threads) for source in sources]), active)

        return compute

    def _declared(self, register: str) -> type:
        return TYPES[self.registers[re.sub(r"\d+$", "", register) if register[0] == "%" else register]]

    def _check(self, register: str, element: type) -> None:
        if np.dtype(self._declared(register)).itemsize != np.dtype(element).itemsize:
            raise ValueError(f"{register} as {element}")

    def _source(self, operand: str, element: type) -> Callable:
        """What reads an operand from threads, as an array of a type."""
        if operand in SPECIAL:
            return lambda threads: SPECIAL[operand](threads)
        if operand == "global_smem":
            return lambda threads: np.zeros((1, 1), element)
        if operand[0] == "%" or operand in self.registers:
            self._check(operand, element)
            return lambda threads: threads.registers[operand].view(element)
        constant = _constant(operand, element)
        return lambda threads: constant

    def _memory(self, name: str, modifiers: list[str], operands: tuple) -> Callable:
        space, *modifiers, kind = modifiers
        space = space.removesuffix("::cta")
        address, values = operands if name == "st" else operands[::-1]
        values = _registers(values)
        assert modifiers == ([] if len(values) == 1 else [f"v{len(values)}"])
        if space == "param":
            (register,) = values
            number = list(self.parameters).index(address.base)
            assert address.offset == 0 and name == "ld"
            wide = self._declared(register) if kind[0] in "us" else TYPES[kind]  # integers may be extended
            self._check(register, wide)
            return lambda threads, active: threads.write(
                register, threads.arguments[number].view(TYPES[kind]).astype(wide), active
            )
        assert space in ("global", "shared")
        element = TYPES[kind]
        size = np.dtype(element).itemsize
        # Integers of few bits lie in wider registers.
        declared = {self._declared(x) for x in values if x[0] == "%"}
        wide = declared.pop() if kind in ("b8", "b16") and len(declared) == 1 else element
        where = self._source(address.base, np.uint64 if space == "global" else np.uint32)

        def load(threads, active):
            data = threads.load(space, where(threads), address.offset, size * len(values), active)
            for i, register in enumerate(values):
                value = np.ascontiguousarray(data[:, size * i : size * (i + 1)]).view(element)[:, 0]
                threads.write_some(register, value.astype(wide), active)

        if name == "ld":
            for register in values:
                self._check(register, wide)
            return load
        sources = [self._source(x, wide) for x in values]

        def store(threads, active):
            data = np.stack([threads.some(source(threads), active).astype(element) for source in sources], axis=1)
            threads.store(space, where(threads), address.offset, data.view(np.uint8), active)

        return store

    def _copy(self, opcode: str, operands: tuple) -> Callable:
        if opcode == "cp.async.commit_group":
            return Threads.commit
        if opcode == "cp.async.wait_group":
            return lambda threads, active: threads.wait(int(operands[0]), active)
        assert opcode in ("cp.async.cg.shared.global", "cp.async.ca.shared.global")
        to, of, width, *length = operands
        width = int(width, 0)
        target, source = self._source(to.base, np.uint32), self._source(of.base, np.uint64)
        read = self._source(length[0] if length else str(width), np.uint32)

        def copy(threads, active):
            threads.copy(target(threads) + np.uint32(to.offset), source(threads) + np.uint64(of.offset), width,
                         read(threads), active)  # fmt: skip

        return copy

    def _warp(self, opcode: str, operands: tuple) -> Callable:
        to, of, *rest = operands
        if opcode in ("shfl.sync.bfly.b32", "shfl.sync.up.b32"):
            lanes, by = np.arange(WARP), int(rest[0])
            goes_up = "up" in opcode
            assert rest[1:] == ["0" if goes_up else "31", "-1"]
            lanes = np.where(lanes < by, lanes, lanes - by) if goes_up else lanes ^ by
            source, members = self._source(of, np.uint32), None
        else:
            name, kind = opcode.removeprefix("redux.sync.").split(".")
            reduce = {"min": np.minimum, "max": np.maximum, "add": np.add}[name]
            source, members = self._source(of, TYPES[kind]), self._source(rest[0], np.uint32)
        self._check(to, np.uint32)

        def exchange(threads, active):
            threads.need_whole(WARP, active)
            if members is not None:
                assert (members(threads) == 0xFFFFFFFF).all(), "a warp's members: expected all"
            x = np.broadcast_to(source(threads), threads.shape).reshape(threads.shape[0], -1, WARP)
            if members is None:
                x = x[..., lanes]
            else:
                x = reduce.reduce(x, axis=-1, keepdims=True, dtype=x.dtype).repeat(WARP, axis=-1)
            threads.write(to, x.reshape(threads.shape), active)

        return exchange

    def _matrices(self, opcode: str, operands: tuple) -> Callable:
        """Four matrices of eight rows of 16 bytes: each thread has a row's address, and gets a word of each matrix."""
        assert opcode == "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
        to, address = operands
        where = self._source(address.base, np.uint32)
        for register in to:
            self._check(register, np.uint32)

        def load(threads, active):
            threads.need_whole(WARP, active)
            assert active is None, "ldmatrix: expected all threads"
            rows = threads.load("shared", where(threads), address.offset, 16, None)
            words = rows.view(np.uint32).reshape(-1, len(to), WARP)  # a warp's: matrix, then row and word
            for i, register in enumerate(to):
                threads.write(register, words[:, i].reshape(threads.shape), None)

        return load

    def _parts(self, operands: tuple, whole: type) -> Callable:
        """mov of a register to or from several, low digits first."""
        to, of = operands
        several = to if isinstance(to, tuple) else of
        part = UNSIGNED[np.dtype(whole).itemsize // len(several)]
        bits = 8 * np.dtype(part).itemsize
        if several is to:
            source = self._source(of, whole)

            def split(threads, active):
                for i, register in enumerate(to):
                    if register != "_":
                        threads.write(register, (source(threads) >> whole(bits * i)).astype(part), active)

            return split
        sources = [self._source(x, part) for x in of]

        def join(threads, active):
            parts = [source(threads).astype(whole) << whole(bits * i) for i, source in enumerate(sources)]
            threads.write(to, sum(parts[1:], parts[0]), active)

        return join


SPECIAL = {
    "%tid.x": lambda threads: np.arange(threads.shape[1], dtype=np.uint32)[None],
    **{f"%ctaid.{x}": lambda threads, i=i: threads.blocks[i] for i, x in enumerate("xyz")},
    **{f"%nctaid.{x}": lambda threads, i=i: np.uint32([[threads.grid[i]]]) for i, x in enumerate("xyz")},
}


def _constant(text: str, element: type) -> np.ndarray:
    """0f3F800000 and 0d3FF0000000000000 are the bits of 1.0; the others are integers."""
    size = np.dtype(element).itemsize
    if text[:2] in ("0f", "0d"):
        assert len(text) == 2 + 2 * size
        bits = int(text[2:], 16)
    else:
        bits = int(text, 0) & (1 << 8 * size) - 1
    return np.array([[bits]], UNSIGNED[size]).view(element)


class Threads:
    """All threads of a grid."""

    def __init__(
        self, program: Program, grid: tuple[int, int, int], arguments: Sequence, tensors: Tensors, shared: int
    ):
        count = int(np.prod(grid))
        self.grid, self.shape = grid, (count, program.threads)
        self.blocks = [x.astype(np.uint32)[:, None] for x in np.unravel_index(np.arange(count), grid, order="F")]
        self.registers = {}
        self.arguments = [
            np.array([[x if kind[0] == "f" else int(x) & (1 << 8 * np.dtype(TYPES[kind]).itemsize) - 1]], TYPES[kind])
            for kind, x in zip(program.parameters.values(), arguments, strict=True)
        ]
        self.declared = program.registers
        self.tensors, self.shared = tensors, shared
        self.memory = {
            "global": Memory(tensors.data, program.threads),
            "shared": Memory(np.full(count * shared, 0xFF, np.uint8), program.threads),
        }
        self.interval = np.zeros((count, 1), np.int32)
        self.copies = [[]]  # groups of what cp.async still has to do

    def run(self, blocks: list[Block]) -> None:
        at = np.zeros(self.shape, np.int32)
        while (now := at.min()) < len(blocks):
            active = at == now
            if active.all():
                active = None
            for step in blocks[now].steps:
                step(self, active)
            follow = now + 1
            if blocks[now].target is not None:
                follow = blocks[now].target
                if blocks[now].guard is not None:
                    follow = np.where(self.predicate(blocks[now].guard), follow, now + 1)
            at = np.where(at == now, follow, at)

    def predicate(self, guard: str):
        return ~self.registers[guard[1:]] if guard[0] == "!" else self.registers[guard]

    def write(self, register: str, value, active) -> None:
        if active is not None:
            value = np.where(active, value, self._before(register, value.dtype))
        self.registers[register] = value

    def _before(self, register: str, element):
        """What a register has before it is written to at all: ones, a NaN."""
        if register in self.registers:
            return self.registers[register].view(element)
        return np.full((1, 1), 0xFF, np.uint8).repeat(element.itemsize, axis=1).view(element)

    def some(self, value, active):
        """(n,) values of the active threads."""
        value = np.broadcast_to(value, self.shape)
        return value.reshape(-1) if active is None else value[np.broadcast_to(active, self.shape)]

    def write_some(self, register: str, value, active) -> None:
        if active is None:
            self.registers[register] = value.reshape(self.shape)
        else:
            whole = np.array(np.broadcast_to(self._before(register, value.dtype), self.shape))
            whole[np.broadcast_to(active, self.shape)] = value
            self.registers[register] = whole

    def need_whole(self, size: int, active) -> None:
        """Raises unless the threads of each warp, or block, have come here together."""
        if active is not None:
            together = np.broadcast_to(active, self.shape).reshape(self.shape[0], -1, size)
            if (together.any(axis=-1) != together.all(axis=-1)).any():
                raise RuntimeError(f"expected {size} threads together, got some of them")

    def barrier(self, active) -> None:
        self.need_whole(self.shape[1], active)
        arrived = np.ones(self.shape, bool) if active is None else np.broadcast_to(active, self.shape)
        self.interval = self.interval + arrived.any(axis=1, keepdims=True)

    def _touched(self, space: str, address, width: int, active, write: bool):
        """Offsets in a memory of what the active threads touch, in order and within bounds."""
        block, thread = (self.some(x, active) for x in np.ogrid[: self.shape[0], : self.shape[1]])
        address = self.some(address, active)
        if space == "global":
            offset = self.tensors.offset(address, width)
        else:
            if (address.astype(np.int64) + width > self.shared).any() or (address % width).any():
                raise IndexError(f"shared memory: {width} bytes outside of {self.shared}, or unaligned")
            offset = block * self.shared + address
        me, at = block * (self.shape[1] + 1) + thread, self.some(self.interval, active)
        self.memory[space].touch(offset, width, me, at, write)
        return offset

    def load(self, space: str, address, offset: int, width: int, active):
        address = address + np.int64(offset).astype(address.dtype)
        return self.memory[space].read(self._touched(space, address, width, active, write=False), width)

    def store(self, space: str, address, offset: int, data, active) -> None:
        address = address + np.int64(offset).astype(address.dtype)
        self.memory[space].write(self._touched(space, address, data.shape[1], active, write=True), data)

    def copy(self, target, source, width: int, read, active) -> None:
        assert active is None, "cp.async: expected all threads"
        offset = self._touched("shared", target, width, None, write=True)
        self.memory["shared"].write(offset, np.full((len(offset), width), 0xFF, np.uint8))
        self.copies[-1].append((target, source, width, read))

    def commit(self, active) -> None:
        self.copies.append([])

    def wait(self, but: int, active) -> None:
        """For all groups but so many of the last."""
        due = max(len(self.copies) - 1 - but, 0)
        for target, source, width, read in (copy for group in self.copies[:due] for copy in group):
            whole = np.broadcast_to(read, self.shape) == width
            assert (whole | (np.broadcast_to(read, self.shape) == 0)).all(), "cp.async: expected all or nothing"
            data = np.zeros((whole.size, width), np.uint8)
            data[whole.reshape(-1)] = self.load("global", source, 0, width, whole)
            self.store("shared", target, 0, data, None)
        self.copies = self.copies[due:]
