"""Rollouts of an optimiser step, dealt evenly over its micro-batches and processes.

The loss of a step is a sum over rollouts (`scsdpo_loss`), with denominators of the whole step. So it does not matter
which micro-batch and process runs a rollout, and one without weight (arXiv 2605.27765, eq. 16) need not run at all.
Rollouts are kept without padding. A micro-batch is as wide as the longest of those that were dealt to it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# A micro-batch costs as many tokens more, about: its passes read all weights and add to all gradients, which takes as
# long as a few hundred tokens' matmuls do.
PASS = 512


class Rollout(NamedTuple):
    """One rollout, on the CPU, and which micro-batch of which process drew it."""

    prompt: Tensor  # (P,) the student's
    teacher_prompt: Tensor  # (Q,)
    completion: Tensor  # (T,) of both
    mask: Tensor  # (T,) 1 at tokens that have a loss
    weight: float  # its question's
    process: int
    micro_batch: int
    old_logp: Tensor | None = None  # (T,) fp32
    advantage: float = 0.0  # in a policy's loss
    policy_weight: float = 0.0  # multiplies that loss's mean over the completion

    @property
    def tokens(self) -> int:
        """Through student and teacher."""
        return len(self.prompt) + len(self.teacher_prompt) + 2 * len(self.completion)


def with_weight(
    batch: dict[str, Tensor],
    mask: Tensor,  # (B, T) 1 at tokens that have a loss
    process: int,
    micro_batches: int,  # equal sizes, one after the other
) -> list[Rollout]:
    """The rollouts of this process that have a weight and a token with a loss, or an advantage, without their padding.

    Args:
        batch: a TRL trainer's: prompt_ids (B, P), completion_ids (B, T) and teacher_input_ids (B, Q + T), whose last T
            are the completion, prompt_mask, completion_mask and teacher_attention_mask; question_weight (B,), and with
            a policy's loss advantages and policy_weight (B,).
    """
    zeros = torch.zeros_like(batch["question_weight"])
    batch = {"policy_weight": zeros, "advantages": zeros, **batch}
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "teacher_input_ids",
             "teacher_attention_mask", "question_weight", "advantages", "policy_weight")  # fmt: skip
    has_policy = (batch["advantages"] * batch["policy_weight"] != 0) & batch["completion_mask"].any(1)
    rows = ((batch["question_weight"] != 0) & mask.any(1) | has_policy).nonzero()[:, 0]
    fields = [batch[name][rows].cpu() for name in names]
    size, width = len(mask) // micro_batches, mask.shape[1]
    return [
        Rollout(
            prompt[there != 0],
            teacher[:-width][seen[:-width] != 0],
            completion[given != 0],
            loss[given != 0],
            weight.item(),
            process,
            row // size,
            None,
            advantage.item(),
            policy_weight.item(),
        )
        for row, prompt, there, completion, given, teacher, seen, weight, advantage, policy_weight, loss in zip(
            rows.tolist(), *fields, mask[rows].cpu(), strict=True
        )
    ]


def stand_in(token: int) -> Rollout:
    """Two tokens without weight, for a micro-batch that has none and still has to take part in collectives."""
    one = torch.tensor([token])
    return Rollout(one, one, one, torch.zeros_like(one), 0.0, 0, 0, torch.zeros(1))


def padded_tokens(rollouts: Sequence[Rollout]) -> int:
    """What student and teacher run for a micro-batch of these."""
    longest = [max((len(x[i]) for x in rollouts), default=0) for i in range(3)]
    return len(rollouts) * (longest[0] + longest[1] + 2 * longest[2])


def deal(
    rollouts: Sequence[Rollout],
    micro_batches: int,
    processes: int,
    most: int,  # rollouts in a micro-batch
) -> list[list[list[Rollout]]]:  # by process and micro-batch
    """The longest first, each to the process with the fewest tokens; then micro-batches of similar lengths.

    No other grouping by length has fewer tokens, padding included, with PASS more for every micro-batch that is not
    empty. None is larger than `most` of the longest. Empty ones come first, the longest rollouts come last.
    """
    return [_micro_batches(share, micro_batches, most) for share in shares(rollouts, processes, micro_batches * most)]


def shares(rollouts: Sequence[Any], count: int, most: int) -> list[list[Any]]:
    """The longest first (by `tokens`), each to the share that has the fewest; no share has more than `most`."""
    dealt: list[list[Any]] = [[] for _ in range(count)]
    loads = [0] * count
    for rollout in sorted(rollouts, key=lambda x: -x.tokens):
        share = min((i for i in range(count) if len(dealt[i]) < most), key=loads.__getitem__)
        dealt[share].append(rollout)
        loads[share] += rollout.tokens
    return dealt


def as_drawn(rollouts: Sequence[Rollout], micro_batches: int, processes: int) -> list[list[list[Rollout]]]:
    """Each where it was drawn."""
    where: list[list[list[Rollout]]] = [[[] for _ in range(micro_batches)] for _ in range(processes)]
    for rollout in rollouts:
        where[rollout.process][rollout.micro_batch].append(rollout)
    return where


def collate(rollouts: Sequence[Rollout], padding: int, device: torch.device | str) -> dict[str, Tensor]:
    """A micro-batch under TRL's names: prompts padded on the left, completions on the right.

    Returns:
        prompt_ids (B, P), completion_ids (B, T), teacher_input_ids (B, Q + T), each with its mask; loss_mask (B, T),
        question_weight, advantages, policy_weight (B,), and old_per_token_logps (B, T) where every rollout has them.
    """

    def padded(values: Sequence[Tensor], side: str, by: int = 0) -> Tensor:
        return pad_sequence(list(values), batch_first=True, padding_value=by, padding_side=side)

    def there(values: Sequence[Tensor], side: str) -> Tensor:
        return padded([torch.ones_like(x) for x in values], side)

    prompts, teachers, completions, masks, weights, _, _, old, advantages, policy_weights = zip(*rollouts, strict=True)
    completion, given = padded(completions, "right", padding), there(completions, "right")
    batch = {
        "prompt_ids": padded(prompts, "left", padding),
        "prompt_mask": there(prompts, "left"),
        "completion_ids": completion,
        "completion_mask": given,
        "teacher_input_ids": torch.cat([padded(teachers, "left", padding), completion], dim=1),
        "teacher_attention_mask": torch.cat([there(teachers, "left"), given], dim=1),
        "loss_mask": padded(masks, "right"),
        "question_weight": torch.tensor(weights),
        "advantages": torch.tensor(advantages),
        "policy_weight": torch.tensor(policy_weights),
    }
    if all(x is not None for x in old):
        batch["old_per_token_logps"] = padded(old, "right")
    return {name: value.to(device) for name, value in batch.items()}


def _micro_batches(share: list[Rollout], count: int, most: int) -> list[list[Rollout]]:
    """Rollouts come from the longest to the shortest."""
    cost = {
        (start, end): PASS + padded_tokens(share[start:end])
        for end in range(1, len(share) + 1)
        for start in range(max(0, end - most), end)
    }
    cheapest: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # the first so many: tokens, and where groups end
    found = [] if share else [cheapest[0]]
    own = sum(x.tokens for x in share)
    for groups in range(1, min(count, len(share)) + 1):
        if found and groups * PASS + own >= min(found)[0]:  # no padding at all would cost as much
            break
        longer: dict[int, tuple[int, list[int]]] = {}
        for (start, end), tokens in cost.items():
            if start in cheapest:
                total = cheapest[start][0] + tokens
                if end not in longer or total < longer[end][0]:
                    longer[end] = (total, [*cheapest[start][1], end])
        cheapest = longer
        found += [cheapest[len(share)]] if len(share) in cheapest else []
    _, ends = min(found)
    filled = [share[start:end] for start, end in pairwise([0, *ends])]
    return [[] for _ in range(count - len(filled))] + filled[::-1]


__all__ = ["Rollout", "as_drawn", "collate", "deal", "padded_tokens", "shares", "stand_in", "with_weight"]
