"""The SDPO fork's own actor on a CPU, case by case: `python sdpo_fork.py OUT`, with the fork on PYTHONPATH.

Its pin is transformers 4.57; newer ones have another name for one class that it imports and does not use here.
"""

import copy
import re
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sdpo_cases import CASES, REWARDS
from transformers import AutoModelForImageTextToText

import peft  # noqa: F401  # isort: skip  # which makes a new module of transformers

if not hasattr(sys.modules["transformers"], "AutoModelForVision2Seq"):
    sys.modules["transformers"].AutoModelForVision2Seq = AutoModelForImageTextToText

from tensordict import TensorDict
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl import DataProto
from verl.trainer.ppo import ray_trainer
from verl.workers.actor import dp_actor
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    PolicyLossConfig,
    SelfDistillationConfig,
)

B, P, T, V, N, TEMPERATURE = 16, 5, 6, 67, 4, 0.8
PAGE = Path(__file__).parents[1] / "docs" / "verl.md"


def model(seed: int = 0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, initializer_range=0.2, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def batch():
    generator = torch.Generator().manual_seed(3)

    def ids(width):
        return torch.randint(3, V, (B, width), generator=generator)

    def position(mask):
        return (mask.cumsum(1) - 1).clamp(min=0)

    prompts, teacher, responses = ids(P), ids(2 * P), ids(T)
    lengths = torch.randint(2, T + 1, (B,), generator=generator)
    mask = (torch.arange(T) < lengths[:, None]).long()
    there = (torch.arange(P) >= torch.randint(0, 3, (B,), generator=generator)[:, None]).long()  # padded on the left
    full, seen = torch.cat([there, mask], 1), torch.cat([torch.ones_like(teacher), mask], 1)
    scores = torch.zeros(B, T)
    scores[torch.arange(B), lengths - 1] = torch.tensor(REWARDS, dtype=torch.float32)
    tensors = {
        "input_ids": torch.cat([prompts, responses], 1), "attention_mask": full, "position_ids": position(full),
        "responses": responses, "response_mask": mask, "advantages": torch.zeros(B, T),
        "old_log_probs": -2 - torch.rand(B, T, generator=generator) * 2,
        "teacher_input_ids": torch.cat([teacher, responses], 1), "teacher_attention_mask": seen,
        "teacher_position_ids": position(seen), "self_distillation_mask": torch.tensor([1.0] * 8 + [0.0] + [1.0] * 7),
        "token_level_scores": scores, "token_level_rewards": scores - 0.7,  # as with a penalty
    }  # fmt: skip
    uid = np.array([f"q{i // N}" for i in range(B)], dtype=object)
    data = DataProto(batch=TensorDict(tensors, batch_size=[B]), non_tensor_batch={"uid": uid})
    data.meta_info = {"temperature": TEMPERATURE, "pad_token_id": 0}
    return data


def weigh(data, patched: bool):
    """By the advantage estimator of scsdpo.sdpo; in the stock fork by the recipe of docs/verl.md, word for word."""
    if patched:
        return ray_trainer.compute_advantage(data, adv_estimator="sc_sdpo", config={})
    (recipe,) = [x for x in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S) if "non_tensor" in x]
    exec(recipe, {"batch": data})
    return data


def run(patched, *, alpha=0.5, micro=B, epochs=1, weighted=False, corrected=False, teacher=None, packed=False,
        aggregation="token-mean", is_clip=2.0, **distillation):  # fmt: skip
    student, data = model(), batch()
    if corrected:
        data.batch["rollout_is_weights"] = 0.5 + torch.rand(B, T, generator=torch.Generator().manual_seed(9))
    if weighted:
        data = weigh(data, patched)
    distillation = SelfDistillationConfig(
        alpha=alpha, is_clip=is_clip, teacher_regularization=teacher or "ema", teacher_update_rate=0.0, **distillation
    )
    config = FSDPActorConfig(
        strategy="fsdp", ppo_mini_batch_size=B, ppo_micro_batch_size_per_gpu=micro, rollout_n=1, use_dynamic_bsz=False,
        ppo_epochs=epochs, policy_loss=PolicyLossConfig(loss_mode="sdpo"), self_distillation=distillation,
        use_torch_compile=False, entropy_coeff=0.0, grad_clip=1e9, loss_agg_mode=aggregation,
        use_remove_padding=packed and patched, fsdp_config=FSDPEngineConfig(dtype="float32"),
        optim=FSDPOptimizerConfig(lr=0.1),
    )  # fmt: skip
    gradients, tokens = {}, []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
    step = optimizer.step

    def record(*args, **kwargs):
        gradients.update({name: p.grad.clone() for name, p in student.named_parameters()})
        step(*args, **kwargs)

    optimizer.step = record
    student.model.register_forward_pre_hook(
        lambda _, args, given: tokens.append(given["input_ids"].numel()) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    actor = dp_actor.DataParallelPPOActor(config, student, optimizer)
    if teacher == "ema":
        actor.teacher_module = model(5)
    elif teacher == "trust-region":
        actor.teacher_module = dp_actor.TrustRegionTeacher(model(5), student, 0.3)
    before = copy.deepcopy(gradients)
    metrics = actor.update_policy(data)
    assert gradients and not before
    return {"loss": metrics["actor/pg_loss"], "gradients": gradients, "tokens": tokens, "metrics": sorted(metrics),
            "weights": data.batch.get("rollout_is_weights", None)}  # fmt: skip


def refused(patched):
    """What would silently be another loss, each with its message."""
    found = {}
    for name, option in {"use_kl_loss": {"use_kl_loss": True}, "entropy": {"calculate_entropy": True}}.items():
        config = FSDPActorConfig(
            strategy="fsdp", ppo_mini_batch_size=B, ppo_micro_batch_size_per_gpu=B, rollout_n=1, use_dynamic_bsz=False,
            policy_loss=PolicyLossConfig(loss_mode="sdpo"), self_distillation=SelfDistillationConfig(is_clip=None),
            use_torch_compile=False, fsdp_config=FSDPEngineConfig(dtype="float32"), **option,
        )  # fmt: skip
        student = model()
        data = batch()
        data.batch["ref_log_prob"] = data.batch["old_log_probs"]
        actor = dp_actor.DataParallelPPOActor(config, student, torch.optim.SGD(student.parameters(), lr=0.0))
        try:
            actor.update_policy(data)
        except ValueError as error:
            found[name] = str(error)
    return found


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=0, world_size=1)
    patched = "scsdpo.sdpo" in sys.modules
    results = {}
    for name, case in CASES.items():
        try:
            results[name] = run(patched, **case)
        except Exception:
            results[name] = traceback.format_exc()
    if patched:
        results["refused"] = refused(patched)
    torch.save(results, out)


if __name__ == "__main__":
    main(sys.argv[1])
