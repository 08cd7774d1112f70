"""scsdpo.dealing: nothing is lost or run twice, and no other grouping by length costs less."""

import itertools
import random

import pytest
import torch

pytest.importorskip("transformers", reason="transformers: pip install '.[transformers]'")

from scsdpo import dealing
from scsdpo.dealing import Rollout, as_drawn, collate, deal, padded_tokens, stand_in, with_weight


def rollout(prompt, teacher, completion, name=1, process=0, micro_batch=0):
    return Rollout(
        torch.full((prompt,), name), torch.full((teacher,), name + 1), torch.arange(completion) + name,
        torch.ones(completion, dtype=torch.int64), 1.5, process, micro_batch,
    )  # fmt: skip


def drawn(seed, count):
    numbers = random.Random(seed)
    return [
        rollout(numbers.randint(1, 9), numbers.randint(3, 30), numbers.randint(1, 40), i) for i in range(10, 10 + count)
    ]


CASES = [(0, 2, 1, 4), (1, 3, 2, 1), (5, 4, 2, 2), (7, 4, 1, 3), (8, 1, 2, 4), (12, 3, 2, 2), (24, 2, 3, 8)]


@pytest.mark.parametrize("count, micro_batches, processes, most", CASES)
@pytest.mark.parametrize("seed", range(5), ids="seed {}".format)
def test_each_is_dealt_once_and_evenly(count, micro_batches, processes, most, seed):
    rollouts = drawn(seed, count)
    shares = deal(rollouts, micro_batches, processes, most)
    assert len(shares) == processes and all(len(share) == micro_batches for share in shares)
    dealt = [x for share in shares for part in share for x in part]
    assert len(dealt) == count and {id(x) for x in dealt} == {id(x) for x in rollouts}
    assert all(len(part) <= most for share in shares for part in share)
    loads = [sum(x.tokens for part in share for x in part) for share in shares]
    if count < micro_batches * most:  # no process is full
        assert max(loads) - min(loads) <= max((x.tokens for x in rollouts), default=0)
    for share in shares:  # where there is one, it is in the last
        assert share[-1] or not any(share)


@pytest.mark.parametrize("a_pass", [0, 40, 512])
@pytest.mark.parametrize("count, micro_batches, most", [(5, 3, 2), (6, 3, 6), (7, 2, 4), (4, 6, 4), (8, 4, 3)])
@pytest.mark.parametrize("seed", range(5), ids="seed {}".format)
def test_no_grouping_by_length_has_fewer_tokens(count, micro_batches, most, a_pass, seed, monkeypatch):
    """All are tried one by one; a micro-batch counts as PASS tokens more."""
    monkeypatch.setattr(dealing, "PASS", a_pass)
    rollouts = drawn(seed, count)
    by_length = sorted(rollouts, key=lambda x: -x.tokens)

    def tokens(groups):
        return sum(padded_tokens(group) + a_pass for group in groups if group)

    best = float("inf")
    for parts in range(1, micro_batches + 1):
        for cuts in itertools.combinations(range(1, count), parts - 1):
            edges = [0, *cuts, count]
            groups = [by_length[a:b] for a, b in itertools.pairwise(edges)]
            if all(len(group) <= most for group in groups):
                best = min(best, tokens(groups))
    (share,) = deal(rollouts, micro_batches, 1, most)
    assert tokens(share) == best
    assert [x for part in share[::-1] for x in part] == by_length


def test_short_rollouts_share_a_micro_batch_and_a_long_one_has_its_own():
    short, long = [rollout(5, 9, 10, i) for i in range(10, 13)], rollout(5, 9, 900, 20)
    (share,) = deal([*short, long], 4, 1, 4)
    assert [len(part) for part in share] == [0, 0, 3, 1]
    (share,) = deal(short, 4, 1, 4)
    assert [len(part) for part in share] == [0, 0, 0, 3]


def test_as_drawn():
    rollouts = [rollout(1, 1, 1, process=p, micro_batch=m) for p, m in ((0, 1), (1, 0), (1, 0), (0, 1))]
    where = as_drawn(rollouts, 2, 2)
    assert [[len(part) for part in share] for share in where] == [[0, 2], [2, 0]]


def batch_of(rollouts, extra):
    """As TRL pads, with more columns of padding; and two more rollouts: one without weight, one without a teacher."""
    every = [*rollouts, rollout(4, 4, 50, 7), rollout(40, 4, 3, 8)]
    batch = collate(every, 0, "cpu")
    zeros = torch.zeros(len(every), extra, dtype=torch.int64)
    for name in ("prompt_ids", "prompt_mask", "teacher_input_ids", "teacher_attention_mask"):
        batch[name] = torch.cat([zeros, batch[name]], dim=1)
    for name in ("completion_ids", "completion_mask", "teacher_input_ids", "teacher_attention_mask", "loss_mask"):
        batch[name] = torch.cat([batch[name], zeros], dim=1)
    batch["question_weight"][-2] = 0.0
    batch["loss_mask"][-1] = 0
    return batch


def test_an_advantage_is_a_reason_to_run():
    """Without a weight or a token with a loss; but not where the policy's loss has no weight."""
    rollouts = drawn(3, 4)
    batch = batch_of(rollouts, 2)
    batch["advantages"] = torch.tensor([0.0, 1, 0, 2, -1, 3])
    batch["policy_weight"] = torch.ones(6)
    batch["question_weight"] = torch.tensor([1.5, 0, 0, 1.5, 0, 1.5])
    back = with_weight(batch, batch["loss_mask"], 0, 1)
    assert [x.advantage for x in back] == [0.0, 1, 2, -1, 3] and [x.policy_weight for x in back] == [1.0] * 5
    collated = collate(back, 0, "cpu")
    assert collated["advantages"].tolist() == [0.0, 1, 2, -1, 3] and not collated["loss_mask"][-1].any()
    batch["policy_weight"] = torch.zeros(6)
    assert len(with_weight(batch, batch["loss_mask"], 0, 1)) == 2


@pytest.mark.parametrize("extra", [0, 3])
def test_padding_is_taken_off_and_put_on(extra):
    rollouts = drawn(3, 4)
    batch = batch_of(rollouts, extra)
    back = with_weight(batch, batch["loss_mask"], 2, 3)
    assert [x.micro_batch for x in back] == [0, 0, 1, 1] and all(x.process == 2 and x.weight == 1.5 for x in back)
    for a, b in zip(rollouts, back, strict=True):
        for name in ("prompt", "teacher_prompt", "completion", "mask"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name, value in collate(back, 0, "cpu").items():
        if value.dim() == 2:
            assert not name.endswith("mask") or value.any(0).all(), name  # no column is padding in every row
    assert len(collate([back[0]], 0, "cpu")["completion_ids"][0]) == len(back[0].completion)


def test_a_stand_in_has_two_tokens_and_no_weight():
    batch = collate([stand_in(9)], 0, "cpu")
    assert batch["prompt_ids"].tolist() == batch["completion_ids"].tolist() == [[9]]
    assert batch["teacher_input_ids"].tolist() == [[9, 9]] and batch["teacher_attention_mask"].all()
    assert batch["question_weight"].item() == 0 and batch["loss_mask"].item() == 0
