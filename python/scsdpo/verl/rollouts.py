"""The rollouts of a mini-batch that have a weight, dealt evenly over processes and micro-batches.

verl aggregates per-token losses linearly, in each of its `loss_agg_mode`s, with denominators of the whole mini-batch.
So a token counts for what verl's aggregation says of it, times its question's weight, and it does not matter which
process and micro-batch runs its rollout. A rollout without weight need not run at all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss

from scsdpo_kernels import TopLogprobs

from ..dealing import shares
from .losses import Objective


class Rollout(NamedTuple):
    """One rollout, on the CPU."""

    prompt: Tensor  # (P,) the student's
    teacher_prompt: Tensor  # (Q,); with a teacher server none
    completion: Tensor  # (T,) of both
    weight: Tensor  # (T,) fp32, what each token's divergence counts for in the loss of the mini-batch
    old_logp: Tensor | None = None  # (T,)
    server: TopLogprobs | None = None  # (T, K), a teacher server's

    @property
    def length(self) -> int:
        """The student's sequence."""
        return len(self.prompt) + len(self.completion)

    @property
    def tokens(self) -> int:
        """Through student and teacher."""
        return self.length + (0 if self.server is not None else len(self.teacher_prompt) + len(self.completion))


def with_weight(batch: TensorDict, objective: Objective) -> list[Rollout]:
    """The rollouts of this process's mini-batch that have a weight and a teacher.

    Raises:
        ValueError: no teacher's prompts or log-probabilities, advantages below 0, position ids that are not 0, 1, ...
    """
    responses = _Responses(batch)
    weight = responses.values(batch["advantages"]).float() * responses.coefficients(objective.actor)
    if (weight < 0).any():
        raise ValueError(
            "advantages: expected question weights, at least 0, got "
            f"{responses.values(batch['advantages']).min().item()}; set algorithm.adv_estimator to sc_sdpo, or sdpo"
        )
    if batch.get("rollout_is_weights") is not None:
        weight = weight * responses.values(batch["rollout_is_weights"])
    old_logp = responses.values(batch["old_log_probs"]) if "old_log_probs" in batch else None
    teacher_prompts = None
    if objective.from_server:
        at = responses.position
        server = [batch[name].values()[at] for name in ("teacher_ids", "teacher_logprobs")]
    elif "teacher_prompts" in batch:
        teacher_prompts = batch["teacher_prompts"].cpu().unbind()
    else:
        raise ValueError(
            "teacher_prompts: expected what the self-teacher sees in place of each prompt, got none in the batch; set "
            "trainer.v1.sampler.custom_sampler.path=pkg://scsdpo.verl and .name=TeacherPrompts, or distillation for a "
            "teacher server"
        )

    rollouts = []
    for i in responses.any(weight != 0).nonzero()[:, 0].tolist():
        if teacher_prompts is not None and not len(teacher_prompts[i]):
            continue
        own = slice(int(responses.offsets[i]), int(responses.offsets[i + 1]))
        rollouts.append(
            Rollout(
                prompt=responses.prompt(i),
                teacher_prompt=responses.ids.new_zeros(0) if teacher_prompts is None else teacher_prompts[i].clone(),
                completion=responses.ids[own].clone(),
                weight=weight[own].clone(),
                old_logp=None if old_logp is None else old_logp[own].clone(),
                server=TopLogprobs(*(x[own].clone() for x in server)) if objective.from_server else None,
            )
        )
    return rollouts


def stand_in(like: TensorDict, objective: Objective) -> Rollout:
    """Two tokens without weight, for a micro-batch that has none and still has to take part in collectives."""
    token = like["input_ids"].values()[:1].cpu()
    zero = torch.zeros(1)
    server = TopLogprobs(token[:, None], zero[:, None]) if objective.from_server else None
    return Rollout(token, token, token, zero, zero if "old_log_probs" in like else None, server)


def micro_batches(
    rollouts: list[Rollout],  # this process's
    group: dist.ProcessGroup,  # data-parallel
    most: int | None,  # rollouts in a micro-batch
    most_tokens: int | None,  # the student's in a micro-batch, in place of most
) -> list[list[Rollout]]:
    """This process's share of the rollouts of all, in as few micro-batches as the largest share needs; at least one.

    most_tokens are given with dynamic batch sizes. All processes call it together, and get as many micro-batches.

    Raises:
        ValueError: a rollout is longer than most_tokens.
    """
    dealt = [rollouts]
    if (processes := dist.get_world_size(group)) > 1:
        everywhere: list[list[Rollout]] = [[] for _ in range(processes)]
        dist.all_gather_object(everywhere, rollouts, group=group)
        rollouts = [x for own in everywhere for x in own]
        dealt = shares(rollouts, processes, max(1, len(rollouts)))
    if most_tokens is None:
        count = max(1, *(-(-len(share) // most) for share in dealt))
        return shares(dealt[dist.get_rank(group)], count, most)
    if (longest := max((x.length for x in rollouts), default=0)) > most_tokens:
        raise ValueError(f"actor.ppo_max_token_len_per_gpu: expected at least the longest rollout's {longest}, got "
                         f"{most_tokens}")  # fmt: skip
    count = max(1, *(-(-sum(x.length for x in share) // most_tokens) for share in dealt))
    while True:
        parts = [shares(share, count, max(1, len(share))) for share in dealt]
        if all(sum(x.length for x in part) <= most_tokens for process in parts for part in process):
            return parts[dist.get_rank(group)]
        count += 1


class _Responses:
    """The response tokens of a mini-batch, one after the other: R of them in B sequences."""

    def __init__(self, batch: TensorDict):
        self.batch = batch
        position_ids, sequences, responses = batch["position_ids"], batch["input_ids"], batch["responses"]
        self.starts = sequences.offsets().cpu()
        if position_ids.dim() == 3:
            raise ValueError("position_ids: expected one per token; multi-modal models are not supported")
        here = torch.arange(int(self.starts[-1])) - self.starts[:-1].repeat_interleave(self.starts.diff())
        if (position_ids.values().cpu() != here).any():
            raise ValueError("position_ids: expected 0, 1, ... in each sequence, got others")
        if responses.is_nested:
            self.length = responses.offsets().diff().cpu()
        else:  # padded by verl's older trainer
            self.length = batch["attention_mask"][:, -responses.shape[1] :].sum(1).cpu()
        self.offsets = torch.cat([self.length.new_zeros(1), self.length.cumsum(0)])
        self.sequence = torch.arange(len(self.length)).repeat_interleave(self.length)  # (R,) whose token it is
        self.position = predicting(self.starts[1:], self.length)  # (R,) that predicts it
        self.tokens = sequences.values().cpu()
        self.ids = self.tokens[self.position + 1]

    def prompt(self, i: int) -> Tensor:
        return self.tokens[self.starts[i] : self.starts[i + 1] - self.length[i]].clone()

    def values(self, field: Tensor) -> Tensor:  # (B, T) padded, or jagged -> (R,)
        if field.is_nested:
            return field.values().cpu()
        return field.cpu()[torch.arange(field.shape[1]) < self.length.unsqueeze(1)]

    def any(self, flags: Tensor) -> Tensor:  # (R,) -> (B,)
        return torch.zeros_like(self.length).index_add_(0, self.sequence, flags.long()) > 0

    def coefficients(self, actor: Any) -> Tensor:
        """(R,): verl's aggregated loss, differentiated by each token's loss."""
        mask = self.batch["response_mask"].cpu()
        mask = mask.to_padded_tensor(0) if mask.is_nested else mask
        losses = torch.zeros(mask.shape, requires_grad=True)
        with torch.enable_grad():
            loss = agg_loss(
                loss_mat=losses,
                loss_mask=mask,
                loss_agg_mode=actor.loss_agg_mode,
                dp_size=self.batch["dp_size"],
                batch_num_tokens=self.batch["batch_num_tokens"],
                global_batch_size=self.batch["global_batch_size"],
                loss_scale_factor=actor.loss_scale_factor,
            )
            (coefficients,) = torch.autograd.grad(loss, losses)
        return self.values(coefficients)


def predicting(ends: Tensor, responses: Tensor) -> Tensor:
    """(R,): where the token before each response token is, of responses that are the end of their sequence.

    ends (B,) are where sequences end in what holds them all, responses (B,) how long their responses are.
    """
    first = ends - responses - 1
    before = responses.cumsum(0) - responses
    return torch.arange(int(responses.sum()), device=ends.device) + (first - before).repeat_interleave(responses)


def jagged(rows: Sequence[Tensor], device: Any) -> Tensor:
    """(B, j), whatever the lengths."""
    length = torch.tensor([0, *map(len, rows)])
    return torch.nested.nested_tensor_from_jagged(torch.cat(list(rows)).to(device), length.cumsum(0).to(device))


__all__ = ["Rollout", "jagged", "micro_batches", "predicting", "stand_in", "with_weight"]
