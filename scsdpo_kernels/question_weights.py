"""Question weights of SC-SDPO (arXiv 2605.27765, eq. 15-16).

    p̂_j = successes / rollouts of question j        w_j = (p̂_j (1 - p̂_j))^α
    S = {j : w_j > 0}        w̄_j = w_j / mean_{l in S} w_l for j in S, 0 otherwise

The mean counts each non-degenerate question once, so the mean weight over S is exactly 1; without any, all are 0.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor


def question_weights(
    rewards: Tensor,
    question_ids: Tensor,
    *,
    exponent: float = 0.5,
    success_threshold: float | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """The normalised weight w̄ of each rollout's question, (B,) fp32, without gradient (eq. 15-16).

    Call it once per step on the whole training batch, before any split into micro-batches: normalised per micro-batch
    the weights would cancel themselves.

    Args:
        rewards: (B,) numbers, one per rollout.
        question_ids: (B,) any integers; rollouts of a question share one.
        exponent: α; the paper's is 1/2.
        success_threshold: a rollout succeeds where its reward is at least this. None: rewards are in [0, 1] and p̂ is
            their mean.
        group: process group over whose ranks the batch is spread; pass rates and the mean are then over the rollouts
            of all its ranks (ids are global), and each rank gets the weights of its own. Collective: a rank whose
            arguments are refused leaves the others waiting until the group's time-out.

    On a GPU it is one kernel and never waits for the device, but for the ranks' counts with `group`: a reward that
    would have raised makes all weights NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    rewards, question_ids = torch.as_tensor(rewards), torch.as_tensor(question_ids)
    if question_ids.numel() == 0:
        question_ids = question_ids.long()  # an empty list has no dtype of its own
    check_numbers(exponent, success_threshold)
    check_rewards(rewards, success_threshold)
    _check_ids(question_ids, rewards)
    if rewards.dtype == torch.bool:
        rewards = rewards.to(torch.uint8)
    own, rewards, question_ids = _gather(rewards.detach(), question_ids.long(), group)
    if rewards.device.type != "cpu":
        from .kernels.question_weights_triton import question_weights

        with torch.get_device_module(rewards.device).device(rewards.device):  # Triton launches on the current one
            return question_weights(rewards, question_ids, exponent, success_threshold)[own]

    success = successes_of(rewards, success_threshold)
    ids, question = torch.unique(question_ids, return_inverse=True)
    rollouts = success.new_zeros(len(ids)).index_add_(0, question, torch.ones_like(success))
    successes = success.new_zeros(len(ids)).index_add_(0, question, success)
    return normalised_weights(successes, rollouts, exponent)[question][own].float()


def successes_of(rewards: Tensor, success_threshold: float | None) -> Tensor:  # (B,) float64
    return rewards.double() if success_threshold is None else (rewards >= success_threshold).double()


def normalised_weights(successes: Tensor, rollouts: Tensor, exponent: float) -> Tensor:  # (questions,) float64, as both
    """w̄ of each question (eq. 15-16)."""
    variance = successes * (rollouts - successes) / rollouts**2  # p̂ (1 - p̂), exactly 0 at both ends
    raw = torch.where(variance > 0, variance**exponent, 0.0)
    mean = raw.sum() / (raw > 0).sum().clamp(min=1)
    return torch.where(raw > 0, raw / mean, 0.0)


def _gather(rewards: Tensor, question_ids: Tensor, group: "dist.ProcessGroup | None") -> tuple[slice, Tensor, Tensor]:
    """All ranks' rollouts, and where this rank's own are among them."""
    if group is None:
        return slice(None), rewards, question_ids
    count = torch.tensor([len(rewards)], device=rewards.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, count, group=group)
    lengths = [int(c) for c in counts]

    def gathered(values: Tensor) -> Tensor:
        padded = torch.cat([values, values.new_zeros(max(lengths) - len(values))])
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    rank = dist.get_rank(group)
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank]), gathered(rewards), gathered(question_ids)


def _check_ids(question_ids: Tensor, rewards: Tensor) -> None:
    if question_ids.shape != rewards.shape:
        raise ValueError(
            f"question_ids: expected the shape of rewards {tuple(rewards.shape)}, got {tuple(question_ids.shape)}"
        )
    if question_ids.is_floating_point() or question_ids.is_complex() or question_ids.dtype == torch.bool:
        raise TypeError(f"question_ids: expected integers, got {question_ids.dtype}")
    if question_ids.device != rewards.device:
        raise ValueError(f"question_ids: expected the device of rewards {rewards.device}, got {question_ids.device}")


def check_numbers(exponent: float, success_threshold: float | None) -> None:
    for name, number in (("exponent", exponent), ("success_threshold", success_threshold)):
        if not isinstance(number, int | float) and not (name == "success_threshold" and number is None):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent: expected a finite number of at least 0, got {exponent}")
    if success_threshold is not None and math.isnan(success_threshold):
        raise ValueError("success_threshold: expected a number, got NaN")


def check_rewards(rewards: Tensor, success_threshold: float | None) -> None:
    if rewards.dim() != 1:
        raise ValueError(f"rewards: expected shape (B,), got {tuple(rewards.shape)}")
    if rewards.is_complex():
        raise TypeError(f"rewards: expected real numbers, got {rewards.dtype}")
    if rewards.device.type != "cpu":  # values are looked at where that does not wait for a device
        return
    if success_threshold is None and not ((rewards >= 0) & (rewards <= 1)).all():
        raise ValueError(
            "rewards: expected numbers in [0, 1] where there is no success_threshold, got "
            f"{rewards.min().item()} to {rewards.max().item()}"
        )
    if success_threshold is not None and rewards.isnan().any():
        raise ValueError("rewards: expected numbers, got NaN")
