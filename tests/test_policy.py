"""A policy-gradient loss of sampled tokens beside the divergence: rows, operator, supports, losses of a batch."""

import itertools
import math

import oracle
import pytest
import torch
from conftest import DEVICE
from oracle import assert_near, relative_error
from problems import DTYPES, problem
from test_row_divergence import INSTRUCTION_SETS, call, device_of, every_kernel, several_blocks  # noqa: F401

from scsdpo_kernels import (
    PolicyGradient,
    SampledToken,
    TopK,
    TopLogprobs,
    linear_divergence,
    linear_divergence_per_token,
    scsdpo_loss,
)
from scsdpo_kernels.kernels.contract import Logits, PerRow, RowPolicy
from scsdpo_kernels.problem import objective_of
from scsdpo_kernels.schedules import chunked

V, D = 307, 24
BETAS = (0.0, 0.3, 1.0)
SHARES = torch.tensor([[0.0, 0.3, 1.0, 0.0], [1.0, 0.5, 0.2, 1.0], [0.9, 0.0, 0.6, 1.0]])
OBJECTIVES = {
    "forward KL": {"beta": 0.0},
    "Jensen-Shannon": {},
    "reverse KL": {"beta": 1.0},
    "Jeffreys": {"divergence": "jeffreys", "beta": 0.3},
    "skewed forward KL": {"divergence": "skewed_forward", "beta": 0.3},
    "skewed reverse KL": {"divergence": "skewed_reverse", "beta": 0.3},
    "Jensen-Shannon, beta of each token": {"beta": SHARES},
    "Jeffreys, beta of each token": {"divergence": "jeffreys", "beta": SHARES},
    "TopK, beta of each token": {"support": TopK(11), "beta": SHARES},
    "entry_clip": {"entry_clip": 0.02, "beta": 0.0},
    "TopK": {"support": TopK(11)},
    "TopK, renormalize": {"support": TopK(11, "renormalize")},
    "TopK of all": {"support": TopK(V)},
    "SampledToken": {"support": SampledToken(), "beta": 1.0},
}
of_every_objective = pytest.mark.parametrize("name", OBJECTIVES)
# Those whose kernels differ, for calls that other tests have seen with every objective.
IN_THE_INTERPRETER = (
    "forward KL", "Jensen-Shannon", "Jeffreys", "skewed reverse KL", "Jensen-Shannon, beta of each token", "TopK",
    "entry_clip", "SampledToken",
)  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------------
# Rows.

TEMPERATURE, SOFTCAP = 0.75, 9.0
ROW_OBJECTIVES = (
    {"beta": 0.0}, {"beta": 0.4}, {"beta": 1.0}, {"beta": 0.0, "entry_clip": 0.05},
    *({"beta": 0.4, "divergence": name} for name in ("jeffreys", "skewed_forward", "skewed_reverse")),
)  # fmt: skip


def row_problem(case, vocabulary, rows=6):
    student = torch.randn(rows, vocabulary) * 3
    target = torch.randint(vocabulary, (rows,))
    if case == "peaked":  # at the target of half of the rows, p is 1 - 1e-8
        at = vocabulary // 2
        student[:, at] = -torch.inf
        student[:, at] = TEMPERATURE * ((student / TEMPERATURE).logsumexp(1) - math.log(1e-8))
        target[::2] = at
    teacher = student + (1e-4 if case == "near" else 0.5) * torch.randn(rows, vocabulary)
    if case == "forbidden":
        student[:, 1::3] = teacher[:, 1::3] = -torch.inf
        target = target // 3 * 3
    if case == "softcap":
        student = SOFTCAP * torch.tanh(student / SOFTCAP)
    return student, teacher, target


def exact_rows(student, teacher, target, objective, weight, policy, softcap, dtype=torch.float64):
    """Value and gradient in PyTorch's own arithmetic."""
    z = student.to(dtype).clone().requires_grad_()
    logp = torch.log_softmax(z / TEMPERATURE, -1)
    logp_y = logp.gather(1, target[:, None])[:, 0]
    losses, clipped = oracle._policy(policy._replace(advantages=policy.advantages.to(dtype)), logp_y, None)
    (gradient,) = torch.autograd.grad((policy.coefficient * losses).sum(), z)
    if dtype == torch.float64:
        of = oracle.rows(student, teacher, temperature=TEMPERATURE, **objective)
        gradient = gradient + weight[:, None] * torch.from_numpy(of.gradient.astype(float))
    if softcap:
        gradient = gradient * (1 - (student.to(dtype) / softcap) ** 2)
    return losses.detach(), clipped, gradient


WEIGHTS = {
    "with a divergence": torch.linspace(1, -1, 6),
    "alone": torch.zeros(6),
    "some alone": torch.tensor([1.0, 0.0, 0.6, -0.2, 0.0, -1.0]),
}


@pytest.mark.parametrize(
    "kernel, weights",
    [*itertools.product(INSTRUCTION_SETS, ("with a divergence", "alone")), ("triton", "some alone")],
)
@pytest.mark.parametrize("objective", ROW_OBJECTIVES, ids=str)
@pytest.mark.parametrize("case", ["plain", "near", "peaked", "forbidden", "softcap"])
def test_rows(kernel, objective, case, weights):
    """Values and gradients as near to float64 as three times PyTorch's own in fp32, and the divergence's contract."""
    vocabularies = (17, 1021)
    if kernel == "triton" and DEVICE == "cpu":  # its interpreter is slow
        vocabularies = (17, 300) if case == "plain" else (300,)
    for vocabulary in vocabularies:
        student, teacher, target = row_problem(case, vocabulary)
        softcap, rows = (SOFTCAP if case == "softcap" else 0.0), len(student)
        advantages, ratio = torch.randn(rows), torch.rand(rows) * 2
        advantages[3] = 0
        coefficient = torch.linspace(-1, 2, rows)
        weight = WEIGHTS[weights]
        given = PolicyGradient(advantages, coefficient=coefficient, ratio=ratio, clip_low=0.3, clip_high=0.1)
        losses, clipped, gradient = exact_rows(student, teacher, target, objective, weight, given, softcap)
        *_, stick = exact_rows(student, teacher, target, objective, weight, given, softcap, torch.float32)
        *_, own = exact_rows(student, teacher, target, objective, torch.zeros(rows), given, softcap)
        assert clipped.any() and not clipped.all()
        device = device_of(kernel)
        row_policy = RowPolicy(*(x.to(device) for x in (advantages, coefficient, ratio)), 0.7, 1.1)
        per_row = PerRow(weight.to(device), target.to(device), policy=row_policy)
        dtypes = (torch.float32, torch.bfloat16)
        if kernel == "triton" and case not in ("plain", "softcap"):
            dtypes = (torch.float32,)
        for dtype in dtypes:
            out = torch.full(student.shape, torch.nan, dtype=dtype, device=device)
            logits = Logits(student.to(device), teacher.to(device), False, softcap)
            scalars = call(kernel, logits, per_row, objective_of(temperature=TEMPERATURE, **objective), out)
            torch.testing.assert_close(scalars.policy_loss.double(), losses, rtol=2e-7, atol=0)
            assert torch.equal(scalars.policy_clipped.double(), clipped)
            error = (out.double().cpu() - gradient).norm(dim=1)
            limit = 3 * (stick.double() - own).norm(dim=1) + 1e-5 * (gradient - own).norm(dim=1)
            limit = limit + 1e-6 * gradient.norm(dim=1)
            if dtype == torch.bfloat16:
                limit = limit + (2**-7 if kernel == "triton" else 2**-8) * gradient.norm(dim=1)
            assert (error <= limit).all(), (error, limit)
            if case == "peaked" and dtype == torch.float32 and weights == "alone" and kernel != "triton":
                # 1 - p of 1e-9, which an fp32 p has lost: as many digits as the sum of e^z has kept beside 1.
                at = out.double().gather(1, target[:, None])[::2, 0]
                torch.testing.assert_close(at, gradient.gather(1, target[:, None])[::2, 0], rtol=0.1, atol=0)


@every_kernel
@pytest.mark.parametrize("beta", BETAS)
def test_a_row_without_advantage_has_the_bits_of_a_row_without_a_policy(kernel, beta):
    student, teacher, target = row_problem("plain", 1021)
    device, one = device_of(kernel), torch.ones(6)
    results = []
    for policy in (None, RowPolicy(0 * one.to(device), one.to(device), None, 0.8, 1.2)):
        out = torch.empty(student.shape, device=device)
        logits = Logits(student.to(device), teacher.to(device), False, 0.0)
        scalars = call(
            kernel, logits, PerRow(one.to(device), target.to(device), policy=policy), objective_of(beta), out
        )
        results.append((*scalars[:5], out.cpu()))
    tolerance = 2e-6 if kernel == "triton" else 0
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * 1e-3)


@every_kernel
def test_ratios_at_and_beyond_their_bounds(kernel):
    """Where the ratio is a bound itself, nothing is clipped, as in PyTorch. No advantage: any ratio is nothing."""
    student, teacher, target = row_problem("plain", 64, rows=8)
    device = device_of(kernel)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, -1.0, 1.0, 0.0])
    ratio = torch.tensor([1.5, 1.5000001, 0.5, 0.49999997, torch.inf, 7.0, torch.inf, torch.nan])
    policy = RowPolicy(advantages.to(device), torch.ones(8, device=device), ratio.to(device), 0.5, 1.5)
    out = torch.empty(student.shape, device=device)
    per_row = PerRow(torch.zeros(8, device=device), target.to(device), policy=policy)
    scalars = call(kernel, Logits(student.to(device), teacher.to(device), False, 0.0), per_row, objective_of(0.5), out)
    assert scalars.policy_clipped.tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
    assert scalars.policy_loss.tolist() == [-1.5, -1.5, 0.5, 0.5, 0, 7, -1.5, 0]
    assert (out != 0).any(1).tolist() == [True, False, True, False, False, True, False, False]


# ---------------------------------------------------------------------------------------------------------------------
# The operator.


def given_and_options(name, off=True, head="plain", leading=(3, 4)):
    """Tokens with both, with a weight alone, with an advantage alone, and with neither."""
    given = problem(leading, D, V, 0.4, scale=2.0, head=head, weighted=True)
    advantages = torch.randn(leading)
    given.token_weight[0, 1] = given.token_weight[1, 2] = 0
    advantages[0, 2] = advantages[1, 2] = 0
    options = {**OBJECTIVES[name], "temperature": 0.8}
    logp = torch.log_softmax(oracle.logits(given.hidden, given.head) / 0.8, -1)
    options["target_ids"] = ids = torch.randint(V, leading)
    ids[2] = logp[2].argmax(-1)  # in A; of the others some are and some are not
    if off:
        options["old_logp"] = logp.gather(-1, ids[..., None])[..., 0] + 0.5 * torch.randn(leading)
    return given, options, advantages


@of_every_objective
@pytest.mark.parametrize(
    "kernels, kind, head",
    [
        *itertools.product(["cpu"], ("on-policy", "off-policy", "given ratio"), ("plain", "all")),
        *(("triton", *x) for x in (("on-policy", "plain"), ("off-policy", "all"), ("given ratio", "plain"))),
    ],
    indirect=["kernels"],
)
def test_against_full_logits(kernels, name, kind, head):
    given, options, advantages = given_and_options(name, kind != "on-policy", head)
    policy = PolicyGradient(advantages, coefficient=torch.rand(3, 4) + 0.5, clip_high=0.28)
    if kind == "given ratio":
        policy = policy._replace(ratio=0.5 + torch.rand(3, 4), coefficient=-0.7)
    got, exact = given.run(**options, policy=policy), oracle.expected(given, **options, policy=policy)
    assert_near(got, exact, limit=1e-5)
    for field in ("policy_loss", "student_logp", "divergence"):
        x, y = getattr(got[0], field), getattr(exact[0], field)
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6)
    assert torch.equal(got[0].policy_clipped.double(), exact[0].policy_clipped)
    assert (got[0].importance_ratio is None) == (kind == "on-policy")
    assert (got[0].policy_clipped.sum() > 0) == (kind != "on-policy")
    assert all(x[1, 2] == 0 for x in got[0][1:] if x is not None)
    assert (got[1][1, 2] == 0).all() and (got[1][0, 1] != 0).any()


@of_every_objective
def test_the_reference_equals_the_oracle(name):
    given, options, advantages = given_and_options(name, head="all")
    given, policy = given.to(torch.float64), PolicyGradient(advantages, coefficient=0.3)
    got = given.run(**options, policy=policy, schedule="reference")
    exact = oracle.expected(given, **options, policy=policy)
    atol = 1e-6 if name == "TopK of all" else 1e-9  # a bucket of nothing counts as 1e-7
    torch.testing.assert_close((*got[0], *got[1:]), (*exact[0], *exact[1:]), rtol=1e-7, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    given = problem(25, 64, V, 0.4, dtype=dtype)
    options = {"target_ids": torch.randint(V, (25,)), "policy": PolicyGradient(torch.randn(25))}
    (got, *gradients), (exact, *exact_gradients) = given.run(**options), oracle.expected(given, **options)
    assert relative_error(got.policy_loss, exact.policy_loss) < 1e-6
    limit = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for x, y in zip(gradients, exact_gradients, strict=True):
        assert x.dtype == dtype and relative_error(x, y) < limit


@pytest.mark.parametrize(
    "kernels, name, schedule",
    [
        *itertools.product(["cpu"], OBJECTIVES, ("chunked", "reference")),
        *(("triton", name, "chunked") for name in IN_THE_INTERPRETER),
    ],
    indirect=["kernels"],
)
def test_per_token(kernels, name, schedule):
    """The coefficient times the policy's loss is added, for any upstream gradient."""
    given, options, advantages = given_and_options(name)
    given, upstream = given.but(token_weight=None), torch.randn(3, 4)
    upstream[0, 0] = 0
    coefficient = torch.rand(3, 4)
    policy = PolicyGradient(advantages, coefficient=coefficient)

    def above(out):
        return (torch.sin(out) * upstream).sum()

    def expected(result):
        return oracle.per_token(result, policy)

    got = given.run(linear_divergence_per_token, above, **options, policy=policy, schedule=schedule)
    exact = oracle.expected(given, lambda result: above(expected(result)), **options, policy=policy)
    torch.testing.assert_close(got[0].double(), expected(exact[0]), rtol=2e-5, atol=1e-6)
    for x, y in zip(got[1:], exact[1:], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "kernels, name",
    [*itertools.product(["cpu"], OBJECTIVES), *itertools.product(["triton"], IN_THE_INTERPRETER)],
    indirect=["kernels"],
)
def test_nothing_of_a_teacher_reaches_a_token_without_weight(kernels, name):
    """Not even NaN: the policy's gradient is the student's own."""
    given, options, advantages = given_and_options(name)
    policy = PolicyGradient(advantages)
    plain = given.run(**options, policy=policy)
    given.teacher[0, 1] = torch.nan
    poisoned = given.run(**options, policy=policy)
    torch.testing.assert_close(poisoned[1:], plain[1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(poisoned[0].loss, plain[0].loss, rtol=1e-5, atol=1e-6)


def test_ids_of_a_server_are_looked_at_where_there_is_a_weight(kernels):
    given = problem(4, D, V).but(teacher=None)
    ids, logp = torch.arange(12).view(4, 3), torch.full((4, 3), -2.0)
    options = {"target_ids": torch.tensor([0, 4, 9, 200]), "token_weight": torch.tensor([1.0, 0.0, 0.0, 2.0]),
               "policy": PolicyGradient(torch.tensor([1.0, -1.0, 2.0, 0.5]))}  # fmt: skip
    plain = given.run(**options, support=TopLogprobs(ids, logp))
    assert_near(plain, oracle.expected(given, **options, support=TopLogprobs(ids, logp)))
    ids[1], ids[2], logp[1] = 10**6, 7, torch.nan
    garbage = given.run(**options, support=TopLogprobs(ids, logp))
    torch.testing.assert_close(garbage[1:], plain[1:], rtol=1e-5, atol=1e-6)


def test_a_beta_is_looked_at_where_there_is_a_weight(kernels):
    """A token with an advantage alone may have anything as its beta; one in the range is its divergence's."""
    given = problem(4, D, V, 0.4)
    options = {"target_ids": torch.arange(4), "token_weight": torch.tensor([1.0, 0.0, 0.0, 2.0]),
               "policy": PolicyGradient(torch.tensor([1.0, -1.0, 2.0, 0.5]))}  # fmt: skip
    beta = torch.tensor([0.0, 0.3, 1.0, 0.7])
    plain, exact = given.run(**options, beta=beta), oracle.expected(given, **options, beta=beta)
    assert_near(plain, exact)
    torch.testing.assert_close(plain[0].divergence.double(), exact[0].divergence, rtol=1e-5, atol=1e-7)
    beta[1], beta[2] = torch.nan, -3.0
    garbage = given.run(**options, beta=beta)
    torch.testing.assert_close(garbage[1:], plain[1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(garbage[0].loss, plain[0].loss, rtol=1e-5, atol=1e-6)
    beta[0] = torch.nan
    with pytest.raises(ValueError, match=r"beta: expected numbers in \[0, 1\]"):
        given.call(**options, beta=beta)


@pytest.mark.parametrize(
    "kernels, name, longer",
    [
        *itertools.product(["cpu"], OBJECTIVES, ("student", "teacher")),
        *zip(itertools.repeat("triton"), IN_THE_INTERPRETER, itertools.cycle(("student", "teacher"))),
    ],
    indirect=["kernels"],
)
def test_heads_that_share_a_prefix(kernels, name, longer):
    """The longer head's further tokens have none of the policy's probability, and no gradient."""
    given, options, advantages = given_and_options(name)
    shorter, further = given.head, torch.cat([given.head, 9 * torch.ones(5, D)])
    sides = (further, shorter) if longer == "student" else (shorter, further)
    given = given.but(head=sides[0], teacher_head=sides[1])
    options |= {"policy": PolicyGradient(advantages, coefficient=0.7), "shared_prefix": True}
    got, exact = given.run(**options), oracle.expected(given, **options)
    assert_near(got, exact, limit=1e-5)
    torch.testing.assert_close(got[0].policy_loss.double(), exact[0].policy_loss, rtol=2e-5, atol=2e-6)
    assert (got[2][V:] == 0).all()
    outside = options["target_ids"].index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(V))
    with pytest.raises(ValueError, match="the prefix that both heads have"):
        given.call(**options | {"target_ids": outside})


def test_tokens_without_weight_and_advantage_are_not_computed(monkeypatch):
    counts, run = [], chunked.run
    monkeypatch.setattr(chunked, "run", lambda plan: counts.append(plan.rows.kept.tolist()) or run(plan))
    given = problem(5, D, V).but(token_weight=torch.tensor([1.0, 0, 0, 2, 0]))
    options = {"target_ids": torch.tensor([3, 4, 5, 6, -100]), "old_logp": torch.tensor([-5.0] * 4 + [torch.nan])}
    policy = PolicyGradient(torch.tensor([0.0, 1, 2, 3, 0]), coefficient=torch.tensor([1.0, 1, 0, 1, 1]))
    result, grad, _ = given.run(**options, policy=policy)
    assert counts == [[0, 1, 3]] and (grad != 0).any(1).tolist() == [True, True, False, True, False]
    assert result.loss.isfinite()
    listed = given.run(**options, policy=policy, rows=torch.tensor([3, 0, 1]))
    torch.testing.assert_close(listed[1:], (grad, _), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"rows: expected every row .* advantage"):
        given.call(**options, policy=policy, rows=torch.tensor([0, 3]))


def test_a_coefficient_of_0_only_reports(kernels):
    given, options, advantages = given_and_options("Jensen-Shannon")
    plain = given.run(**options)
    advantages[0, 0], options["old_logp"][0, 0] = -1.0, -1e4  # a ratio beyond fp32
    plain = given.run(**options)
    result, *gradients = given.run(**options, policy=PolicyGradient(advantages, coefficient=0.0))
    assert torch.equal(result.loss, plain[0].loss) and result.policy_loss[0, 0] == torch.inf
    torch.testing.assert_close(tuple(gradients), plain[1:], rtol=1e-5, atol=1e-7)


def test_without_policy_its_fields_are_none():
    given = problem(3, D, V)
    for schedule in ("chunked", "reference"):
        result = given.call(target_ids=torch.zeros(3).long(), schedule=schedule)
        assert result.policy_loss is None and result.policy_clipped is None


@pytest.mark.parametrize("schedule", ["chunked", "reference"])
def test_one_token_without_a_leading_axis(schedule):
    given = problem(2, D, V)
    policy = PolicyGradient(torch.tensor([1.0, 2.0]))
    many = given.call(target_ids=torch.tensor([3, 4]), policy=policy, schedule=schedule)
    one = given.tokens(1).call(target_ids=torch.tensor(4), policy=PolicyGradient(torch.tensor(2.0)), schedule=schedule)
    assert one.policy_loss.shape == () and torch.equal(one.policy_loss, many.policy_loss[1])


def test_compiled_with_other_coefficients():
    given, ids, advantages = problem(4, D, V), torch.zeros(4).long(), torch.randn(4)

    def step(hidden, coefficient, clip):
        policy = PolicyGradient(advantages, coefficient=coefficient, clip_low=clip)
        return linear_divergence(hidden, given.head, given.teacher, target_ids=ids, policy=policy).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for numbers in ((1.0, 0.2), (0.5, 0.3), (0.25, 0.1)):
        assert torch.equal(compiled(given.hidden, *numbers), step(given.hidden, *numbers))


IDS = {"target_ids": torch.zeros(4).long()}
FOUR = torch.zeros(4)


@pytest.mark.parametrize(
    "error, options, message",
    [
        (TypeError, {**IDS, "policy": FOUR}, "policy: expected a PolicyGradient or None, got Tensor"),
        (ValueError, {"policy": PolicyGradient(FOUR)}, "policy: expected target_ids with it"),
        (TypeError, {**IDS, "policy": PolicyGradient(None)}, "policy.advantages: expected a tensor, got NoneType"),
        (TypeError, {**IDS, "policy": PolicyGradient(FOUR.long())}, "policy.advantages: expected floating-point"),
        (ValueError, {**IDS, "policy": PolicyGradient(FOUR[:3])}, r"policy.advantages: expected shape \(4,\)"),
        (ValueError, {**IDS, "policy": PolicyGradient(FOUR, ratio=FOUR[:3])}, r"policy.ratio: expected shape \(4,\)"),
        (ValueError, {**IDS, "policy": PolicyGradient(FOUR, coefficient=FOUR[:3])}, "policy.coefficient: expected sh"),
        (ValueError, {**IDS, "policy": PolicyGradient(FOUR, coefficient=float("nan"))}, "policy.coefficient: expected"),
        (ValueError, {**IDS, "policy": PolicyGradient(FOUR, clip_low=-0.1)}, "policy.clip_low: expected a number of"),
        (TypeError, {**IDS, "policy": PolicyGradient(FOUR, clip_high=None)}, "policy.clip_high: expected a number"),
        (ValueError, {**IDS, "policy": PolicyGradient(FOUR / 0)}, "policy: expected advantages and coefficients"),
    ],
)
@pytest.mark.parametrize("schedule", ["chunked", "reference"])
def test_what_does_not_fit_raises_by_name(error, options, message, schedule):
    with pytest.raises(error, match=message):
        problem(4, D, V).call(**options, schedule=schedule)


def test_unchecked_targets_give_nan_in_their_row(kernels, unchecked):
    given = problem(4, D, V).but(token_weight=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    options = {"support": TopK(5)} if kernels == "cpu" else {}  # native row kernels take checked ids
    policy = PolicyGradient(torch.tensor([1.0, 1.0, 2.0, 0.0]))
    ids = torch.tensor([4, -100, 5, V])
    result, grad, _ = given.run(**options, target_ids=ids, policy=policy, rows=torch.arange(4))
    assert result.policy_loss.isnan().tolist() == [False, True, False, False]
    assert grad.isnan().any(1).tolist() == [False, True, False, False]


# ---------------------------------------------------------------------------------------------------------------------
# The losses of a batch.


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "sum"])
def test_scsdpo_loss(reduction):
    """Question weights multiply the divergence alone; mask, reduction and denominator are those of both."""
    given = problem((3, 4), D, V, 0.4)
    ids, old, advantages = torch.randint(V, (3, 4)), torch.randn(3, 4) - 5, torch.randn(3, 4)
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    options = {"mask": mask, "reduction": reduction, "question_weight": torch.tensor([1.5, 0.0, 0.5]),
               "target_ids": ids, "old_logp": old}  # fmt: skip
    token_weight = torch.rand(3, 4)
    policy = PolicyGradient(advantages, coefficient=0.3)
    result, *gradients = given.run(scsdpo_loss, **options, policy=policy, token_weight=token_weight)
    plain = given.run(scsdpo_loss, **options, token_weight=token_weight)

    def aggregate(result):
        per = result.policy_loss * mask
        if reduction == "sequence-mean":
            return 0.3 * (per.sum(1) / mask.sum(1)).mean()
        return 0.3 * per.sum() / (mask.sum() if reduction == "token-mean" else 1)

    exact = oracle.expected(given, aggregate, target_ids=ids, old_logp=old, policy=PolicyGradient(advantages))
    torch.testing.assert_close(result.loss.double(), plain[0].loss.double() + aggregate(exact[0]), rtol=1e-5, atol=1e-6)
    for x, y, z in zip(gradients, plain[1:], exact[1:], strict=True):
        torch.testing.assert_close(x.double(), y.double() + z, rtol=1e-4, atol=1e-6)
    kept = mask != 0
    torch.testing.assert_close(result.policy_loss[kept].double(), exact[0].policy_loss[kept], rtol=1e-5, atol=1e-6)
    assert (result.policy_loss[~kept] == 0).all()


def test_scsdpo_loss_refuses_by_name():
    hidden, weight, teacher, _ = problem((2, 3), D, V)
    options = {"mask": torch.ones(2, 3), "question_weight": torch.ones(2), "target_ids": torch.zeros(2, 3).long()}
    policy = PolicyGradient(torch.ones(2, 3))
    with pytest.raises(ValueError, match="policy: expected another reduction than 'weighted-token-mean'"):
        scsdpo_loss(hidden, weight, teacher, **options, policy=policy, reduction="weighted-token-mean")
    with pytest.raises(ValueError, match=r"policy.coefficient: expected a number or shape \(2, 3\), got \(3,\)"):
        scsdpo_loss(hidden, weight, teacher, **options, policy=policy._replace(coefficient=torch.ones(3)))
    with pytest.raises(TypeError, match="policy: expected a PolicyGradient or None, got float"):
        scsdpo_loss(hidden, weight, teacher, **options, policy=1.0)
