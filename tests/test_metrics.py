"""Metrics from the same pass: against float64, token by token; what else a call gives is what it gives without them."""

import itertools
import math
import subprocess
import sys

import oracle
import pytest
import torch
from conftest import every_schedule
from problems import DTYPES, HEADS, Problem, known, problem
from ranks import over
from test_shards import ENDS, Process
from torch import Tensor

from scsdpo_kernels import (
    METRICS,
    Head,
    PolicyGradient,
    SampledToken,
    TopK,
    TopLogprobs,
    VocabShard,
    linear_divergence_per_token,
    scsdpo_loss,
)
from scsdpo_kernels.arguments import problem_of
from scsdpo_kernels.linear_divergence import DEFAULTS
from scsdpo_kernels.problem import flatten
from scsdpo_kernels.schedules import chunked, metrics

V, D, LEADING = 67, 16, (3, 5)
SCHEDULES = ("chunked", "reference")

GENERATOR = torch.Generator().manual_seed(1)
TARGETS = {
    "target_ids": torch.randint(60, LEADING, generator=GENERATOR),
    "old_logp": -3 - 5 * torch.rand(LEADING, generator=GENERATOR),
    "importance_clip": 0.7,
}
POLICY = {**TARGETS, "policy": PolicyGradient(torch.randn(LEADING, generator=GENERATOR))}
NAMED = torch.rand(*LEADING, V, generator=GENERATOR).argsort(-1)[..., :6]
NAMED[::2, :, 1:] = -1  # empty slots
NAMED[1, 1] = -1
LOGP = torch.randn(*LEADING, 6, generator=GENERATOR) - 4
TOP1, MASS, ENTRIES, RATIOS = METRICS
TOP1_AND_RATIOS = {**TARGETS, "metrics": (RATIOS, TOP1)}


def sides(own: bool = False, **more) -> Problem:
    """Tokens of which a third have no weight; own: a teacher with a head of its own, beside the student's."""
    given = problem(LEADING, D, V, **{"distance": 0.5, "scale": 2.0, "weighted": True, **more})
    given.token_weight.view(-1)[::3] = 0
    if own:
        generator = torch.Generator().manual_seed(3)
        head = Head(given.head) if isinstance(given.head, Tensor) else given.head
        weight = head.weight + 0.05 * torch.randn(head.weight.shape, generator=generator).to(head.weight.dtype)
        bias = None if head.bias is None else head.bias + 0.3 * torch.randn(V, generator=generator)
        given = given.but(teacher_head=head._replace(weight=weight, bias=bias))
    return given


def forbidding() -> Problem:
    """The student some tokens, the teacher others, among them the likeliest ones of a few rows."""
    given = sides(own=True, head="bias")
    given.head.bias[:20] = given.teacher_head.bias[10:40] = -torch.inf
    return given


def peaked() -> Problem:
    """Half of the tokens have almost all of their probability at one entry."""
    given = sides(distance=0.05)
    given.head[20] = given.hidden[0, 1] * 0.6
    return given


def of_unequal_lengths() -> Problem:
    given = sides(own=True)
    return given.but(head=torch.cat([given.head, 9 * torch.ones(5, D)]))


def server(given: Problem) -> Problem:
    return given.but(teacher=None, teacher_head=None)


# A problem and the options, of which several names share one pass.
CASES = {
    "a shared head": (sides(), {"metrics": (TOP1,)}),
    "heads of their own": (sides(own=True), {"metrics": (TOP1,), "beta": 1.0, "temperature": 0.7}),
    "nearly equal": (sides(distance=1e-6), {"metrics": (TOP1,)}),
    "forbidden tokens": (forbidding(), {"metrics": (TOP1,), "beta": 0.5}),
    "peaked": (peaked(), TOP1_AND_RATIOS),
    "importance ratios": (sides(own=True), TOP1_AND_RATIOS),
    "unequal lengths": (of_unequal_lengths(), {**TOP1_AND_RATIOS, "shared_prefix": True}),
    "a policy": (sides(), {**POLICY, "metrics": (TOP1, RATIOS)}),
    "sampled token": (sides(), {**TOP1_AND_RATIOS, "support": SampledToken(), "beta": 1.0}),
    **{f"a head with {x}": (sides(head=x), {"metrics": (TOP1, MASS), "support": TopK(5)}) for x in HEADS},
    **{f"top {k}, {tail}": (sides(own=True), {**TARGETS, "metrics": (MASS, TOP1, RATIOS), "support": TopK(k, tail)})
       for k in (1, 7, 60, 100) for tail in ("bucket", "renormalize")},
    "top 7, nearly equal": (sides(distance=1e-6), {"metrics": (MASS, TOP1), "support": TopK(7)}),
    "top 7, peaked": (peaked(), {"metrics": (MASS, TOP1), "support": TopK(7), "temperature": 0.5}),
    "top 30, forbidden tokens": (forbidding(), {"metrics": (MASS, TOP1), "support": TopK(30)}),
    "server": (server(sides()), {**POLICY, "metrics": (MASS, RATIOS), "support": TopLogprobs(NAMED, LOGP)}),
    "server, renormalize": (server(sides()), {"metrics": (MASS,), "support": TopLogprobs(NAMED, LOGP, "renormalize")}),
    **{f"entries clipped at {clip}": (sides(own=True), {"metrics": (ENTRIES, TOP1), "beta": 0.0, "entry_clip": clip})
       for clip in (1e-4, 0.01, 0.3, 50.0)},
    "entries clipped, a shared head": (
        sides(), {**POLICY, "metrics": (ENTRIES, RATIOS), "beta": 0.0, "entry_clip": 0.003, "temperature": 1.7}),
    "entries clipped, forbidden tokens": (
        sides(own=True, head="bias"), {"metrics": (ENTRIES,), "beta": 0.0, "entry_clip": 0.01}),
    "entries clipped, softcap": (sides(head="all"), {"metrics": (ENTRIES,), "beta": 0.0, "entry_clip": 0.01}),
}  # fmt: skip
CASES["entries clipped, forbidden tokens"][0].teacher_head.bias[10:40] = -torch.inf
CASES["entries clipped, forbidden tokens"][0].head.bias[38:45] = -torch.inf


def expected(given: Problem, options: dict) -> dict[str, Tensor]:
    """Token by token in float64, with sets and sums of Python's; 0 at tokens that are not computed."""
    of, temperature = given.to(torch.float64), options.get("temperature", 1.0)
    log_p, log_q = oracle._log_probabilities(of, temperature, options.get("shared_prefix", False))
    counts = given.token_weight != 0
    if (policy := options.get("policy")) is not None:
        counts = counts | (policy.advantages != 0)
    names = [entry for name in options["metrics"] for entry in METRICS[name]]
    found = {name: torch.zeros(log_p.shape[:-1], dtype=torch.float64) for name in names}
    for at in counts.nonzero().tolist():
        at, of_token = tuple(at), {}
        p = log_p[at].tolist()
        q = None if log_q is None else log_q[at].tolist()
        if TOP1 in options["metrics"]:
            likeliest = [{v for v, x in enumerate(side) if x == max(side)} for side in (p, q)]
            of_token["top1_agreement"] = float(bool(set.intersection(*likeliest)))
        if MASS in options["metrics"]:
            support = options["support"]
            if isinstance(support, TopK):
                ids = sorted(range(len(p)), key=lambda v: -p[v])[: support.k]
                named = [q[v] for v in ids]
            else:
                weighted = given.token_weight[at] != 0  # otherwise it is computed for its policy's loss alone
                slots = zip(support.ids[at].tolist(), support.logp[at].tolist(), strict=True)
                slots = [(v, x) for v, x in slots if v >= 0 and weighted]
                ids, named = [v for v, _ in slots], [x for _, x in slots]
            of_token["student_support_mass"] = math.fsum(math.exp(p[v]) for v in ids)
            of_token["teacher_support_mass"] = math.fsum(math.exp(x) for x in named)
        if ENTRIES in options["metrics"]:
            there = [v for v, x in enumerate(q) if x > -math.inf]
            terms = [math.inf if p[v] == -math.inf else math.exp(q[v]) * (q[v] - p[v]) for v in there]
            of_token["entry_clipped"] = sum(x > options["entry_clip"] for x in terms) / len(there)
        if RATIOS in options["metrics"]:
            log_ratio = p[options["target_ids"][at]] - options["old_logp"][at].item()
            of_token["importance_clipped"] = float(math.exp(min(20, max(-20, log_ratio))) > options["importance_clip"])
        for name, value in of_token.items():
            found[name][at] = value
    return found


def assert_exact(got: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The flags and shares of entries without an error: no token of these problems is at a threshold."""
    assert list(got) == list(exact)
    for name, values in exact.items():
        rtol, atol = (2e-6, 1e-9) if name.endswith("mass") else (1e-6, 0)
        torch.testing.assert_close(got[name].double(), values, rtol=rtol, atol=atol, msg=lambda x, n=name: f"{n}: {x}")


@pytest.mark.parametrize("name", CASES)
def test_against_float64(kernels, name):
    given, options = CASES[name]
    result = given.call(**options)
    exact = expected(given, options)
    assert all(x.dtype == torch.float32 and x.shape == LEADING and not x.requires_grad for x in result.metrics.values())
    assert_exact(result.metrics, exact)
    for entry, values in exact.items():  # the cases would see a constant
        some = values[given.token_weight != 0]
        varies = entry.endswith("mass") or (entry == "entry_clipped" and options["entry_clip"] < 1)
        assert not varies or some.unique().numel() > 1 or name.startswith("top 100"), entry


def test_the_cases_have_flags_of_both_kinds():
    for entry in ("top1_agreement", "importance_clipped"):
        tokens = [expected(given, options)[entry][given.token_weight != 0]
                  for given, options in CASES.values() if entry in options["metrics"]]  # fmt: skip
        assert 0.1 < torch.cat(tokens).mean() < 0.9
        assert sum(x.unique().numel() == 2 for x in tokens) > 0.8 * len(tokens)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_has_them(name, dtype):
    given, options = CASES[name]
    result = given.to(dtype).call(**options, schedule="reference")
    assert all(x.dtype == dtype and not x.requires_grad for x in result.metrics.values())
    assert_exact(result.metrics, expected(given, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    """Of the numbers that are given, as the values are."""
    for own in (False, True):
        given = sides(own=own, dtype=dtype)
        options = {**TARGETS, "metrics": (TOP1, MASS, RATIOS), "support": TopK(9)}
        assert_exact(given.call(**options).metrics, expected(given, options))


IN_THE_INTERPRETER = (
    "a shared head", "heads of their own", "importance ratios", "a policy", "sampled token", "a head with all",
    "top 7, bucket", "top 7, renormalize", "server", "entries clipped at 0.01",
)  # fmt: skip


@pytest.mark.parametrize(
    "kernels, name, schedule",
    [
        *itertools.product(["cpu"], CASES, SCHEDULES),
        *(("triton", name, "chunked") for name in IN_THE_INTERPRETER),
    ],
    indirect=["kernels"],
)
def test_everything_else_has_the_bits_of_a_call_without(kernels, name, schedule):
    given, options = CASES[name]
    plain, *gradients = given.run(**{**options, "metrics": ()}, schedule=schedule)
    result, *others = given.run(**options, schedule=schedule)
    assert plain.metrics is None and result.loss.equal(plain.loss)
    fields = known(result._replace(metrics=None))
    assert fields.keys() == known(plain).keys()
    for field, values in known(plain).items():
        assert torch.equal(fields[field], values), field
    for got, want in zip(others, gradients, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("trained", ["all", "hidden", "nothing"])
@pytest.mark.parametrize("name", ["a shared head", "top 7, bucket", "entries clipped at 0.01", "importance ratios"])
def test_whatever_is_trained(name, trained):
    given, options = CASES[name]
    if trained == "all":
        given = given.leaves()
    elif trained == "hidden":
        given = given.but(hidden=given.hidden.clone().requires_grad_())
    assert_exact(given.call(**options).metrics, expected(CASES[name][0], options))


def few_rows(monkeypatch) -> None:
    """Chunks of two rows, and blocks of one."""
    monkeypatch.setattr(chunked, "MIN_ROWS", 2)
    monkeypatch.setattr(chunked, "BUFFER_BYTES", dict.fromkeys(chunked.BUFFER_BYTES, 0))
    monkeypatch.setattr(metrics, "BLOCK_BYTES", dict.fromkeys(metrics.BLOCK_BYTES, 0))


@pytest.mark.parametrize("name", CASES)
def test_chunks_and_blocks_change_nothing(monkeypatch, name):
    given, options = CASES[name]
    whole = given.call(**options).metrics
    monkeypatch.setattr(metrics, "BLOCK_BYTES", {"cpu": 3 * 4 * V})  # three rows, and what remains
    blocks = given.call(**options).metrics
    few_rows(monkeypatch)
    for other in (blocks, given.call(**options).metrics):
        for entry, values in whole.items():
            assert torch.equal(other[entry], values), entry


# ---------------------------------------------------------------------------------------------------------------------
# Ties, forbidden tokens and NaN: logits that are given, by heads that are the identity.

FORBIDDEN = -math.inf
AGREEMENTS = {  # student, teacher, agreement
    "the same": ([0.0, 2.0, 1.0, 0.5], [0.0, 9.0, 1.0, 2.0], 1),
    "another": ([0.0, 2.0, 1.0, 0.5], [0.0, 1.0, 1.5, 0.5], 0),
    "the student's first of two": ([3.0, 1.0, 1.0, 3.0], [5.0, 0.0, 0.0, 0.0], 1),
    "the student's second of two": ([3.0, 1.0, 1.0, 3.0], [0.0, 0.0, 0.0, 5.0], 1),
    "neither of two": ([3.0, 1.0, 1.0, 3.0], [0.0, 0.0, 5.0, 0.0], 0),
    "the teacher's first of two": ([5.0, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, 3.0], 1),
    "the teacher's second of two": ([0.0, 0.0, 0.0, 5.0], [3.0, 1.0, 1.0, 3.0], 1),
    "one of two on both sides": ([5.0, 5.0, 0.0, 0.0], [0.0, 3.0, 3.0, 0.0], 1),
    "two and two others": ([5.0, 5.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0], 0),
    "all": ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 1),
    "below 0": ([-9.0, -8.0, -8.5, -30.0], [-9.0, -5.0, -6.0, -7.0], 1),
}


def given_logits(student: Tensor, teacher: Tensor, device="cpu") -> Problem:
    """Biases forbid tokens, as they do in models: 0 · inf is no logit."""
    heads = [Head(torch.eye(x.shape[1], device=device)) for x in (student, teacher)]
    return Problem(student.to(device), heads[0], teacher.to(device), heads[1])


@every_schedule
@pytest.mark.parametrize("shared", [False, True], ids=["heads of their own", "a shared head"])
def test_ties_count_on_either_side(kernels, schedule, shared):
    student, teacher, agreements = zip(*AGREEMENTS.values(), strict=True)
    given = given_logits(torch.tensor(student), torch.tensor(teacher))
    result = given.but(teacher_head=None if shared else given.teacher_head).call(metrics=(TOP1,), schedule=schedule)
    assert result.metrics[TOP1].tolist() == list(agreements)


@every_schedule
def test_a_token_that_one_side_forbids_is_not_its_likeliest(kernels, schedule):
    student = torch.tensor([[9.0, 1.0, 0.0], [9.0, 1.0, 0.0]])
    teacher = torch.tensor([[0.0, 5.0, 1.0], [7.0, 5.0, 1.0]])
    bias = torch.tensor([FORBIDDEN, 0.0, 0.0])
    given = given_logits(student, teacher)
    plain = given.call(metrics=(TOP1,), schedule=schedule)
    assert plain.metrics[TOP1].tolist() == [0, 1]
    forbidden = given.but(head=given.head._replace(bias=bias))
    assert forbidden.call(metrics=(TOP1,), schedule=schedule).metrics[TOP1].tolist() == [1, 0]
    shared = forbidden.but(teacher_head=None).call(metrics=(TOP1,), schedule=schedule)
    assert shared.metrics[TOP1].tolist() == [1, 1]


@every_schedule
def test_a_token_that_only_the_teacher_may_say_is_clipped(kernels, schedule):
    """Its term is infinite. One that only the student may say is not counted."""
    given = given_logits(torch.zeros(2, 4), torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    bias = torch.tensor([FORBIDDEN, 0.0, 0.0, 0.0])
    options = {"metrics": (ENTRIES,), "beta": 0.0, "entry_clip": 5.0, "schedule": schedule}
    ours = given.but(head=given.head._replace(bias=bias)).call(**options)
    assert ours.metrics[ENTRIES].tolist() == [0.25, 0.25]
    theirs = given.but(teacher_head=given.teacher_head._replace(bias=bias)).call(**{**options, "entry_clip": 0.2})
    torch.testing.assert_close(theirs.metrics[ENTRIES], torch.tensor([1 / 3, 0.0]))
    both = [head._replace(bias=bias) for head in (given.head, given.teacher_head)]
    torch.testing.assert_close(
        given.but(head=both[0], teacher_head=both[1]).call(**{**options, "entry_clip": 0.2}).metrics[ENTRIES],
        torch.tensor([1 / 3, 0.0]),
    )


NAN_CASES = {
    "top 1": {"metrics": (TOP1,)},
    "top 1, a support": {"metrics": (TOP1, MASS), "support": TopK(2)},
    "entries": {"metrics": (ENTRIES, TOP1), "beta": 0.0, "entry_clip": 0.1},
}


@pytest.mark.parametrize(
    "kernels, schedule, side, value",
    [
        *itertools.product(["cpu"], SCHEDULES, ("hidden", "teacher"), (math.nan, math.inf)),
        *(("triton", "chunked", *x) for x in (("hidden", math.nan), ("teacher", math.inf))),
    ],
    indirect=["kernels"],
)
@pytest.mark.parametrize("shared", [False, True], ids=["heads of their own", "a shared head"])
@pytest.mark.parametrize("name", NAN_CASES)
def test_rows_that_are_nan_have_nan(kernels, name, value, shared, side, schedule):
    """And no others."""
    given, options = sides(own=not shared).but(token_weight=None), NAN_CASES[name]
    bad = getattr(given, side).clone()
    bad[1, 2, 3] = bad[2, 4, 0] = value
    result = given.but(**{side: bad}).call(**options, schedule=schedule)
    for entry, values in result.metrics.items():
        want = torch.zeros(LEADING, dtype=torch.bool)
        want[1, 2] = want[2, 4] = True
        assert torch.equal(values.isnan(), want), entry


@every_schedule
def test_a_log_probability_that_is_nan(kernels, schedule):
    given, options = sides().but(token_weight=None), {**TARGETS, "metrics": (RATIOS,)}
    old = options["old_logp"].clone()
    old[1, 1] = math.nan
    result = given.call(**{**options, "old_logp": old}, schedule=schedule)
    assert result.metrics[RATIOS].isnan().nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_ratio_at_its_bound_is_not_clipped(schedule):
    given = given_logits(torch.tensor([[1e5, 0.0]] * 4), torch.zeros(4, 2))  # log p of token 0 is 0
    old = -torch.tensor([-1.0, 0.0, 1e-3, 100.0])
    options = {"target_ids": torch.zeros(4).long(), "old_logp": old, "metrics": (RATIOS,), "schedule": schedule}
    assert given.call(**options, importance_clip=1.0).metrics[RATIOS].tolist() == [0, 0, 1, 1]
    assert given.call(**options, importance_clip=1e9).metrics[RATIOS].tolist() == [0, 0, 0, 0]  # e^20 is the most
    assert given.call(**options, importance_clip=math.inf).metrics[RATIOS].tolist() == [0, 0, 0, 0]


def test_wrong_ids_that_nobody_has_checked_give_nan(unchecked):
    """On a GPU with the caller's own rows; there is one support that is right."""
    ids, logp = torch.tensor([[3, 4, -1], [5, 5, -1], [6, V, -1]]), torch.full((3, 3), -2.0)
    given = server(problem(3, D, V))
    found = given.call(support=TopLogprobs(ids, logp), metrics=(MASS,), rows=torch.arange(3)).metrics
    for values in found.values():
        assert values.isnan().tolist() == [False, True, True]


# ---------------------------------------------------------------------------------------------------------------------
# The operator.


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_token_without_a_leading_axis_and_none(schedule):
    given, options = sides(own=True), {"metrics": (MASS, TOP1), "support": TopK(5), "schedule": schedule}
    many = given.call(**options).metrics
    one = given.tokens((1, 1)).call(**options).metrics
    for entry, values in many.items():
        assert one[entry].shape == () and torch.equal(one[entry], values[1, 1])
    nobody = given.tokens((slice(0, 0), 0)).call(**options).metrics
    assert [x.shape for x in nobody.values()] == [(0,)] * 3
    unweighted = given.but(token_weight=torch.zeros(LEADING)).call(**options).metrics
    assert all(x.shape == LEADING and (x == 0).all() for x in unweighted.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_that_the_caller_knows(schedule):
    given, options = CASES["top 7, bucket"]
    rows = torch.cat([given.token_weight.view(-1).nonzero()[:, 0].flip(0), torch.tensor([0])])
    listed = given.call(**options, rows=rows, schedule=schedule).metrics
    everywhere = expected(given.but(token_weight=torch.ones(LEADING)), options)
    is_listed = torch.zeros(15, dtype=torch.bool).index_fill(0, rows, True).view(LEADING)
    for entry, values in everywhere.items():
        if entry != "importance_clipped":  # whose old_logp are not looked at where the weight is 0
            torch.testing.assert_close(listed[entry].double(), values.where(is_listed, 0.0), rtol=1e-5, atol=1e-7)


def test_names_are_in_the_order_in_which_they_are_asked_for_and_once():
    given, support = sides(), TopK(3)
    found = given.call(metrics=[MASS, TOP1, MASS], support=support).metrics
    assert list(found) == ["student_support_mass", "teacher_support_mass", "top1_agreement"]
    assert given.call(metrics=[]).metrics is None and given.call().metrics is None


def test_the_loss_of_a_batch_has_them():
    given, mask = sides(), torch.ones(LEADING)
    mask[1, 3:] = 0
    weight = torch.tensor([1.0, 0.5, 0.0])
    result = scsdpo_loss(*given, mask=mask, question_weight=weight, metrics=(TOP1,))
    computed = (mask * weight[:, None]) != 0
    exact = expected(given.but(token_weight=computed.float()), {"metrics": (TOP1,)})
    assert_exact(result.metrics, exact)


@pytest.mark.parametrize("name", ["top 7, bucket", "entries clipped at 0.01", "server", "importance ratios"])
def test_opcheck(name):
    given, options = CASES[name]
    leaves = flatten(problem_of(*given.leaves(), given.token_weight, DEFAULTS | options))
    torch.library.opcheck(torch.ops.scsdpo_kernels.divergence.default, (*leaves, [True] * 5))


@pytest.mark.parametrize("name", ["top 7, bucket", "entries clipped at 0.01", "importance ratios"])
def test_compiled_has_the_bits_of_eager(name):
    given, options = CASES[name]

    def step(hidden, head):
        result = Problem(hidden, head, given.teacher, given.teacher_head, given.token_weight).call(**options)
        return result.loss, result.metrics

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = given.leaves()
        loss, found = run(leaves.hidden, leaves.head)
        results.append((loss, *found.values(), *torch.autograd.grad(loss, leaves.trained)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


IDS = {"target_ids": torch.zeros(4).long()}


@pytest.mark.parametrize(
    "error, options, message",
    [
        (TypeError, {"metrics": "top1_agreement"}, "metrics: expected a list or tuple of names, got str"),
        (TypeError, {"metrics": None}, "metrics: expected a list or tuple of names, got NoneType"),
        (ValueError, {"metrics": ("accuracy",)}, "metrics: expected some of top1_agreement, support_mass, "
         "entry_clipped, importance_clipped, got 'accuracy'"),
        (ValueError, {"metrics": (3,)}, "metrics: expected some of top1_agreement"),
        (ValueError, {"metrics": (TOP1, MASS)},
         r"metrics: expected support=TopK\(...\) or TopLogprobs\(...\) with 'support_mass', got None"),
        (ValueError, {"metrics": (MASS,), "support": SampledToken(), "beta": 1.0, **IDS},
         "metrics: expected .* with 'support_mass', got SampledToken"),
        (ValueError, {"metrics": (ENTRIES,)}, "metrics: expected entry_clip with 'entry_clipped', got None"),
        (ValueError, {"metrics": (RATIOS,), **IDS}, "metrics: expected old_logp with 'importance_clipped', got None"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_does_not_fit_raises_by_name(error, options, message, schedule):
    with pytest.raises(error, match=message):
        problem(4, D, V).call(**options, schedule=schedule)


def test_what_is_not_known_of_a_server_raises_by_name():
    support = TopLogprobs(torch.zeros(4, 1).long(), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="metrics: expected the teacher's logits with 'top1_agreement', got TopLogpr"):
        server(problem(4, D, V)).call(support=support, metrics=(TOP1,))


def test_a_result_of_one_tensor_has_none():
    with pytest.raises(TypeError, match="metrics: linear_divergence_per_token takes none"):
        problem(4, D, V).call(linear_divergence_per_token, metrics=(TOP1,))
    problem(4, D, V).call(linear_divergence_per_token, metrics=())


PEAK = """
import sys, torch
from torch.autograd.profiler import profile
from scsdpo_kernels import linear_divergence
V, rows = 151936, 24
options, shared = eval(sys.argv[1]), sys.argv[2] == "shared"
hidden, weight = torch.randn(rows, 8), torch.randn(V, 8)
teacher_head = None if shared else torch.randn(V, 8)
def peak(metrics):
    with profile(profile_memory=True) as run:
        linear_divergence(hidden, weight, hidden + 0.1, teacher_head, **options, metrics=metrics)
    now = most = 0
    for event in run.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
peak(())
print((peak(sys.argv[3].split()) - peak(())) / (4 * V))
"""


@pytest.mark.parametrize("shared", ["shared", "own"])
@pytest.mark.parametrize("options, names", [
    ("{}", TOP1), ("{'beta': 0.0, 'entry_clip': 0.05}", f"{TOP1} {ENTRIES}"),
])  # fmt: skip
def test_a_pass_takes_a_few_rows_of_memory_more(options, names, shared):
    """Rows of fp32 logits in what the allocator has given out at once, over a call without metrics; a chunk has 24."""
    rows = float(subprocess.check_output([sys.executable, "-c", PEAK, options, shared, names], text=True))
    print(f"{names}, {shared}: {rows:.2f} rows")
    assert 0 < rows < 5


# ---------------------------------------------------------------------------------------------------------------------
# A vocabulary that is spread over processes.

ON_PARTS = [name for name in CASES if name != "unequal lengths"]


@over(1, 2, 3)
@pytest.mark.parametrize("name", ON_PARTS)
def test_parts_are_the_whole(group, name):
    process, (given, options) = Process(group), CASES[name]
    result = process.part(given).call(**process.here(options), shard=process.shard())
    exact = expected(given, options)
    assert_exact({entry: x.cpu() for entry, x in result.metrics.items()}, exact)
    plain = process.part(given).call(**process.here({**options, "metrics": ()}), shard=process.shard())
    for field, values in known(plain).items():
        assert torch.equal(getattr(result, field), values), field


@over(2, 3)
@pytest.mark.parametrize("name", ["top 7, bucket", "entries clipped at 0.01", "a policy", "server"])
def test_parts_with_tokens_of_each_process_s_own(group, name):
    """The last process has none."""
    process, (given, options) = Process(group), CASES[name]
    count = max(1, process.world - 1)
    ends = [LEADING[0] * r // count for r in range(process.world)] + [LEADING[0]]
    tokens = slice(*ends[process.rank : process.rank + 2])
    shard = process.shard(sequence_parallel=True)
    result = process.part(given, tokens).call(**process.here(options, tokens), shard=shard)
    exact = {entry: x[tokens] for entry, x in expected(given, options).items()}
    assert_exact({entry: x.cpu() for entry, x in result.metrics.items()}, exact)


@over(1, 2, 3, 4)
def test_ties_across_parts_count(group):
    """A tie within the first part, within the last and between them: as without parts."""
    process, generator = Process(group), torch.Generator().manual_seed(0)
    ends = (0, *ENDS[process.world])
    at = sorted({*ends[:-1], *(x - 1 for x in ends[1:] if x), 20, 40} & set(range(V)))
    rows = [(a, b, c) for a in at for b in at for c in at]
    student, teacher = (torch.rand(len(rows), V, generator=generator) for _ in range(2))
    for row, (a, b, c) in enumerate(rows):
        student[row, [a, b]], teacher[row, c] = 3.0, 2.0
    given = given_logits(student, teacher).but(token_weight=torch.ones(len(rows)))
    exact = expected(given, {"metrics": (TOP1,)})
    assert exact[TOP1].tolist() == [float(c in (a, b)) for a, b, c in rows]
    for swapped in (False, True):
        some = given if not swapped else given.but(hidden=given.teacher, teacher=given.hidden)
        head, other = (x._replace(weight=process.cut(x.weight)) for x in (some.head, some.teacher_head))
        mine = Problem(some.hidden.to(process.device), head, some.teacher.to(process.device), other)
        result = mine.call(metrics=(TOP1,), shard=process.shard())
        assert torch.equal(result.metrics[TOP1].cpu().double(), exact[TOP1])


@over(2, 3)
def test_nan_in_one_part_is_nan(group):
    process, given = Process(group), sides(own=True, head="bias").but(token_weight=None)
    given.head.bias[V - 1] = math.nan
    options = {"metrics": (TOP1, ENTRIES), "beta": 0.0, "entry_clip": 0.1}
    result = process.part(given).call(**options, shard=process.shard())
    assert all(x.isnan().all() for x in result.metrics.values())


@over(2, 3)
def test_processes_that_ask_for_others_are_told(group):
    process = Process(group)
    names = (TOP1,) if process.rank == 0 else ()
    with pytest.raises(ValueError, match=r"metrics: \('top1_agreement',\) on process 0, \(\) on process"):
        process.part(sides()).call(metrics=names, shard=process.shard())


@over(2)
def test_compiled_on_parts(group):
    process = Process(group)
    mine, shard = process.part(sides()), VocabShard(process.start, process.stop, group)
    step = torch.compile(lambda *x: Problem(*x).call(shard=shard, metrics=(TOP1,)).metrics[TOP1], fullgraph=True,
                         backend="eager")  # fmt: skip
    assert torch.equal(step(*mine, mine.token_weight), mine.call(shard=shard, metrics=(TOP1,)).metrics[TOP1])
