"""Question weights where verl has advantages: one number per token, computed on the driver from the whole batch.

verl and its forks have one signature for this. `scsdpo.verl` and `scsdpo.sdpo` register it with theirs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scsdpo_kernels import question_weights

from .head import question_numbers


def question_weight_advantages(
    token_level_rewards: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T)
    index: Sequence,  # (B,) verl's uid, one per question
    config: Any = None,  # verl's algorithm config
    **_: Any,
) -> tuple[Tensor, Tensor]:  # (B, T), (B, T)
    """The weight of each token's question as its advantage (arXiv 2605.27765, eq. 16), its pass rate as its return.

    algorithm.question_weight_exponent (1/2) and algorithm.question_success_threshold (0.5 as in SDPO; null: rewards
    are in [0, 1] and their mean is the pass rate) are read from the config where they are there. verl calls it once a
    step, with the whole batch.

    Raises:
        ValueError: algorithm.use_kl_in_reward, with which rewards are no successes any more.
    """
    config = {} if config is None else config
    if config.get("use_kl_in_reward", False):
        raise ValueError("algorithm.use_kl_in_reward: expected False with adv_estimator=sc_sdpo, got True; pass rates "
                         "are of rewards without a penalty")  # fmt: skip
    exponent = config.get("question_weight_exponent", 0.5)
    threshold = config.get("question_success_threshold", 0.5)
    rewards = token_level_rewards.sum(-1)
    question = question_numbers(index, device=rewards.device)
    weight = question_weights(rewards, question, exponent=exponent, success_threshold=threshold)
    question = question.unique(return_inverse=True)[1]
    success = rewards if threshold is None else (rewards >= threshold).to(rewards)
    count = torch.bincount(question)
    pass_rate = torch.zeros(len(count), dtype=rewards.dtype, device=rewards.device).index_add_(0, question, success)
    per_row = torch.stack([weight.to(rewards), (pass_rate / count)[question]])
    return tuple(x.unsqueeze(-1) * response_mask for x in per_row)


def unit_advantages(token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """SDPO without question weights: 1 for every token, as advantage and as return."""
    weight = response_mask.to(token_level_rewards)
    return weight, weight


ESTIMATORS = {"sc_sdpo": question_weight_advantages, "sdpo": unit_advantages}

__all__ = ["ESTIMATORS", "question_weight_advantages", "unit_advantages"]
