"""Matrix products of the CPU: every dtype, layout and instruction set, against float64 and torch's own fp32 product."""

import pytest
import torch

from scsdpo_kernels.kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES_OF_GRADIENTS = ((torch.float32, torch.bfloat16), (torch.float32, torch.float16))
SHAPES = [
    (1, 1, 1),
    (1, 5, 7),
    (6, 16, 4),
    (13, 33, 101),
    (15, 1030, 40),
    (700, 70, 300),
    (20, 2100, 64),
    (3, 64, 4000),
    (33, 513, 129),
]


def stick(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact product, and how far off an fp32 one may be: a few roundings of each sum's magnitude."""
    left, right = left.double(), right.double()
    depth = left.shape[1]
    return left @ right, (2 + depth**0.5) * 2**-24 * (left.abs() @ right.abs())


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Inside of a larger matrix of NaN, which a read beyond the edge would bring along."""
    if layout == "transposed":
        return matrix(columns, rows, dtype, "rows").t()
    step = 2 if layout == "strided" else 1
    around = torch.full((rows + 2, step * columns + 3), torch.nan, dtype=dtype)
    inside = around[1:-1, 1:-2][:, ::step]
    return inside.copy_(torch.randn(rows, columns))


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("left_dtype, right_dtype", [*zip(DTYPES, DTYPES, strict=True), *DTYPES_OF_GRADIENTS])
@pytest.mark.parametrize(
    "left_layout, right_layout",
    [("rows", "rows"), ("rows", "transposed"), ("transposed", "rows"), ("strided", "strided")],
)
@pytest.mark.parametrize("rows, depth, columns", SHAPES)
def test_is_torchs_product(instruction_set, left_dtype, right_dtype, left_layout, right_layout, rows, depth, columns):
    torch.manual_seed(0)
    left, right = matrix(rows, depth, left_dtype, left_layout), matrix(depth, columns, right_dtype, right_layout)
    exact, limit = stick(left, right)
    got = torch.full((rows, columns + 5), torch.nan)
    native.matmul(left, right, got[:, 2:-3], instruction_set=instruction_set)
    assert ((got[:, 2:-3] - exact).abs() <= limit).all()
    native.matmul(left, right, got[:, 2:-3], add=True, instruction_set=instruction_set)
    assert ((got[:, 2:-3] - 2 * exact).abs() <= 2 * limit).all()
    assert got[:, :2].isnan().all() and got[:, -3:].isnan().all()


@pytest.mark.skipif(not native.multiplies_bf16(), reason="this processor has no instructions for bf16")
def test_bf16_takes_the_instructions_for_it():
    """What `matmul` chooses for hidden states and a head in bf16. Its sums differ in their last bits."""
    torch.manual_seed(0)
    left, right = matrix(90, 1500, torch.bfloat16, "rows"), matrix(1500, 170, torch.bfloat16, "transposed")
    results = {name: torch.empty(90, 170) for name in (None, "avx512", native.instruction_sets()[-1])}
    for name, out in results.items():
        native.matmul(left, right, out, instruction_set=name)
    assert torch.equal(results[None], results[native.instruction_sets()[-1]])
    assert not torch.equal(results[None], results["avx512"])


@pytest.mark.parametrize("instruction_set", [*native.instruction_sets(), None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [((0, 1), (0, 170)), ((7, 33), (99, 131)), ((89, 90), (169, 170))])
def test_an_entry_has_the_same_bits_whatever_stands_beside_it(instruction_set, dtype, rows, columns):
    torch.manual_seed(0)
    left, right = matrix(90, 1500, dtype, "rows"), matrix(1500, 170, dtype, "transposed")
    whole = torch.empty(90, 170)
    native.matmul(left, right, whole, instruction_set=instruction_set)
    rows, columns = slice(*rows), slice(*columns)
    part = torch.empty_like(whole[rows, columns])
    native.matmul(left[rows], right[:, columns], part, instruction_set=instruction_set)
    assert torch.equal(part, whole[rows, columns])


def test_more_threads_than_blocks():
    left, right, threads = torch.randn(100, 50), torch.randn(50, 130), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3, 40):
            torch.set_num_threads(count)
            results.append(torch.empty(100, 130))
            native.matmul(left, right, results[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, results[0]) for x in results)


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_every_fp16_number(instruction_set):
    """Subnormals, infinities and NaN among them, times one."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    one = torch.ones(1, 1)
    for start in range(0, 2**16, 2**12):
        column = numbers[:, None][start : start + 2**12]
        out = torch.empty(len(column), 1)
        native.matmul(column, one, out, instruction_set=instruction_set)
        assert torch.equal(out.nan_to_num(nan=7.0), column.float().nan_to_num(nan=7.0))


@pytest.mark.parametrize("rows, depth, columns", [(0, 3, 4), (3, 4, 0), (3, 0, 4)])
def test_nothing_to_do(rows, depth, columns):
    out = torch.full((rows, columns), 7.0)
    native.matmul(torch.ones(rows, depth), torch.ones(depth, columns), out, add=True)
    assert (out == 7).all()
    native.matmul(torch.ones(rows, depth), torch.ones(depth, columns), out)
    assert (out == (0 if depth == 0 else depth)).all()
