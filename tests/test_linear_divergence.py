"""The fused operator end to end: values and both gradients against float64, by a measuring stick in the same dtype."""

import math

import oracle
import pytest
import torch
from oracle import relative_error
from problems import DTYPES, Problem, known, problem

from scsdpo_kernels import Head, LoRA, TopK, linear_divergence
from scsdpo_kernels.schedules import chunked, products

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def row_stick(given, beta, temperature=1.0):
    """Float64 row arithmetic and products on logits that torch projects in fp32, and their logit gradient."""
    hidden, weight, teacher, head = given
    head = weight if head is None else head
    student_logits = hidden.float() @ weight.float().T
    rows = oracle.rows(student_logits, teacher.float() @ head.float().T, beta, temperature)
    gradient = torch.from_numpy(rows.gradient.astype("float64"))
    divergence = torch.from_numpy(rows.divergence.astype("float64"))
    return divergence, gradient @ weight.double(), gradient.T @ hidden.double(), gradient


def assert_as_exact(given, limit, **options):
    """Divergence and gradients beside the oracle's."""
    got, exact = given.run(**options), oracle.expected(given, **options)
    assert relative_error(got[0].divergence, exact[0].divergence) < limit
    for x, y in zip(got[1:], exact[1:], strict=True):
        assert relative_error(x, y) < limit


@pytest.mark.parametrize("temperature", [1.0, 0.7], ids="temperature {}".format)
@pytest.mark.parametrize("vocabulary", [17, 1009], ids="{} entries".format)
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-5], ids="{} apart".format)
@pytest.mark.parametrize("beta", BETAS, ids="beta {}".format)
@pytest.mark.parametrize("head", ["shared", "own"])
def test_fp32_contract(head, beta, distance, vocabulary, temperature):
    """At most 3× the error of float64 rows on fp32 logits, plus 3e-6."""
    given = problem(vocabulary=vocabulary, distance=distance)
    if head == "own":  # as far from the student as the shared case, through another head
        torch.manual_seed(0)
        given = given.but(teacher_head=given.head * (1 + distance * torch.randn_like(given.head)))
    options = {"beta": beta, "temperature": temperature}
    (exact, *exact_gradients), stick = oracle.expected(given, **options), row_stick(given, **options)
    result, *gradients = given.run(**options)
    # F.kl_div in float64 cancels below a divergence of about 1e-11: 1e-16 of it over D
    floor = 3e-6 + 1e-15 / exact.divergence.mean().item()
    pairs = zip((result.divergence, *gradients), stick[:3], (exact.divergence, *exact_gradients), strict=True)
    for got, measured, want in pairs:
        assert relative_error(got, want) <= 3 * relative_error(measured, want) + floor
    assert (result.divergence >= 0).all()
    torch.testing.assert_close(result.loss, result.divergence.sum())


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("beta", BETAS)
def test_shared_fp32_head_keeps_relative_precision(beta, distance):
    """The difference is projected, so 1e-5 relative holds where separate fp32 logits have lost the divergence."""
    given = problem(distance=distance, scale=4.0)
    result, *gradients = given.run(beta=beta)
    for got, want in zip(gradients, oracle.expected(given, beta=beta)[1:], strict=True):
        assert relative_error(got, want) < 1e-5 + 1e-8 / distance
    # second order in delta for every beta: D = c/2 Var_p(delta . W), c = 1 at the ends and beta (1 - beta) between
    hidden, weight, teacher, _ = given.to(torch.float64)
    logits = (teacher - hidden) @ weight.T
    p = (hidden @ weight.T).softmax(dim=-1)
    variance = (p * logits**2).sum(-1) - (p * logits).sum(-1) ** 2
    curvature = 1.0 if beta in (0.0, 1.0) else beta * (1 - beta)
    assert relative_error(result.divergence, curvature / 2 * variance) < 1e-5 + 4 * distance


@pytest.mark.parametrize("distance", [1.0, 0.05], ids="{} apart".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", BETAS, ids="beta {}".format)
@pytest.mark.parametrize("teacher_width", [None, 32], ids=["shared head", "own head"])
def test_half_precision_contract(teacher_width, beta, dtype, distance):
    """Values as exact as fp32 rows; gradients within 2× the error of rounding the exact logit gradient to the dtype."""
    given = problem(dtype=dtype, distance=distance, teacher_width=teacher_width, vocabulary=1009)
    exact, *exact_gradients = oracle.expected(given, beta=beta)
    measured, _, _, gradient = row_stick(given, beta)
    rounded = gradient.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).double()
    sticks = (rounded @ given.head.double()).to(dtype), (rounded.T @ given.hidden.double()).to(dtype)
    result, *gradients = given.run(beta=beta)
    limit = 3 * relative_error(measured, exact.divergence) + 3e-6
    assert relative_error(result.divergence, exact.divergence) <= limit
    for got, stick, want in zip(gradients, sticks, exact_gradients, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) <= 2 * relative_error(stick, want)


def test_bf16_where_teacher_is_a_rounding_away():
    """One bf16 step in a tenth of the hidden entries: fp32 logits still resolve it, bf16 logits would not."""
    given = problem(dtype=torch.bfloat16, width=256, vocabulary=2003)
    hidden = given.hidden.float()
    step = (torch.rand(hidden.shape, generator=torch.Generator().manual_seed(1)) < 0.1) * hidden * 2**-7
    given = given.but(teacher=(hidden + step).bfloat16())
    (exact, *exact_gradients), (result, *gradients) = oracle.expected(given), given.run()
    assert exact.divergence.mean() < 1e-5
    assert relative_error(result.divergence, exact.divergence) < 1e-3
    for got, want in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, want) < 5e-3


@pytest.mark.parametrize("vocabulary", [1, 2, 997, 50257], ids="{} entries".format)
@pytest.mark.parametrize("width", [1, 31, 64], ids="width {}".format)
def test_odd_sizes(vocabulary, width):
    given = problem(3, width=width, vocabulary=vocabulary)
    if vocabulary > 1:
        assert_as_exact(given, 2e-5)
        return
    result, *gradients = given.run()
    assert result.loss == 0 and all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_default_dtype_does_not_matter(default, dtype):
    given = problem(dtype=dtype)
    options = {"target_ids": torch.arange(37), "old_logp": torch.full((37,), -6.0)}
    expected = given.run(**options)
    torch.set_default_dtype(default)
    try:
        got = given.run(**options)
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip((got[0].loss, *got[1:]), (expected[0].loss, *expected[1:]), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(known(got[0]).values(), known(expected[0]).values(), strict=True):
        assert torch.equal(x, y)


def test_real_vocabulary():
    assert_as_exact(problem(9, width=128, vocabulary=151936, distance=0.1), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_shapes_and_strides(dtype):
    """(B, T) of a shifted slice, a transposed head, one row, no leading axis: the same numbers as flat copies."""
    wide, weight, teacher, _ = problem((4, 7), dtype=dtype)
    weight_strided = weight.t().contiguous().t()
    token_weight = torch.randn(7, 4).t()[:, :-1]
    target_ids = torch.randint(701, (4, 7))[:, 1:].int()
    old_logp = -6.0 + torch.randn(7, 4).t()[:, :-1]
    options = {"token_weight": token_weight, "target_ids": target_ids, "old_logp": old_logp}
    result, grad_hidden, grad_weight = Problem(wide[:, :-1], weight_strided, teacher[:, 1:]).run(**options)
    apart = Problem(wide[:, :-1].reshape(24, -1), weight, teacher[:, 1:].reshape(24, -1))
    flat, flat_hidden, flat_weight = apart.run(
        token_weight=token_weight.reshape(24),
        target_ids=target_ids.reshape(24).long(),
        old_logp=old_logp.reshape(24),
    )
    torch.testing.assert_close(result.loss, flat.loss, rtol=2e-5, atol=2e-6)
    for x, y in zip(known(result).values(), known(flat).values(), strict=True):
        assert x.shape == (4, 6) and x.dtype == result.loss.dtype == torch.float32
        torch.testing.assert_close(x.flatten(), y, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(grad_hidden.reshape(24, -1), flat_hidden, rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(grad_weight, flat_weight, rtol=2e-2, atol=2e-3)

    single, single_hidden, _ = Problem(wide[2, 3], weight, teacher[2, 4]).run(token_weight=token_weight[2, 3])
    assert single.divergence.shape == () and single_hidden.shape == wide[2, 3].shape
    torch.testing.assert_close(single.divergence, result.divergence[2, 3], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_no_rows(shape):
    given = problem(shape)
    result, grad_hidden, grad_weight = given.run(target_ids=torch.empty(shape, dtype=torch.long))
    assert result.loss == 0 and result.divergence.shape == result.student_logp.shape == shape
    assert grad_hidden.shape == given.hidden.shape and (grad_weight == 0).all()


def test_all_weights_zero():
    """A zero that is attached to hidden states and head, so that every rank runs its backward."""
    result, *gradients = problem().run(token_weight=torch.zeros(37))
    assert result.loss == 0 and result.loss.requires_grad
    assert all((x == 0).all() for x in (*gradients, result.divergence))


@pytest.mark.parametrize("beta", BETAS)
def test_weights_of_every_size(beta):
    """Zero, negative, tiny and huge: gradients are Σ w dD, and skipped rows hold 0 in every output."""
    token_weight = torch.tensor([0.0, -2.0, 1e-6, 1.0, 1e12, 0.0, -1e-3] * 6)[:37]
    given = problem().but(token_weight=token_weight)
    exact, exact_hidden, exact_weight = oracle.expected(given, beta=beta)
    result, grad_hidden, grad_weight = given.run(beta=beta, target_ids=torch.arange(37))
    skipped = token_weight == 0
    assert result.importance_ratio is None
    for name, field in zip(result._fields[1:6], result[1:6], strict=True):
        assert (field[skipped] == 0).all() and (field[~skipped] != 0).all(), name
    assert (grad_hidden[skipped] == 0).all()
    for row in torch.nonzero(~skipped).flatten():
        assert relative_error(grad_hidden[row], exact_hidden[row]) < 2e-5
    assert relative_error(grad_weight, exact_weight) < 2e-5
    assert relative_error(result.loss, exact.loss) < 2e-5


@pytest.mark.parametrize("schedule", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_every_dtype(dtype, schedule):
    given, mask = problem(), torch.arange(37) % 3 != 0
    floats, *gradients = given.run(token_weight=mask.float())
    got, *got_gradients = given.run(token_weight=mask.to(dtype), schedule=schedule)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, floats.loss, rtol=1e-5, atol=0)
    for x, y in zip(got_gradients, gradients, strict=True):
        assert relative_error(x, y) < 1e-5


def test_rows_of_weight_zero_have_no_influence():
    """Bit for bit, whatever they hold; and they are not projected."""
    given = problem(40)
    token_weight = torch.randn(40) * (torch.arange(40) % 3 != 0)
    first = given.run(token_weight=token_weight)
    given.hidden[::3], given.teacher[::3] = torch.nan, torch.inf
    second = given.run(token_weight=token_weight)
    assert all(torch.equal(x, y) for x, y in zip(first[1:], second[1:], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first[0][:4], second[0][:4], strict=True))


def test_only_kept_rows_are_projected(monkeypatch):
    projected = []
    project = products.project

    def spy(hidden, weight, logits):
        projected.append(len(hidden))
        project(hidden, weight, logits)

    monkeypatch.setattr(products, "project", spy)
    problem(40).run(token_weight=(torch.arange(40) % 4 == 0).float())
    assert projected == [10, 10]


def test_nan_in_one_row_reaches_that_row_and_the_loss():
    given = problem()
    options = {"target_ids": torch.arange(37), "old_logp": torch.full((37,), -6.0)}
    clean, clean_hidden, _ = given.run(**options)
    given.hidden[5, 3] = torch.nan
    result, grad_hidden, _ = given.run(**options)
    others = torch.arange(37) != 5
    assert result.loss.isnan()
    for got, want in zip(known(result).values(), known(clean).values(), strict=True):
        assert torch.equal(got[others], want[others])
    assert result.divergence[5].isnan() and result.student_logp[5].isnan() and grad_hidden[5].isnan().all()
    assert torch.equal(grad_hidden[others], clean_hidden[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_do_not_change_the_result(monkeypatch, dtype):
    given = problem(53, dtype=dtype)
    options = {"token_weight": torch.randn(53), "target_ids": torch.arange(53)}
    whole, whole_hidden, whole_weight = given.run(**options)
    monkeypatch.setattr(chunked, "MIN_ROWS", 7)
    monkeypatch.setitem(chunked.BUFFER_BYTES, "cpu", 0)
    parts, parts_hidden, parts_weight = given.run(**options)
    # (53 rows: 8 chunks of 7, the last of 4)
    for x, y in zip(whole, parts, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(parts_hidden, whole_hidden) < tolerance
    assert relative_error(parts_weight, whole_weight) < tolerance


def test_same_bits_from_run_to_run():
    given = problem(300, vocabulary=3001)
    first = given.run()
    again = given.run()
    assert torch.equal(first[0].divergence, again[0].divergence)
    assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])


def test_a_head_given_twice_is_shared():
    """teacher_head that is student_head means None, bit for bit: the gradient is of the student's use only."""
    given = problem()
    once, twice = given.run(), given.but(teacher_head=given.head).run()
    assert all(torch.equal(x, y) for x, y in zip(once[1:], twice[1:], strict=True))


def test_nothing_differentiates_into_the_teacher():
    hidden, weight, teacher, _ = problem()
    head = weight.clone().requires_grad_()
    teacher.requires_grad_()
    token_weight = torch.ones(37, requires_grad=True)
    weight.requires_grad_()
    result = linear_divergence(hidden, weight, teacher, head, token_weight=token_weight)
    result.loss.backward()
    assert weight.grad is not None
    assert teacher.grad is None and head.grad is None and token_weight.grad is None
    assert not linear_divergence(hidden, weight.detach(), teacher, head).loss.requires_grad
    assert not any(field.requires_grad for field in result[1:4])


@pytest.mark.parametrize("beta", BETAS)
def test_reference_gradcheck(beta):
    """The readable schedule's own gradient, in float64, and twice. The teacher's head is a copy that stays put."""
    hidden, weight, teacher, _ = problem(3, width=5, vocabulary=11, dtype=torch.float64)
    head = weight.clone()
    token_weight = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)

    def loss(hidden, weight):
        options = {"token_weight": token_weight, "beta": beta, "schedule": "reference"}
        return linear_divergence(hidden, weight, teacher, head, **options).loss

    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("teacher_width", [None, 20])
def test_reference_equals_the_oracle(beta, teacher_width):
    given = problem((4, 5), dtype=torch.float64, teacher_width=teacher_width, weighted=True)
    options = {"beta": beta, "temperature": 0.8, "target_ids": torch.randint(701, (4, 5))}
    got, exact = given.run(**options, schedule="reference"), oracle.expected(given, **options)
    torch.testing.assert_close((*got[0], *got[1:]), (*exact[0], *exact[1:]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("schedule", ["chunked", "reference"])
@pytest.mark.parametrize("masked", [-torch.inf, -1e9])
@pytest.mark.parametrize("shared", [True, False])
def test_forbidden_vocabulary(beta, schedule, masked, shared):
    """Columns that a row of the head forbids, through a hidden entry that is always one: as if they were not there."""
    hidden, weight, teacher, _ = problem(vocabulary=64)
    hidden[:, -1] = teacher[:, -1] = 1.0
    weight[50:] = 0.0
    weight[50:, -1] = masked
    exact, exact_hidden, exact_weight = oracle.expected(Problem(hidden, weight[:50], teacher), beta=beta)
    given = Problem(hidden, weight, teacher, None if shared else weight.clone())
    result, grad_hidden, grad_weight = given.run(beta=beta, schedule=schedule)
    assert relative_error(result.divergence, exact.divergence) < 1e-5
    assert relative_error(grad_weight[:50], exact_weight) < 1e-5 and (grad_weight[50:] == 0).all()
    if masked == -1e9:  # an infinite head has no finite product with a gradient of zero
        assert relative_error(grad_hidden, exact_hidden) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [60.0, 110.0, 400.0, 1000.0])
def test_distant_logits_in_the_reference(gap, dtype):
    """Both probabilities underflow at the same entry: their mixture is not log 0."""
    given = Problem(torch.tensor([[gap]]), torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[gap * 1.01]]))
    result, *gradients = given.to(dtype).run(schedule="reference")
    assert 0 <= result.loss < 1e-20 and all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("schedule", ["chunked", "reference"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_importance_ratio_is_a_detached_weight(schedule, beta, clip):
    """Loss and gradients are those of token_weight × min(e^clamp(log p - old_logp, -20, 20), clip)."""
    given = problem((3, 9), vocabulary=301)
    options = {"target_ids": torch.randint(301, (3, 9)), "temperature": 1.3, "beta": beta, "schedule": schedule}
    token_weight = torch.randn(3, 9).relu()
    logp = given.call(**options).student_logp
    old = logp - torch.randn(3, 9)
    old[0, :2] = torch.tensor([torch.inf, -torch.inf])
    old[token_weight == 0] = torch.nan  # not looked at
    clipped = {} if clip is None else {"importance_clip": clip}
    ratio = (logp.double() - old.double()).clamp(-20, 20).exp().clamp(max=clip or 2.0)
    ratio[token_weight == 0] = 0.0
    got, *gradients = given.run(**options, token_weight=token_weight, old_logp=old, **clipped)
    plain, *plain_gradients = given.run(**options, token_weight=(token_weight.double() * ratio).float(), **clipped)
    assert plain.importance_ratio is None and not got.importance_ratio.requires_grad
    torch.testing.assert_close(got.importance_ratio.double(), ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.loss, plain.loss, rtol=2e-5, atol=0)
    for x, y in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=1e-7)
    listed = torch.arange(27)  # rows of weight 0 among them, whose old_logp is NaN
    again, *gradients = given.run(**options, token_weight=token_weight, old_logp=old, rows=listed, **clipped)
    assert again.loss.isfinite() and all(x.isfinite().all() for x in gradients)
    torch.testing.assert_close(again.loss, got.loss, rtol=1e-6, atol=0)


IDS, OLD = torch.zeros(4, dtype=torch.int64), torch.zeros(4)


@pytest.mark.parametrize(
    "error, match, options",
    [
        (ValueError, "old_logp: expected target_ids", {"old_logp": OLD}),
        (ValueError, r"old_logp: expected shape \(4,\)", {"old_logp": OLD[:3], "target_ids": IDS}),
        (TypeError, "old_logp: expected floating-point", {"old_logp": IDS, "target_ids": IDS}),
        (TypeError, "old_logp: expected a tensor", {"old_logp": 0.5, "target_ids": IDS}),
        (ValueError, "importance_clip: .* above 0", {"old_logp": OLD, "target_ids": IDS, "importance_clip": 0.0}),
        (ValueError, "importance_clip: .* above 0", {"old_logp": OLD, "target_ids": IDS, "importance_clip": math.nan}),
        (TypeError, "importance_clip: expected a number", {"old_logp": OLD, "target_ids": IDS, "importance_clip": "2"}),
    ],
)
def test_arguments_of_importance_that_clash(error, match, options):
    with pytest.raises(error, match=match):
        problem(4, vocabulary=31).call(**options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunked_equals_reference_in_every_field(dtype):
    given = problem((3, 9), dtype=dtype).but(token_weight=torch.randn(3, 9).relu())
    options = {"target_ids": torch.randint(701, (3, 9)), "temperature": 1.3}
    options |= {"old_logp": -6.5 + torch.randn(3, 9), "importance_clip": 3.0}
    got, reference = given.call(**options), given.call(**options, schedule="reference")
    torch.testing.assert_close(got.loss, reference.loss, rtol=2e-4, atol=2e-6)
    for (name, x), y in zip(known(got).items(), known(reference).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("some", [slice(0, 1), slice(3, 20), slice(40, 41)], ids=["first", "middle", "last"])
@pytest.mark.parametrize("case", ["plain", "top_k", "bias and softcap", "lora"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_width", [None, 12], ids=["shared head", "own head"])
def test_a_token_has_the_same_bits_whichever_tokens_stand_beside_it(dtype, teacher_width, case, some):
    given = problem(41, width=700, vocabulary=333, teacher_width=teacher_width, dtype=dtype)
    if case == "bias and softcap":
        given = given.but(head=Head(given.head, bias=torch.randn(333), softcap=20.0))
    if case == "lora":
        lora = LoRA(torch.randn(4, 700).to(dtype) * 0.05, torch.randn(333, 4).to(dtype), 0.5)
        given = given.but(head=Head(given.head, lora=lora))
    options, ids = {"support": TopK(7) if case == "top_k" else None}, torch.arange(41)
    together = given.call(**options, target_ids=ids)
    apart = given.tokens(some).call(**options, target_ids=ids[some])
    for x, y in zip(known(apart).values(), known(together).values(), strict=True):
        assert torch.equal(x, y[some])


def test_one_number_that_is_all_weights():
    """Expanded, it has no memory of its own for each token."""
    given = problem(9, vocabulary=101)
    one, many = (given.run(token_weight=x) for x in (torch.full((1,), 2.0).expand(9), torch.full((9,), 2.0)))
    for x, y in zip((one[0].loss, *one[1:]), (many[0].loss, *many[1:]), strict=True):
        assert torch.equal(x, y)
