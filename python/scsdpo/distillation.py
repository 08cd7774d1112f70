"""TRL's DistillationTrainer, whose teacher is another model, with this package's operator as its loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .head import TeacherHead, distill, hidden_states, patch_lm_head
from .step_metrics import MetricsOptions, StepMetrics, check_metrics

try:
    from trl import DistillationConfig, DistillationTrainer
except ImportError as error:
    raise ImportError(f"FusedDistillationTrainer is made for trl>=1.10: {error}") from error
if not hasattr(DistillationTrainer, "_compute_loss"):
    raise ImportError("FusedDistillationTrainer is made for trl>=1.10, whose DistillationTrainer has _compute_loss")

_MULTIMODAL = ("pixel_values", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
               "mm_token_type_ids", "image_position_ids")  # fmt: skip


@dataclass
class FusedDistillationConfig(MetricsOptions, DistillationConfig):
    """TRL's DistillationConfig, and what is logged."""


class FusedDistillationTrainer(DistillationTrainer):
    """Takes what DistillationTrainer takes, and its DistillationConfig or a FusedDistillationConfig.

    The head is measured (`scsdpo.head`), so that scales, softcaps, biases and adapters are right whatever they are
    called, and it is read where a wrapper has gathered it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.teacher_model is None:
            raise ValueError("teacher_model: expected a model or its name, got None")
        patch_lm_head(self.model)
        patch_lm_head(self.teacher_model)
        self._teacher_head = TeacherHead()
        self._divergence_metrics = tuple(getattr(self.args, "divergence_metrics", ()))
        check_metrics(self._divergence_metrics, {"top1_agreement"})
        self._step_metrics = StepMetrics(self.accelerator, self._divergence_metrics)

    def compute_loss(self, *args: Any, **kwargs: Any):
        loss = super().compute_loss(*args, **kwargs)
        if self._divergence_metrics:
            self._step_metrics.finish("train" if self.model.training else "eval")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in self._step_metrics.since_last_log(mode).items():
            if name in self._step_metrics.entries:
                self._metrics[mode][f"scsdpo/{name}"] = [value]
        super().log(logs, *args, **kwargs)

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # the loss, the sum of entropies, how many
        """Inside the student wrapper's forward: TRL calls it there."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        backbone = {name: inputs[name] for name in _MULTIMODAL if name in inputs}
        if "pixel_values" in inputs and "image_grid_thw" in inputs:
            backbone["image_grid_thw"] = inputs["image_grid_thw"]
        ones = torch.ones(len(mask), device=mask.device)
        self.teacher_model.eval()
        with torch.no_grad():
            teacher = hidden_states(self.teacher_model, ids, attention, mask.shape[1], backbone=backbone)
        result = distill(
            unwrapped_student,
            ids,
            attention,
            mask.shape[1],
            mask=mask,
            teacher_hidden=teacher,
            teacher_head=self._teacher_head.at(self.state.global_step, self.teacher_model),
            question_weight=ones,
            reduction="token-mean",
            denominator=num_items_in_batch,
            beta=self.beta,
            temperature=self.temperature,
            backbone=backbone,
            metrics=self._divergence_metrics,
        )
        if self._divergence_metrics:
            mode = "train" if self.model.training else "eval"
            here = torch.full((len(mask),), self.accelerator.process_index, device=mask.device)
            self._step_metrics.begin(mode, 1)
            self._step_metrics.drawn(mode, 0, mask.numel())
            self._step_metrics.add(mode, result, mask, ones, here)
        return result.loss, (result.student_entropy * mask).sum(), mask.sum()


__all__ = ["FusedDistillationConfig", "FusedDistillationTrainer"]
