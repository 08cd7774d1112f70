"""Question weights against a plain-Python reading of eq. 15-16."""

import math

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from scsdpo_kernels import question_weights
from scsdpo_kernels.kernels import question_weights_triton


def by_hand(rewards, ids, exponent=0.5):
    """{id: w̄}, a question at a time."""
    raw = {}
    for j in set(ids):
        own = [r for r, i in zip(rewards, ids, strict=True) if i == j]
        rate = math.fsum(own) / len(own)
        raw[j] = (rate * (1 - rate)) ** exponent if 0 < rate < 1 else 0.0
    kept = [w for w in raw.values() if w > 0]
    return {j: w / (math.fsum(kept) / len(kept)) if kept else 0.0 for j, w in raw.items()}


def test_the_papers_raw_weights():
    """G = 8: .33072 for 1 and 7 successes, .43301 for 2 and 6, .48412 for 3 and 5, .5 for 4, before normalisation."""
    successes = range(9)
    rewards = torch.cat([torch.tensor([1.0] * k + [0.0] * (8 - k)) for k in successes])
    weights = question_weights(rewards, torch.arange(9).repeat_interleave(8)).view(9, 8)
    raw = [0, 0.33072, 0.43301, 0.48412, 0.5, 0.48412, 0.43301, 0.33072, 0]
    mean = sum(raw) / 7
    torch.testing.assert_close(weights[:, 0], torch.tensor([w / mean for w in raw]), rtol=2e-5, atol=0)
    assert (weights == weights[:, :1]).all() and weights.dtype == torch.float32
    torch.testing.assert_close(weights[1:8, 0].mean(), torch.tensor(1.0))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(-3, 5)), max_size=60),
    st.sampled_from([0.5, 1.0, 0.25, 2.0]),
)
def test_equals_the_definition(rollouts, exponent):
    rewards, ids = ([r for r, _ in rollouts], [i for _, i in rollouts])
    weights = question_weights(torch.tensor(rewards), torch.tensor(ids, dtype=torch.long), exponent=exponent)
    expected = by_hand(rewards, ids, exponent)
    expected = torch.tensor([expected[i] for i in ids], dtype=torch.float32)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


def test_each_question_counts_once_however_many_rollouts():
    rewards = torch.tensor([1.0, 0.0] + [1.0, 0.0, 0.0, 0.0] * 5)
    ids = torch.tensor([10**15, 10**15] + [-4] * 20)  # any integers
    weights = question_weights(rewards, ids)
    mean = (0.5 + math.sqrt(0.1875)) / 2
    torch.testing.assert_close(weights[[0, 2]], torch.tensor([0.5 / mean, math.sqrt(0.1875) / mean]))


@pytest.mark.parametrize("rewards", [[], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
def test_only_degenerate_questions(rewards):
    weights = question_weights(torch.tensor(rewards), torch.arange(len(rewards)))
    assert weights.shape == (len(rewards),) and (weights == 0).all()


def test_success_threshold():
    rewards, ids = torch.tensor([-3.0, 0.5, 7.0, 0.49]), torch.zeros(4, dtype=torch.int32)
    assert (question_weights(rewards, ids, success_threshold=0.5) == 1).all()
    assert (question_weights(rewards, ids, success_threshold=-3) == 0).all()


def test_exponent_zero_keeps_what_is_not_degenerate():
    weights = question_weights(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), exponent=0.0)
    assert weights.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_reward_dtypes_and_lists(dtype):
    rewards = torch.tensor([1, 0, 1, 1]).to(dtype)
    expected = question_weights(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 0]))
    assert torch.equal(question_weights(rewards, torch.zeros(4, dtype=torch.int8)), expected)
    assert torch.equal(question_weights([1, 0, 1, 1], [0, 0, 0, 0]), expected)
    assert question_weights([], []).shape == (0,)


def test_no_gradient():
    assert not question_weights(torch.rand(4, requires_grad=True), torch.zeros(4, dtype=torch.long)).requires_grad


def kernel(rewards, ids, exponent=0.5, success_threshold=None):
    """The Triton kernel, wherever the tensors are."""
    tensors = rewards.to(DEVICE), ids.to(DEVICE)
    return question_weights_triton.question_weights(*tensors, exponent, success_threshold).cpu()


QUESTIONS = {
    "ids of any size": lambda count, generator: torch.randint(9, (count,), generator=generator) - 4 + 2**40,
    "two in turn": lambda count, generator: torch.arange(count) % 2,
    "one rollout each": lambda count, generator: torch.arange(count),
}


@pytest.mark.parametrize("questions", QUESTIONS)
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("exponent, threshold", [(0.5, None), (1.0, None), (0.25, 0.5), (0.0, 1.0)])
def test_the_kernel_equals_the_definition(count, exponent, threshold, questions):
    """Degenerate questions, and questions whose rollouts lie in several blocks."""
    generator = torch.Generator().manual_seed(count)
    rewards = torch.randint(2, (count,), generator=generator).float()
    ids = QUESTIONS[questions](count, generator)
    expected = question_weights(rewards, ids, exponent=exponent, success_threshold=threshold)
    torch.testing.assert_close(kernel(rewards, ids, exponent, threshold), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", ["a reward", 0.3, 0.1, 5])
def test_the_kernels_thresholds_are_compared_as_torch_compares(dtype, threshold):
    rewards = (torch.tensor([0.1, 0.3, 0.7, 0.9]) * (10 if not dtype.is_floating_point else 1)).to(dtype)
    ids = torch.zeros(4, dtype=torch.int32)
    threshold = rewards[1].item() if threshold == "a reward" else threshold
    expected = question_weights(rewards, ids, success_threshold=threshold)
    assert torch.equal(kernel(rewards, ids, 0.5, threshold), expected)


@pytest.mark.parametrize("bad", [torch.nan, -0.5, 1.5])
def test_the_kernel_makes_all_weights_nan_where_a_reward_is_refused(bad):
    """In another question too: no weight of a batch with a broken reward looks right."""
    rewards, ids = torch.tensor([1.0, 0.0, bad, 1.0, 0.0]), torch.tensor([0, 0, 1, 1, 1])
    assert kernel(rewards, ids).isnan().all()
    with_threshold = kernel(rewards, ids, 0.5, 0.5)
    assert with_threshold.isnan().all() if math.isnan(bad) else with_threshold.isfinite().all()


ZEROS = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    "match, error, rewards, ids, options",
    [
        ("rewards", ValueError, torch.rand(2, 2), torch.stack([ZEROS, ZEROS]), {}),
        ("question_ids", ValueError, torch.rand(3), ZEROS, {}),
        ("question_ids", TypeError, torch.rand(2), torch.zeros(2), {}),
        ("question_ids", TypeError, torch.rand(2), ZEROS.bool(), {}),
        ("question_ids", ValueError, torch.rand(2), ZEROS.to("meta"), {}),
        ("rewards", TypeError, torch.rand(2).to(torch.complex64), ZEROS, {}),
        ("rewards.*success_threshold", ValueError, torch.tensor([1.5, 0.0]), ZEROS, {}),
        ("rewards.*success_threshold", ValueError, torch.tensor([-0.5, 0.0]), ZEROS, {}),
        ("rewards", ValueError, torch.tensor([torch.nan, 0.0]), ZEROS, {}),
        ("rewards", ValueError, torch.tensor([torch.nan, 0.0]), ZEROS, {"success_threshold": 0.5}),
        ("exponent", ValueError, torch.rand(2), ZEROS, {"exponent": -1}),
        ("exponent", TypeError, torch.rand(2), ZEROS, {"exponent": "0.5"}),
        ("success_threshold", TypeError, torch.rand(2), ZEROS, {"success_threshold": "0.5"}),
        ("success_threshold", ValueError, torch.rand(2), ZEROS, {"success_threshold": math.nan}),
        ("exponent", ValueError, torch.rand(2), ZEROS, {"exponent": math.nan}),
    ],
)
def test_bad_input_names_the_argument(match, error, rewards, ids, options):
    with pytest.raises(error, match=match):
        question_weights(rewards, ids, **options)
