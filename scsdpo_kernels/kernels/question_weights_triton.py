"""Question weights (arXiv 2605.27765, eq. 15-16) in one launch, without waiting for the device.

One program compares every pair of rollouts. Rollouts with the same id make a question; its first one stands for it in
the mean over questions. B² comparisons are about 2·10⁵ for the paper's batch of 256, and still milliseconds for 10⁴
rollouts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 64, 8


@triton.jit
def _rollouts(rewards, question_ids, start, count, threshold: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK rollouts: number, whether it exists, question, success (NaN where a reward is none)."""
    number = start + tl.arange(0, BLOCK)
    exists = number < count
    question = tl.load(question_ids + number, exists, 0).to(tl.int64)
    reward = tl.load(rewards + number, exists, 0).to(tl.float64)
    if threshold is not None:
        success = tl.where(reward >= threshold, 1.0, tl.where(reward == reward, 0.0, reward))
    else:
        success = tl.where((reward >= 0) & (reward <= 1), reward, float("nan"))
    return number, exists, question, success


@triton.jit
def question_weights_kernel(
    rewards, question_ids, raw, weights, count,
    exponent: tl.constexpr, threshold: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((1,), tl.float64)
    questions = tl.zeros((1,), tl.float64)
    for start in range(0, count, BLOCK):
        number, exists, question, _ = _rollouts(rewards, question_ids, start, count, threshold, BLOCK)
        rollouts = tl.zeros((BLOCK,), tl.float64)
        successes = tl.zeros((BLOCK,), tl.float64)
        earlier = tl.zeros((BLOCK,), tl.int32)
        for other_start in range(0, count, BLOCK):
            other, other_exists, other_question, success = _rollouts(
                rewards, question_ids, other_start, count, threshold, BLOCK
            )
            same = (question[:, None] == other_question[None, :]) & other_exists[None, :]
            rollouts += tl.sum(same.to(tl.float64), 1)
            successes += tl.sum(tl.where(same, success[None, :], 0.0), 1)
            earlier += tl.sum((same & (other[None, :] < number[:, None])).to(tl.int32), 1)
        rollouts = tl.where(exists, rollouts, 1.0)
        variance = successes * (rollouts - successes) / (rollouts * rollouts)  # p̂ (1 - p̂), exactly 0 at both ends
        if exponent == 0.5:
            weight = tl.sqrt(variance)
        else:
            weight = tl.exp(exponent * tl.log(tl.where(variance > 0, variance, 1.0)))
        weight = tl.where(variance <= 0, 0.0, weight + 0.0 * variance)  # NaN stays
        stands_for_it = exists & (earlier == 0)
        total += tl.sum(tl.where(stands_for_it, weight, 0.0), 0)
        questions += tl.sum((stands_for_it & (weight > 0)).to(tl.float64), 0)
        tl.store(raw + number, weight, exists)
    tl.debug_barrier()
    scale = tl.where(total == 0, 0.0, questions / tl.where(total == 0, 1.0, total))
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        weight = tl.load(raw + number, number < count, 0.0)
        tl.store(weights + number, (weight * scale).to(tl.float32), number < count)


def question_weights(
    rewards: Tensor,  # (B,)
    question_ids: Tensor,  # (B,) integers
    exponent: float,
    success_threshold: float | None,
) -> Tensor:  # (B,) fp32
    """w̄ of each rollout's question. A reward that is NaN, or outside [0, 1] without a threshold, makes all NaN."""
    rewards = rewards.contiguous()
    weights = torch.empty(len(rewards), dtype=torch.float32, device=rewards.device)
    raw = torch.empty(len(rewards), dtype=torch.float64, device=rewards.device)
    if success_threshold is not None and rewards.is_floating_point():  # torch compares in the rewards' dtype
        success_threshold = torch.tensor(success_threshold, dtype=rewards.dtype).item()
    question_weights_kernel[1,](
        rewards, question_ids.contiguous(), raw, weights, len(rewards),
        exponent=float(exponent), threshold=success_threshold, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return weights
