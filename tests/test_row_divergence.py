"""The row kernels, given logits, against long-double arithmetic: native on every instruction set, and Triton.

Without a GPU, Triton's run in its interpreter.
"""

import itertools

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, few_in_the_interpreter

from scsdpo_kernels.kernels import native, row_divergence_triton
from scsdpo_kernels.kernels.contract import Logits, PerRow, RowPolicy, Scalars
from scsdpo_kernels.problem import KINDS, objective_of

BETAS = (0.0, 0.01, 0.5, 0.9, 1.0)
VOCABULARIES = (1, 2, 7, 16, 17, 1021, 4999)
INSTRUCTION_SETS = [x for x in native.instruction_sets() if x not in native.WITH_BF16]  # with kernels of their own
KERNELS = [*INSTRUCTION_SETS, "triton"]
best_kernels = pytest.mark.parametrize("kernel", [INSTRUCTION_SETS[-1], "triton"])
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """A row of the tests is then longer than what Triton's kernel takes at a time."""
    monkeypatch.setattr(row_divergence_triton, "BLOCK", 256)
    monkeypatch.setattr(row_divergence_triton, "WARPS", 4)


def call(kernel, logits, rows, objective, gradient):
    """A row kernel on its device: scalars on the CPU. `gradient` is written where the kernel runs."""
    given = logits, rows, objective, gradient
    if kernel != "triton":
        return native.row_divergence(*given, instruction_set=kernel)
    scalars = row_divergence_triton.row_divergence(*given)
    return Scalars(*(x if x is None else x.cpu() for x in scalars))


def device_of(kernel):
    return DEVICE if kernel == "triton" else "cpu"


def run(student, teacher, beta, *, temperature=1.0, weight=None, target=None, gradient="float32", difference=False,
        kernel=INSTRUCTION_SETS[-1], old_logp=None, importance_clip=2.0, entry_clip=0.0, softcap=0.0,
        divergence="jensen_shannon"):  # fmt: skip
    """Scalars and the gradient, from logits that stay as they are."""
    device = device_of(kernel)
    weight = torch.ones(len(student)) if weight is None else weight
    teacher = (teacher.double() - student).to(student.dtype) if difference else teacher.to(student.dtype)
    student, teacher, weight, target, old_logp = (
        x if x is None else x.to(device) for x in (student, teacher, weight, target, old_logp)
    )
    if student.is_contiguous():  # as `chunked` has them: rows start at multiples of 16 bytes
        vocabulary = student.shape[1]
        student, teacher = (F.pad(x, (0, -vocabulary % 8))[:, :vocabulary] for x in (student, teacher))
    out = None
    if gradient is not None:
        out = torch.full_like(student, torch.nan, dtype=getattr(torch, gradient))
    given = Logits(student, teacher, difference, softcap), PerRow(weight, target, old_logp, importance_clip)
    beta = beta.to(device) if isinstance(beta, torch.Tensor) else beta
    scalars = call(kernel, *given, objective_of(beta, temperature, entry_clip, divergence), out)
    return scalars, None if out is None else out.cpu()


def assert_same(got, expected, kernel):
    """The same bits; in Triton's interpreter nearly so, since NumPy's sums depend on where an array lies in memory."""
    tolerance = 2e-6 if kernel == "triton" and DEVICE == "cpu" else 0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True)


def logits(vocabulary, scale, distance, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocabulary, generator=generator) * scale
    return student, student + distance * torch.randn(rows, vocabulary, generator=generator)


def assert_rows(scalars, gradient, expected, floor=1e-10, gradient_floor=1e-10):
    """The precision contract: 1e-5 relative, down to a divergence of 1e-10."""
    error = np.abs(scalars.divergence.numpy() - expected.divergence)
    assert (error <= 1e-5 * np.maximum(expected.divergence, floor)).all(), (error, expected.divergence)
    assert (scalars.divergence >= 0).all()
    norm = np.linalg.norm(expected.gradient.astype(float), axis=-1)
    error = np.linalg.norm((gradient.double().numpy() - expected.gradient).astype(float), axis=-1)
    assert (error <= 1e-5 * np.maximum(norm, gradient_floor)).all(), (error, norm)
    for side in ("student_entropy", "teacher_entropy"):
        exact = getattr(expected, side).astype(float)
        np.testing.assert_allclose(getattr(scalars, side).numpy(), exact, rtol=1e-5, atol=2e-6)


@every_kernel
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("difference", [False, True], ids=["logits", "difference"])
def test_precision(kernel, beta, difference):
    cases = itertools.product(VOCABULARIES, (0.5, 4.0, 12.0), (1e-5, 1e-3, 0.1, 3.0))
    few = [(1, 0.5, 0.1), (7, 0.5, 0.1), (257, 4.0, 1e-3), *itertools.product([600], (0.5, 12.0), (1e-5, 0.1, 3.0))]
    for vocabulary, scale, distance in few_in_the_interpreter(kernel, cases, few):
        student, teacher = logits(vocabulary, scale, distance, rows=few_in_the_interpreter(kernel, 5, 3))
        if difference:  # the kernel's teacher is then student + fp32(teacher - student)
            expected = oracle.rows(student, student.double() + (teacher - student).double(), beta, 0.75)
        else:
            expected = oracle.rows(student, teacher, beta, 0.75)
        scalars, gradient = run(student, teacher, beta, temperature=0.75, difference=difference,
                                kernel=kernel)  # fmt: skip
        assert_rows(scalars, gradient, expected)


@pytest.mark.parametrize("beta", BETAS)
def test_full_vocabulary(beta):
    student, teacher = logits(151936, 3.0, 1e-2, rows=2)
    assert_rows(*run(student, teacher, beta), oracle.rows(student, teacher, beta))


@every_kernel
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("difference", [False, True], ids=["logits", "difference"])
@pytest.mark.parametrize("gradient", ["float32", "bfloat16"])
def test_bf16_logits(kernel, beta, difference, gradient):
    vocabulary = few_in_the_interpreter(kernel, 1021, 381)
    student, teacher = (x.bfloat16() for x in logits(vocabulary, 3.0, 0.3))
    target = torch.tensor([0, vocabulary - 1, 7, 8, 300])
    seen = student.double() + (teacher.double() - student).bfloat16().double() if difference else teacher
    scalars, got = run(student, teacher, beta, target=target, difference=difference, gradient=gradient, kernel=kernel)
    expected = oracle.rows(student.float(), seen, beta)
    if gradient == "float32":
        assert_rows(scalars, got, expected)
    else:
        _, exact = run(student, teacher, beta, difference=difference, kernel=kernel)
        assert_rounded(got, exact, kernel)
    at = (np.arange(5), target.numpy())
    np.testing.assert_allclose(scalars.student_logp.numpy(), expected.log_p[at].astype(float), rtol=1e-6)
    np.testing.assert_allclose(scalars.teacher_logp.numpy(), expected.log_q[at].astype(float), rtol=1e-6)


@every_kernel
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("difference", [False, True], ids=["logits", "difference"])
@pytest.mark.parametrize("height, offset", [(26.0, 0.0), (20.0, 1.3)])
def test_peaked_rows_keep_their_gradient(kernel, beta, difference, height, offset):
    """p = 1 - 1e-8 or 1 - 3e-6 at one entry of both: score minus mean score would be rounding there."""
    student, _ = logits(few_in_the_interpreter(kernel, 1000, 400), 1.0, 0.0)
    student[:, 123] = height
    noise = torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    teacher = student.double() + offset + 1e-2 * noise
    seen = student.double() + (teacher - student.double()).float().double() if difference else teacher.float()
    expected = oracle.rows(student, seen, beta)
    assert (np.exp(expected.log_p[:, 123]) > 1 - 1e-5).all()
    scalars, gradient = run(student, teacher, beta, difference=difference, kernel=kernel)
    assert_rows(scalars, gradient, expected, floor=1e-13, gradient_floor=0)


@best_kernels
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("height", [15.0, 60.0, 150.0])
@pytest.mark.parametrize("vocabulary", [100, 600])
def test_disagreeing_peaks(kernel, beta, height, vocabulary):
    """log(q / p) of up to ±150 at entries that have all the mass of one side: ratios overflow, the result does not."""
    student, teacher = logits(vocabulary, 1.0, 0.5, rows=few_in_the_interpreter(kernel, 5, 3))
    student[:, 1] = height
    teacher[:, 2] = height
    expected = oracle.rows(student, teacher, beta)
    scalars, gradient = run(student, teacher, beta, kernel=kernel)
    if height == 15.0 or beta in (0.0, 1.0):
        return assert_rows(scalars, gradient, expected)
    np.testing.assert_allclose(scalars.divergence.numpy(), expected.divergence.astype(float), rtol=1e-6)
    assert np.abs(gradient.numpy() - expected.gradient).max() < 1e-7  # saturated, see below


@best_kernels
@pytest.mark.parametrize("temperature", [1.0, 0.125])
@pytest.mark.parametrize("beta", BETAS)
def test_peaks_that_nearly_tie(kernel, beta, temperature):
    """The teacher's largest logit is a rounding above its logit at the student's peak, whatever the logits' size."""
    for offset in (20.0, 100.0, 1000.0):
        student = offset + torch.tensor([[0.0, -3.0, -4.0, -1.0]]) * temperature
        teacher = offset + torch.tensor([[0.0, 1.8e-6 * offset, -4.0, -6.0]]) * torch.tensor(
            [1, 1, temperature, temperature]
        )
        got = run(student, teacher, beta, temperature=temperature, kernel=kernel)
        assert_rows(*got, oracle.rows(student, teacher, beta, temperature))


@best_kernels
@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.999, 0.9999, 1 - 1e-6])
@pytest.mark.parametrize("distance", [1e-3, 0.3, 3.0])
def test_shares_near_the_ends(kernel, beta, distance):
    """1 - beta has digits of its own: the generalised Jensen-Shannon divergence goes to 0 at both ends."""
    vocabulary, rows = few_in_the_interpreter(kernel, (1000, 5), (600, 2))
    student, teacher = logits(vocabulary, 2.0, distance, rows=rows)
    got, expected = run(student, teacher, beta, kernel=kernel), oracle.rows(student, teacher, beta)
    assert_rows(*got, expected, floor=1e-12, gradient_floor=1e-12)


@best_kernels
@pytest.mark.parametrize("beta", BETAS)
def test_entries_below_the_normal_numbers(kernel, beta):
    """e^-88 is 0 to the kernel, e^-86 is not: still no negative divergence."""
    for gap in range(80, 110, few_in_the_interpreter(kernel, 1, 3)):
        student, teacher = torch.tensor([[0.0, -gap, -3.0]]), torch.tensor([[0.0, -gap + 2.0, -3.0]])
        scalars, gradient = run(student, teacher, beta, kernel=kernel)
        assert (scalars.divergence >= 0).all() and (scalars.divergence < 1e-30).all() and gradient.abs().max() < 1e-30


@best_kernels
def test_saturated_jensen_shannon(kernel):
    """Disjoint supports: the gradient vanishes, and the kernel's error is that of fp32 scores, as torch's own."""
    student, teacher = logits(1000, 8.0, 40.0)
    expected = oracle.rows(student, teacher, 0.5)
    _, gradient = run(student, teacher, 0.5, kernel=kernel)
    error = np.abs(gradient.numpy() - expected.gradient).max(axis=-1)
    assert (error <= 1e-6 * np.exp(expected.log_p.max(axis=-1))).all()


@best_kernels
@pytest.mark.parametrize("beta", BETAS)
def test_identical_rows_are_exactly_zero(kernel, beta):
    student, _ = logits(few_in_the_interpreter(kernel, 4999, 599), 5.0, 0.0)
    for difference in (False, True):
        scalars, gradient = run(student, student, beta, difference=difference, kernel=kernel)
        assert (scalars.divergence == 0).all() and (gradient == 0).all()


@every_kernel
@pytest.mark.parametrize("beta", BETAS)
def test_forbidden_entries_contribute_their_limit(kernel, beta):
    student, teacher = logits(1000, 2.0, 0.3)
    both, student_only, teacher_only = slice(0, 50), slice(50, 90), slice(900, 1000)
    student[:, both] = teacher[:, both] = -torch.inf
    student[:2, student_only] = -torch.inf
    teacher[:2, teacher_only] = -torch.inf
    expected = oracle.rows(student, teacher, beta)
    scalars, gradient = run(student, teacher, beta, kernel=kernel)
    assert not scalars.divergence.isnan().any() and not gradient.isnan().any()
    if beta in (0.0, 1.0):
        assert (scalars.divergence[:2] == torch.inf).all() and (expected.divergence[:2] == np.inf).all()
    finite = slice(2, None) if beta in (0.0, 1.0) else slice(None)
    assert_rows(
        Scalars(*(x if x is None else x[finite] for x in scalars)),
        gradient[finite],
        oracle.Rows(*(x[finite] for x in expected)),
    )
    assert (gradient[:, both] == 0).all() and (gradient[:2, student_only] == 0).all() == (beta != 0)
    if beta == 0:  # dD/dz = p - q stays finite where D is not
        np.testing.assert_allclose(gradient[:2].numpy(), expected.gradient[:2].astype(float), atol=1e-7)


@best_kernels
@pytest.mark.parametrize("height", [0.0, 10.0])
def test_a_forbidden_entry_pushes_reverse_kl_without_nan(kernel, height):
    student, teacher = logits(64, 1.0, 0.1)
    student[:, 7] += height
    teacher[:, 7] = -torch.inf
    _, gradient = run(student, teacher, 1.0, kernel=kernel)
    assert (gradient[:, 7] == torch.inf).all()
    others = torch.cat([gradient[:, :7], gradient[:, 8:]], dim=1)
    assert (others < -1e30).all()


@best_kernels
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("low", [-1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("teacher_there", [-torch.inf, 0.0])
def test_padding_by_a_low_number(kernel, beta, low, teacher_there):
    """As if it were -inf for the student, whatever the teacher has there."""
    vocabulary = few_in_the_interpreter(kernel, 6144, 1536)
    student, teacher = logits(vocabulary, 1.0, 1e-2, rows=2)
    there = torch.arange(vocabulary) // 4 % 256 == 5  # four in a row, far apart
    student[:, there] = low
    teacher[:, there] = teacher_there if teacher_there < 0 else teacher[:, there]
    limit = student.masked_fill(there, -torch.inf)
    scalars, gradient = run(student, teacher, beta, kernel=kernel)
    expected = oracle.rows(limit, teacher, beta)
    assert not gradient.isnan().any() and not scalars.divergence.isnan().any()
    if beta == 0 and teacher_there == 0:  # log p is -1e4 or less where q is not 0
        return np.testing.assert_allclose(gradient.numpy(), expected.gradient.astype(float), atol=1e-7)
    assert_rows(scalars, gradient, expected)


@best_kernels
def test_a_teacher_of_the_lowest_number_is_no_nan(kernel):
    student, teacher = logits(6144, 1.0, 1e-2, rows=2)
    teacher[:, torch.arange(6144) // 4 % 256 == 5] = torch.finfo(torch.float32).min
    scalars, gradient = run(student, teacher, 1.0, kernel=kernel)
    assert (scalars.divergence > 1e30).all() and not gradient.isnan().any()


@best_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("beta", BETAS)
def test_nan_stays_in_its_row(kernel, bad, side, beta):
    student, teacher = logits(100, 1.0, 0.3)
    clean, clean_gradient = run(student, teacher, beta, kernel=kernel)
    (student if side == "student" else teacher)[2, 33] = bad
    scalars, gradient = run(student, teacher, beta, kernel=kernel)
    assert scalars.divergence[2].isnan() and gradient[2].isnan().all()
    others = torch.tensor([0, 1, 3, 4])
    assert_same(scalars.divergence[others], clean.divergence[others], kernel)
    assert_same(gradient[others], clean_gradient[others], kernel)


@best_kernels
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("beta", BETAS)
def test_nan_among_entries_that_underflow(kernel, side, beta):
    """A NaN 300 below the row's largest logits: its share of every sum is 0, and the row is NaN all the same."""
    student, teacher = logits(1000, 1.0, 0.3)
    student[:, 500:] -= 300
    teacher[:, 500:] -= 300
    (student if side == "student" else teacher)[2, 700] = torch.nan
    scalars, gradient = run(student, teacher, beta, kernel=kernel)
    assert scalars.divergence[2].isnan() and gradient[2, :500].isnan().all()
    assert scalars.divergence[[0, 1, 3, 4]].isfinite().all()


@every_kernel
@pytest.mark.parametrize("has_policy", [False, True], ids=["divergence", "policy"])
def test_rows_of_weight_0_may_hold_anything(kernel, has_policy):
    """NaN logits, and a NaN ratio of others: a policy's coefficient is 0 there, too."""
    device, weight = device_of(kernel), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    student, teacher = logits(300, 2.0, 0.3)
    student[1] = torch.nan
    old_logp = torch.tensor([-5.0, -5.0, -5.0, torch.nan, -5.0])
    weight, old_logp, target = (x.to(device) for x in (weight, old_logp, torch.arange(5)))
    policy = RowPolicy(torch.ones_like(weight), weight, None, 0.8, 1.2) if has_policy else None
    gradient = torch.full_like(student, torch.nan, device=device)
    given = Logits(student.to(device), teacher.to(device), False, 0.0), PerRow(weight, target, old_logp, 2.0, policy)
    for beta in (0.0, 0.5, 1.0):
        call(kernel, *given, objective_of(beta), gradient)
        assert gradient.isfinite().all() and ((gradient == 0).all(1) == (weight == 0)).all()


@best_kernels
@pytest.mark.parametrize("weight", [0.0, -1.0, 1e-20, 1e25, -1e30])
def test_weight_scales_the_gradient_alone(kernel, weight):
    student, teacher = logits(500, 2.0, 0.3)
    plain, unit = run(student, teacher, 0.5, kernel=kernel)
    scalars, gradient = run(student, teacher, 0.5, weight=torch.full((5,), weight), kernel=kernel)
    assert_same(scalars.divergence, plain.divergence, kernel)
    scaled = unit.double() * np.float32(weight)
    if kernel == "triton":  # it also reads its logits again
        return torch.testing.assert_close(gradient.double(), scaled, rtol=2e-5, atol=1e-6 * scaled.abs().max().item())
    torch.testing.assert_close(gradient.double(), scaled, rtol=3e-7, atol=0)


@every_kernel
@pytest.mark.parametrize("beta", BETAS)
def test_bf16_gradient_over_the_students_row(kernel, beta):
    """In place and rounded to nearest even: bit for bit the fp32 gradient's own cast."""
    student, teacher = logits(1021, 3.0, 0.3)
    student[0, 5] = torch.nan
    _, exact = run(student, teacher, beta, kernel=kernel)
    device = device_of(kernel)
    for width in (1021, 1024):  # rows are unaligned, aligned
        in_place = torch.empty(5, width)[:, :1021].copy_(student).to(device)
        over = in_place.view(torch.bfloat16)[:, :1021]
        given = Logits(in_place, teacher.to(device), difference=False, softcap=0.0)
        call(kernel, given, PerRow(torch.ones(5, device=device)), objective_of(beta), over)
        assert_rounded(over, exact, kernel)


def assert_rounded(got, exact, kernel):
    same = got.cpu().float()
    if kernel == "triton":  # compiled anew for another stride, to other last bits; its interpreter cuts bf16 off
        torch.testing.assert_close(same, exact, rtol=2**-7, atol=0, equal_nan=True)
    else:
        assert torch.equal(same.nan_to_num(7.0), exact.bfloat16().float().nan_to_num(7.0))


@best_kernels
def test_strided_rows_and_targets(kernel):
    wide_student, wide_teacher = logits(2000, 2.0, 0.5)
    student, teacher = wide_student[:, 3:1500], wide_teacher[:, 5:1502]
    target = torch.tensor([0, 1496, 7, 8, 900])
    expected = oracle.rows(student, teacher, 0.5)
    scalars, gradient = run(student, teacher, 0.5, target=target, kernel=kernel)
    assert_rows(scalars, gradient, expected)
    at = (np.arange(5), target.numpy())
    np.testing.assert_allclose(scalars.student_logp.numpy(), expected.log_p[at].astype(float), rtol=1e-6)
    np.testing.assert_allclose(scalars.teacher_logp.numpy(), expected.log_q[at].astype(float), rtol=1e-6)


@pytest.mark.parametrize(
    "kernel, beta, clip",
    [
        *itertools.product(INSTRUCTION_SETS, (0.0, 0.5, 1.0), (0.5, 2.0, 1e10, float("inf"))),
        *(("triton", *x) for x in ((0.0, 0.5), (0.5, 2.0), (1.0, 2.0), (1.0, 1e10), (0.5, float("inf")))),
    ],
)
def test_importance_ratio_multiplies_the_weight(kernel, beta, clip):
    """min(e^clamp(log p - old, -20, 20), clip), of this pass's log p; the divergence itself stays."""
    student, teacher = logits(300, 2.0, 0.3, rows=9)
    student[8, 299] = -torch.inf  # log p = -inf is clamped, too
    target = torch.tensor([0, 1, 2, 3, 4, 5, 6, 299, 299])
    weight = torch.tensor([1.0, -2.0, 1e-3, 1, 1, 1, 1, 1, 1])
    options = {"weight": weight, "target": target, "temperature": 0.75, "kernel": kernel}
    plain, unit = run(student, teacher, beta, **options)
    old = plain.student_logp - torch.tensor([0.0, 0.3, -0.4, 0.7, 3.0, 25.0, -25.0, -torch.inf, 0.0])
    old[8] = -3.0
    scalars, gradient = run(student, teacher, beta, **options, old_logp=old, importance_clip=clip)
    ratio = (plain.student_logp.double() - old.double()).clamp(-20, 20).exp().clamp(max=clip)
    torch.testing.assert_close(scalars.importance_ratio.double(), ratio, rtol=3e-6, atol=0)
    assert_same(scalars.divergence, plain.divergence, kernel)
    torch.testing.assert_close(gradient.double(), unit.double() * ratio[:, None], rtol=2e-5, atol=1e-12, equal_nan=True)
    assert plain.importance_ratio is None and (clip != 2.0 or (ratio == 2.0).sum() == 3)
    if beta == 0:  # values alone
        alone, _ = run(student, teacher, beta, **options, old_logp=old, importance_clip=clip, gradient=None)
        assert_same(alone.importance_ratio, scalars.importance_ratio, kernel)


def test_threads_do_not_change_a_bit():
    student, teacher = logits(30000, 3.0, 0.3, rows=9)
    hidden, weight = torch.randn(9, 40), torch.randn(30000, 40)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            scalars, gradient = run(student, teacher, 0.5)
            projected = torch.empty(9, 30000)
            native.matmul(hidden, weight.t(), projected)
            results.append((scalars.divergence, gradient, projected))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, results[0], strict=True))


def test_an_instruction_set_that_is_not_there_raises():
    beyond = set(native._C.InstructionSet.__members__) - set(native.instruction_sets(""))
    student, teacher = logits(10, 1.0, 0.1)
    for name in beyond:
        with pytest.raises(ValueError, match="instruction_set"):
            run(student, teacher, 0.5, kernel=name)
    with pytest.raises(KeyError):
        run(student, teacher, 0.5, kernel="mmx")


def test_kinds_have_the_same_names_on_both_sides():
    assert tuple(native._C.Kind.__members__) == KINDS
