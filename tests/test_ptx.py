"""The kernels as Triton compiles them for a GPU, run on a CPU by ptx.py, against long-double arithmetic and float64.

What test_row_divergence.py asks of the kernels' Python in Triton's interpreter, asked of the compiler's output: with
products fused into sums where the compiler has fused them, loads pipelined through shared memory, and approximate
instructions both exact and as wrong as they may be.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from ptx_gpu import Compiled
from test_policy import exact_rows
from test_question_weights import by_hand
from test_row_divergence import assert_rows, logits
from test_support_kernels import first_largest

from scsdpo_kernels import PolicyGradient
from scsdpo_kernels.kernels import native, support_torch
from scsdpo_kernels.kernels.contract import Logits, PerRow, RowPolicy, RowStatistics, Scalars, SupportLogits
from scsdpo_kernels.kernels.of_target import of_target
from scsdpo_kernels.problem import objective_of
from scsdpo_kernels.schedules import chunked
from scsdpo_kernels.schedules.chunked import ALIGNMENT
from scsdpo_kernels.schedules.shards import merge_statistics

TEMPERATURE = 0.75
SEEDS = (None, 1)  # approximate instructions: exact; wrong by their bounds
TRITON_3_6 = Path(sys.prefix) / "triton-3.6.0"  # see test_triton_targets.py
KINDS = {"forward": (0.0, 0.0), "reverse": (1.0, 0.0), "jensen_shannon": (0.5, 0.0), "clipped": (0.0, 0.01)}


@pytest.fixture(scope="module")
def sm_80():
    with Compiled("sm_80") as compiled:
        yield compiled


# ---------------------------------------------------------------------------------------------------------------------
# Rows.


class Case(NamedTuple):
    kind: str
    vocabulary: int
    difference: bool = False
    logits: torch.dtype = torch.float32
    gradient: torch.dtype | None = torch.float32
    softcap: float = 0.0
    target: bool = False

    @property
    def objective(self):
        beta, clip = KINDS[self.kind]
        return objective_of(beta, TEMPERATURE, clip)


class Rows(NamedTuple):
    """Rows of a case, one of each nature. Their names say which."""

    names: list[str]
    student: torch.Tensor  # (C, V)
    teacher: torch.Tensor  # as the kernel takes it
    seen: torch.Tensor  # the teacher's logits, (C, V) float64
    weight: torch.Tensor  # (C,)

    def some(self, test) -> list[int]:
        return [i for i, name in enumerate(self.names) if test(name)]


def rows_of(case: Case) -> Rows:
    generator = torch.Generator().manual_seed(case.vocabulary)
    v = case.vocabulary

    def randn():
        return torch.randn(v, generator=generator)

    rows = {}
    for scale, distance in ((0.5, 1e-5), (4.0, 1e-3), (4.0, 0.1), (12.0, 3.0)):
        student = randn() * scale
        rows[f"{scale} and {distance}"] = student, student + distance * randn()
    student = randn() * 3
    rows["identical"] = student, student
    if v > 100:
        there = slice(v // 50, v // 20)
        for height, offset in ((26.0, 0.0), (20.0, 1.3)):
            student = randn()
            student[v // 3] = height * TEMPERATURE
            rows[f"peaked, {height}"] = student, student + offset + 1e-2 * randn()
        student = randn() * 4 + 100
        rows["far from 0"] = student, student + 1e-3 * randn()
        few = torch.full((2, v), -torch.inf)
        few[0, v - 4 :] = 1000 + torch.tensor([0.0, -3.0, -4.0, -1.0]) * TEMPERATURE
        few[1, v - 4 :] = 1000 + torch.tensor([0.0, 1.8e-3, -4 * TEMPERATURE, -6 * TEMPERATURE])
        rows["nearly a tie"] = few[0], few[1]
        student, teacher = randn() * 2, randn() * 2
        student[there] = teacher[there] = -torch.inf
        rows["forbidden by both"] = student, teacher
        teacher = student + 0.3 * randn()
        if case.kind != "reverse":
            teacher[::7] = -torch.inf
            rows["forbidden by the teacher"] = student, teacher
        elif not case.difference:
            rows["forbidden by the student"] = student.index_fill(0, torch.arange(0, v, 7), -torch.inf), teacher
        broken = student.clone()
        broken[v // 2] = torch.nan
        rows["NaN"] = broken, student
        rows["NaN, weight 0"] = student, broken
    student, teacher = (torch.stack(side).to(case.logits) for side in zip(*rows.values(), strict=True))
    seen = teacher.double()
    if case.difference:
        teacher = torch.where(student == teacher, 0.0, teacher - student)
        seen = student.double() + teacher
    weight = torch.tensor([1.0, -2.5, 1e-20, 1e25]).repeat(4)[: len(rows)]
    weight[[name.endswith("weight 0") for name in rows]] = 0
    return Rows(list(rows), student, teacher, seen, weight)


def padded(x, dtype=None, value=0.0):
    """With rows as far apart as `chunked` has them."""
    return F.pad(x.to(dtype or x.dtype), (0, -x.shape[1] % ALIGNMENT), value=value)[:, : x.shape[1]]


def check(case: Case, rows: Rows, scalars: Scalars, gradient: torch.Tensor | None) -> None:
    """The precision contract of test_row_divergence.py, in every row by itself."""
    beta, clip = KINDS[case.kind]
    expected = oracle.rows(rows.student.float(), rows.seen, beta, TEMPERATURE, clip or None)
    got = torch.zeros_like(rows.student, dtype=torch.float64) if gradient is None else gradient.double()
    if gradient is not None:
        zero, bad = rows.some(lambda name: name.endswith("weight 0")), rows.some(lambda name: name == "NaN")
        assert (got[zero] == 0).all() and got[bad].isnan().all() and scalars.divergence[zero + bad].isnan().all()
    exact = expected.gradient.astype(float)
    if case.softcap:
        exact = exact * np.maximum(1 - (rows.student.double().numpy() / case.softcap) ** 2, 0)
    if case.gradient == torch.bfloat16:  # what rounding to it costs is what it may cost
        got = within_rounding(got / rows.weight[:, None].double(), exact)
    elif gradient is not None:
        got = got / rows.weight[:, None].double()
    else:
        exact = exact * 0
    expected = expected._replace(gradient=exact)

    if case.kind == "clipped":  # a sum of either sign, in which terms cancel
        good = rows.some(lambda name: "NaN" not in name)
        want = expected.divergence.astype(float)
        np.testing.assert_allclose(scalars.divergence[good].numpy(), want[good], rtol=1e-5, atol=1e-6)
        zeros = torch.zeros(len(want))
        scalars, expected = scalars._replace(divergence=zeros), expected._replace(divergence=zeros.numpy())

    def compare(some, **floors):
        of = [Scalars(*(x if x is None else x[some] for x in scalars)), got[some]]
        assert_rows(*of, oracle.Rows(*(x[some] for x in expected)), **floors)

    compare(rows.some(lambda name: "NaN" not in name))
    if rows.some(lambda name: "peaked" in name):
        compare(rows.some(lambda name: "peaked" in name), floor=1e-13, gradient_floor=0)
    same = rows.some(lambda name: name == "identical")
    assert (scalars.divergence[same] == 0).all() and (got[same] == 0).all()


def within_rounding(got, exact):
    """`exact` wherever `got` is as near to it as its own rounding to bf16, or one rounding of fp32 further."""
    exact = torch.tensor(exact)
    limit = (exact.abs() * (2**-8 * 1.001)).nan_to_num()
    return torch.where((got - exact).abs() <= limit, exact, got)


def run_whole(compiled, case: Case, rows: Rows):
    student, teacher = padded(rows.student), padded(rows.teacher)
    gradient = None
    if case.gradient is not None:
        gradient = padded(torch.full(student.shape, torch.nan), case.gradient, torch.nan)
    target = old_logp = None
    if case.target:
        target = torch.full((len(student),), case.vocabulary // 2 + 1)
        old_logp = torch.linspace(-12, -4, len(student))
    weight = rows.weight
    scalars = compiled.row_divergence_triton.row_divergence(
        Logits(student, teacher, case.difference, case.softcap), PerRow(weight, target, old_logp, 2.0),
        case.objective, gradient,
    )  # fmt: skip
    if gradient is not None:
        beyond = gradient.as_strided((len(gradient), gradient.stride(0)), gradient.stride())[:, case.vocabulary :]
        assert beyond.isnan().all()  # nothing is written there
    if case.target:
        good = rows.some(lambda name: "NaN" not in name)
        z = torch.stack([rows.student.double(), rows.seen])[:, good] / TEMPERATURE
        logp = z.log_softmax(-1)[..., case.vocabulary // 2 + 1]
        torch.testing.assert_close(scalars.student_logp[good].double(), logp[0], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(scalars.teacher_logp[good].double(), logp[1], rtol=1e-6, atol=2e-6)
        ratio = (scalars.student_logp.double() - old_logp.double()).clamp(-20, 20).exp().clamp(max=2.0)
        torch.testing.assert_close(scalars.importance_ratio[good].double(), ratio[good], rtol=3e-6, atol=0)
        rows = rows._replace(weight=(weight * ratio.nan_to_num(1.0)).float())
    return rows, scalars, gradient


WHOLE = [
    Case("forward", 6657, target=True),
    Case("forward", 2064, difference=True, gradient=torch.bfloat16),
    Case("forward", 37, logits=torch.float64),
    Case("reverse", 2301, logits=torch.bfloat16, gradient=torch.bfloat16, softcap=50.0, target=True),
    Case("reverse", 6656, difference=True),
    Case("jensen_shannon", 6657, target=True),
    Case("jensen_shannon", 6656, difference=True, softcap=50.0),
    Case("jensen_shannon", 2064, gradient=None),
    Case("jensen_shannon", 1),
    Case("clipped", 2301, target=True),
    Case("clipped", 2064, difference=True, gradient=torch.bfloat16),
]


def label(case: Case) -> str:
    changed = [f"{k}={v}" for k, v in case._asdict().items() if v != Case._field_defaults.get(k)]
    return " ".join(str(x).replace("torch.", "") for x in changed)


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_whole_rows(sm_80, case):
    rows = rows_of(case)
    for sm_80.seed in SEEDS:
        check(case, *run_whole(sm_80, case, rows))


def ties() -> Rows:
    """The teacher's largest logit is a rounding above its logit at the student's peak, whatever the logits' size."""
    offset = torch.linspace(20, 1000, 20)[:, None]
    student, teacher = torch.full((2, 20, 301), -torch.inf)
    student[:, -4:] = offset + torch.tensor([0.0, -3.0, -4.0, -1.0]) * TEMPERATURE
    teacher[:, -4:] = offset + torch.tensor([0.0, 0.0, -4.0, -6.0]) * TEMPERATURE
    teacher[:, -3] += 1.8e-6 * offset[:, 0]
    return Rows(["tie"] * 20, student, teacher, teacher.double(), torch.ones(20))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_peaks_that_nearly_tie(sm_80, kind):
    case = Case(kind, 301)
    for sm_80.seed in SEEDS:
        check(case, *run_whole(sm_80, case, ties()))


def test_what_one_side_forbids_alone(sm_80):
    """KL is infinite then. Its gradient is finite at beta 0, and at beta 1 infinite at the forbidden entries alone."""
    some = torch.arange(0, 2301, 9)
    for kind in ("forward", "reverse"):
        student, teacher = logits(2301, 2.0, 0.3, rows=2)
        (student if kind == "forward" else teacher)[:, some] = -torch.inf
        rows = Rows(["a", "b"], student, teacher, teacher.double(), torch.ones(2))
        _, scalars, gradient = run_whole(sm_80, Case(kind, 2301), rows)
        assert (scalars.divergence == torch.inf).all()
        if kind == "forward":
            expected = oracle.rows(student, teacher, 0.0, TEMPERATURE).gradient.astype(float)
            np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5, atol=1e-7)
        else:
            assert (gradient[:, some] == torch.inf).all()
            rest = torch.ones(2301, dtype=torch.bool).index_fill(0, some, False)
            assert gradient[:, rest].isfinite().all() and (gradient[:, rest] < -1e20).all()


IN_PLACE = Case("jensen_shannon", 6657, gradient=torch.bfloat16)


def in_place(rows):
    """What the row kernel takes whose gradient lies over the student's logits."""
    student, teacher = padded(rows.student), padded(rows.teacher)
    over = student.view(torch.bfloat16)[:, : IN_PLACE.vocabulary]
    return Logits(student, teacher, False, 0.0), PerRow(rows.weight), IN_PLACE.objective, over


def test_bf16_gradient_over_the_students_row(sm_80):
    """It has the bits of one elsewhere; and no thread writes over what another has yet to read."""
    rows = rows_of(IN_PLACE)
    *given, over = in_place(rows)
    apart = torch.full((len(over), over.stride(0)), torch.nan, dtype=torch.bfloat16)[:, : IN_PLACE.vocabulary]
    for gradient in (apart, over):
        check(IN_PLACE, rows, sm_80.row_divergence_triton.row_divergence(*given, gradient), gradient)
    assert torch.equal(over.view(torch.int16), apart.view(torch.int16))


PARTS = [
    Case("forward", 2301, gradient=torch.bfloat16, softcap=50.0),
    Case("reverse", 2301),
    Case("jensen_shannon", 2320, difference=True, gradient=torch.bfloat16),
    Case("clipped", 2320, difference=True),
]


@pytest.mark.parametrize("case", PARTS, ids=label)
def test_parts_of_rows(sm_80, case):
    """The stages of a vocabulary that is spread over processes, as `divergence_on_part` calls them, on two parts."""
    rows, kernels = rows_of(case), sm_80.row_divergence_triton
    cut = case.vocabulary - 240  # two blocks and a rest, and a rest alone
    parts = [
        Logits(*(padded(x[:, of]) for x in (rows.student, rows.teacher)), case.difference, case.softcap)
        for of in (slice(0, cut), slice(cut, None))
    ]
    for sm_80.seed in SEEDS:
        own = [kernels.row_statistics(part, TEMPERATURE) for part in parts]
        known = merge_statistics(torch.stack([torch.stack([x.double() for x in of]) for of in own]), TEMPERATURE)
        terms = sum(kernels.row_terms(part, case.objective, known) for part in parts)
        gradients = []
        for part in parts:
            gradients.append(padded(torch.full(part.student.shape, torch.nan), case.gradient, torch.nan))
            divergence = kernels.row_gradient(part, case.objective, known, terms, PerRow(rows.weight), gradients[-1])
        scalars = Scalars(divergence, known.student_entropy, known.teacher_entropy, None, None)
        check(case, rows, scalars, torch.cat(gradients, dim=1))


# ---------------------------------------------------------------------------------------------------------------------
# Rows with a policy-gradient loss of their targets.


class OfPolicy(NamedTuple):
    """What is given of each row of a case, and what comes of it in float64; how far a gradient may be off, by row."""

    given: PerRow
    losses: torch.Tensor
    clipped: torch.Tensor
    gradient: torch.Tensor
    limit: torch.Tensor

    def check(self, case: Case, rows: Rows, losses, clipped, gradient) -> None:
        good = rows.some(lambda name: name != "NaN")
        torch.testing.assert_close(losses[good].double(), self.losses[good], rtol=4e-6, atol=1e-6)
        assert torch.equal(clipped[good].double(), self.clipped[good])
        assert self.clipped[good].any() == (self.given.policy.ratio is not None or self.given.old_logp is not None)
        bad = rows.some(lambda name: name == "NaN")
        assert losses[bad].isnan().all()
        if gradient is not None:
            error = (gradient.double() - self.gradient).norm(dim=1)
            assert (error <= self.limit)[good].all(), torch.stack([error, self.limit])[:, good]
            assert gradient[bad].isnan().all()


def of_policy(case: Case, rows: Rows, ratios: str) -> OfPolicy:
    """Targets at a row's peak and elsewhere; some rows have no advantage, and some ratios are beyond their bounds."""
    generator = torch.Generator().manual_seed(1)
    count, v = rows.student.shape
    advantages, coefficient = torch.randn(count, generator=generator), torch.linspace(-1, 2, count)
    advantages[2] = 0
    target = torch.where(torch.arange(count) % 2 == 0, rows.student.nan_to_num(-torch.inf).argmax(1), v - 1)
    logp = torch.log_softmax(rows.student.double() / TEMPERATURE, -1).gather(1, target[:, None])[:, 0]
    ratio = 0.4 + 1.2 * torch.rand(count, generator=generator)
    old_logp = (logp - ratio.double().log()).float() if ratios == "old_logp" else None
    weight = torch.where(rows.weight == 0, 0.0, torch.linspace(1, -1, count))
    given = PerRow(weight, target, old_logp, 2.0,
                   RowPolicy(advantages, coefficient, ratio if ratios == "ratio" else None, 0.7, 1.1))  # fmt: skip
    if ratios == "old_logp":
        ratio = (logp - old_logp.double()).exp()
        weight = weight.double() * ratio.clamp(max=2.0).nan_to_num(1.0)
    else:
        ratio = ratio.double() if ratios == "ratio" else None
    policy = PolicyGradient(advantages, coefficient=coefficient, ratio=ratio, clip_low=0.3, clip_high=0.1)
    beta, clip = KINDS[case.kind]
    seen = torch.where(rows.weight[:, None] == 0, rows.student.double(), rows.seen)  # of no weight there is nothing
    sides = rows.student.float(), seen, target, {"beta": beta, "entry_clip": clip or None}
    losses, clipped, gradient = exact_rows(*sides, weight, policy, 0.0)
    *_, own = exact_rows(*sides, 0 * weight, policy, 0.0)
    *_, stick = exact_rows(*sides, 0 * weight, policy, 0.0, torch.float32)
    limit = 3 * (stick.double() - own).norm(dim=1) + 1e-5 * (gradient - own).norm(dim=1) + 1e-6 * gradient.norm(dim=1)
    limit = limit + 1e-18  # of long double's own, where both sides are one and the policy is clipped
    if case.gradient == torch.bfloat16:
        limit = limit + 2**-8 * gradient.norm(dim=1)
    if case.softcap:
        gradient = gradient * (1 - (rows.student.double() / case.softcap) ** 2).clamp(min=0)
    return OfPolicy(given, losses, clipped, gradient, limit)


POLICIES = [
    (Case("forward", 2301), "old_logp"),
    (Case("forward", 37, logits=torch.float64), "on-policy"),
    (Case("reverse", 2064, difference=True, gradient=torch.bfloat16), "ratio"),
    (Case("jensen_shannon", 2301), "on-policy"),
    (Case("jensen_shannon", 2320, gradient=torch.bfloat16, softcap=50.0), "ratio"),
    (Case("jensen_shannon", 2064, gradient=None), "old_logp"),
    (Case("clipped", 2301), "old_logp"),
]


def run_policy(compiled, case: Case, rows: Rows, of: OfPolicy):
    gradient = None
    if case.gradient is not None:
        gradient = padded(torch.full(rows.student.shape, torch.nan), case.gradient, torch.nan)
    logits = Logits(padded(rows.student), padded(rows.teacher), case.difference, case.softcap)
    scalars = compiled.row_divergence_triton.row_divergence(logits, of.given, case.objective, gradient)
    return scalars.policy_loss, scalars.policy_clipped, gradient


@pytest.mark.parametrize("case, ratios", POLICIES, ids=lambda x: x if isinstance(x, str) else label(x))
def test_whole_rows_with_a_policy(sm_80, case, ratios):
    rows = rows_of(case)
    expected = of_policy(case, rows, ratios)
    for sm_80.seed in SEEDS:
        expected.check(case, rows, *run_policy(sm_80, case, rows, expected))


@pytest.mark.parametrize("case", PARTS, ids=label)
def test_parts_of_rows_with_a_policy(sm_80, case):
    """The target is in one part, and the other has its own entries' share of the gradient."""
    rows, kernels = rows_of(case), sm_80.row_divergence_triton
    expected = of_policy(case, rows, "ratio")
    cut, target = case.vocabulary - 240, expected.given.target
    starts = (0, cut)
    parts = [
        Logits(*(padded(x[:, of]) for x in (rows.student, rows.teacher)), case.difference, case.softcap)
        for of in (slice(0, cut), slice(cut, None))
    ]
    assert (target < cut).any() and (target >= cut).any()
    for sm_80.seed in SEEDS:
        own = [kernels.row_statistics(part, TEMPERATURE) for part in parts]
        known = merge_statistics(torch.stack([torch.stack([x.double() for x in of]) for of in own]), TEMPERATURE)
        terms = sum(kernels.row_terms(part, case.objective, known) for part in parts)
        at_target = rows.student.gather(1, target[:, None])[:, 0].double()
        (_, losses, clipped), weight, slope = of_target(at_target / TEMPERATURE - known.student_lse, expected.given)
        gradients = []
        for part, start in zip(parts, starts, strict=True):
            column = target - start
            column = torch.where((column >= 0) & (column < part.student.shape[1]), column, -1)
            given = PerRow(weight, column, policy=expected.given.policy._replace(coefficient=slope.float()))
            gradients.append(padded(torch.full(part.student.shape, torch.nan), case.gradient, torch.nan))
            kernels.row_gradient(part, case.objective, known, terms, given, gradients[-1])
        expected.check(case, rows, losses, clipped, torch.cat(gradients, dim=1))


# ---------------------------------------------------------------------------------------------------------------------
# The other kernels.


@pytest.mark.parametrize("vocabulary, bias, softcap", [(4999, True, 5.0), (4112, False, 0.0)])
def test_head_logits(sm_80, vocabulary, bias, softcap):
    """c tanh(s (x + b) / c), to twice the error that `hyperbolic_tangent` states; s (x + b) to two roundings."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, vocabulary, generator=generator) * torch.logspace(-3, 1, 3)[:, None]
    b = torch.randn(vocabulary, generator=generator) if bias else None
    x[:, 7] = 0.0 if b is None else -b[7]
    z = 1.7 * (x.double() + (0 if b is None else (x + b).double() - x.double()))
    exact = z if softcap == 0 else softcap * torch.tanh(z / softcap)
    for sm_80.seed in SEEDS:
        got = padded(x)
        sm_80.logits_triton.head_logits(got, b, 1.7, softcap)
        torch.testing.assert_close(got.double(), exact, rtol=1.2e-6 if softcap else 1.2e-7, atol=0)


def test_likeliest(sm_80):
    """Of equal numbers the first ones, two at a place where sets meet."""
    z = torch.randn(2, 9001, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    z[0, [63, 64, 9000]] = 9.0
    for k in (2, 40):
        assert sm_80.support_triton.likeliest(padded(z), k).tolist() == [first_largest(x, k) for x in z.tolist()]


class Support(NamedTuple):
    """Three rows of a support: one has nothing else, one an empty slot, and one weight 0 and no number."""

    logits: Logits  # with the support's entries
    columns: torch.Tensor
    at: SupportLogits
    tail: RowStatistics
    given: PerRow


def support_of(vocabulary, softcap, policy):
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 3, vocabulary, generator=generator) * 3
    columns = torch.stack([torch.randperm(vocabulary, generator=generator)[:9] for _ in z])
    columns[1, 4] = -1
    z[0] = torch.where(torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, columns[0], True), z[0], -torch.inf)
    z[2, 7] = torch.nan
    given = PerRow(torch.tensor([1.0, -2.0, 0.0]))
    if policy:
        target = torch.stack([columns[0, 3], torch.tensor(vocabulary - 1), columns[2, 0]])
        advantage, coefficient = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0.5, 2.0, 0.0])
        given = given._replace(
            target=target, old_logp=torch.tensor([-1.0, -2.0, -3.0]),
            policy=RowPolicy(advantage, coefficient, None, 0.8, 1.2),
        )  # fmt: skip
    logits = Logits(padded(z), padded(t), False, softcap)
    target = None if given.target is None else support_torch.entries(logits, given.target[:, None], torch.nan)[..., 0]
    rest = Logits(*(x.clone() for x in logits[:2]), False, softcap)
    student, teacher = support_torch.entries(rest, columns, -torch.inf, forbid=True)
    tail = native.row_statistics(rest, TEMPERATURE)
    return Support(logits, columns, SupportLogits(columns, student, teacher, None, target), tail, given)


@pytest.mark.parametrize("policy", [False, True], ids=["divergence", "policy"])
@pytest.mark.parametrize("vocabulary, softcap, dtype", [(6657, 0.0, torch.bfloat16), (4112, 30.0, torch.float32)])
def test_supports(sm_80, vocabulary, softcap, dtype, policy):
    """As PyTorch's operators have it in float64: values to an fp32 rounding, the dense gradient to twice the error that
    `exponential` states."""
    case, kernels = support_of(vocabulary, softcap, policy), sm_80.support_triton
    for renormalize in (False, True):
        options = {"renormalize": renormalize}
        expected = support_torch.support_values(case.at, case.tail, case.given, TEMPERATURE, **options)
        got = kernels.support_values(case.at, case.tail, case.given, TEMPERATURE, **options)
        for name in ("log_p", "log_q", "lse", "log_tail", "weight", "slope"):
            x, y = getattr(got, name), getattr(expected, name)
            assert (x is None) == (y is None)
            if y is not None:
                limit = 1e-6 if y.dtype == torch.float32 else 1e-12
                torch.testing.assert_close(x, y, rtol=limit, atol=limit, equal_nan=True)
        torch.testing.assert_close(got.scalars[1:], expected.scalars[1:], rtol=1e-6, atol=1e-6, equal_nan=True)
        for x, y in zip(got.few[:2], expected.few[:2], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, equal_nan=True)
    g = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    for is_bounded in (False, True):
        rest = case.logits._replace(student=case.logits.student.clone(), teacher=case.logits.teacher.clone())
        read = kernels.entries(rest, case.columns, -torch.inf, forbid=True)
        assert torch.equal(read.nan_to_num(0.5), torch.stack([case.at.student, case.at.teacher]).nan_to_num(0.5))
        rest = rest._replace(student=padded(rest.student))
        arguments = (
            rest, case.columns, case.at, case.given.target, expected, case.tail.student_lse, g, TEMPERATURE
        )  # fmt: skip
        want, got = (padded(torch.full(rest.student.shape, torch.nan), dtype, torch.nan) for _ in range(2))
        support_torch.support_gradient(*arguments, want, is_bounded=is_bounded)
        for sm_80.seed in SEEDS:
            kernels.support_gradient(*arguments, got, is_bounded=is_bounded)
            eps = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got, want, rtol=eps, atol=1e-7)
        in_place = chunked.view_as(rest.student, dtype)
        kernels.support_gradient(*arguments, in_place, is_bounded=is_bounded)
        assert torch.equal(in_place, got)
        assert (got[2] == 0).all()


@pytest.mark.parametrize("exponent, threshold", [(0.5, None), (1.0, 0.5), (0.25, None)])
def test_question_weights(sm_80, exponent, threshold):
    generator = torch.Generator().manual_seed(0)
    for sm_80.seed in SEEDS:
        for count in (2, 130):
            rewards = torch.randint(2, (count,), generator=generator).float()
            ids = torch.randint(9, (count,), generator=generator) - 4 + 2**40
            got = sm_80.question_weights_triton.question_weights(rewards, ids, exponent, threshold)
            expected = by_hand(rewards.tolist(), ids.tolist(), exponent)
            want = torch.tensor([expected[i] for i in ids.tolist()])
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scaling(sm_80, dtype):
    """Every entry once and rounded once; or nothing is written at all."""
    for factor in (2.5, torch.nan, 1.0):
        gradient = torch.randn(12_345, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = (gradient.float() * factor).to(dtype)
        sm_80.scaling_triton.multiply(gradient, torch.tensor(factor))
        assert torch.equal(gradient.nan_to_num(7.0), expected.nan_to_num(7.0))


# ---------------------------------------------------------------------------------------------------------------------
# Another GPU, and another compiler.


OTHER = Case("jensen_shannon", 6656, difference=True, gradient=torch.bfloat16, softcap=50.0)


@pytest.mark.parametrize("target, triton", [("sm_90", None), ("sm_80", TRITON_3_6)], ids=["sm_90", "3.6.0"])
def test_others(target, triton):
    if triton is not None and not triton.is_dir():
        pytest.skip(f"no Triton 3.6.0 in {triton}; ./dev test installs it")
    with Compiled(target, triton=triton) as compiled:
        check(OTHER, *run_whole(compiled, OTHER, rows_of(OTHER)))


# ---------------------------------------------------------------------------------------------------------------------
# Faults that are seen here, and not by Triton's interpreter.

FAULTS = [
    # Differences of exponents that are 0 in Python were unequal roundings of one product on a GPU.
    ("kernels/divergence_triton.py", "-tl.floor(base(maximum) * bits)", "-(base(maximum) * bits)"),
    # Threads may be ahead of others by more than a block of the row.
    ("kernels/row_divergence_triton.py", "    tl.debug_barrier()  # see _write_gradient", "    pass"),
    # A target's entry is written by its block, and then alone.
    ("kernels/row_divergence_triton.py", "    tl.debug_barrier()  # after what the blocks have", "    pass  #"),
]


@pytest.fixture(scope="module")
def faulty():
    with Compiled(changes=FAULTS) as compiled:
        yield compiled


def test_a_bias_that_is_fused_in_one_place_and_not_in_another(faulty):
    case = Case("forward", 301)
    with Compiled(changes=FAULTS, interpreted=True) as interpreted:
        check(case, *run_whole(interpreted, case, ties()))
    got = run_whole(faulty, case, ties())
    with pytest.raises(AssertionError):
        check(case, *got)


def test_a_gradient_without_its_barrier(faulty):
    with pytest.raises(RuntimeError, match=r"RaceError: \d+ writes of \d+ bytes"):
        faulty.row_divergence_triton.row_divergence(*in_place(rows_of(IN_PLACE)))


def test_a_target_without_its_barrier(faulty):
    case, ratios = POLICIES[0]
    rows = rows_of(case)
    with pytest.raises(RuntimeError, match=r"RaceError: \d+ writes of \d+ bytes"):
        run_policy(faulty, case, rows, of_policy(case, rows, ratios))
