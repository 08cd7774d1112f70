"""Divergences beside the generalised Jensen-Shannon one, and a β of each token's own: rows, parts of rows, operator."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from conftest import DEVICE, few_in_the_interpreter
from oracle import assert_near
from problems import problem
from test_row_divergence import INSTRUCTION_SETS, assert_rows, assert_same, device_of, every_kernel, logits, run
from test_shards import Tables

from scsdpo_kernels import SampledToken, TopK, TopLogprobs, linear_divergence, linear_divergence_per_token
from scsdpo_kernels.arguments import problem_of
from scsdpo_kernels.kernels import native, row_divergence_triton
from scsdpo_kernels.kernels.contract import Logits, PerRow, Scalars
from scsdpo_kernels.kernels.mixture import mixtures
from scsdpo_kernels.linear_divergence import DEFAULTS
from scsdpo_kernels.problem import ENDS, flatten, objective_of
from scsdpo_kernels.schedules import chunked
from scsdpo_kernels.schedules.shards import merge_statistics

DIVERGENCES = tuple(name for name in ENDS if name != "jensen_shannon")
KERNELS = [INSTRUCTION_SETS[-1], "triton"]
best_kernels = pytest.mark.parametrize("kernel", KERNELS)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
V, D = 307, 24


def has_end(divergence, beta):
    return beta not in (0, 1) or ENDS[divergence][int(beta)] is not None


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """A row of the tests is then longer than what Triton's kernel takes at a time."""
    monkeypatch.setattr(row_divergence_triton, "BLOCK", 128)
    monkeypatch.setattr(row_divergence_triton, "WARPS", 4)


# ---------------------------------------------------------------------------------------------------------------------
# Rows.


@every_kernel
@every_divergence
@pytest.mark.parametrize("beta", [0.01, 0.5, 0.9])
def test_precision(kernel, divergence, beta):
    """Near-equal and far, of odd sizes: 1e-5 relative, down to a divergence of 1e-10."""
    cases = itertools.product((1, 7, 17, 1021), (0.5, 12.0), (1e-5, 0.1, 3.0))
    if kernel == "triton" and DEVICE == "cpu":  # its interpreter is slow
        cases = itertools.product((307,), (12.0,), (1e-5, 0.1, 3.0))
    for vocabulary, scale, distance in cases:
        student, teacher = logits(vocabulary, scale, distance, rows=few_in_the_interpreter(kernel, 5, 3))
        expected = oracle.rows(student, teacher, beta, 0.75, divergence=divergence)
        assert_rows(*run(student, teacher, beta, temperature=0.75, kernel=kernel, divergence=divergence), expected)


@best_kernels
@every_divergence
@pytest.mark.parametrize("beta", [1e-6, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("distance", [1e-3, 3.0])
def test_shares_near_the_ends(kernel, divergence, beta, distance):
    """1 - β has digits of its own, and a skewed KL goes to 0 at one end."""
    student, teacher = logits(300, 2.0, distance, rows=few_in_the_interpreter(kernel, 5, 2))
    expected = oracle.rows(student, teacher, beta, divergence=divergence)
    got = run(student, teacher, beta, kernel=kernel, divergence=divergence)
    assert_rows(*got, expected, floor=1e-12, gradient_floor=1e-12)


@best_kernels
@every_divergence
@pytest.mark.parametrize("beta", [0.1, 0.9])
@pytest.mark.parametrize("height, offset", [(26.0, 0.0), (20.0, 1.3)])
def test_peaked_rows_keep_their_gradient(kernel, divergence, beta, height, offset):
    student, _ = logits(300, 1.0, 0.0)
    student[:, 123] = height
    teacher = student + offset + 1e-2 * torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    expected = oracle.rows(student, teacher, beta, divergence=divergence)
    scalars, gradient = run(student, teacher, beta, kernel=kernel, divergence=divergence)
    assert_rows(scalars, gradient, expected, floor=1e-13, gradient_floor=0)


@best_kernels
@every_divergence
@pytest.mark.parametrize("beta", [0.01, 0.5, 0.9])
def test_forbidden_entries_contribute_their_limit(kernel, divergence, beta):
    student, teacher = logits(300, 2.0, 0.3)
    both, student_only, teacher_only = slice(0, 50), slice(50, 90), slice(250, 300)
    student[:, both] = teacher[:, both] = -torch.inf
    student[:2, student_only] = -torch.inf
    teacher[1:3, teacher_only] = -torch.inf
    expected = oracle.rows(student, teacher, beta, divergence=divergence)
    scalars, gradient = run(student, teacher, beta, kernel=kernel, divergence=divergence)
    assert not scalars.divergence.isnan().any() and not gradient.isnan().any()
    assert (gradient[:, both] == 0).all()
    finite = slice(None)
    if divergence == "jeffreys":
        finite = slice(3, None)
        assert (scalars.divergence[:3] == torch.inf).all() and (expected.divergence[:3] == np.inf).all()
        # (1-β) (p - q) stays finite where KL(q‖p) does not
        np.testing.assert_allclose(gradient[0].numpy(), expected.gradient[0].astype(float), atol=1e-6)
        assert (gradient[1:3, teacher_only] == torch.inf).all()  # as the reverse KL's
        assert (gradient[1:3, 90:250] < -1e20).all()
    kept = Scalars(*(x if x is None else x[finite] for x in scalars))
    assert_rows(kept, gradient[finite], oracle.Rows(*(x[finite] for x in expected)))


@best_kernels
@every_divergence
@pytest.mark.parametrize("height", [15.0, 150.0])
def test_disagreeing_peaks(kernel, divergence, height):
    """log(q / p) of up to ±150: ratios overflow, the result does not."""
    student, teacher = logits(100, 1.0, 0.5)
    student[:, 1] = height
    teacher[:, 2] = height
    for beta in (0.1, 0.8):
        expected = oracle.rows(student, teacher, beta, divergence=divergence)
        scalars, gradient = run(student, teacher, beta, kernel=kernel, divergence=divergence)
        np.testing.assert_allclose(scalars.divergence.numpy(), expected.divergence.astype(float), rtol=2e-6)
        largest = np.abs(expected.gradient).max()
        assert np.abs(gradient.numpy() - expected.gradient).max() < 2e-7 + 1e-5 * largest  # saturated mixtures


@best_kernels
@every_divergence
def test_equal_rows_are_0_and_nan_stays_in_its_row(kernel, divergence):
    student, teacher = logits(307, 5.0, 0.3)
    scalars, gradient = run(student, student, 0.3, kernel=kernel, divergence=divergence)
    assert (scalars.divergence == 0).all() and (gradient == 0).all()
    clean, clean_gradient = run(student, teacher, 0.3, kernel=kernel, divergence=divergence)
    for side, bad in itertools.product((student, teacher), (torch.nan, torch.inf)):
        kept = side[2, 200].item()
        side[2, 200] = bad
        scalars, gradient = run(student, teacher, 0.3, kernel=kernel, divergence=divergence)
        side[2, 200] = kept
        assert scalars.divergence[2].isnan() and gradient[2].isnan().all()
        others = torch.tensor([0, 1, 3, 4])
        assert_same(scalars.divergence[others], clean.divergence[others], kernel)
        assert_same(gradient[others], clean_gradient[others], kernel)


def ends_and_between(divergence):
    """A β a row: both ends, where they exist."""
    betas = [beta for beta in (0.0, 1.0, 0.3, 0.7, 1e-6) if has_end(divergence, beta)]
    return torch.tensor(betas[:1] + betas, dtype=torch.float64)[:5]


@pytest.mark.parametrize("divergence", ENDS)
@pytest.mark.parametrize("kernel, difference", [*itertools.product(INSTRUCTION_SETS, (False, True)), ("triton", False)])
def test_a_row_with_a_beta_of_its_own_has_the_bits_of_a_number(kernel, divergence, difference):
    student, teacher = logits(307, 4.0, 0.5)
    betas, target = ends_and_between(divergence), torch.tensor([0, 306, 7, 8, 300])
    options = {"temperature": 0.75, "kernel": kernel, "divergence": divergence, "difference": difference}
    scalars, gradient = run(student, teacher, betas, target=target, **options)
    for r, beta in enumerate(betas.tolist()):
        row = slice(r, r + 1)
        alone, alone_gradient = run(student[row], teacher[row], beta, target=target[row], **options)
        for got, want in zip(scalars[:5], alone[:5], strict=True):
            assert_same(got[row], want, kernel)
        assert_same(gradient[row], alone_gradient, kernel)


@best_kernels
@pytest.mark.parametrize("divergence", ENDS)
def test_a_beta_that_is_nan_is_nan_in_its_row(kernel, divergence):
    student, teacher = logits(300, 4.0, 0.5)
    betas = ends_and_between(divergence)
    betas[1] = torch.nan
    scalars, gradient = run(student, teacher, betas, kernel=kernel, divergence=divergence)
    assert scalars.divergence.isnan().tolist() == gradient.isnan().all(1).tolist() == [False, True, False, False, False]
    assert gradient[[0, 2, 3, 4]].isfinite().all()
    assert (scalars.student_entropy >= 0).all()  # known all the same


@pytest.mark.parametrize("divergence", ENDS)
def test_constants_of_a_beta_have_one_row_of_bits(divergence):
    """Whichever others a table has: a call makes one for all of its chunks."""
    betas = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = mixtures(divergence, betas)
    for rows in (slice(0, 1), slice(7, 8), slice(100, 116), slice(3, 300)):
        assert torch.equal(table[rows], mixtures(divergence, betas[rows]))


def in_parts(kernel, student, teacher, objective, cut):
    """A row's divergence and gradient, of two parts whose sums are put together as processes do."""
    rows = native if kernel != "triton" else row_divergence_triton
    student, teacher = student.to(device_of(kernel)), teacher.to(device_of(kernel))
    parts = [
        Logits(student[:, some].contiguous(), teacher[:, some].contiguous(), False, 0.0)
        for some in (slice(0, cut), slice(cut, None))
    ]
    own = [rows.row_statistics(part, objective.temperature) for part in parts]
    known = merge_statistics(torch.stack([torch.stack([x.double() for x in part]) for part in own]),
                             objective.temperature)  # fmt: skip
    terms = sum(rows.row_terms(part, objective, known) for part in parts)
    given, results = PerRow(torch.ones(len(student), device=device_of(kernel))), []
    for part in parts:
        gradient = torch.full_like(part.student, torch.nan)
        divergence = rows.row_gradient(part, objective, known, terms, given, gradient)
        results.append((divergence.cpu(), gradient.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    return results[0][0], torch.cat([gradient for _, gradient in results], dim=1)


@best_kernels
@pytest.mark.parametrize("divergence", ENDS)
@pytest.mark.parametrize("distance", [1e-3, 2.0])
def test_parts_of_rows(kernel, divergence, distance):
    """β is a number or one a row; peaked in one part, with forbidden entries."""
    student, teacher = logits(307, 2.0, distance)
    student[1, 250] = teacher[1, 250] = 25.0
    student[2:4, 30:60] = teacher[2:4, 30:60] = -torch.inf
    betas = ends_and_between(divergence)
    for beta, shares in ((0.3, [0.3] * 5), (betas.to(device_of(kernel)), betas.tolist())):
        got, gradient = in_parts(kernel, student, teacher, objective_of(beta, 0.75, 0.0, divergence), 140)
        for r, share in enumerate(shares):
            row = slice(r, r + 1)
            exact = oracle.rows(student[row], teacher[row], share, 0.75, divergence=divergence)
            error = np.linalg.norm((gradient[row].double().numpy() - exact.gradient).astype(float))
            assert error <= 3e-5 * np.linalg.norm(exact.gradient.astype(float)) + 1e-12
            np.testing.assert_allclose(got[row].numpy(), exact.divergence.astype(float), rtol=2e-5, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The operator.


def a_beta_each(leading, divergence):
    generator = torch.Generator().manual_seed(3)
    beta = torch.rand(leading, generator=generator)
    for i, end in enumerate((0.0, 1.0)):
        if has_end(divergence, end):
            beta.view(-1)[i::5] = end
    return beta


@pytest.mark.parametrize("divergence", ENDS)
@pytest.mark.parametrize("own", [False, True], ids=["one beta", "a beta each"])
@pytest.mark.parametrize("support", [None, TopK(20), TopK(20, "renormalize")], ids=["whole", "bucket", "renormalize"])
def test_values_and_gradients(kernels, divergence, own, support, monkeypatch):
    """Everything of the student's has one, in three chunks, with weights of 0 and importance ratios."""
    leading = (2, few_in_the_interpreter(kernels, 6, 3))
    monkeypatch.setattr(chunked, "MIN_ROWS", few_in_the_interpreter(kernels, 4, 2))
    monkeypatch.setattr(chunked, "BUFFER_BYTES", dict.fromkeys(chunked.BUFFER_BYTES, 0))
    given = problem(leading, D, V, 0.5, scale=2.0, head="all", weighted=True)
    given.token_weight[0, 2] = 0
    beta = a_beta_each(leading, divergence) if own else 0.3
    if own:
        beta[0, 2] = torch.nan  # this token does not count
    options = {"divergence": divergence, "beta": beta, "temperature": 0.8, "support": support}
    tokens = leading[0] * leading[1]
    options |= {"target_ids": torch.arange(tokens).view(leading), "old_logp": torch.full(leading, -5.0)}
    got, exact = given.run(**options), oracle.expected(given, **options)
    torch.testing.assert_close(got[0].divergence.double(), exact[0].divergence, rtol=3e-5, atol=1e-7)
    assert_near(got, exact, limit=3e-5)
    if support is None and kernels == "cpu":
        reference = given.to(torch.float64).run(**options, schedule="reference")
        torch.testing.assert_close((*reference[0], *reference[1:]), (*exact[0], *exact[1:]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("support", [None, TopK(20)], ids=["whole", "bucket"])
def test_a_gpus_constants_are_made_once_a_call(kernels, support, monkeypatch):
    monkeypatch.setattr(chunked, "MIN_ROWS", 4)
    monkeypatch.setattr(chunked, "BUFFER_BYTES", dict.fromkeys(chunked.BUFFER_BYTES, 0))
    given = problem(12, D, V, 0.5)
    with Tables() as tables:
        given.run(beta=a_beta_each((12,), "jeffreys"), divergence="jeffreys", support=support)
    assert tables.count == (kernels != "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ENDS)
@pytest.mark.parametrize("distance", [1e-3, 0.5], ids=["near", "far"])
def test_errors_are_within_three_of_eager_pytorchs(dtype, divergence, distance):
    """Values and gradients of both sides' own heads, measured by plain PyTorch in the same dtype."""
    given = problem(25, 32, 401, distance, scale=2.0, dtype=dtype)
    given = given.but(teacher_head=given.head.clone())
    beta = a_beta_each((25,), divergence)
    options = {"divergence": divergence, "beta": beta}
    (got, *gradients), (exact, *exact_gradients) = given.run(**options), oracle.expected(given, **options)

    leaves = given.leaves()
    log_p, log_q = (
        (hidden @ head.T).float().log_softmax(-1)
        for hidden, head in ((leaves.hidden, leaves.head), (given.teacher, given.teacher_head))
    )
    each = zip(log_p, log_q, beta.tolist(), strict=True)
    stick = torch.stack([oracle.between(p, q, share, divergence) for p, q, share in each])
    eager = stick.detach(), *torch.autograd.grad(stick.sum(), leaves.trained)
    ours = got.divergence, *gradients
    for x, y, z in zip(ours, eager, (exact.divergence, *exact_gradients), strict=True):
        assert oracle.relative_error(x, z) <= 3 * oracle.relative_error(y, z)


def test_ends_are_the_kls():
    """To the bit, as numbers and as tensors."""
    given, zeros = problem(9, D, V), torch.zeros(9)
    for divergence in ENDS:
        for end in (0.0, 1.0):
            if has_end(divergence, end):
                kl = given.run(beta=end)
                for beta in (end, zeros + end):
                    got = given.run(beta=beta, divergence=divergence)
                    assert all(torch.equal(x, y) for x, y in zip((got[0].divergence, *got[1:]),
                                                                 (kl[0].divergence, *kl[1:]), strict=True))  # fmt: skip


def test_jensen_shannon_is_the_skewed_kls_sum():
    """(1-β) KL(p‖m) + β KL(q‖m): what the names stand for."""
    given = problem(9, D, V, 0.8, scale=2.0)
    js = given.call(beta=0.3).divergence
    skewed = {x: given.call(beta=0.3, divergence=x).divergence for x in ("skewed_forward", "skewed_reverse")}
    torch.testing.assert_close(0.7 * skewed["skewed_reverse"] + 0.3 * skewed["skewed_forward"], js, rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", ["chunked", "reference"])
def test_per_token(schedule):
    given, upstream = problem((3, 5), D, V, 0.5), torch.linspace(-1, 1, 15).view(3, 5)
    options = {"divergence": "jeffreys", "beta": a_beta_each((3, 5), "jeffreys")}
    got, *gradients = given.run(linear_divergence_per_token, lambda out: (out * upstream).sum(), **options,
                                schedule=schedule)  # fmt: skip
    exact, *expected = oracle.expected(given, lambda result: (result.divergence * upstream).sum(), **options)
    torch.testing.assert_close(got.double(), exact.divergence, rtol=2e-5, atol=1e-7)
    for x, y in zip(gradients, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-4, atol=1e-6)


def test_a_server_with_a_beta_of_each_token():
    given = problem((2, 4), D, V, 0.5, weighted=True).but(teacher=None)
    ids = torch.arange(48).view(2, 4, 6)
    options = {"support": TopLogprobs(ids, torch.full((2, 4, 6), -3.0)), "divergence": "skewed_reverse",
               "beta": 0.05 + 0.9 * torch.rand(2, 4)}  # fmt: skip
    assert_near(given.run(**options), oracle.expected(given, **options))


def test_one_token_without_a_leading_axis():
    given, beta = problem(1, D, V), torch.tensor([0.3])
    alone, together = given.tokens(0).call(beta=beta[0]), given.call(beta=beta)
    assert alone.divergence.shape == () and torch.equal(alone.divergence, together.divergence[0])


@pytest.mark.parametrize("operator, rest", [("divergence", ([True, True, False, False, False],)),
                                            ("divergence_per_token", ())])  # fmt: skip
@pytest.mark.parametrize("own", [False, True])
def test_opcheck(operator, rest, own):
    given = problem(7, width=8, vocabulary=31).leaves()
    options = {"divergence": "skewed_forward", "beta": torch.linspace(0, 0.9, 7) if own else 0.4}
    leaves = flatten(problem_of(*given, None, DEFAULTS | options))
    torch.library.opcheck(getattr(torch.ops.scsdpo_kernels, operator).default, (*leaves, *rest))


def test_compiled_has_the_bits_of_eager():
    given = problem((2, 9), width=16, vocabulary=101)

    def step(hidden, beta):
        shares = torch.where(beta > 0.5, 1.0, beta)
        return linear_divergence(hidden, given.head, given.teacher, beta=shares, divergence="jeffreys").loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        hidden, beta = given.hidden.clone().requires_grad_(), torch.linspace(0, 1, 18).view(2, 9).requires_grad_()
        loss = function(hidden, beta)
        results.append((loss, *torch.autograd.grad(loss, (hidden, beta), allow_unused=True)))
    assert results[0][2] is None and results[1][2] is None  # nothing differentiates into β
    assert all(torch.equal(x, y) for x, y in zip(results[0][:2], results[1][:2], strict=True))


SHARES = torch.full((4,), 0.5)
TARGETS = torch.zeros(4).long()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"divergence": "kl"}, ValueError, "divergence: expected one of jensen_shannon, .*, got 'kl'"),
        ({"divergence": None}, TypeError, "divergence: expected a string, got NoneType"),
        ({"divergence": "skewed_forward", "beta": 1.0}, ValueError, r"beta: expected a number in \[0, 1\) .*, got 1"),
        ({"divergence": "skewed_reverse", "beta": 0}, ValueError, r"beta: expected a number in \(0, 1\] .*, got 0"),
        ({"beta": SHARES.long()}, TypeError, "beta: expected floating-point numbers, got torch.int64"),
        ({"beta": SHARES[:3]}, ValueError, r"beta: expected shape \(4,\), got \(3,\)"),
        ({"beta": SHARES.to("meta")}, ValueError, "beta: expected student_hidden's device cpu, got meta"),
        ({"beta": SHARES * 3}, ValueError, r"beta: expected numbers in \[0, 1\], got 1.5 to 1.5"),
        ({"beta": SHARES.clone().index_fill_(0, torch.tensor([2]), torch.nan)}, ValueError, "beta: expected numbers"),
        ({"beta": SHARES * 2, "divergence": "skewed_forward"}, ValueError, r"beta: expected numbers in \[0, 1\), got"),
        ({"beta": SHARES * 0, "divergence": "skewed_reverse"}, ValueError, r"beta: expected numbers in \(0, 1\], got"),
        ({"beta": SHARES * 0, "entry_clip": 0.1}, ValueError, "entry_clip: expected beta=0 .* got a tensor"),
        ({"beta": 0.0, "entry_clip": 0.1, "divergence": "jeffreys"}, ValueError, "entry_clip: expected no divergence"),
        ({"beta": SHARES * 2, "support": SampledToken(), "target_ids": TARGETS}, ValueError,
         "SampledToken: expected beta=1 .* got a tensor"),
        ({"beta": 1.0, "support": SampledToken(), "target_ids": TARGETS, "divergence": "jeffreys"}, ValueError,
         "SampledToken: expected no divergence"),
    ],
)  # fmt: skip
def test_what_does_not_fit_raises_by_name(options, error, message):
    for schedule in ("chunked", "reference"):
        with pytest.raises(error, match=message):
            problem(4, D, V).call(**options, schedule=schedule)


def test_unchecked_shares_give_nan_in_their_token(kernels, unchecked):
    """A token of weight 0 may hold anything."""
    given = problem(5, D, V).but(token_weight=torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0]))
    beta = torch.tensor([0.5, 7.0, 1.5, torch.nan, 1.0])
    result, grad, _ = given.run(beta=beta, rows=torch.arange(5))
    assert result.divergence.isnan().tolist() == [False, False, True, True, False]
    assert grad.isnan().all(1).tolist() == [False, False, True, True, False]
    result, grad, _ = given.run(beta=beta, rows=torch.arange(5), divergence="skewed_forward")
    assert result.divergence.isnan().tolist() == [False, False, True, True, True]
