"""What TRL's self-distillation trainers have in common here: the fused loss, of dealt rollouts that have a weight.

A mixin in front of `SDPOTrainer` or `SDFTTrainer`. Every argument of TRL's keeps its meaning and its aggregation: the
loss is the mean over a rollout's distilled tokens, then over the rollouts of an optimiser step. No step holds a
(B, T, V) tensor: the divergence and the log-probabilities of rollouts come from hidden states, inside the head's
forward (`scsdpo.head`). Rollouts without weight are not run, and the others are dealt evenly (`scsdpo.dealing`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from scsdpo_kernels import Head, LinearDivergence, PolicyGradient, SampledToken, TopK, TopLogprobs

from . import dealing
from .dealing import Rollout
from .ema_teacher import EMATeacher
from .head import TeacherHead, distill, hidden_states, patch_lm_head
from .measured import is_whole, measured
from .step_metrics import MetricsOptions, StepMetrics, check_metrics

SEAMS = ("_prepare_training_batch", "_prepare_inputs", "_compute_rollout_logps", "_log_self_distillation_metric",
         "_get_teacher_context_for_self_distillation", "compute_loss")  # fmt: skip


@dataclass
class DealingOptions(MetricsOptions):
    """How the rollouts of an optimiser step are run, and what is logged of them."""

    deal_rollouts: bool = field(
        default=True,
        metadata={"help": "Deal rollouts over micro-batches and processes. False: each runs where it was drawn."},
    )
    skip_zero_steps: bool = field(
        default=False,
        metadata={
            "help": "Leave out the update of an optimiser step whose weights are all 0. False: momentum, weight decay "
            "and a moving-average teacher still move parameters, as in TRL."
        },
    )


class FusedSelfDistillation:
    """Before a TRL trainer in the order of bases; needs DealingOptions in its config."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, DealingOptions):
            raise TypeError(f"args: expected a {self.config_cls.__name__}, got {type(self.args).__name__}")
        if self.args.use_teacher_server:
            raise ValueError(f"use_teacher_server: expected False; {type(self).__name__} runs its teacher itself")
        if self.args.distillation_mode == "topk_logits" and self.args.distillation_topk is None:
            raise ValueError("distillation_topk: expected a number with distillation_mode='topk_logits', got None")
        if self.args.skip_zero_steps and (self.is_deepspeed_enabled or self.accelerator.scaler is not None):
            raise ValueError(
                "skip_zero_steps: expected False under DeepSpeed and fp16, whose optimisers need gradients"
            )
        self._distillation_weight = getattr(self.args, "distillation_weight", 1.0)
        if self._distillation_weight != 1:
            self._check_policy()
        self._check_metrics()
        head = patch_lm_head(self.model)
        patch_lm_head(self.teacher_model)
        if getattr(head, "lora_A", None) is not None and self.args.teacher_model_kind == "ema":
            raise ValueError(
                "teacher_model_kind: expected 'live' or 'base' where LoRA adapts the head, got 'ema', with which TRL "
                "sets the head's own weight to 0; or leave 'lm_head' out of target_modules"
            )
        self._teacher_head = TeacherHead()
        self._rollouts: list[Rollout] = []  # all processes' generation batch
        self._first: int | None = None  # micro-batch of the optimiser step, counted as TRL's _step
        self._micro_batches = 0  # this optimiser step's
        self._dealt: dict[int, list[Rollout]] = {}  # this process's, by micro-batch
        self._has_weight = False  # a rollout of the optimiser step, on any process
        self._runs_empty = True
        self._step_metrics = StepMetrics(self.accelerator, self.args.divergence_metrics)
        self._policy_loss: Tensor | float = 0.0  # this optimiser step's so far
        if self.args.teacher_model_kind == "ema":
            self.callback_handler.callbacks = [
                EMATeacher(x, self) if EMATeacher.is_for(x) else x for x in self.callback_handler.callbacks
            ]
        if self.args.skip_zero_steps:
            self.add_callback(_WithoutUpdate(self))

    def _check_metrics(self) -> None:
        has = set()
        if self._distillation_weight != 0:  # there is a teacher
            has.add("top1_agreement")
            if self.args.distillation_mode == "topk_logits":
                has.add("support_mass")
            if self.args.distillation_is_clip is not None and self._needs_old_logps():
                has.add("importance_clipped")
        check_metrics(self.args.divergence_metrics, has)

    # ------------------------------------------------------------------------------------------------------------------
    # For the trainers

    def _weigh(self, batch: dict[str, Any]) -> Tensor:  # (B,)
        """The weight of each rollout's question."""
        return torch.ones(len(batch["completion_ids"]), device=self.accelerator.device)

    def _loss_mask(self, batch: dict[str, Any]) -> Tensor:  # (B, T)
        """1 at tokens that have a loss."""
        mask = batch["completion_mask"]
        if (skipped := getattr(self, "num_loss_tokens_to_skip", 0)) > 0:
            mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= skipped)
        distilled = batch.get("self_distillation_mask")
        return mask if distilled is None else mask * (distilled != 0).unsqueeze(1)

    # ------------------------------------------------------------------------------------------------------------------
    # The policy's loss, of trainers that blend one in

    def _check_policy(self) -> None:
        if self.loss_type not in ("grpo", "bnpo", "dapo", "dr_grpo"):
            raise ValueError(f"loss_type: expected grpo, bnpo, dapo or dr_grpo, got {self.loss_type!r}")
        if not self._is_off_policy():
            return
        if self.importance_sampling_level != "token":
            raise ValueError(
                "importance_sampling_level: expected 'token' with distillation_weight below 1 and rollouts that "
                f"outlive an optimiser step, got {self.importance_sampling_level!r}, whose ratios need another pass"
            )
        if self.args.distillation_is_clip is None and self._distillation_weight != 0:
            raise ValueError(
                "distillation_is_clip: expected a number with distillation_weight between 0 and 1 and rollouts that "
                "outlive an optimiser step, got None"
            )

    def _policy_weights(self, batch: dict[str, Any], micro_batches: int) -> Tensor:  # (B,)
        """What multiplies a rollout's mean over its completion so that the mean over rollouts is TRL's `loss_type`."""
        lengths = batch["completion_mask"].sum(1).float()
        if self.loss_type == "grpo":
            weights = torch.ones_like(lengths)
        elif self.loss_type == "dr_grpo":
            weights = lengths / self.max_completion_length
        else:  # the mean over tokens of the micro-batch that has drawn it
            lengths = lengths.view(micro_batches, -1)
            mean = lengths.sum(1, keepdim=True).clamp(min=1.0) / lengths.shape[1]
            weights = (lengths / mean).view(-1)
        return (1 - self._distillation_weight) * weights

    # ------------------------------------------------------------------------------------------------------------------
    # Generation batches, optimiser steps and micro-batches

    def _prepare_training_batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._prepare_training_batch(inputs)
        batch["question_weight"] = self._weigh(batch)
        slices = self.args.steps_per_generation if self.model.training else 1
        if self._distillation_weight != 1:
            batch["policy_weight"] = self._policy_weights(batch, slices)
        if self.model.training:
            own = dealing.with_weight(batch, self._loss_mask(batch), self.accelerator.process_index, slices)
            self._rollouts = gather_object(own)
            self._runs_empty = not self._is_alone_until_the_last()
            if self._needs_old_logps():
                most = len(batch["completion_ids"]) // slices
                shares = self._shares(self._rollouts, slices, most)[self.accelerator.process_index]
                self._rollouts = gather_object([x for share in shares for x in self._with_old_logps(share)])
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's micro-batch, as long as nothing is dealt; then `_micro_batch`'s."""
        batch = super()._prepare_inputs(generation_batch)
        rows, width = batch["completion_ids"].shape
        if self.model.training:
            if self._first is None or self._step >= self._first + self._micro_batches:
                self._begin_optimiser_step()
            if self._step not in self._dealt:
                self._dealt = self._deal(rows)
            index = self._step - self._first
            return self._micro_batch(self._dealt[self._step], "train", index, rows, width, self._micro_batches)
        self._step_metrics.begin("eval", 1)
        rollouts = dealing.with_weight(batch, self._loss_mask(batch), self.accelerator.process_index, 1)
        if self._needs_old_logps():
            rollouts = self._with_old_logps(rollouts)
        return self._micro_batch(rollouts, "eval", 0, rows, width, 1)

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        """An optimiser step begins."""
        self._first = None
        return super().get_batch_samples(*args, **kwargs)

    def _begin_optimiser_step(self) -> None:
        self._first, self._micro_batches = self._step, int(self.current_gradient_accumulation_steps)
        self._dealt, self._has_weight = {}, False
        self._step_metrics.begin("train", self._micro_batches)

    def _deal(self, rows: int) -> dict[int, list[Rollout]]:
        """This process's rollouts from here on, as far as both the generation batch and the optimiser step reach."""
        done, slices = self._step - self._first, self.args.steps_per_generation
        start = self._step % slices
        count = min(slices - start, self._micro_batches - done)
        here = [x for x in self._rollouts if start <= x.micro_batch < start + count]
        here = [x._replace(micro_batch=x.micro_batch - start) for x in here]
        self._has_weight = self._has_weight or bool(here)
        shares = self._shares(here, count, rows)[self.accelerator.process_index]
        return {
            self._step + i: [x._replace(micro_batch=x.micro_batch + done) for x in share]
            for i, share in enumerate(shares)
        }

    def _shares(self, rollouts: list[Rollout], micro_batches: int, most: int) -> list[list[list[Rollout]]]:
        processes = self.accelerator.num_processes
        if self.args.deal_rollouts:
            return dealing.deal(rollouts, micro_batches, processes, most)
        return dealing.as_drawn(rollouts, micro_batches, processes)

    def _micro_batch(
        self, rollouts: list[Rollout], mode: str, index: int, rows: int, width: int, micro_batches: int
    ) -> dict[str, Any]:
        """What compute_loss takes: `dealing.collate`'s tensors; where they were drawn; the denominator, and if it runs.

        Without rollouts it runs two tokens of weight 0 where others wait for this process: where parameters are
        sharded, and in the last micro-batch, whose backward DDP waits for and after which every gradient is there.
        """
        last = index == micro_batches - 1
        self._step_metrics.drawn(mode, index, rows * width)
        batch: dict[str, Any] = {
            "mode": mode,
            "last": last,
            "runs": bool(rollouts) or last or self._runs_empty,
            "denominator": float(rows * micro_batches),
        }
        if batch["runs"]:
            run = rollouts or [dealing.stand_in(self._tokenizer.pad_token_id)]
            batch |= dealing.collate(run, self._tokenizer.pad_token_id, self.accelerator.device)
            origin = [x.micro_batch * self.accelerator.num_processes + x.process for x in run]
            batch["origin"] = torch.tensor(origin, device=self.accelerator.device)
        return batch

    def _is_alone_until_the_last(self) -> bool:
        """Whether no process waits for another but in the last micro-batch: nothing sharded, gradients reduced once."""
        whole = all(is_whole(x) for x in (self.model_wrapped, self.teacher_model))
        reduced_each_time = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return whole and not reduced_each_time and not self.is_deepspeed_enabled

    # ------------------------------------------------------------------------------------------------------------------
    # Log-probabilities of rollouts

    def _compute_rollout_logps(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where TRL asks: weights are not known then."""

    def _needs_old_logps(self) -> bool:
        """Where TRL takes them."""
        needs = self.args.distillation_is_clip is not None or self._distillation_weight != 1
        return needs and self._is_off_policy() and not getattr(self, "generate_from_teacher", False)

    def _is_off_policy(self) -> bool:
        """Whether a generation batch outlives an optimiser step."""
        every = self.args.steps_per_generation * self.num_iterations
        return self.args.gradient_accumulation_steps % every != 0

    def _with_old_logps(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The same rollouts, of one micro-batch, with the student's log-probabilities of their tokens."""
        if not rollouts and not self._runs_empty:
            return []
        run = rollouts or [dealing.stand_in(self._tokenizer.pad_token_id)]
        batch = dealing.collate(run, self._tokenizer.pad_token_id, self.accelerator.device)
        completions = batch["completion_ids"]
        with torch.no_grad(), self.accelerator.autocast():
            logps = distill(
                self.model_wrapped if self.is_fsdp_enabled else self.model,
                torch.cat([batch["prompt_ids"], completions], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                completions.shape[1],
                mask=None,
                temperature=self.temperature,
                target_ids=completions,
                support=_without_teacher(completions),
            ).student_logp.cpu()
        return [
            x._replace(old_logp=logp[: len(x.completion)].clone()) for x, logp in zip(rollouts, logps, strict=False)
        ]

    # ------------------------------------------------------------------------------------------------------------------
    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("return_outputs: expected False; there are no logits to return")
        mode = inputs["mode"]
        if inputs["runs"]:
            result = self._distill(model, inputs)
            mask = inputs["loss_mask"]
            if self._distillation_weight == 0:  # there was no teacher
                result, mask = result._replace(teacher_entropy=torch.zeros_like(result.student_entropy)), 0 * mask
            self._step_metrics.add(mode, result, mask, inputs["question_weight"], inputs["origin"])
            self._policy_loss = self._policy_loss + self._mean_policy_loss(result, inputs)
            loss = result.loss
        else:
            loss = torch.zeros((), device=self.accelerator.device, requires_grad=True)
        if inputs["last"]:
            self._log_self_distillation_metric(mode, self._step_metrics.finish(mode))
            if self._distillation_weight != 1:
                policy_loss = torch.as_tensor(self._policy_loss, device=self.accelerator.device, dtype=torch.float32)
                policy_loss = self.accelerator.reduce(policy_loss, "mean").item()
                self._metrics[mode]["self_distillation/policy_loss"].append(policy_loss)
                self._policy_loss = 0.0
        return loss

    def _mean_policy_loss(self, result: LinearDivergence, inputs: dict[str, Any]) -> Tensor | float:
        """A micro-batch's share of TRL's metric."""
        if result.policy_loss is None:
            return 0.0
        mask = inputs["completion_mask"]
        of_rollouts = (result.policy_loss * mask).sum(1) / mask.sum(1)
        weights = inputs["policy_weight"] / (1 - self._distillation_weight)
        return (of_rollouts * weights).sum() / inputs["denominator"]

    def _distill(self, model: torch.nn.Module, inputs: dict[str, Any]) -> LinearDivergence:
        tokens, objective = inputs["completion_ids"].shape[1], self._objective(inputs)
        with self.accelerator.autocast():
            if self._distillation_weight != 0:
                own = measured(model).state.head
                with torch.no_grad(), self._get_teacher_context_for_self_distillation():
                    objective["teacher_hidden"] = hidden_states(
                        self.teacher_model, inputs["teacher_input_ids"], inputs["teacher_attention_mask"], tokens
                    )
                    shares = measured(self.teacher_model).state.head == own
                    objective["teacher_head"] = None if shares else self._head_of_teacher()
            return distill(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                tokens,
                question_weight=inputs["question_weight"],
                reduction="sequence-mean",
                denominator=inputs["denominator"],
                target_ids=inputs["completion_ids"],
                temperature=self.temperature,
                **objective,
            )

    def _objective(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """TRL's names for the losses as scsdpo_loss's."""
        completions, old_logp = inputs["completion_ids"], inputs.get("old_per_token_logps")
        objective: dict[str, Any] = {"beta": self.args.distillation_alpha, "mask": inputs["loss_mask"]}
        objective["metrics"] = tuple(self.args.divergence_metrics)
        if self._distillation_weight != 1:  # whose tokens are all, with a teacher or without
            objective["mask"] = inputs["completion_mask"]
            objective["token_weight"] = self._distillation_weight * inputs["loss_mask"]
            advantages, weights = (
                inputs[x].unsqueeze(1).expand(completions.shape) for x in ("advantages", "policy_weight")
            )
            objective["policy"] = PolicyGradient(advantages, self.epsilon_low, self.epsilon_high, weights)
            if old_logp is not None:
                objective["old_logp"] = old_logp
        if self._distillation_weight == 0:
            return objective | {"support": _without_teacher(completions)}
        if self.args.distillation_mode == "topk_logits":
            tail = "bucket" if self.args.distillation_add_tail else "renormalize"
            objective["support"] = TopK(self.args.distillation_topk, tail=tail)
        elif self.args.distillation_mode == "sampled_token":
            objective["support"] = SampledToken()
        if self.args.distillation_is_clip is not None and old_logp is not None:
            objective |= {"old_logp": old_logp, "importance_clip": self.args.distillation_is_clip}
        return objective

    def _head_of_teacher(self) -> Head:
        """Where the teacher's adapter is at work."""
        return self._teacher_head.at(self.state.global_step, self.teacher_model)

    # ------------------------------------------------------------------------------------------------------------------
    # Logs, steps without weight, checkpoints

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in self._step_metrics.since_last_log(mode).items():
            self._metrics[mode][f"scsdpo/{name}"] = [value]
        super().log(logs, *args, **kwargs)

    @property
    def step_is_zero(self) -> bool:
        """Whether the update of this optimiser step is to be left out."""
        return self.args.skip_zero_steps and not self._has_weight

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EMATeacher):
                callback.resume_from(checkpoint)


def _without_teacher(completions: Tensor) -> TopLogprobs:
    """A teacher who has said one token: the student alone is projected."""
    return TopLogprobs(completions.unsqueeze(-1), completions.unsqueeze(-1) * 0.0)


class _WithoutUpdate(TrainerCallback):
    """Takes the gradients of a step without weight from the optimiser, which leaves such parameters alone."""

    def __init__(self, trainer: FusedSelfDistillation):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.trainer.step_is_zero:
            for parameter in model.parameters():
                parameter.grad = None


__all__ = ["SEAMS", "DealingOptions", "FusedSelfDistillation"]
