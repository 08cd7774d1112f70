"""TRL's DistillationTrainer, whose teacher is another model, with this package's operator as its loss."""

from typing import Any

import torch
from torch import Tensor, nn

from .head import TeacherHead, distill, hidden_states, patch_lm_head

try:
    from trl import DistillationTrainer
except ImportError as error:
    raise ImportError(f"FusedDistillationTrainer is made for trl>=1.10: {error}") from error
if not hasattr(DistillationTrainer, "_compute_loss"):
    raise ImportError("FusedDistillationTrainer is made for trl>=1.10, whose DistillationTrainer has _compute_loss")

_MULTIMODAL = ("pixel_values", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
               "mm_token_type_ids", "image_position_ids")  # fmt: skip


class FusedDistillationTrainer(DistillationTrainer):
    """Takes what DistillationTrainer takes, and its DistillationConfig.

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
            question_weight=torch.ones(len(mask), device=mask.device),
            reduction="token-mean",
            denominator=num_items_in_batch,
            beta=self.beta,
            temperature=self.temperature,
            backbone=backbone,
        )
        return result.loss, (result.student_entropy * mask).sum(), mask.sum()


__all__ = ["FusedDistillationTrainer"]
