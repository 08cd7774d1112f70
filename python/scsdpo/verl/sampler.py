"""The self-teacher's prompts, put beside rollouts when verl's trainer takes them from its replay buffer."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transfer_queue
from tensordict import TensorDict
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from .prompts import Attempt, default_prompt, successful_siblings

FIELDS = ("uid", "raw_prompt", "responses", "rm_scores", "reward_model", "extra_fields")


class TeacherPrompts(ReplayBuffer):
    """Named in trainer.v1.sampler.custom_sampler, with trainer_mode "sync".

    trainer.v1.sampler.sampler_kwargs:
        prompt: "module:function" in place of the default text. The function takes verl's tokenizer and an `Attempt`,
            and returns token ids, none where this rollout has no teacher.
        success_threshold: the reward from which on a rollout solves its question; algorithm's
            question_success_threshold if absent, or 0.5.
        max_length: of a prompt in tokens; a rollout whose prompt is longer has no teacher.

    Raises:
        ValueError: a setting of verl's that a custom sampler does not see, or another of sampler_kwargs.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.trainer = getattr(self.refill_fn, "__self__", None)
        if not hasattr(self.trainer, "config"):
            raise ValueError(
                "trainer.v1.sampler.custom_sampler: expected TeacherPrompts to be given a method of verl's trainer as "
                f"refill_fn, got {self.refill_fn!r}; scsdpo.verl is not made for this release of verl"
            )
        config = self.trainer.config
        self._check(config)
        known = {"prompt": None, "success_threshold": None, "max_length": None}
        if others := sorted(set(self.sampler_kwargs or {}) - set(known)):
            raise ValueError(f"trainer.v1.sampler.sampler_kwargs: expected {', '.join(known)}, got {', '.join(others)}")
        options = known | dict(self.sampler_kwargs or {})
        self.prompt = _function(options["prompt"])
        self.max_length = options["max_length"]
        threshold = options["success_threshold"]
        if threshold is None:
            threshold = config.algorithm.get("question_success_threshold", None)
        self.success_threshold = 0.5 if threshold is None else float(threshold)

    def _check(self, config: Any) -> None:
        filters = config.algorithm.get("filter_groups", None)
        reward_model = config.reward.reward_model
        before_rewards = reward_model.enable and not reward_model.enable_resource_pool
        for name, expected, wrong, reason in (
            ("trainer.v1.trainer_mode", "sync", self.trainer_mode != "sync", "this sampler is verl's synchronous one"),
            ("algorithm.filter_groups.enable", False, bool(filters is not None and filters.get("enable", False)),
             "verl does not tell a custom sampler what to filter; weights of 0 leave out the same questions"),
            ("trainer.v1.sampler.sync_refill_failed_groups", False,
             bool(config.trainer.v1.sampler.get("sync_refill_failed_groups", False)),
             "verl does not tell a custom sampler to refill"),
            ("reward.reward_model.enable_resource_pool", True, before_rewards,
             "a reward model that shares the trainer's processes gives its rewards after sampling"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(
                    f"{name}: expected {expected!r} with scsdpo.verl's TeacherPrompts, got another: {reason}"
                )

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict]:
        """verl's batch, with `teacher_prompts` as a further field: jagged int64, empty where there is no teacher."""
        batch, metrics = super().sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
        if partition_id != "train":
            return batch, metrics
        if several := [key for key in batch.keys if key.rpartition("_")[2] != "0"]:
            raise ValueError(f"agent loop: expected one output for each rollout, got a further one, {several[0]}")
        data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=partition_id, select_fields=list(FIELDS))
        uid, rewards = list(data["uid"]), [float(scores.sum()) for scores in data["rm_scores"].unbind()]
        prompts = [self._made(attempt) for attempt in self._attempts(data, uid, rewards)]
        fields = {"teacher_prompts": torch.nested.as_nested_tensor(prompts, layout=torch.jagged)}
        batch = transfer_queue.kv_batch_put(
            keys=batch.keys, partition_id=partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )
        return batch, metrics | self._metrics(uid, rewards, prompts)

    def _attempts(self, data: TensorDict, uid: Sequence[str], rewards: Sequence[float]) -> list[Attempt]:
        decode = self.trainer.tokenizer.decode
        responses = [decode(ids, skip_special_tokens=True) for ids in data["responses"].unbind()]
        siblings = successful_siblings(uid, rewards, self.success_threshold)
        columns = {name: list(data[name]) if name in data else [None] * len(uid) for name in FIELDS[4:]}
        return [
            Attempt(
                messages=list(messages),
                response=response,
                reward=reward,
                solution=None if sibling is None else responses[sibling],
                feedback=_feedback(extra),
                reward_model=reward_model,
            )
            for messages, response, reward, sibling, reward_model, extra in zip(
                data["raw_prompt"], responses, rewards, siblings, *columns.values(), strict=True
            )
        ]

    def _made(self, attempt: Attempt) -> torch.Tensor:  # (Q,)
        if self.prompt is None:
            template = self.trainer.config.data.get("apply_chat_template_kwargs", None) or {}
            ids = default_prompt(self.trainer.tokenizer, attempt, **template)
        else:
            ids = self.prompt(self.trainer.tokenizer, attempt)
        ids = torch.as_tensor(ids, dtype=torch.int64)
        if ids.dim() != 1:
            raise ValueError(
                "trainer.v1.sampler.sampler_kwargs.prompt: expected a function that returns token ids in one "
                f"dimension, got shape {tuple(ids.shape)}"
            )
        return ids[:0] if self.max_length is not None and len(ids) > self.max_length else ids

    def _metrics(self, uid: Sequence[str], rewards: Sequence[float], prompts: Sequence[torch.Tensor]) -> dict:
        success: dict[str, list[bool]] = {}
        for question, reward in zip(uid, rewards, strict=True):
            success.setdefault(question, []).append(reward >= self.success_threshold)
        return {
            "scsdpo/pass_rate": sum(map(sum, success.values())) / len(uid),
            "scsdpo/zero_weight_questions": sum(len(set(own)) == 1 for own in success.values()) / len(success),
            "scsdpo/with_teacher": sum(len(prompt) > 0 for prompt in prompts) / len(prompts),
        }


def _feedback(extra_fields: Any) -> str | None:
    """What the reward function has returned as "feedback" beside its score."""
    fields = getattr(extra_fields, "data", extra_fields)
    given = (fields or {}).get("reward_extra_info") or {}
    text = given.get("feedback")
    return text if isinstance(text, str) and text.strip() else None


def _function(name: str | None) -> Callable | None:
    if name is None:
        return None
    module, colon, function = name.partition(":")
    found = getattr(importlib.import_module(module), function, None) if colon else None
    if not callable(found):
        raise ValueError(f"trainer.v1.sampler.sampler_kwargs.prompt: expected 'module:function', got {name!r}")
    return found


__all__ = ["TeacherPrompts"]
