"""The tiled schedule against float64 end to end: on a GPU, or without one on CPU tensors in Triton's interpreter."""

import itertools

import oracle
import pytest
import torch
from conftest import DEVICE
from oracle import relative_error
from test_linear_divergence import DTYPES, fused, problem, row_stick
from test_package import LargestTensor

from scsdpo_kernels import linear_divergence
from scsdpo_kernels.schedules import tiled

pytestmark = pytest.mark.usefixtures("untuned")
BETAS = (0.0, 0.3, 1.0)


def on_device(*tensors):
    return tuple(x if x is None else x.to(DEVICE) for x in tensors)


def run(*tensors, **options):
    """LinearDivergence and both gradients of the tiled schedule, on the CPU."""
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    result, *gradients = fused(*on_device(*tensors), schedule="tiled", **options)
    return type(result)(*(x if x is None else x.cpu() for x in result)), *(x.cpu() for x in gradients)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("head", ["shared", "own"])
def test_fp32_contract(beta, head):
    """At most 3× the error of float64 rows on fp32 logits, plus 3e-6, at distances of 1 to 1e-5."""
    for distance, vocabulary, width in ((1.0, 17, 48), (1e-2, 201, 31), (1e-5, 201, 48)):
        tensors = problem(leading=(35,), vocabulary=vocabulary, width=width, distance=distance)
        if head == "own":  # as far from the student as the shared case, through another head
            tensors = (*tensors[:3], tensors[1] * (1 + distance * torch.randn_like(tensors[1])))
        exact = oracle.end_to_end(*tensors, beta=beta, temperature=0.7)
        stick = row_stick(*tensors, beta, 0.7)
        result, *gradients = run(*tensors, beta=beta, temperature=0.7)
        floor = 3e-6 + 1e-15 / exact.divergence.mean().item()
        for got, measured, expected in zip((result.divergence, *gradients), stick[:3], exact[1:], strict=True):
            assert relative_error(got, expected) <= 3 * relative_error(measured, expected) + floor
        assert (result.divergence >= 0).all()
        torch.testing.assert_close(result.loss, result.divergence.sum())


@pytest.mark.parametrize("beta", BETAS)
def test_shared_fp32_head_keeps_relative_precision(beta):
    """The difference is projected: D = c/2 Var_p(delta . W) to second order, c = 1 or beta (1 - beta)."""
    hidden, weight, teacher, _ = problem(distance=1e-6, scale=4.0, vocabulary=301)
    exact = oracle.end_to_end(hidden, weight, teacher, beta=beta)
    result, grad_hidden, grad_weight = run(hidden, weight, teacher, beta=beta)
    logits = (teacher.double() - hidden.double()) @ weight.double().T
    p = (hidden.double() @ weight.double().T).softmax(dim=-1)
    variance = (p * logits**2).sum(-1) - (p * logits).sum(-1) ** 2
    curvature = 1.0 if beta in (0.0, 1.0) else beta * (1 - beta)
    assert relative_error(result.divergence, curvature / 2 * variance) < 2e-5
    assert relative_error(grad_hidden, exact.grad_hidden) < 1e-2  # the oracle's own cancellation
    assert relative_error(grad_weight, exact.grad_weight) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("width, teacher_width", [(48, None), (47, None), (48, 32)])
def test_half_precision_contract(dtype, beta, width, teacher_width):
    """Aligned heads are fetched by tensor descriptors, a width of 47 by pointers."""
    tensors = problem(dtype=dtype, width=width, teacher_width=teacher_width, vocabulary=201)
    exact = oracle.end_to_end(*tensors, beta=beta)
    measured, _, _, gradient = row_stick(*tensors, beta, 1.0)
    rounded = gradient.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).double()
    sticks = (rounded @ tensors[1].double()).to(dtype), (rounded.T @ tensors[0].double()).to(dtype)
    result, *gradients = run(*tensors, beta=beta)
    assert relative_error(result.divergence, exact.divergence) <= 3 * relative_error(measured, exact.divergence) + 3e-6
    # Triton's interpreter cuts bf16 off where hardware rounds to nearest: twice the error, all in one direction.
    limit = 6 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2
    for got, stick, expected in zip(gradients, sticks, exact[2:], strict=True):
        assert got.dtype == dtype
        assert relative_error(got, expected) <= limit * relative_error(stick, expected)


@pytest.mark.parametrize("vocabulary, width", [(1, 5), (2, 1), (64, 16), (65, 33)])
@pytest.mark.parametrize("beta", BETAS)
def test_odd_sizes(vocabulary, width, beta):
    tensors = problem(leading=(3,), width=width, vocabulary=vocabulary)
    exact = oracle.end_to_end(*tensors, beta=beta)
    result, *gradients = run(*tensors, beta=beta)
    for got, expected in zip((result.divergence, *gradients), exact[1:], strict=True):
        assert (got == 0).all() if vocabulary == 1 else relative_error(got, expected) < 2e-5


def test_weights_and_targets_and_entropies():
    """Negative, huge and zero weights; rows of weight 0 are never loaded: NaN and inf in them reach nothing."""
    hidden, weight, teacher, _ = problem(leading=(5, 9), vocabulary=301)
    token_weight = torch.randn(5, 9)
    token_weight[:, 2], token_weight[3, 3], token_weight[:, 5:] = 0, -1e6, 0
    ids = torch.randint(301, (5, 9))
    ids[:, 2] = -100
    exact = oracle.end_to_end(hidden, weight, teacher, token_weight=token_weight)
    plain = linear_divergence(hidden, weight, teacher, token_weight=token_weight, target_ids=ids)
    hidden[:, 2], teacher[:, 5:] = torch.nan, torch.inf
    result, grad_hidden, grad_weight = run(hidden, weight, teacher, token_weight=token_weight, target_ids=ids)
    for got, expected in zip(result, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
    assert relative_error(grad_hidden, exact.grad_hidden) < 3e-6
    assert relative_error(grad_weight, exact.grad_weight) < 3e-6
    assert (grad_hidden[token_weight == 0] == 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_forbidden_tokens(beta):
    """A head's entry far below all others, and the teacher's own -inf, contribute their limit."""
    hidden, weight, teacher, _ = problem(leading=(6,), vocabulary=201)
    hidden[:, 0] = teacher[:, 0] = hidden[:, 0].abs() + 0.1  # so that -inf in the head is -inf in every logit
    own = weight.clone()
    own[150:, 0] = -torch.inf
    weight[150:, 0] = -1e30
    result, _, grad_weight = run(hidden, weight, teacher, own, beta=beta)
    kept = [x if x is None else x[:150] for x in (weight, own)]
    expected, _, expected_weight = run(hidden, kept[0], teacher, kept[1], beta=beta)
    torch.testing.assert_close(result.divergence, expected.divergence, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad_weight[:150], expected_weight, rtol=1e-4, atol=1e-6)
    assert (grad_weight[150:] == 0).all()


def test_nan_in_one_row_reaches_that_row_and_the_loss():
    hidden, weight, teacher, _ = problem(vocabulary=65, leading=(9,))
    for beta in BETAS:
        clean, clean_hidden, _ = run(hidden, weight, teacher, beta=beta)
        for side in (hidden, teacher):
            kept, side[5, 3] = side[5, 3].clone(), torch.nan
            result, grad_hidden, _ = run(hidden, weight, teacher, beta=beta)
            side[5, 3] = kept
            others = torch.arange(9) != 5
            assert result.loss.isnan() and result.divergence[5].isnan() and grad_hidden[5].isnan().all()
            torch.testing.assert_close(result.divergence[others], clean.divergence[others], rtol=1e-5, atol=0)
            torch.testing.assert_close(grad_hidden[others], clean_hidden[others], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slabs_add_up_with_more_than_the_gradients_digits(monkeypatch, dtype):
    """A bf16 hidden gradient waits in 24 bits between slabs: many slabs are as exact as one."""
    tensors = problem(leading=(20,), vocabulary=601, dtype=dtype)
    whole = run(*tensors)
    monkeypatch.setattr(tiled, "SLAB_BYTES", 0)
    slabs = run(*tensors)
    assert tiled.slab_columns(20, 601, 2, 64) == 64
    exact = oracle.end_to_end(*tensors)
    for one, many, expected in zip(whole[1:], slabs[1:], exact[2:], strict=True):
        # In the interpreter every slab's scores are cut off, so only the sums differ here.
        limit = {torch.float32: 3e-6, torch.float16: 3e-4, torch.bfloat16: 8e-3}[dtype]
        assert relative_error(many, expected) < limit
        assert relative_error(many, one) < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-3}[dtype]


def test_the_24_bits_are_rounded_without_bias():
    """fp32 sums of positive terms, kept between 60 slabs: cut off, they would fall short by 60 × 2⁻¹⁷."""
    rows, columns, width = 32, 32, 32
    slab, head = (torch.rand(shape, dtype=torch.float32).bfloat16() for shape in ((rows, columns), (columns, width)))
    slab, head, kept = on_device(slab, head, torch.arange(rows))
    grad_hidden = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE)
    low = torch.empty(rows, width, dtype=torch.uint8, device=DEVICE)
    for number in range(60):
        tiled._add_grad_hidden(slab, columns, head, kept, grad_hidden, low, first=number == 0, last=False)
    upper = grad_hidden.view(torch.int16).int() << 16
    total = (upper | (low.int() << 8)).view(torch.float32).cpu().double()
    exact = 60 * (slab.double() @ head.double()).cpu()
    error = (total - exact) / exact
    assert error.abs().max() < 5e-4 and error.mean().abs() < 5e-5


def test_nan_survives_the_24_bits():
    hidden, weight, teacher, _ = problem(leading=(4,), vocabulary=300, dtype=torch.bfloat16)
    hidden[1] = torch.nan
    _, grad_hidden, _ = run(hidden, weight, teacher)
    assert grad_hidden[1].isnan().all() and grad_hidden[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("rows", [1, 37])
def test_strided_hidden_states_and_heads(rows):
    hidden, weight, teacher, _ = problem(leading=(2, rows + 1), vocabulary=99)
    wide = torch.randn(99, 100)
    wide[:, 3:51] = weight
    views = hidden[:, :-1], wide[:, 3:51], teacher[:, 1:]
    exact = oracle.end_to_end(*views)
    result, *gradients = run(*views)
    for got, expected in zip((result.divergence, *gradients), exact[1:], strict=True):
        assert relative_error(got, expected) < 3e-6


def test_no_rows():
    hidden, weight, teacher, _ = problem(leading=(4,), vocabulary=50)
    for leading in (0, 4):
        rows = hidden[:leading], weight, teacher[:leading]
        result, grad_hidden, grad_weight = run(*rows, token_weight=torch.zeros(leading))
        assert result.loss == 0 and (grad_hidden == 0).all() and (grad_weight == 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_evaluation_allocates_rows_only(monkeypatch, beta):
    """Without gradients, nothing of rows × vocabulary, nor of a chunk, and no third walk."""
    monkeypatch.setattr(tiled, "gradient_kernel", None)
    rows, vocabulary = 40, 2000
    tensors = on_device(*problem(leading=(rows,), width=8, vocabulary=vocabulary))
    with torch.no_grad(), LargestTensor() as largest:
        linear_divergence(*tensors, beta=beta, schedule="tiled")
    splits, _ = tiled.splits_of(-(-vocabulary // 64), -(-rows // 32), 6, 1024)
    if DEVICE == "cpu":
        assert largest.numel <= tiled.MOMENTS * tiled.PARTS * splits * rows < rows * vocabulary / 3


def test_training_allocates_no_logits(monkeypatch):
    monkeypatch.setattr(tiled, "SLAB_BYTES", 0)
    rows, width, vocabulary = 40, 8, 2000
    hidden, weight, teacher, _ = on_device(*problem(leading=(rows,), width=width, vocabulary=vocabulary))
    with LargestTensor() as largest:
        fused(hidden, weight, teacher, schedule="tiled")
    splits, _ = tiled.splits_of(-(-vocabulary // 64), -(-rows // 32), 6, 1024)
    if DEVICE == "cpu":
        assert (
            largest.numel
            <= max(tiled.MOMENTS * tiled.PARTS * splits * rows, vocabulary * width)
            < rows * vocabulary / 3
        )


def test_frozen_sides():
    hidden, weight, teacher, _ = on_device(*problem(vocabulary=201))
    _, expected_hidden, expected_weight = fused(hidden, weight, teacher, schedule="tiled")
    for trained, frozen, expected in ((hidden, weight, expected_hidden), (weight, hidden, expected_weight)):
        trained.requires_grad_()
        linear_divergence(hidden, weight, teacher, schedule="tiled").loss.backward()
        torch.testing.assert_close(trained.grad, expected, rtol=1e-5, atol=1e-6)
        assert frozen.grad is None
        trained.requires_grad_(False).grad = None


def test_splits_cover_the_vocabulary():
    sizes = itertools.product((1, 2, 7, 38, 1187, 4096), (1, 3, 64, 65, 132, 500), (1, 6, 132), (0, 1, 16, 10**6))
    for tiles, blocks, processors, resident in sizes:
        splits, each = tiled.splits_of(tiles, blocks, processors, resident)
        assert (splits - 1) * each < tiles <= splits * each
        # no more blocks at once than are resident, unless there are too few tiles
        assert processors <= 1.5 * splits * max(resident, 1) or splits * 4 > tiles or blocks < resident
    # Qwen3-8B in tiles of 128 on an H200, where 14 blocks' hidden states fit half of the cache: ten ranges for 64
    # blocks of rows, 640 programs in five waves; and a single full wave for four blocks
    assert tiled.splits_of(1187, 64, 132, 14) == (10, 119)
    assert tiled.splits_of(1187, 4, 132, 14) == (33, 36)


def test_slabs_are_whole_tiles():
    assert tiled.slab_columns(8192, 151936, 2, 128) == 1024
    assert tiled.slab_columns(10**9, 151936, 2, 128) == 128
    assert tiled.slab_columns(1, 300, 2, 128) == 384
