"""SC-SDPO in verl: an advantage estimator, losses and an FSDP engine, with no change to its trainer.

    algorithm.adv_estimator=sc_sdpo                         question weights, from `uid` and rewards, in `advantages`
    actor_rollout_ref.actor.policy_loss.loss_mode=scsdpo_jsd      or scsdpo_forward_kl, scsdpo_reverse_kl
    VERL_ENGINE_VENDOR=scsdpo                               in every worker's environment: SCSDPOEngine, below

and in each batch, beside what verl puts there, `teacher_prompts`: what the self-teacher sees in place of a rollout's
prompt, a jagged tensor of token ids, empty where there is no feedback. (`successful_siblings` finds the rollouts that
may serve as demonstrations.) Without it, the teacher is whom `distillation` configures and its server's top-K
(`teacher_ids`, `teacher_logprobs`), under distillation.distillation_loss.loss_mode.

verl aggregates per-token losses linearly, in each of its `loss_agg_mode`s. So the engine asks its aggregation for each
token's coefficient, multiplies with the question weight and hands the product to `linear_divergence` as a row weight:
gradients are made in the forward pass, inside the head's forward (`scsdpo.head`). Sequences of weight 0 are not run.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from scsdpo_kernels import TopLogprobs, question_weights

from .head import distill, hidden_states, patch_lm_head, question_numbers

TESTED = ">=0.9.1,<0.10"

try:
    from tensordict import TensorDict
    from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
    from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
    from verl.utils import tensordict_utils
    from verl.utils.device import get_device_id, get_device_name
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    _SEAMS = ("forward_step", "prepare_model_inputs", "_build_fsdp_module")
    _missing = [name for name in _SEAMS if not hasattr(FSDPEngineWithLMHead, name)]
except ImportError as error:
    raise ImportError(f"scsdpo.verl is made for verl{TESTED} (pip install 'scsdpo-kernels[verl]'): {error}") from error
if _missing:
    raise ImportError(
        f"scsdpo.verl is made for verl{TESTED}; FSDPEngine of verl {metadata.version('verl')} has no "
        f"{', '.join(_missing)}"
    )

BETA = {"scsdpo_forward_kl": 0.0, "scsdpo_jsd": 0.5, "scsdpo_reverse_kl": 1.0}


@register_adv_est("sc_sdpo")
def question_weight_advantages(
    token_level_rewards: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T)
    index: Sequence,  # (B,) verl's uid, one per question
    config: Any = None,  # verl's algorithm config
    **_: Any,
) -> tuple[Tensor, Tensor]:  # (B, T), (B, T)
    """The weight of each token's question as its advantage (arXiv 2605.27765, eq. 16), its pass rate as its return.

    algorithm.question_weight_exponent (1/2) and algorithm.question_success_threshold (0.5 as in SDPO; null: rewards
    are in [0, 1] and their mean is the pass rate) are read from the config where they are there. verl calls it once a
    step, with the whole batch.
    """
    exponent, threshold = 0.5, 0.5
    if config is not None:
        exponent = config.get("question_weight_exponent", exponent)
        threshold = config.get("question_success_threshold", threshold)
    rewards = token_level_rewards.sum(-1)
    question = question_numbers(index, device=rewards.device)
    weight = question_weights(rewards, question, exponent=exponent, success_threshold=threshold)
    question = question.unique(return_inverse=True)[1]
    success = rewards if threshold is None else (rewards >= threshold).to(rewards)
    count = torch.bincount(question)
    pass_rate = torch.zeros(len(count), dtype=rewards.dtype, device=rewards.device).index_add_(0, question, success)
    per_row = torch.stack([weight.to(rewards), (pass_rate / count)[question]])
    return tuple(x.unsqueeze(-1) * response_mask for x in per_row)


@register_adv_est("sdpo")
def unit_advantages(token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """SDPO without question weights: 1 for every token, as advantage and as return."""
    weight = response_mask.to(token_level_rewards)
    return weight, weight


def successful_siblings(uid: Sequence, rewards: Sequence[float], success_threshold: float = 0.5) -> list[int | None]:
    """For each rollout, the first other rollout of its question that succeeded, None where there is none (SDPO)."""
    succeeded: dict[Any, list[int]] = {}
    for rollout, (question, reward) in enumerate(zip(uid, rewards, strict=True)):
        if reward >= success_threshold:
            succeeded.setdefault(question, []).append(rollout)
    return [
        next((other for other in succeeded.get(question, ()) if other != rollout), None)
        for rollout, question in enumerate(uid)
    ]


def _needs_the_engine(*_: Any, **__: Any):
    raise RuntimeError(
        "a loss of scsdpo.verl is computed by its engine, where hidden states are: set VERL_ENGINE_VENDOR=scsdpo in "
        "the environment of every worker, with actor.strategy=fsdp2 or fsdp"
    )


register_distillation_loss(DistillationLossSettings(names=list(BETA), use_topk=True))(_needs_the_engine)
for _name in BETA:
    register_policy_loss(_name)(_needs_the_engine)


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda", "cpu"], vendor="scsdpo"
)
class SCSDPOEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine, with the losses of this module; with any other loss it is verl's own.

    For other settings, register a subclass under a vendor's name of your own.
    """

    teacher_model_kind = "live"  # or "base": the model without its LoRA adapters
    distill_args: dict[str, Any] = {"importance_clip": 2.0}  # noqa: RUF012 further arguments of linear_divergence

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        head = patch_lm_head(module)
        if self.teacher_model_kind == "base" and getattr(head, "lora_A", None) is not None:
            raise ValueError("teacher_model_kind: expected 'live' where LoRA adapts the head, got 'base'")
        if self.use_ulysses_sp:
            raise ValueError(
                "ulysses_sequence_parallel_size: expected 1, got "
                f"{self.ulysses_sequence_parallel_size}; hidden states are needed at whole sequences"
            )
        return super()._build_fsdp_module(module)

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable, forward_only: bool):
        objective = _objective(loss_function)
        if objective is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        config, beta = objective
        batch = micro_batch.to(get_device_id())
        if batch["position_ids"].dim() == 3:
            raise ValueError("position_ids: expected one per token; multi-modal models are not supported")
        responses = _Responses(batch)
        has_prompt = batch["teacher_prompts"].offsets().diff() > 0 if "teacher_prompts" in batch else None
        weight = responses.weight(config, has_prompt)
        # Every process runs a sequence in every micro-batch, or the others' collectives wait.
        kept = responses.any(weight != 0)
        kept[0] |= ~kept.any()
        rows = kept[responses.sequence]

        distill_args = {"beta": beta, "temperature": _temperature(batch), **self.distill_args}
        importance_clip = distill_args.pop("importance_clip")
        distill_args["target_ids"] = responses.ids[rows]
        if importance_clip is not None and "old_log_probs" in batch:
            old_logp = responses.values(batch["old_log_probs"])
            distill_args |= {"old_logp": old_logp[rows], "importance_clip": importance_clip}

        with self._autocast():
            if has_prompt is not None:
                distill_args["teacher_hidden"] = self._teacher(batch, responses, kept & has_prompt, rows)
            else:
                position = responses.position[rows]
                distill_args["support"] = TopLogprobs(
                    ids=batch["teacher_ids"].values()[position], logp=batch["teacher_logprobs"].values()[position]
                )
            sequences = _jagged(batch["input_ids"], kept)
            inputs = self._model_inputs(batch, sequences, _jagged(batch["position_ids"], kept))
            position = _predicting(sequences.offsets().diff(), responses.length[kept], inputs["input_ids"])
            result = distill(
                self.module,
                inputs.pop("input_ids"),
                inputs.pop("attention_mask"),
                position,
                mask=None,
                backbone=inputs,
                token_weight=weight[rows],
                **distill_args,
            )

        # Shares and means of all response tokens of the mini-batch, in which those of weight 0 count as 0: verl adds up
        # what micro-batches say, and takes the mean over processes.
        own = weight[rows] != 0
        tokens = batch["batch_num_tokens"] / batch["dp_size"]
        metrics = {"scsdpo/loss": result.loss, "scsdpo/rows_kept": own.sum() / tokens}
        for name in ("divergence", "student_entropy", "teacher_entropy"):
            if (value := getattr(result, name)) is not None:
                metrics[f"scsdpo/{name}"] = (value * own).sum() / tokens
        metrics = Metric.from_dict(metrics, aggregation=AggregationType.SUM)
        return result.loss, {"model_output": {}, "loss": result.loss.detach().item(), "metrics": metrics}

    @torch.no_grad()
    def _teacher(self, batch: TensorDict, responses: "_Responses", run: Tensor, rows: Tensor) -> Tensor:
        """(R, D): hidden states at the kept rows; zeros at those of sequences whose teacher is not run."""
        if run.any():
            sequences = _followed_by(_jagged(batch["teacher_prompts"], run), _jagged(responses.nested, run))
        else:  # for the others' collectives
            sequences = _jagged(batch["input_ids"], torch.arange(len(run), device=run.device) == 0)
        length = sequences.offsets().diff()
        positions = torch.cat([torch.arange(n, device=length.device) for n in length.tolist()])
        inputs = self._model_inputs(batch, sequences, _like(positions, sequences))
        base = nullcontext() if self.teacher_model_kind == "live" else self.module.disable_adapter()
        training = self.module.training
        self.module.eval()  # no dropout
        ids, attention_mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        position = _predicting(length, responses.length[run], ids) if run.any() else length.new_zeros(0)
        with base:
            hidden = hidden_states(self.module, ids, attention_mask, position, backbone=inputs)
        self.module.train(training)
        teacher = hidden.new_zeros(len(rows), hidden.shape[-1])
        teacher[run[responses.sequence]] = hidden
        return teacher[rows]

    def _model_inputs(self, batch: TensorDict, sequences: Tensor, position_ids: Tensor) -> dict[str, Any]:
        """What verl hands to the model for these sequences, packed or padded as configured."""
        part = TensorDict({"input_ids": sequences, "position_ids": position_ids}, batch_size=[len(sequences)])
        keep = {"use_remove_padding": True, "pad_token_id": 0}
        given = {key: tensordict_utils.get_non_tensor_data(batch, key, default) for key, default in keep.items()}
        tensordict_utils.assign_non_tensor(part, temperature=1.0, **given)
        return self.prepare_model_inputs(part)[0]

    def _autocast(self):
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)


class _Responses:
    """The response tokens of a micro-batch, one after the other: R of them in B sequences."""

    def __init__(self, batch: TensorDict):
        sequences, responses = batch["input_ids"], batch["responses"]
        if responses.is_nested:
            self.length = responses.offsets().diff()
        else:  # padded by verl's older trainer
            self.length = batch["attention_mask"][:, -responses.shape[1] :].sum(1)
        index = torch.arange(len(self.length), device=self.length.device)
        self.sequence = index.repeat_interleave(self.length)  # (R,) whose token it is
        self.position = _predicting(sequences.offsets().diff(), self.length, None)  # (R,) that predicts it, of all
        self.ids = sequences.values()[self.position + 1]
        offsets = torch.cat([self.length.new_zeros(1), self.length.cumsum(0)])
        self.nested = torch.nested.nested_tensor_from_jagged(self.ids, offsets)
        self.batch = batch

    def values(self, field: Tensor) -> Tensor:  # (B, T) padded, or jagged -> (R,)
        if field.is_nested:
            return field.values()
        return field[torch.arange(field.shape[1], device=field.device) < self.length.unsqueeze(1)]

    def any(self, flags: Tensor) -> Tensor:  # (R,) -> (B,)
        return torch.zeros_like(self.length).index_add_(0, self.sequence, flags.long()) > 0

    def weight(self, config: Any, has_prompt: Tensor | None) -> Tensor:  # (R,) fp32
        """What each token's divergence counts for in the step's loss."""
        batch = self.batch
        advantages = self.values(batch["advantages"])
        if (advantages < 0).any():
            raise ValueError(
                "advantages: expected question weights, at least 0, got "
                f"{advantages.min().item()}; set algorithm.adv_estimator to sc_sdpo, or sdpo"
            )
        weight = self._coefficients(config) * advantages.float()
        if batch.get("rollout_is_weights") is not None:
            weight = weight * self.values(batch["rollout_is_weights"])
        return weight if has_prompt is None else torch.where(has_prompt[self.sequence], weight, 0.0)

    def _coefficients(self, config: Any) -> Tensor:
        """(R,): verl's aggregated loss, differentiated by each token's loss."""
        mask = self.batch["response_mask"]
        mask = mask.to_padded_tensor(0) if mask.is_nested else mask
        losses = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
        with torch.enable_grad():
            loss = agg_loss(
                loss_mat=losses,
                loss_mask=mask,
                loss_agg_mode=config.loss_agg_mode,
                dp_size=self.batch["dp_size"],
                batch_num_tokens=self.batch["batch_num_tokens"],
                global_batch_size=self.batch["global_batch_size"],
                loss_scale_factor=config.loss_scale_factor,
            )
            (coefficients,) = torch.autograd.grad(loss, losses)
        return self.values(coefficients)


def _objective(loss_function: Callable | None) -> tuple[Any, float] | None:
    """The actor's config and beta, of a loss of this module; None of any other."""
    given = getattr(loss_function, "keywords", {})
    config, distillation = given.get("config"), given.get("distillation_config")
    if distillation is not None and distillation.distillation_loss.loss_mode in BETA:
        loss = distillation.distillation_loss
        expected = {"use_task_rewards": False, "use_policy_gradient": False, "loss_max_clamp": None}
        _expect("distillation.distillation_loss", loss, expected)
        mode = loss.loss_mode
    elif config is not None and getattr(config, "policy_loss", None) is not None:
        mode = config.policy_loss.get("loss_mode", "vanilla")
    else:
        return None
    if mode not in BETA:
        return None
    if distillation is not None and distillation.distillation_loss.loss_mode != mode:
        raise ValueError(
            f"actor.policy_loss.loss_mode: expected none of scsdpo.verl's beside distillation, got {mode}; set "
            "distillation.distillation_loss.loss_mode"
        )
    _expect("actor", config, {"entropy_coeff": 0, "use_kl_loss": False})
    return config, BETA[mode]


def _expect(name: str, config: Any, expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if getattr(config, key) != value:
            raise ValueError(
                f"{name}.{key}: expected {value} with a loss of scsdpo.verl, got {getattr(config, key)}; the "
                "divergence is the whole loss, and log-probabilities beside it have no gradient"
            )


def _temperature(batch: TensorDict) -> float:
    temperature = batch["temperature"]
    if not isinstance(temperature, Tensor):
        return float(temperature)
    if (temperature != temperature.flatten()[0]).any():
        raise ValueError("temperature: expected one for all sequences")
    return float(temperature.flatten()[0])


def _predicting(length: Tensor, responses: Tensor, padded: Tensor | None) -> Tensor:
    """(R,): where the token before each response token is, in packed sequences or in rows of a padded (B, L, ...).

    A response is the end of its sequence.
    """
    if padded is None or len(padded) == 1:
        ends = length.cumsum(0)
    else:
        ends = torch.arange(len(length), device=length.device) * padded.shape[1] + length
    first = ends - responses - 1
    before = responses.cumsum(0) - responses
    index = torch.arange(int(responses.sum()), device=length.device)
    return index + (first - before).repeat_interleave(responses)


def _like(values: Tensor, nested: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, nested.offsets())


def _jagged(nested: Tensor, rows: Tensor) -> Tensor:  # rows: (B,) bool
    length = nested.offsets().diff()
    offsets = torch.cat([length.new_zeros(1), length[rows].cumsum(0)])
    return torch.nested.nested_tensor_from_jagged(nested.values()[rows.repeat_interleave(length)], offsets)


def _followed_by(first: Tensor, second: Tensor) -> Tensor:
    """Row for row, both jagged."""
    parts = [part for pair in zip(first.unbind(), second.unbind(), strict=True) for part in pair]
    length = first.offsets().diff() + second.offsets().diff()
    offsets = torch.cat([length.new_zeros(1), length.cumsum(0)])
    return torch.nested.nested_tensor_from_jagged(torch.cat(parts), offsets)


__all__ = ["SCSDPOEngine", "question_weight_advantages", "successful_siblings", "unit_advantages"]
