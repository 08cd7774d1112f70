"""A batch spread over processes: question weights and losses are those of one process, whichever way it is split."""

import pytest
import torch
import torch.distributed as dist
from problems import Problem, problem
from ranks import over

from scsdpo_kernels import VocabShard, question_weights, scsdpo_loss, step_denominator

REWARDS = torch.tensor([1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1.0])
QUESTIONS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3])  # 1 is failed, 3 is solved
MASK = (torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) < 0.7).float()
V = 67


def on_device(group: dist.ProcessGroup) -> tuple:
    """Both sides, rewards, questions and mask."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    given = Problem(*(x if x is None else x.to(device) for x in problem((12, 5), 16, V, 2.0, scale=4.0)))
    return given, *(x.to(device) for x in (REWARDS, QUESTIONS, MASK))


# Where the rollouts of each process end; one may have none, or those of the failed question only.
SPLITS = {
    "even": lambda world: [12 * r // world for r in range(world + 1)],
    "all on the first": lambda world: [0, *[12] * world],
    "uneven": lambda world: [0, *[min(12, 7 + r) for r in range(world - 1)], 12],
}


@over(1, 2, 3, 4)
@pytest.mark.parametrize("micro", [1, 3, 12], ids="micro-batches of {}".format)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("reduction", ["token-mean", "weighted-token-mean", "sequence-mean"])
def test_splits_of_a_batch(group, reduction, split, micro):
    """Weights to the bit, and gradients to rounding; questions straddle processes."""
    given, rewards, questions, mask = on_device(group)
    expected = question_weights(rewards, questions)
    _, _, whole = given.run(scsdpo_loss, question_weight=expected, mask=mask, reduction=reduction)
    first, end = SPLITS[split](dist.get_world_size(group))[dist.get_rank(group) :][:2]
    own = torch.arange(first, end, device=mask.device)
    weight = question_weights(rewards[own], questions[own], group=group)
    total = step_denominator(mask[own], weight, reduction=reduction, group=group)
    gradient = torch.zeros_like(given.head)
    for part in own.split(micro):
        options = {"question_weight": weight[part - first], "mask": mask[part], "denominator": total}
        gradient += given.tokens(part).run(scsdpo_loss, **options, reduction=reduction)[2]
    dist.all_reduce(gradient, group=group)
    assert torch.equal(weight, expected[own])
    torch.testing.assert_close(gradient, whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())


@over(3)
@pytest.mark.parametrize("split", [(8, 8, 8), (1, 20, 3), (24, 0, 0), (0, 11, 13)], ids=str)
def test_any_split_gives_the_same_weights_to_the_bit(group, split):
    """Questions straddle processes, and one process has no rollout at all."""
    generator = torch.Generator().manual_seed(0)
    rewards, questions = torch.randint(2, (24,), generator=generator), torch.randint(5, (24,), generator=generator)
    before, device = sum(split[: dist.get_rank(group)]), on_device(group)[-1].device
    own = slice(before, before + split[dist.get_rank(group)])
    weight = question_weights(rewards[own].float().to(device), questions[own].to(device), group=group)
    assert torch.equal(weight.cpu(), question_weights(rewards.float(), questions)[own])


def of_own_rollouts(group, reduction):
    """scsdpo_loss of all, and that of a vocabulary whose processes have rollouts of their own."""
    given, rewards, questions, mask = on_device(group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    weight, own, (start, stop) = (
        question_weights(rewards, questions),
        slice(rank, None, world),
        (V * rank // world, V * (rank + 1) // world),
    )
    shard = VocabShard(start, stop, group, sequence_parallel=True)
    whole = given.call(scsdpo_loss, question_weight=weight, mask=mask, reduction=reduction)
    mine = given.tokens(own).but(head=given.head[start:stop])
    return whole, mine.call(scsdpo_loss, question_weight=weight[own], mask=mask[own], reduction=reduction, shard=shard)


@over(1, 2, 3, 4)
@pytest.mark.parametrize("reduction", ["token-mean", "weighted-token-mean", "sum"])
def test_own_rollouts_have_one_denominator(group, reduction):
    whole, got = of_own_rollouts(group, reduction)
    torch.testing.assert_close(got.loss, whole.loss, rtol=1e-5, atol=1e-6)


@over(1, 2, 3, 4)
def test_own_rollouts_have_no_mean_over_sequences(group):
    with pytest.raises(ValueError, match="reduction: expected no 'sequence-mean'"):
        of_own_rollouts(group, "sequence-mean")
