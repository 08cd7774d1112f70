"""verl's FSDP engine with this package's losses.

It runs the rollouts of a mini-batch that have a weight, and no others (`scsdpo.verl.rollouts`). The loss is computed
inside the head's forward (`scsdpo.head`), which makes its gradients in the same pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.engine.utils import postprocess_batch_func

from scsdpo_kernels import Head, TopK, TopLogprobs

from ..head import distill, head_of, hidden_states, patch_lm_head
from .ema_teacher import EMATeacher
from .losses import Objective, SelfDistillation, objective_of
from .rollouts import Rollout, jagged, micro_batches, predicting, stand_in, with_weight


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda", "cpu"], vendor="scsdpo"
)
class SCSDPOEngine(FSDPEngineWithLMHead):
    """With any other loss than this package's it is verl's own engine."""

    ema_teacher: EMATeacher | None = None  # from the first mini-batch on that asks for one
    _checkpoint: str | None = None  # the folder that was loaded
    _has_updated = False  # since the learning rate's last step
    _lora_on_head = False

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        if self.use_ulysses_sp:
            raise ValueError(
                "ulysses_sequence_parallel_size: expected 1, got "
                f"{self.ulysses_sequence_parallel_size}; hidden states are needed at whole sequences"
            )
        if self.model_config.use_fused_kernels:
            raise ValueError(
                "actor_rollout_ref.model.use_fused_kernels: expected False, got True, which replaces the model's "
                "forward; this engine's losses need no logits either"
            )
        self._lora_on_head = getattr(patch_lm_head(module), "lora_A", None) is not None
        return super()._build_fsdp_module(module)

    # ------------------------------------------------------------------------------------------------------------------
    # A mini-batch

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        """verl's, of the rollouts that have a weight."""
        objective = objective_of(loss_function)
        if objective is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        group = self.get_data_parallel_group()
        tokens = data["loss_mask"].sum().to(get_device_id())
        dist.all_reduce(tokens, group=group)
        processes = self.get_data_parallel_size()
        tensordict_utils.assign_non_tensor(data, batch_num_tokens=tokens.item(), dp_size=processes)

        dynamic = tensordict_utils.get_non_tensor_data(data, "use_dynamic_bsz", True)
        parts = micro_batches(
            with_weight(data, objective),
            group,
            None if dynamic else data["micro_batch_size_per_gpu"],
            data["max_token_len_per_gpu"] if dynamic else None,
        )
        teacher_head = None if objective.from_server else self._teacher_head(objective.options)
        outputs = []
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if forward_only else self._gradient_sync_context(is_last_micro_batch=last):
                loss, metrics = self._distill(part or [stand_in(data, objective)], data, objective, teacher_head)
                if not forward_only:
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            outputs.append({"loss": loss.detach().item(), "metrics": metrics})
        return postprocess_batch_func(outputs, indices=None, data=data)

    def _distill(
        self, rollouts: Sequence[Rollout], data: TensorDict, objective: Objective, teacher_head: Head | None
    ) -> tuple[Tensor, dict[str, Metric]]:
        """A micro-batch: its part of the mini-batch's loss."""
        device, options = get_device_id(), objective.options
        weight = torch.cat([x.weight for x in rollouts]).to(device)
        distill_args: dict[str, Any] = {"beta": objective.beta, "temperature": _temperature(data)}
        distill_args["target_ids"] = torch.cat([x.completion for x in rollouts]).to(device)
        distill_args["metrics"] = tuple(options.metrics)
        if options.importance_clip is not None and rollouts[0].old_logp is not None:
            old_logp = torch.cat([x.old_logp for x in rollouts]).to(device)
            distill_args |= {"old_logp": old_logp, "importance_clip": options.importance_clip}
        with self._autocast():
            if objective.from_server:
                named = zip(*(x.server[:2] for x in rollouts), strict=True)
                distill_args["support"] = TopLogprobs(*(torch.cat(x).to(device) for x in named))
            else:
                distill_args |= {"teacher_hidden": self._teacher(rollouts, data, options), "teacher_head": teacher_head}
                if options.top_k is not None:
                    distill_args["support"] = TopK(options.top_k, options.tail)
            inputs, position = self._model_inputs([x.prompt for x in rollouts], rollouts, data)
            result = distill(
                self.module,
                inputs.pop("input_ids"),
                inputs.pop("attention_mask"),
                position,
                mask=None,
                backbone=inputs,
                token_weight=weight,
                **distill_args,
            )

        # Shares and means of all response tokens of the mini-batch, in which those of weight 0 count as 0: verl adds up
        # what micro-batches say, and takes the mean over processes.
        own = weight != 0
        tokens = data["batch_num_tokens"] / data["dp_size"]
        metrics = {"scsdpo/loss": result.loss.detach(), "scsdpo/rows_kept": own.sum() / tokens}
        for name in ("divergence", "student_entropy", "teacher_entropy"):
            if (value := getattr(result, name)) is not None:
                metrics[f"scsdpo/{name}"] = (value * own).sum() / tokens
        for name, value in (result.metrics or {}).items():
            metrics[f"scsdpo/{name}"] = (value * own).sum() / tokens
        return result.loss, Metric.from_dict(metrics, aggregation=AggregationType.SUM)

    def _model_inputs(
        self, prompts: Sequence[Tensor], rollouts: Sequence[Rollout], data: TensorDict
    ) -> tuple[dict[str, Any], Tensor]:
        """What verl hands to the model for these sequences, packed or padded as configured; where responses begin."""
        sequences = jagged([torch.cat([p, x.completion]) for p, x in zip(prompts, rollouts, strict=True)], "cpu")
        length = sequences.offsets().diff()
        positions = torch.cat([torch.arange(n) for n in length.tolist()])
        fields = {
            "input_ids": sequences.to(get_device_id()),
            "position_ids": torch.nested.nested_tensor_from_jagged(positions, sequences.offsets()).to(get_device_id()),
        }
        part = TensorDict(fields, batch_size=[len(rollouts)])
        keep = {"use_remove_padding": True, "pad_token_id": 0}
        given = {key: tensordict_utils.get_non_tensor_data(data, key, default) for key, default in keep.items()}
        tensordict_utils.assign_non_tensor(part, temperature=1.0, **given)
        inputs = self.prepare_model_inputs(part)[0]
        rows, width = inputs["input_ids"].shape
        ends = length.cumsum(0) if given["use_remove_padding"] else torch.arange(rows) * width + length
        position = predicting(ends, torch.tensor([len(x.completion) for x in rollouts]))
        return inputs, position.to(get_device_id())

    def _autocast(self) -> AbstractContextManager:
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)

    # ------------------------------------------------------------------------------------------------------------------
    # The self-teacher

    @torch.no_grad()
    def _teacher(self, rollouts: Sequence[Rollout], data: TensorDict, options: SelfDistillation) -> Tensor:
        """(R, D): its hidden states."""
        inputs, position = self._model_inputs([x.teacher_prompt for x in rollouts], rollouts, data)
        ids, attention_mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        with self._as_teacher(options):
            return hidden_states(self.module, ids, attention_mask, position, backbone=inputs)

    def _teacher_head(self, options: SelfDistillation) -> Head | None:
        """The head of a moving average, gathered once a mini-batch; None where the teacher's is the student's own."""
        if options.teacher != "ema":
            return None
        if self.ema_teacher is None:
            self._begin_ema_teacher(options.teacher_update_rate)
        with self._as_teacher(options), self._autocast():
            return head_of(self.module)

    @contextmanager
    def _as_teacher(self, options: SelfDistillation) -> Iterator[None]:
        """The module is the teacher, without dropout."""
        if options.teacher == "base" and (self._lora_on_head or not hasattr(self.module, "disable_adapter")):
            raise ValueError(
                "actor.policy_loss.teacher: expected 'live' or 'ema' "
                f"{'where LoRA adapts the head' if self._lora_on_head else 'without LoRA'}, got 'base'"
            )
        contexts = {"ema": lambda: self.ema_teacher.in_place(), "base": lambda: self.module.disable_adapter()}
        training = self.module.training
        self.module.eval()
        try:
            with contexts.get(options.teacher, nullcontext)():
                yield
        finally:
            self.module.train(training)

    def _begin_ema_teacher(self, rate: float) -> None:
        if self.engine_config.strategy != "fsdp2":
            raise ValueError(
                f"actor.strategy: expected 'fsdp2' with a moving-average teacher, got {self.engine_config.strategy!r}"
            )
        self.ema_teacher = EMATeacher(self.module, rate, "cpu" if self._is_offload_param else None)
        if self._checkpoint is not None:
            self.ema_teacher.load(self._checkpoint)

    def optimizer_step(self) -> float:
        norm = super().optimizer_step()
        self._has_updated |= norm == norm and abs(norm) != float("inf")  # verl leaves out an update that is not finite
        return norm

    def lr_scheduler_step(self) -> float:
        """Once per step of verl's trainer, after the last mini-batch; the moving-average teacher moves with it."""
        if self.ema_teacher is not None and self._has_updated:
            self.ema_teacher.update()
        self._has_updated = False
        return super().lr_scheduler_step()

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.ema_teacher is not None:
            self.ema_teacher.save(local_path)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().load_checkpoint(local_path, *args, **kwargs)
        self.ema_teacher, self._checkpoint = None, local_path


def _temperature(data: TensorDict) -> float:
    temperature = data["temperature"]
    if not isinstance(temperature, Tensor):
        return float(temperature)
    if (temperature != temperature.flatten()[0]).any():
        raise ValueError("temperature: expected one for all sequences")
    return float(temperature.flatten()[0])


__all__ = ["SCSDPOEngine"]
