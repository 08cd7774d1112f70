"""The official SDPO repository (lasgroup/SDPO, a fork of verl) with the fused operator, and with question weights.

    VERL_USE_EXTERNAL_MODULES=scsdpo.sdpo      in every process's environment: the fork imports this module
    algorithm.adv_estimator=sc_sdpo            question weights; with any other, SDPO's own weights of 1

The fork's actor runs student and teacher to log-probabilities of the whole vocabulary and hands them to its loss. Here
`_forward_micro_batch` hands out what it would have run, and the loss runs it: the teacher's and the student's
backbones, and the divergence as the head's forward (`scsdpo.head`), for rollouts that have a weight. With the fork's
sampled-token loss (full_logit_distillation=False), and with any other loss, it is the fork's own.

The fork's loss multiplies each token by `rollout_is_weights`. Question weights go into that factor, on the driver.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scsdpo_kernels import Head, TopK, TrustRegionTeacher, question_weights

from .advantages import ESTIMATORS
from .head import distill, head_of, hidden_states, question_numbers

COMMIT = "0e6d510"

try:
    import verl.trainer.ppo.ray_trainer as driver
    import verl.workers.actor.dp_actor as fork
    from verl.trainer.ppo.core_algos import register_adv_est

    if not hasattr(fork, "compute_self_distillation_loss"):
        raise ImportError("no compute_self_distillation_loss in verl.workers.actor.dp_actor")
except ImportError as error:
    raise ImportError(
        f"scsdpo.sdpo is made for lasgroup/SDPO at {COMMIT}, scsdpo.verl for verl itself; got another verl: {error}"
    ) from error


class Deferred(NamedTuple):
    """What the fork would have run to log-probabilities."""

    actor: Any
    model: nn.Module
    temperature: float
    inputs: dict[str, Tensor]  # input_ids, attention_mask, position_ids (B, L); responses (B, T)
    log_probs: Tensor  # (B, T) zeros, in place of log-probabilities


def deferring(stock: Callable) -> Callable:
    def _forward_micro_batch(
        self: Any,
        micro_batch: dict[str, Tensor],
        temperature: float,
        calculate_entropy: bool = False,
        return_all_logps: bool = False,
        distill_topk: int | None = None,
        topk_indices: Tensor | None = None,
        module: nn.Module | None = None,
    ) -> dict[str, Any]:
        if not (return_all_logps or distill_topk):
            return stock(self, micro_batch, temperature, calculate_entropy=calculate_entropy, module=module)
        for name, wrong in {
            "calculate_entropy": calculate_entropy,
            "use_kl_loss": self.config.use_kl_loss,
            "use_fused_kernels": self.use_fused_kernels,
            "use_prefix_grouper": self.use_prefix_grouper,
            "ulysses_sequence_parallel_size": self.use_ulysses_sp,
        }.items():
            if wrong:
                raise ValueError(
                    f"actor.{name}: expected none with scsdpo.sdpo, which has no log-probabilities or logits beside "
                    "the divergence, got one"
                )
        if micro_batch["position_ids"].dim() == 3:
            raise ValueError("position_ids: expected one per token; multi-modal models are not supported")
        micro_batch.pop("rollout_log_probs", None)  # the fork would compare them with log-probabilities
        names = ("input_ids", "attention_mask", "position_ids", "responses")
        nothing = torch.zeros_like(micro_batch["responses"], dtype=torch.float32)
        inputs = {name: micro_batch[name] for name in names}
        deferred = Deferred(self, module or self.actor_module, temperature, inputs, nothing)
        return {"log_probs": nothing, "all_logps": deferred, "topk_logps": deferred, "topk_indices": None}

    return _forward_micro_batch


def fused(stock: Callable) -> Callable:
    def compute_self_distillation_loss(
        student_log_probs: Tensor,
        teacher_log_probs: Tensor,
        response_mask: Tensor,  # (B, T)
        self_distillation_config: Any,
        old_log_probs: Tensor | None = None,  # (B, T)
        student_all_log_probs: Any = None,
        teacher_all_log_probs: Any = None,
        student_topk_log_probs: Any = None,
        teacher_topk_log_probs: Any = None,
        self_distillation_mask: Tensor | None = None,  # (B,)
        loss_agg_mode: str = "token-mean",
        rollout_is_weights: Tensor | None = None,  # (B, T)
    ) -> tuple[Tensor, dict[str, Any]]:
        student = student_topk_log_probs if student_all_log_probs is None else student_all_log_probs
        teacher = teacher_topk_log_probs if teacher_all_log_probs is None else teacher_all_log_probs
        if not isinstance(student, Deferred):
            return stock(
                student_log_probs, teacher_log_probs, response_mask, self_distillation_config, old_log_probs,
                student_all_log_probs, teacher_all_log_probs, student_topk_log_probs, teacher_topk_log_probs,
                self_distillation_mask, loss_agg_mode, rollout_is_weights,
            )  # fmt: skip
        mask = response_mask
        if self_distillation_mask is not None:
            mask = mask * self_distillation_mask.unsqueeze(1)
        weight = _coefficients(mask, loss_agg_mode)
        if rollout_is_weights is not None:
            weight = weight * rollout_is_weights
        run = (weight != 0).any(1)
        metrics = {"scsdpo/rollouts_run": run.float().mean().item()}
        options: dict[str, Any] = {}
        # On-policy the fork gives the student's own as old, which are zeros here: a ratio of 1.
        on_policy = old_log_probs is not None and old_log_probs.data_ptr() == student.log_probs.data_ptr()
        if self_distillation_config.is_clip is not None and not on_policy:
            options = {"old_logp": old_log_probs, "importance_clip": self_distillation_config.is_clip}
        result = _distilled(student, teacher, weight, run, self_distillation_config, options)
        own = weight[weight != 0].numel()
        metrics["scsdpo/divergence"] = (result.divergence.sum() / max(1, own)).item()
        return result.loss, metrics

    return compute_self_distillation_loss


def _coefficients(mask: Tensor, loss_agg_mode: str) -> Tensor:  # (B, T)
    """The fork's aggregated loss, differentiated by each token's loss, in which it is linear."""
    losses = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
    with torch.enable_grad():
        tokens = mask.sum().clamp(min=1.0)
        loss = fork.agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=loss_agg_mode, batch_num_tokens=tokens)
        (coefficients,) = torch.autograd.grad(loss, losses)
    return coefficients


def _distilled(
    student: Deferred, teacher: Deferred, weight: Tensor, run: Tensor, config: Any, options: dict[str, Any]
) -> Any:
    """The tokens that have a weight; two tokens without one where a micro-batch has none, for collectives."""
    actor = student.actor
    options = {"beta": config.alpha, "temperature": student.temperature, **options}
    if config.distillation_topk is not None:
        tail = "bucket" if config.distillation_add_tail else "renormalize"
        options["support"] = TopK(config.distillation_topk, tail)
    if run.any():
        tokens = weight[run] != 0
        options |= {"token_weight": weight[run][tokens], "target_ids": student.inputs["responses"][run][tokens]}
        if "old_logp" in options:
            options["old_logp"] = options["old_logp"][run][tokens]
        inputs = [_at(x.inputs, run, tokens, actor.use_remove_padding) for x in (student, teacher)]
    else:
        ids = student.inputs["input_ids"][:1, :2] * 0
        two = (ids, torch.ones_like(ids), torch.arange(2, device=ids.device)[None], ids[0, :1])
        options |= {"token_weight": torch.zeros(1, device=ids.device), "target_ids": ids[0, :1]}
        options = {name: x for name, x in options.items() if name not in ("old_logp", "importance_clip")}
        inputs = [two, two]
    with torch.autocast(device_type=actor.device_name, dtype=actor.param_dtype):
        hidden, head = _teacher(teacher, *inputs[1])
        ids, attention_mask, position_ids, position = inputs[0]
        return distill(
            student.model, ids, attention_mask, position, mask=None, backbone={"position_ids": position_ids},
            teacher_hidden=hidden, teacher_head=head, **options,
        )  # fmt: skip


def _at(
    inputs: dict[str, Tensor], run: Tensor, tokens: Tensor, packed: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Sequences of the rollouts that run, padded or packed, and where the tokens before those are, (R,)."""
    ids, attention, positions = (inputs[name][run] for name in ("input_ids", "attention_mask", "position_ids"))
    before = torch.zeros_like(attention, dtype=torch.bool)
    before[:, -tokens.shape[1] - 1 : -1] = tokens
    where = before.flatten().nonzero()[:, 0]
    if not packed:
        return ids, attention, positions, where
    there = attention.flatten() != 0
    where = (there.cumsum(0) - 1)[where]
    return ids.flatten()[there][None], None, positions.flatten()[there][None], where


@torch.no_grad()
def _teacher(
    deferred: Deferred, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, position: Tensor
) -> tuple[Tensor, Head | Tensor | None]:
    """Hidden states (R, D) and head; the head is gathered once an optimiser step, and None if it is the student's."""
    actor, model = deferred.actor, deferred.model

    def hidden(of: nn.Module) -> Tensor:
        return hidden_states(of, ids, attention_mask, position, backbone={"position_ids": position_ids})

    if model is actor.actor_module:
        return hidden(model), None
    kept = vars(actor).setdefault("_scsdpo_teacher_head", [])
    if not isinstance(model, fork.TrustRegionTeacher):
        if not kept:
            kept.append(head_of(model))
        return hidden(model), kept[0]
    if not kept:
        heads = [head_of(x) for x in (model.ref_module, model.student_module)]
        for head in heads:
            if (head.bias, head.lora, head.logit_scale, head.softcap) != (None, None, 1.0, None):
                raise ValueError(
                    "teacher_regularization: expected 'ema' for a head with a bias, adapter, scale or softcap, got "
                    "'trust-region'"
                )
        kept.append(TrustRegionTeacher(heads[0].weight, heads[1].weight, model.mix_coef))
    both = kept[0].hidden(*(hidden(x) for x in (model.ref_module, model.student_module)))
    return both, kept[0].weight


def forgetting_heads(stock: Callable) -> Callable:
    def _optimizer_step(self: Any) -> Tensor:
        vars(self).pop("_scsdpo_teacher_head", None)
        return stock(self)

    return _optimizer_step


def weighing(stock: Callable) -> Callable:
    def compute_advantage(data: Any, adv_estimator: Any, *args: Any, **kwargs: Any) -> Any:
        """On the driver, after the fork's rollout correction and before its update of the actor."""
        data = stock(data, adv_estimator, *args, **kwargs)
        if adv_estimator != "sc_sdpo":
            return data
        config = kwargs.get("config") or {}
        weight = question_weights(
            data.batch["token_level_scores"].sum(-1),
            question_numbers(data.non_tensor_batch["uid"]),
            exponent=config.get("question_weight_exponent", 0.5),
            success_threshold=config.get("question_success_threshold", 0.5),
        )
        ones = torch.ones_like(data.batch["response_mask"], dtype=torch.float32)
        given = data.batch.get("rollout_is_weights", None)
        data.batch["rollout_is_weights"] = (ones if given is None else given) * weight.unsqueeze(1)
        return data

    return compute_advantage


_STOCK = {
    (fork.DataParallelPPOActor, "_forward_micro_batch"): deferring,
    (fork.DataParallelPPOActor, "_optimizer_step"): forgetting_heads,
    (fork, "compute_self_distillation_loss"): fused,
    (driver, "compute_advantage"): weighing,
}
for (_owner, _name), _wrap in _STOCK.items():
    setattr(_owner, _name, _wrap(getattr(_owner, _name)))
for _name, _estimator in ESTIMATORS.items():
    register_adv_est(_name)(_estimator)

__all__ = ["COMMIT", "Deferred"]
