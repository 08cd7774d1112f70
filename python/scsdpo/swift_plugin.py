"""ms-swift's GKD, with a teacher of its own or as self-distillation, with the fused loss: a plug-in for `swift rlhf`.

    echo "import scsdpo.swift_plugin" > plugin.py
    swift rlhf --rlhf_type gkd --external_plugins plugin.py ...

The loss is ms-swift's: the mean of D(p_n, q_n) over a micro-batch's response tokens, D the divergence of `--beta` at
`--temperature`. No step holds full logits of student or teacher. In self-distillation, a row's `teacher_prompt` takes
the place of its last user message for the teacher, which is the student itself (or, where `--teacher_model` is the
model that LoRA adapts, the student without its adapter). Every rollout has weight 1, since GKD has no rewards.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

if __name__ != "scsdpo.swift_plugin":
    raise ImportError(
        "--external_plugins: expected a file of yours with the line 'import scsdpo.swift_plugin', got swift_plugin.py "
        "itself, in whose folder Python would look for TRL"
    )

TESTED = ">=4.6,<4.7"
SEAMS = ("_setup_teacher", "_compute_jsd_loss", "_prepare_inputs", "load_teacher_model_context", "compute_loss")

try:
    from swift.rlhf_trainers import GKDTrainer
    from swift.trainers import TrainerFactory, disable_gradient_checkpointing

    from .head import TeacherHead, distill, hidden_states, patch_lm_head
    from .measured import measured
except ImportError as error:
    raise ImportError(f"scsdpo.swift_plugin is made for ms-swift{TESTED}: {error}") from error

if _missing := [name for name in SEAMS if not hasattr(GKDTrainer, name)]:
    raise ImportError(
        f"scsdpo.swift_plugin is made for ms-swift{TESTED}; GKDTrainer of ms-swift {metadata.version('ms-swift')} has "
        f"no {', '.join(_missing)}"
    )

IGNORED = -100  # a label that has no loss
_NOT_OF_THE_MODEL = ("input_ids", "attention_mask", "labels", "loss_scale", "logits_to_keep")


class FusedGKDTrainer(GKDTrainer):
    """Takes what ms-swift's GKDTrainer takes.

    Raises:
        ValueError: what needs logits, or a teacher that is not here: a teacher server, `gkd_logits_topk`, `sft_alpha`,
            Liger's loss, sequence parallelism, models with images or sound, Unsloth's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        refused = {
            "teacher_model_server": (self.use_teacher_api, "None; the teacher runs here"),
            "gkd_logits_topk": (self.gkd_logits_topk is not None, "None; the divergence has the whole vocabulary"),
            "sft_alpha": (self.args.sft_alpha > 0, "0; its cross-entropy needs full logits"),
            "use_liger_kernel": (self.use_liger_gkd_loss, "False; the loss is fused here"),
            "sequence_parallel_size": (self.template.sequence_parallel_size > 1, "1"),
            "model": (self.model.model_meta.is_multimodal, "one without images or sound"),
            "tuner_backend": (self.args.tuner_backend == "unsloth", "peft"),
        }
        for name, (is_refused, expected) in refused.items():
            if is_refused:
                raise ValueError(f"{name}: expected {expected}, got another")
        patch_lm_head(self.model)
        if self.teacher_model is not None:
            patch_lm_head(self.teacher_model)
        self._teacher_head = TeacherHead()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("return_outputs: expected False, got True; there are no logits to return")
        student, teacher = inputs["model_inputs"], inputs["teacher_model_inputs"]
        predicting, of_teacher = _predicting(student["labels"]), _predicting(teacher["labels"])
        if len(predicting) != len(of_teacher):
            raise ValueError(
                f"teacher_prompt: expected as many response tokens as the student has, {len(predicting)}, got "
                f"{len(of_teacher)}"
            )
        other, own = self.teacher_model or model, measured(model).state.head
        with torch.no_grad(), self._teacher_context(model):
            hidden = hidden_states(
                other, teacher["input_ids"], teacher.get("attention_mask"), of_teacher, backbone=_further(teacher)
            )
            shares = measured(other).state.head == own
            head = None if shares else self._teacher_head.at(self.state.global_step, other)
        result = distill(
            model,
            student["input_ids"],
            student.get("attention_mask"),
            predicting,
            mask=None,
            teacher_hidden=hidden,
            teacher_head=head,
            backbone=_further(student),
            beta=self.beta,
            temperature=self.temperature,
        )
        return result.loss / max(len(predicting), 1)

    @contextmanager
    def _teacher_context(self, model: nn.Module) -> Iterator[None]:
        """In which the teacher runs: there, without the student's adapter, without gradient checkpointing."""
        other = self.teacher_model or model
        with ExitStack() as stack:
            if self.teacher_model is not None and self.args.offload_teacher_model:
                stack.enter_context(self.load_teacher_model_context())
            if self.teacher_model is None and self._teacher_use_disable_adapter:
                stack.enter_context(self.accelerator.unwrap_model(model).disable_adapter())
            stack.enter_context(disable_gradient_checkpointing(other, self.args.gradient_checkpointing_kwargs))
            yield


def _predicting(labels: Tensor) -> Tensor:  # (B, L) -> (R,)
    """Positions in B·L before a response token, by which it is predicted."""
    following = labels.roll(-1, dims=1)
    following[:, -1] = IGNORED
    return (following != IGNORED).flatten().nonzero()[:, 0]


def _further(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in _NOT_OF_THE_MODEL}


TrainerFactory.TRAINER_MAPPING["gkd"] = "scsdpo.swift_plugin.FusedGKDTrainer"

__all__ = ["FusedGKDTrainer"]
