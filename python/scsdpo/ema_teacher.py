"""A moving-average teacher of TRL's self-distillation trainers, saved and resumed with checkpoints.

TRL saves the student alone, and a resumed run starts with a teacher that is the initial model again.
"""

import os
import warnings
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import TrainerCallback

FILE = "ema_teacher.pt"


class EMATeacher(TrainerCallback):
    """TRL's callback of such a teacher, and around it: the file, and no update after a step that has none."""

    def __init__(self, inner: TrainerCallback, trainer: Any):
        self.inner, self.trainer = inner, trainer
        self.checkpoint: str | None = None

    @staticmethod
    def is_for(callback: TrainerCallback) -> bool:
        """Whether it is TRL's, of a separate model or of an adapter of the student."""
        return type(callback).__name__ in ("SyncTeacherModelCallback", "PEFTAdapterEMACallback")

    def resume_from(self, checkpoint: str | None) -> None:
        """Remembers the folder until training begins, when an adapter has been made."""
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        if self._is_adapter and not self.inner._initialized:  # PEFT has read it from a checkpoint, TRL makes it anew
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            if self.inner.teacher_adapter_name in model.peft_config:
                model.delete_adapter(self.inner.teacher_adapter_name)
        self.inner.on_train_begin(args, state, control, **kwargs)
        if self.checkpoint is not None:
            self._load(os.path.join(self.checkpoint, FILE))
            self.checkpoint = None

    def on_step_end(self, args, state, control, **kwargs):
        if not self.trainer.step_is_zero:
            self.inner.on_step_end(args, state, control, **kwargs)

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.is_deepspeed_enabled:  # whose parameters are not in a state dict
            return
        if self._is_adapter:
            saved = {name: value.cpu() for name, value in self.inner.shadow_weights.items()}
        else:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            saved = get_model_state_dict(self.inner.ref_model, options=options)
        if args.should_save and saved:
            torch.save(saved, os.path.join(args.output_dir, f"checkpoint-{state.global_step}", FILE))

    @property
    def _is_adapter(self) -> bool:
        return hasattr(self.inner, "shadow_weights")

    def _load(self, path: str) -> None:
        if not os.path.exists(path):
            warnings.warn(f"{path}: expected the moving-average teacher, found none; it starts anew", stacklevel=2)
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not self._is_adapter:
            set_model_state_dict(self.inner.ref_model, saved, options=StateDictOptions(full_state_dict=True))
            return
        from peft import set_peft_model_state_dict

        shadow = self.inner.shadow_weights
        self.inner.shadow_weights = {name: saved[name].to(value.device) for name, value in shadow.items()}
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        set_peft_model_state_dict(model, self.inner.shadow_weights, adapter_name=self.inner.teacher_adapter_name)


__all__ = ["EMATeacher"]
