"""SC-SDPO in TRL: its SDPOTrainer with question weights and the fused loss, as a drop-in.

    from scsdpo.trl import SCSDPOConfig, SCSDPOTrainer

    trainer = SCSDPOTrainer(model, reward_funcs, SCSDPOConfig(...), train_dataset=...)

Every argument of TRL's keeps its meaning and its aggregation: the loss is the mean over a rollout's distilled tokens,
then over the rollouts of a micro-batch, here times the weight of the rollout's question (arXiv 2605.27765), which is
computed once a generation batch, over all processes. No step holds a (B, T, V) tensor: the divergence and the
log-probabilities of rollouts come from hidden states, inside the head's forward (`scsdpo.head`).
"""

from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from scsdpo_kernels import Head, LinearDivergence, SampledToken, TopK, TopLogprobs, question_weights

from .head import base_model, distill, head_of, hidden_states, patch_lm_head

TESTED = ">=1.16,<1.17"
_SEAMS = ("_prepare_training_batch", "_compute_rollout_logps", "_get_teacher_context_for_self_distillation",
          "_log_self_distillation_metric", "compute_loss")  # fmt: skip

try:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    _missing = [name for name in _SEAMS if not hasattr(SDPOTrainer, name)]
except ImportError as error:
    raise ImportError(f"scsdpo.trl is made for trl{TESTED} (pip install 'scsdpo-kernels[trl]'): {error}") from error
if _missing:
    raise ImportError(
        f"scsdpo.trl is made for trl{TESTED}; SDPOTrainer of trl {metadata.version('trl')} has no {', '.join(_missing)}"
    )


@dataclass
class SCSDPOConfig(SDPOConfig):
    """TRL's SDPOConfig and how questions are weighted."""

    question_weighting: str = field(
        default="sc-sdpo", metadata={"help": "'sc-sdpo': w = (p̂ (1 - p̂))^exponent, normalised. 'none': plain SDPO."}
    )
    question_weight_exponent: float = field(
        default=0.5, metadata={"help": "α of SC-SDPO's weights; the paper's is 1/2."}
    )
    question_success_threshold: float | None = field(
        default=None,
        metadata={"help": "Reward from which a rollout counts as a success. None: success_reward_threshold."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.question_weighting not in ("sc-sdpo", "none"):
            raise ValueError(f"question_weighting: expected 'sc-sdpo' or 'none', got {self.question_weighting!r}")
        if self.distillation_weight != 1.0:
            raise ValueError(
                f"distillation_weight: expected 1.0, got {self.distillation_weight}; the policy loss that it blends in "
                "needs full logits, which this trainer never has"
            )
        if self.use_teacher_server:
            raise ValueError("use_teacher_server: expected False; SCSDPOTrainer runs its teacher itself")


class SCSDPOTrainer(SDPOTrainer):
    """TRL's SDPOTrainer with question weights and the fused loss. Takes what SDPOTrainer takes."""

    config_cls = SCSDPOConfig
    _tag_names = ["trl", "sdpo", "sc-sdpo"]  # noqa: RUF012
    _PER_ROLLOUT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "teacher_input_ids",
                    "teacher_attention_mask", "question_weight", "old_per_token_logps")  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, SCSDPOConfig):
            raise TypeError(f"args: expected an SCSDPOConfig, got {type(self.args).__name__}")
        if self.args.distillation_mode == "topk_logits" and self.args.distillation_topk is None:
            raise ValueError("distillation_topk: expected a number with distillation_mode='topk_logits', got None")
        head = patch_lm_head(self.model)
        patch_lm_head(self.teacher_model)
        if getattr(head, "lora_A", None) is not None and self.args.teacher_model_kind != "live":
            raise ValueError(
                "teacher_model_kind: expected 'live' where LoRA adapts the head, got "
                f"{self.args.teacher_model_kind!r}; or leave 'lm_head' out of target_modules"
            )
        self._teacher_head: tuple[int, Head | None] = (-1, None)

    def _prepare_training_batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._prepare_training_batch(inputs)
        mode = "train" if self.model.training else "eval"
        generations = self.num_generations if mode == "train" else self.num_generations_eval
        rewards = self.accelerator.gather(batch["rewards"])  # groups are contiguous here, and may straddle processes
        threshold = self.args.question_success_threshold
        threshold = self.args.success_reward_threshold if threshold is None else threshold
        weights = question_weights(
            rewards,
            torch.arange(len(rewards), device=rewards.device) // generations,
            exponent=self.args.question_weight_exponent,
            success_threshold=threshold,
        )
        self._metrics[mode]["scsdpo/pass_rate"].append((rewards >= threshold).float().mean().item())
        self._metrics[mode]["scsdpo/zero_weight_questions"].append((weights == 0).float().mean().item())
        if self.args.question_weighting == "none":
            weights = torch.ones_like(weights)
        start = self.accelerator.process_index * len(batch["rewards"])
        batch["question_weight"] = weights[start : start + len(batch["rewards"])]
        return batch

    def _compute_rollout_logps(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor | None:
        if self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0:
            return None  # on-policy: TRL asks for none either
        with torch.no_grad(), self.accelerator.autocast():
            return distill(
                self.model_wrapped if self.is_fsdp_enabled else self.model,
                torch.cat([prompt_ids, completion_ids], dim=1),
                torch.cat([prompt_mask, completion_mask], dim=1),
                completion_ids.shape[1],
                mask=None,
                temperature=self.temperature,
                target_ids=completion_ids,
                # A teacher who has said one token: the student alone is projected.
                support=TopLogprobs(
                    completion_ids.unsqueeze(-1), torch.zeros_like(completion_ids, dtype=torch.float32).unsqueeze(-1)
                ),
            ).student_logp

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("return_outputs: expected False; there are no logits to return")
        mask = inputs["completion_mask"]
        if (distilled := inputs.get("self_distillation_mask")) is not None:
            mask = mask * distilled.unsqueeze(1)
        rollouts, tokens = mask.shape
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1.0
        # Rollouts of weight 0 are not run. Every process runs one, or the others' collectives wait.
        run = (inputs["question_weight"] != 0) & mask.any(1)
        run[0] |= ~run.any()
        inputs = {name: inputs[name][run] for name in self._PER_ROLLOUT if inputs.get(name) is not None}
        mask = mask[run]
        with self.accelerator.autocast():
            with torch.no_grad(), self._get_teacher_context_for_self_distillation():
                teacher = hidden_states(
                    self.teacher_model, inputs["teacher_input_ids"], inputs["teacher_attention_mask"], tokens
                )
            result = distill(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                tokens,
                teacher_hidden=teacher,
                teacher_head=self._head_of_teacher(),
                mask=mask,
                question_weight=inputs["question_weight"],
                reduction="sequence-mean",
                denominator=float(rollouts * accumulation),
                target_ids=inputs["completion_ids"],
                temperature=self.temperature,
                **self._objective(inputs.get("old_per_token_logps")),
            )
        self._log_distillation(result, mask * (inputs["question_weight"] != 0).unsqueeze(1), rollouts * tokens)
        return result.loss

    def _objective(self, old_logp: Tensor | None) -> dict[str, Any]:
        """TRL's names for the divergence as linear_divergence's."""
        objective: dict[str, Any] = {"beta": self.args.distillation_alpha}
        if self.args.distillation_mode == "topk_logits":
            tail = "bucket" if self.args.distillation_add_tail else "renormalize"
            objective["support"] = TopK(self.args.distillation_topk, tail=tail)
        elif self.args.distillation_mode == "sampled_token":
            objective["support"] = SampledToken()
        if self.args.distillation_is_clip is not None and old_logp is not None:
            objective |= {"old_logp": old_logp, "importance_clip": self.args.distillation_is_clip}
        return objective

    def _head_of_teacher(self) -> Head | None:
        """Gathered once an optimiser step; None of a teacher whose head is the student's own."""
        if self._teacher_head[0] != self.state.global_step:
            own, other = (base_model(x).get_output_embeddings() for x in (self.model, self.teacher_model))
            head = None if other is own else head_of(self.teacher_model)
            self._teacher_head = (self.state.global_step, head)
        return self._teacher_head[1]

    def _log_distillation(self, result: LinearDivergence, kept: Tensor, rows: int) -> None:
        """Means over the tokens that were computed, of all processes; kept: which they are, of so many rows."""
        mode = "train" if self.model.training else "eval"
        ratio = 1.0 if result.importance_ratio is None else result.importance_ratio
        own = [kept.sum(), kept.new_tensor(rows)]
        fields = (ratio * result.divergence, result.divergence, result.student_entropy, result.teacher_entropy)
        own += [(x * kept).sum() for x in fields]
        sums = self.accelerator.gather(torch.stack([x.float() for x in own]).unsqueeze(0))
        count = sums[:, 0].sum().clamp(min=1.0)
        # as TRL does: the mean over processes of each one's own mean
        self._log_self_distillation_metric(mode, (sums[:, 2] / sums[:, 0].clamp(min=1.0)).mean().item())
        self._metrics[mode]["scsdpo/rows_kept"].append((sums[:, 0].sum() / sums[:, 1].sum()).item())
        for name, total in zip(("divergence", "student_entropy", "teacher_entropy"), sums[:, 3:].sum(0), strict=True):
            self._metrics[mode][f"scsdpo/{name}"].append((total / count).item())


__all__ = ["SCSDPOConfig", "SCSDPOTrainer"]
