"""The PTX interpreter by itself: arithmetic against fractions, and what it is to refuse."""

from fractions import Fraction

import numpy as np
import ptx
import pytest
import torch

KERNEL = """
.visible .entry f(
    .param .u64 f_param_0,
    .param .u64 .ptr .global .align 1 f_param_1
)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<30>;
    .reg .b64 %rd<30>;
    mov.u32 %r0, %tid.x;
    ld.param.b64 %rd0, [f_param_0];
    ld.param.b64 %rd1, [f_param_1];
    mad.wide.u32 %rd2, %r0, 4, %rd0;
    mad.wide.u32 %rd3, %r0, 4, %rd1; // addresses of this thread's numbers
    ld.global.b32 %r1, [%rd2];
    BODY
    st.global.b32 [%rd3], %r9;
    ret;
}
"""


def run(body, given, seed=None, shared=0):
    """A body that makes a thread's %r9 of its %r1, in 64 threads; a constant where there are fewer numbers."""
    memory = np.zeros((3, 64), np.asarray(given).dtype)
    memory[0] = np.resize(given, 64)
    given, _, result = memory  # nothing is next to them
    program = ptx.Program(KERNEL.replace("BODY", body), seed)
    program.run((1, 1, 1), [given.ctypes.data, result.ctypes.data], [(x.ctypes.data, 256) for x in (given, result)],
                shared)  # fmt: skip
    return result


def test_a_product_is_rounded_before_a_sum_and_not_within_an_fma():
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    product = "mul.f32 %r2, %r1, 0f3FB504F3;"  # sqrt(2)
    apart = run(product + "mul.f32 %r3, %r1, 0f3FB504F3; sub.f32 %r9, %r2, %r3;", x)
    fused = run(product + "neg.f32 %r3, %r2; fma.rn.f32 %r9, %r1, 0f3FB504F3, %r3;", x)
    root = np.array(0x3FB504F3, np.uint32).view(np.float32)
    assert (apart == 0).all() and (fused != 0).mean() > 0.9
    exact = [float(Fraction(float(a)) * Fraction(float(root)) - Fraction(float(a * root))) for a in x]
    assert (fused == np.float32(exact)).all()


def nearest(exact: Fraction, digits: int) -> Fraction:
    """To so many binary digits, half to even."""
    if exact == 0:
        return exact
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length() - digits
    unit = Fraction(2) ** exponent
    while abs(exact) >= unit * 2**digits:
        unit *= 2
    while abs(exact) < unit * 2 ** (digits - 1):
        unit /= 2
    return round(exact / unit) * unit


@pytest.mark.parametrize("dtype, digits", [(np.float32, 24), (np.float64, 53)])
def test_fma_is_rounded_once(dtype, digits):
    """Also just above and below a tie, where a sum that was rounded to more digits before is one."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 500)).astype(dtype)
    c = (-a * b * rng.choice([1, 1 + 1e-3, 1e-3, 1e3], 500)).astype(dtype)
    x = 2.0 ** -(digits // 2)
    y = 2.0**-digits / x  # (1 + x) (1 + y) lies between two numbers of so many digits
    ties = [(s * (1 + x), 1 + y, t) for s in (1, -1) for t in (0, 2.0**-120, -(2.0**-120))]
    a, b, c = np.concatenate([[a, b, c], np.array(ties, dtype).T], axis=1)
    got = ptx.fma(a, b, c)
    assert got.dtype == dtype
    for x, y, z, result in zip(*(v.astype(float).tolist() for v in (a, b, c, got)), strict=True):
        assert Fraction(result) == nearest(Fraction(x) * Fraction(y) + Fraction(z), digits), (x, y, z)
    with np.errstate(invalid="ignore"):
        special = ptx.fma(
            *(np.array(x, dtype) for x in ([np.inf, np.inf, 0, 1], [1, 1, np.inf, 1], [1, -np.inf, 1, -1]))
        )
    np.testing.assert_array_equal(special, np.array([np.inf, np.nan, np.nan, 0], dtype))


def test_bf16_is_rounded_to_nearest_even():
    x = np.random.default_rng(0).standard_normal(61).astype(np.float32)
    x = np.concatenate([x, np.array([0x3F808000, 0x3F818000, 0x7F800000], np.uint32).view(np.float32)])
    got = run("cvt.rn.bf16x2.f32 %r9, %r1, 0f3F800000;", x).view(np.uint32)
    bits = torch.tensor(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (got >> 16 == bits).all() and (got & 0xFFFF == 0x3F80).all()
    assert (run("cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r9, %rs1;", x).view(np.uint32) >> 16 == bits).all()


@pytest.mark.parametrize("name, exact", [("ex2", np.exp2), ("lg2", np.log2), ("rcp", np.reciprocal)])
def test_approximate_instructions(name, exact):
    """Rounded once, or with a seed wrong by as much as they may be, alike for like arguments."""
    x = np.abs(np.random.default_rng(0).standard_normal(32)).astype(np.float32) + np.float32(0.01)
    x = np.concatenate([x, x])
    body, want = f"{name}.approx.ftz.f32 %r9, %r1;", exact(x.astype(float))
    assert (run(body, x) == want.astype(np.float32)).all()
    for seed in (1, 2):
        got = run(body, x, seed)
        size = np.maximum(abs(want), 1) if name == "lg2" else abs(want)
        off = (got - want) / size * 2**22
        assert abs(off).min() > 0.2 and abs(off).max() < 1.3 and (got[:32] == got[32:]).all()
        assert 0 < (off > 0).sum() < 64
    assert (run(body, x, 1) != run(body, x, 2)).any()


LOOP = """
    mov.b32 %r9, 0f00000000;
    mov.b32 %r2, 0;
    setp.eq.b32 %p1, %r0, 5;
    @%p1 bra $L__BB0_2;
$L__BB0_1:
    add.f32 %r9, %r9, %r1;
    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p2, %r2, %r0;
    @%p2 bra $L__BB0_1;
$L__BB0_2:
"""


def test_threads_that_go_different_ways():
    got = run(LOOP + "bar.sync 0;", np.float32([1.0]))
    assert (got == np.where(np.arange(64) == 5, 0, np.maximum(np.arange(64), 1))).all()
    with pytest.raises(RuntimeError, match="expected 64 threads together"):
        run(LOOP.replace("$L__BB0_2:", "bar.sync 0;\n$L__BB0_2:"), np.float32([1.0]))


def test_exchanges_within_a_warp():
    x = np.arange(64, dtype=np.int32) - 7
    assert (run("shfl.sync.bfly.b32 %r9, %r1, 4, 31, -1;", x) == x[np.arange(64) ^ 4]).all()
    lowest = run("mov.b32 %r2, -1; redux.sync.min.s32 %r9, %r1, %r2;", x)
    assert (lowest == np.repeat([-7, 25], 32)).all()


EXCHANGE = """
    shl.b32 %r2, %r0, 2;
    mov.b32 %r3, global_smem;
    add.s32 %r4, %r3, %r2;
    xor.b32 %r5, %r4, 128; // of the other warp
"""


def test_threads_meet_in_memory_at_a_barrier():
    x = np.arange(64, dtype=np.float32)
    body = EXCHANGE + "st.shared.b32 [%r4], %r1; bar.sync 0; ld.shared.b32 %r9, [%r5];"
    assert (run(body, x, shared=256) == x[np.arange(64) ^ 32]).all()
    with pytest.raises(ptx.RaceError, match="64 reads of 4 bytes"):
        run(body.replace("bar.sync 0;", ""), x, shared=256)
    late = "ld.shared.b32 %r9, [%r5]; st.shared.b32 [%r4], %r9;"
    with pytest.raises(ptx.RaceError, match="64 writes of 4 bytes"):
        run(EXCHANGE + late, x, shared=256)
    assert np.isnan(run(EXCHANGE + late.replace("; st", "; bar.sync 0; st"), x, shared=256)).all()  # nobody wrote


def test_memory_has_an_end_and_is_aligned():
    for where, message in (("[%rd2+4]", "1 accesses of 4 bytes outside"), ("[%rd2+-4]", "1 accesses of 4"),
                           ("[%rd2+2]", "1 accesses of 4|unaligned")):  # fmt: skip
        with pytest.raises(IndexError, match=message):
            run(f"ld.global.b32 %r9, {where};", np.float32([1.0]))
    with pytest.raises(IndexError, match="shared memory"):
        run(EXCHANGE + "ld.shared.b32 %r9, [%r4+4];", np.float32([1.0]), shared=256)


def test_copies_arrive_when_they_are_waited_for():
    x = np.arange(64, dtype=np.float32)
    start = """
    and.b32 %r6, %r0, 15; // sixteen threads' worth, by all
    mul.wide.u32 %rd4, %r0, 16;
    add.s64 %rd5, %rd1, %rd4;
    shl.b32 %r7, %r0, 4;
    mov.b32 %r8, global_smem;
    add.s32 %r10, %r8, %r7;
    mov.b32 %r11, 16;
    add.s64 %rd6, %rd0, %rd4;
    setp.gt.u32 %p3, %r0, 15;
    selp.b32 %r11, 0, %r11, %p3;
    selp.b64 %rd6, %rd0, %rd6, %p3;
    cp.async.cg.shared.global [ %r10 + 0 ], [ %rd6 + 0 ], 0x10, %r11;
    cp.async.commit_group;
"""
    waited = start + "cp.async.wait_group 0; ld.shared.b32 %r9, [%r10];"
    assert (run(waited, x, shared=1024) == np.where(np.arange(64) < 16, x[np.arange(64) % 16 * 4], 0)).all()
    assert np.isnan(run(waited.replace("wait_group 0", "wait_group 1"), x, shared=1024)).all()


def test_an_unknown_instruction_raises():
    with pytest.raises(NotImplementedError, match=r"sin\.approx\.f32.*%r9"):
        run("sin.approx.f32 %r9, %r1;", np.float32([1.0]))
    with pytest.raises(NotImplementedError, match=r"add\.sat\.f32"):
        run("add.sat.f32 %r9, %r1, %r1;", np.float32([1.0]))
