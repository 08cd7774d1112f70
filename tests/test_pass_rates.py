"""Pass rates that are kept across steps, against a plain-Python reading of their equations; over process groups too."""

import itertools
import math
import os
import socket
import uuid

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from scsdpo_kernels import PassRates, question_weights


class ByHand:
    """A question at a time, with every step it was in."""

    def __init__(self, prior, decay):
        self.prior, self.decay, self.steps = prior, decay, {}

    def rate(self, question):
        (a, b), steps = self.prior, self.steps.get(question, [])
        ages = range(len(steps) - 1, -1, -1)
        successes = math.fsum(self.decay**age * sum(step) for age, step in zip(ages, steps, strict=True))
        rollouts = math.fsum(self.decay**age * len(step) for age, step in zip(ages, steps, strict=True))
        return (a + successes) / (a + b + rollouts)

    def update(self, rewards, ids, exponent=0.5):
        for question in set(ids):
            step = [r for r, i in zip(rewards, ids, strict=True) if i == question]
            self.steps.setdefault(question, []).append(step)
        rates = {i: self.rate(i) for i in set(ids)}
        raw = {i: (p * (1 - p)) ** exponent if 1e-12 < p < 1 - 1e-12 else 0.0 for i, p in rates.items()}
        kept = [w for w in raw.values() if w > 0]
        return [raw[i] / (math.fsum(kept) / len(kept)) if kept else 0.0 for i in ids]


STEP = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(-3, 5)), max_size=40)
PRIORS = st.sampled_from([(0.0, 0.0), (1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])


@settings(max_examples=100, deadline=None)
@given(st.lists(STEP, max_size=5), PRIORS, st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([0.5, 1.0]))
def test_equals_the_definition(steps, prior, decay, exponent):
    rates, expected = PassRates(prior, decay), ByHand(prior, decay)
    for step in steps:
        rewards, ids = [r for r, _ in step], [i for _, i in step]
        got = rates.update(rewards, ids, exponent=exponent)
        want = torch.tensor(expected.update(rewards, ids, exponent), dtype=torch.float32)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        for question in ids:
            assert math.isclose(rates.rate(question), expected.rate(question), rel_tol=1e-12, abs_tol=1e-15)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, max_size=3), st.sampled_from([0.5, 1.0, 0.25, 0.0]), st.sampled_from([None, 0.3]))
def test_without_prior_and_decay_it_is_question_weights(steps, exponent, threshold):
    """To the bit, in every step."""
    rates, options = PassRates(), {"exponent": exponent, "success_threshold": threshold}
    for step in steps:
        rewards, ids = torch.tensor([r for r, _ in step]), torch.tensor([i for _, i in step], dtype=torch.long)
        assert torch.equal(rates.update(rewards, ids, **options), question_weights(rewards, ids, **options))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64], ids=str)
def test_reward_dtypes(dtype):
    rewards, ids = torch.tensor([1, 0, 1, 1, 1]).to(dtype), torch.tensor([4, 4, 4, 7, 7])
    assert torch.equal(PassRates().update(rewards, ids), question_weights(rewards, ids))


def names(kind):
    given = {"strings": ["b", "a", "b", "a"], "uids": [str(uuid.UUID(int=i)) for i in (9, 2, 9, 2)]}
    arrays = {"integers": [5, 3, 5, 3], "a tensor": torch.tensor([5, 3, 5, 3]), "an array": np.array([5, 3, 5, 3])}
    return (given | arrays | {"an array of strings": np.array(["b", "a", "b", "a"], dtype=object)})[kind]


@pytest.mark.parametrize("kind", ["integers", "a tensor", "an array", "strings", "uids", "an array of strings"])
def test_ids_of_every_kind(kind):
    rates, ids = PassRates((1.0, 1.0), 0.5), names(kind)
    weights = [rates.update([1, 0, 1, 1], ids) for _ in range(2)]
    expected = ByHand((1.0, 1.0), 0.5)
    for got in weights:
        torch.testing.assert_close(got, torch.tensor(expected.update([1, 0, 1, 1], [5, 3, 5, 3])))
    first = ids[0] if isinstance(ids[0], str) else int(ids[0])
    assert len(rates) == 2 and math.isclose(rates.rate(first), (1 + 3) / (2 + 3))


def test_a_solved_question_loses_its_weight_step_by_step():
    """With a prior, a question whose rollouts all succeed weighs less each time; beside it one that is open."""
    rates, rewards, ids = PassRates((1.0, 1.0), 1.0), [1, 1, 1, 0], ["solved", "solved", "open", "open"]
    weights = [rates.update(rewards, ids)[0].item() for _ in range(4)]
    assert all(0 < later < earlier for earlier, later in itertools.pairwise(weights))
    assert question_weights(rewards, [0, 0, 1, 1])[0] == 0


def test_steps_without_a_question_change_nothing_of_it():
    rates = PassRates(decay=0.5)
    rates.update([1, 0], ["a", "a"])
    for _ in range(3):
        rates.update([1, 1], ["b", "b"])
    assert rates.rate("a") == 0.5
    rates.update([1, 1], ["a", "a"])
    assert rates.rate("a") == (0.5 * 1 + 2) / (0.5 * 2 + 2)


def test_a_question_that_is_not_known():
    assert PassRates((1.0, 3.0)).rate("new") == 0.25 and math.isnan(PassRates().rate("new"))


def test_the_limit_forgets_what_was_not_in_a_step_for_longest():
    rates = PassRates(decay=1.0, limit=2)
    rates.update([1, 0], ["a", "b"])
    rates.update([1], ["a"])
    rates.update([1], ["e"])
    assert rates.rate("a") == 1 and math.isnan(rates.rate("b"))
    weights = rates.update([1, 0, 1, 0], ["c", "c", "d", "d"])  # more than the limit holds has its weights all the same
    assert weights.tolist() == [1, 1, 1, 1] and len(rates) == 2
    rates.update([0], ["a"])
    assert rates.rate("a") == 0 and rates.rate("d") == 0.5 and math.isnan(rates.rate("c"))
    unlimited = PassRates()
    for i in range(50):
        unlimited.update([1], [i])
    assert len(unlimited) == 50


@pytest.mark.parametrize("ids", [["a", "b", "a"], [3, -(2**62), 3]], ids=["strings", "integers"])
def test_saved_and_loaded(ids, tmp_path):
    """Through a file that holds plain data; the order in which questions are forgotten too."""
    rates = PassRates((0.5, 0.5), 0.75, limit=2)
    for rewards in ([1, 0, 1], [0.25, 1, 0]):
        rates.update(rewards, ids)
    torch.save(rates.state_dict(), tmp_path / "rates.pt")
    loaded = PassRates((0.5, 0.5), 0.75, limit=2)
    loaded.update([1], ids[:1])
    loaded.load_state_dict(torch.load(tmp_path / "rates.pt", weights_only=True))
    assert loaded.state_dict() == rates.state_dict() and len(loaded) == 2
    new = "c" if isinstance(ids[0], str) else 4
    for step in (ids, [new] * 3):
        assert torch.equal(loaded.update([1, 0, 0], step), rates.update([1, 0, 0], step))
    assert loaded.state_dict() == rates.state_dict() and list(loaded.state_dict()["question_ids"])[-1] == new
    empty = PassRates()
    empty.load_state_dict(PassRates().state_dict())
    assert len(empty) == 0


GOOD = {"question_ids": ["a", "b"], "successes": [1.0, 0.5], "rollouts": [2.0, 0.5]}


@pytest.mark.parametrize(
    "message, state",
    [
        ("expected question_ids, successes and rollouts, got list", []),
        (r"got \['question_ids', 'rollouts', 'successes', 'x'\]", GOOD | {"x": 1}),
        ("got 1 different of 2 questions", GOOD | {"question_ids": ["a", "a"]}),
        ("2 questions, 1 successes and 2 rollouts", GOOD | {"successes": [1.0]}),
        ("no more successes than rollouts", GOOD | {"successes": [1.0, 0.6]}),
        ("expected finite counts", GOOD | {"rollouts": [math.nan, 1.0]}),
    ],
)
def test_a_state_that_is_none_is_refused(message, state):
    rates = PassRates()
    rates.load_state_dict(GOOD)
    with pytest.raises(ValueError, match=message):
        rates.load_state_dict(state)
    assert rates.state_dict() == GOOD


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, r"prior: expected two numbers \(a, b\), got 1.0", {"prior": 1.0}),
        (TypeError, "prior: expected a number, got str", {"prior": ("1", 1)}),
        (ValueError, "prior: expected finite numbers of at least 0, got -1", {"prior": (1, -1)}),
        (ValueError, "prior: expected finite numbers of at least 0, got inf", {"prior": (math.inf, 1)}),
        (ValueError, r"decay: expected a number in \[0, 1\], got 1.5", {"decay": 1.5}),
        (ValueError, r"decay: expected a number in \[0, 1\], got nan", {"decay": math.nan}),
        (TypeError, "limit: expected an integer or None, got float", {"limit": 10.0}),
        (ValueError, "limit: expected at least 1, got 0", {"limit": 0}),
    ],
)
def test_bad_settings_name_the_argument(error, message, options):
    with pytest.raises(error, match=message):
        PassRates(**options)


BAD_STEPS = [
    (ValueError, r"rewards: expected shape \(B,\)", torch.rand(2, 2), [0, 0], {}),
    (ValueError, "rewards: expected numbers in", [1.5, 0.0], [0, 0], {}),
    (ValueError, "rewards: expected numbers, got NaN", [math.nan, 0.0], [0, 0], {"success_threshold": 0.5}),
    (ValueError, "question_ids: expected one for each of 2 rollouts, got 3 of them", [1, 0], [0, 0, 0], {}),
    (ValueError, "question_ids: expected one for each of 1 rollouts, got one number", [1], torch.tensor(3), {}),
    (TypeError, "question_ids: expected integers or strings, got torch.float32", [1, 0], torch.zeros(2), {}),
    (TypeError, "question_ids: expected integers or strings, got torch.bool", [1], torch.tensor([True]), {}),
    (TypeError, "question_ids: expected integers or strings, got UUID", [1, 0], [uuid.UUID(int=1)] * 2, {}),
    (TypeError, "question_ids: expected integers or strings, got list", [1], [[1]], {}),
    (TypeError, "question_ids: expected integers or strings, got both", [1, 0], [1, "1"], {}),
    (ValueError, "exponent: expected", [1, 0], [0, 0], {"exponent": -1}),
    (TypeError, "success_threshold: expected a number", [1, 0], [0, 0], {"success_threshold": "1"}),
]


@pytest.mark.parametrize("error, message, rewards, ids, options", BAD_STEPS)
def test_a_step_that_is_refused_is_not_taken_in(error, message, rewards, ids, options):
    rates = PassRates()
    rates.update([1, 0], [0, 0])
    before = rates.state_dict()
    with pytest.raises(error, match=message):
        rates.update(rewards, ids, **options)
    assert rates.state_dict() == before


STEPS, WORLD = 3, 3
SPLITS = [(8, 8, 8), (1, 20, 3), (24, 0, 0)]


def batch(step, kind):
    generator = torch.Generator().manual_seed(step)
    rewards, ids = torch.randint(2, (24,), generator=generator), torch.randint(7, (24,), generator=generator)
    return rewards.float(), ids if kind == "integers" else [f"q{i}" for i in ids.tolist()]


def on_a_rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    group, results = dist.group.WORLD, {}
    for kind in ("integers", "strings"):
        rates = PassRates((0.5, 1.0), 0.5, limit=6)
        for step, split in enumerate(SPLITS):
            rewards, ids = batch(step, kind)
            own = slice(sum(split[:rank]), sum(split[: rank + 1]))
            results[kind, step] = rates.update(rewards[own], ids[own], group=group)
        results[kind, "state"] = rates.state_dict()
        plain = PassRates().update(rewards[own], ids[own], group=group)
        if kind == "integers":
            assert torch.equal(plain, question_weights(rewards[own], ids[own], group=group))

    def raises(error, message, rates, *step):
        before = rates.state_dict()
        with pytest.raises(error, match=message):
            rates.update(*step, group=group)
        assert rates.state_dict() == before

    last = rank == WORLD - 1
    rejected = "rewards: expected numbers" if last else "refused on other ranks, rank 2: rewards: expected numbers"
    raises(ValueError, rejected, rates, [2.0 if last else 1.0], ["a"])
    raises(ValueError, "group: expected the same prior", PassRates(decay=0.5 if last else 0.0), [1], ["a"])
    raises(ValueError, "group: expected the same .* number of questions", PassRates() if last else rates, [1], ["a"])
    raises(TypeError, "integers on one rank and strings on another", PassRates(), [1], [1] if last else ["1"])
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_every_rank_knows_the_same_and_has_its_own_weights(tmp_path):
    """To the bit, whichever way a step is split; what one rank refuses, or has missed, raises on all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(on_a_rank, (port, str(tmp_path)), nprocs=WORLD)
    results = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(WORLD)]
    for kind in ("integers", "strings"):
        rates = PassRates((0.5, 1.0), 0.5, limit=6)
        for step in range(STEPS):
            assert torch.equal(torch.cat([x[kind, step] for x in results]), rates.update(*batch(step, kind)))
        assert all(x[kind, "state"] == rates.state_dict() for x in results)
