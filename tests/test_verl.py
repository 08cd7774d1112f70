"""scsdpo.verl in verl's own classes: its engine on a CPU, over gloo, against eager PyTorch with full logits.

Runs where verl is installed (its requirements on transformers differ from TRL's: ./dev verl has an environment for it).
"""

import copy
import os
import re
import subprocess
import sys
import traceback
import uuid
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("verl_on_cpu", reason="verl: ./dev verl", exc_type=ImportError)

from peft import LoraConfig, PeftModel, get_peft_model
from tensordict import TensorDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from verl import DataProto
from verl.trainer.config import CheckpointConfig
from verl.trainer.distillation import distillation_ppo_loss
from verl.trainer.distillation.losses import get_distillation_loss_fn
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils import tensordict_utils
from verl.utils.metric import Metric
from verl.workers.config import (
    DistillationConfig,
    DistillationLossConfig,
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from scsdpo.verl import TESTED, SCSDPOEngine, SelfDistillation
from scsdpo.verl.losses import BETA
from scsdpo_kernels import METRICS

VOCABULARY, QUESTIONS, ROLLOUTS = 67, 4, 4
TEMPERATURE, CLIP = 0.8, 1.5
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    words = ["<pad>", "<eos>", "<unk>", *map(str, range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    for name, tied in (("untied", False), ("tied", True)):
        torch.manual_seed(1)
        config = Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
            bos_token_id=None, eos_token_id=1, initializer_range=0.2,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(root / name)
        fast.save_pretrained(root / name)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(root / "untied"),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(root / "adapter")
    return root


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def whole_batch(seed: int = 3) -> dict[str, list[torch.Tensor]]:
    """Rollouts of every process, ragged; two have no teacher, one a response mask with a hole."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator)

    batch: dict[str, list] = {"prompts": [], "responses": [], "teacher_prompts": [], "response_mask": []}
    for _ in range(QUESTIONS * ROLLOUTS):
        for name, (low, high) in {"prompts": (2, 7), "responses": (1, 8), "teacher_prompts": (3, 12)}.items():
            batch[name].append(ids(low, high))
        batch["response_mask"].append(torch.ones(len(batch["responses"][-1]), dtype=torch.long))
    for i in (2, 5):  # one's question has a weight
        batch["teacher_prompts"][i] = batch["teacher_prompts"][i][:0]
    batch["response_mask"][6][:1] = 0
    batch["old_log_probs"] = [-1 - 5 * torch.rand(len(x), generator=generator) for x in batch["responses"]]
    # the questions' pass rates: 1/2, none, 1/4, all
    batch["rewards"] = torch.tensor([1, 0, 1, 0, *[0] * 4, 0, 0, 0, 1, *[1] * 4], dtype=torch.float32)
    batch["uid"] = [f"q{i // ROLLOUTS}" for i in range(QUESTIONS * ROLLOUTS)]
    return batch


def advantages_of(batch: dict, name: str = "sc_sdpo", config=None) -> tuple[list, list]:
    """Through the driver's own compute_advantage; (lists of ragged rows)."""
    length = max(map(len, batch["responses"]))
    mask = torch.zeros(len(batch["responses"]), length, dtype=torch.long)
    rewards = torch.zeros(mask.shape)
    for row, own in enumerate(batch["response_mask"]):
        mask[row, : len(own)] = own
        rewards[row, len(own) - 1] = batch["rewards"][row]
    data = DataProto.from_single_dict({"token_level_rewards": rewards, "response_mask": mask})
    data.non_tensor_batch["uid"] = np.array(batch["uid"], dtype=object)
    data = compute_advantage(data, adv_estimator=name, config=config)
    return tuple(
        [row[: len(own)] for row, own in zip(data.batch[field], batch["responses"], strict=True)]
        for field in ("advantages", "returns")
    )


def part_of(
    batch: dict, rank: int, world: int, micro: int, *, teacher="prompts", padded=False, contiguous=False, budget=None
):
    """What verl's trainer hands to a process, and which rollouts these are."""
    count = len(batch["responses"])
    rows = list(range(rank, count, world))
    if contiguous:
        rows = list(range(rank * count // world, (rank + 1) * count // world))
    fields = {
        "input_ids": jagged([torch.cat([batch["prompts"][i], batch["responses"][i]]) for i in rows]),
        "position_ids": jagged([torch.arange(len(batch["prompts"][i]) + len(batch["responses"][i])) for i in rows]),
        "loss_mask": jagged([batch["response_mask"][i] for i in rows]),
    }
    names = ["prompts", "responses", "response_mask", "old_log_probs", "advantages", "teacher_prompts"]
    for name in names + ["rollout_is_weights"] * ("rollout_is_weights" in batch):
        fields[name] = jagged([batch[name][i] for i in rows])
    if teacher == "server":
        del fields["teacher_prompts"]
        fields["teacher_ids"] = jagged([batch["teacher_ids"][i] for i in rows])
        fields["teacher_logprobs"] = jagged([batch["teacher_logprobs"][i] for i in rows])
    data = TensorDict(fields, batch_size=[len(rows)])
    tensordict_utils.assign_non_tensor(
        data, use_dynamic_bsz=budget is not None, micro_batch_size_per_gpu=micro, max_token_len_per_gpu=budget,
        temperature=TEMPERATURE,
        global_batch_size=len(batch["responses"]), use_remove_padding=not padded, calculate_entropy=False,
    )  # fmt: skip
    return data, rows


def loss_function(mode: str, aggregation: str, *, distillation: bool = False, options=None, **actor):
    policy = SelfDistillation(loss_mode="vanilla" if distillation else mode, importance_clip=CLIP, **(options or {}))
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=ROLLOUTS, ppo_mini_batch_size=QUESTIONS, ppo_micro_batch_size_per_gpu=2,
        loss_agg_mode=aggregation, policy_loss=policy, **{"entropy_coeff": 0.0, **actor},
    )  # fmt: skip
    if not distillation:
        return partial(ppo_loss, config=config)
    loss = DistillationLossConfig(
        loss_mode=mode, use_task_rewards=False, use_policy_gradient=False, loss_max_clamp=None, topk=5
    )
    given = DistillationConfig(enabled=False, distillation_loss=loss)
    return partial(distillation_ppo_loss, config=config, distillation_config=given)


def engine_of(
    folder, model: str, strategy: str, *, padded: bool = False, gathered: bool = False, expected=SCSDPOEngine, **options
):
    config = HFModelConfig(
        path=str(folder / model), override_config={"attn_implementation": "eager"}, use_remove_padding=not padded,
        enable_gradient_checkpointing=options.pop("checkpointing", False), **options,
    )  # fmt: skip
    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = EngineRegistry.new(
        "language_model", strategy, model_config=config,
        engine_config=FSDPEngineConfig(
            strategy=strategy, mixed_precision=precision, use_torch_compile=False, reshard_after_forward=not gathered
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=10, clip_grad=0.5),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    assert type(engine) is expected
    engine.initialize()
    return engine


# Eager PyTorch, one process, one sequence at a time, full logits.


def eager_divergence(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    if beta == 0:
        return (q.exp() * (q - p)).sum(-1)
    if beta == 1:
        return (p.exp() * (p - q)).sum(-1)
    m = ((1 - beta) * p.exp() + beta * q.exp()).log()
    return (1 - beta) * (p.exp() * (p - m)).sum(-1) + beta * (q.exp() * (q - m)).sum(-1)


def eager_loss(
    model, batch: dict, mode, aggregation, teacher="prompts", lora=None, average=None, top_k=None, beta=None
):
    """A teacher is the model itself, or `average`."""
    losses, counts = [], []
    beta = BETA[mode] if beta is None else beta
    for i, response in enumerate(batch["responses"]):
        ids = torch.cat([batch["prompts"][i], response])
        p = (model(ids[None]).logits[0, -len(response) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        own = p.detach().gather(-1, response[:, None])[:, 0]
        if teacher == "server":
            at = slice(len(batch["prompts"][i]) - 1, -1)
            support = batch["teacher_ids"][i][at]
            q = batch["teacher_logprobs"][i][at].to(p)
        else:
            prompt = batch["teacher_prompts"][i] if len(batch["teacher_prompts"][i]) else batch["prompts"][i]
            with torch.no_grad(), model.disable_adapter() if lora == "base" else nullcontext():
                logits = (average or model)(torch.cat([prompt, response])[None]).logits[0, -len(response) - 1 : -1]
                q = (logits / TEMPERATURE).log_softmax(-1)
            support = p.detach().topk(top_k, -1).indices if top_k else None
            q = q.gather(-1, support) if top_k else q
        if support is not None:
            p = p.gather(-1, support)
            p, q = (torch.cat([x, torch.log(-torch.expm1(x.logsumexp(-1, keepdim=True)))], -1) for x in (p, q))
        divergence = eager_divergence(p, q, beta)
        if teacher != "server":
            divergence = divergence * bool(len(batch["teacher_prompts"][i]))
        ratio = (own - batch["old_log_probs"][i]).clamp(-20, 20).exp().clamp(max=CLIP)
        corrected = batch["rollout_is_weights"][i] if "rollout_is_weights" in batch else 1.0
        losses.append(batch["advantages"][i] * corrected * ratio * divergence * batch["response_mask"][i])
        counts.append(batch["response_mask"][i].sum())
    if aggregation == "token-mean":
        return torch.cat(losses).sum() / sum(counts)
    if aggregation == "token-sum":
        return torch.cat(losses).sum()
    if aggregation == "seq-mean-token-sum":
        return sum(x.sum() for x in losses) / len(losses)
    return sum(x.sum() / (n + 1e-8) for x, n in zip(losses, counts, strict=True)) / len(losses)


def eager_step(model, optimizer, *args, **kwargs) -> tuple[float, float]:
    loss = eager_loss(model, *args, **kwargs)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss.item(), norm.item()


def with_teacher_server(batch: dict, folder) -> dict:
    """A server's top five for every position but the last of each sequence, from another model."""
    torch.manual_seed(7)
    server = Qwen3ForCausalLM(AutoModelForCausalLM.from_pretrained(folder / "untied").config)
    batch |= {"teacher_ids": [], "teacher_logprobs": []}
    for prompt, response in zip(batch["prompts"], batch["responses"], strict=True):
        with torch.no_grad():
            logp = (server(torch.cat([prompt, response])[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        top = logp.topk(5, -1)
        batch["teacher_ids"].append(top.indices)
        batch["teacher_logprobs"].append(top.values)
    return batch


def steps(rank, world, folder, *, model="untied", strategy="fsdp2", mode="scsdpo_jsd", aggregation="token-mean",
          teacher="prompts", padded=False, checkpointing=False, micro=2, budget=None, contiguous=False, lora=None,
          options=None, resumed=False, single=False, gathered=False, corrected=False):  # fmt: skip
    batch, options = whole_batch(), options or {}
    if corrected:
        batch["rollout_is_weights"] = [0.5 + x.abs() / 6 for x in batch["old_log_probs"]]
    if single:
        batch["teacher_prompts"] = [x if i == 9 else x[:0] for i, x in enumerate(batch["teacher_prompts"])]
    if contiguous:  # the second process has degenerate questions only
        batch["rewards"][8:12] = 0
    batch["advantages"], _ = advantages_of(batch)
    if teacher == "server":
        batch = with_teacher_server(batch, folder)
    adapter = {"lora_rank": 4, "lora_adapter_path": str(folder / "adapter")} if lora else {}

    def new_engine():
        return engine_of(
            folder, model, strategy, padded=padded, checkpointing=checkpointing, gathered=gathered, **adapter
        )

    engine = new_engine()
    if lora:
        options = {**options, "teacher": lora}
    loss_fn = loss_function(mode, aggregation, distillation=teacher == "server", options=options)
    eager = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32, attn_implementation="eager")
    if lora:
        eager = PeftModel.from_pretrained(eager, folder / "adapter", is_trainable=True)
    average = copy.deepcopy(eager) if options.get("teacher") == "ema" else None
    optimizer = torch.optim.AdamW(eager.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)
    asked = {"lora": lora, "average": average, "top_k": options.get("top_k"), "beta": options.get("beta")}
    for step in range(3 if average else 2):
        if step == 2 and resumed:
            where = folder / f"checkpoint-{world}"
            engine.save_checkpoint(str(where), global_step=step)
            engine = new_engine()
            engine.load_checkpoint(str(where))
        tokens = []
        embedding = engine.module.get_input_embeddings()
        hook = embedding.register_forward_pre_hook(
            lambda _, args, tokens=tokens: tokens.append(args[0].numel() * torch.is_grad_enabled())
        )
        data, _ = part_of(
            batch, rank, world, micro, teacher=teacher, padded=padded, contiguous=contiguous, budget=budget
        )
        with engine.train_mode():
            out = engine.train_batch(data, loss_fn)
            engine.lr_scheduler_step()
        hook.remove()
        loss = torch.tensor(sum(out["loss"]))
        dist.all_reduce(loss)  # each is multiplied with the number of processes, for their gradients' mean
        expected, norm = eager_step(eager, optimizer, batch, mode, aggregation, teacher, **asked)
        assert loss.item() / world == pytest.approx(expected, rel=1e-5)
        assert float(out["metrics"]["grad_norm"]) == pytest.approx(norm, rel=2e-5)
        assert norm > 0.01
        if average:
            with torch.no_grad():
                for own, student in zip(average.parameters(), eager.parameters(), strict=True):
                    own.lerp_(student, options["teacher_update_rate"])
        fields = {"loss", "divergence", "rows_kept", "student_entropy"} | (
            {"teacher_entropy"} if teacher == "prompts" else set()
        )
        fields |= {entry for name in options.get("metrics", ()) for entry in METRICS[name]}
        assert set(out["metrics"]) == {f"scsdpo/{name}" for name in fields} | {"grad_norm"}
        if not padded and not checkpointing:
            run_evenly([n for n in tokens if n], batch, world, teacher, micro, budget)


def run_evenly(tokens: list[int], batch: dict, world: int, teacher: str, micro: int, budget: int | None) -> None:
    """The student's tokens of each micro-batch: those of rollouts with a weight, evenly, or two in an empty one."""
    kept = [i for i, x in enumerate(batch["advantages"]) if (x * batch["response_mask"][i]).any()]
    if teacher == "prompts":
        kept = [i for i in kept if len(batch["teacher_prompts"][i])]
    lengths = [len(batch["prompts"][i]) + len(batch["responses"][i]) for i in kept]
    everywhere: list = [None] * world
    dist.all_gather_object(everywhere, tokens)
    empty = sum(n == 2 for own in everywhere for n in own)
    assert sum(map(sum, everywhere)) == sum(lengths) + 2 * empty
    assert len({len(own) for own in everywhere}) == 1, "processes wait for each other in every micro-batch"
    sums = [sum(own) for own in everywhere]
    assert max(sums) - min(sums) <= max(lengths) + 2 * empty
    if budget is None:
        assert len(tokens) <= -(-len(kept) // micro)
        assert max(map(max, everywhere)) <= micro * max(lengths)
    else:
        assert max(map(max, everywhere)) <= budget


CASES = {
    "jsd": {},
    "forward KL": {"mode": "scsdpo_forward_kl", "aggregation": "seq-mean-token-sum"},
    "reverse KL": {"mode": "scsdpo_reverse_kl", "aggregation": "seq-mean-token-mean"},
    "tied": {"model": "tied"},
    "padded": {"padded": True},
    "checkpointing": {"checkpointing": True},
    "teacher server": {"teacher": "server", "mode": "scsdpo_forward_kl"},
    "teacher server, jsd": {"teacher": "server"},
    "one micro-batch": {"micro": 8},
    "one sequence": {"micro": 1},
    "rollout correction": {"corrected": True},
    "dynamic batch size": {"budget": 14},
    "dynamic batch size, a large one": {"budget": 1000, "aggregation": "seq-mean-token-mean"},
    "token-sum": {"aggregation": "token-sum"},
    "another beta": {"options": {"beta": 0.2}},
    "top-K": {"options": {"top_k": 7}},
    "metrics": {"options": {"metrics": ["top1_agreement", "importance_clipped"]}, "micro": 1},
    "metrics of a support": {"options": {"top_k": 7, "metrics": ["support_mass"]}},
    "metrics of a server": {"teacher": "server", "options": {"metrics": ["support_mass"]}},
    "moving average": {"options": {"teacher": "ema", "teacher_update_rate": 0.3}},
    "moving average, tied": {"model": "tied", "options": {"teacher": "ema", "teacher_update_rate": 0.3}},
    "moving average, resumed": {"options": {"teacher": "ema", "teacher_update_rate": 0.3}, "resumed": True},
    "moving average, parameters stay gathered": {
        "options": {"teacher": "ema", "teacher_update_rate": 0.3},
        "gathered": True,
    },
    "moving average of LoRA": {"lora": "ema", "options": {"teacher_update_rate": 0.3}},
    "a process draws no weight": {"contiguous": True},
    "one rollout with a weight": {"single": True, "micro": 1},
    "LoRA": {"lora": "live"},
    "LoRA, base teacher": {"lora": "base"},
}


def tokens_run(rank: int, world: int, folder) -> dict[str, int]:
    """Through student and teacher, one sequence at a time; with question weights and without, of 32 rollouts.

    One question of eight has a weight.
    """
    one, other = whole_batch(1), whole_batch(2)
    batch = {name: [*one[name], *other[name]] for name in one if name not in ("rewards", "uid")}
    batch["teacher_prompts"] = [x if len(x) else batch["prompts"][i] for i, x in enumerate(batch["teacher_prompts"])]
    batch["uid"] = [f"q{i // ROLLOUTS}" for i in range(2 * QUESTIONS * ROLLOUTS)]
    batch["rewards"] = torch.tensor([1, 0, 0, 1, *[0] * 12, *[1] * 16], dtype=torch.float32)
    engine, run = engine_of(folder, "untied", "fsdp2"), {}
    for name in ("sc_sdpo", "sdpo"):
        tokens: list[int] = []
        batch["advantages"], _ = advantages_of(batch, name)
        embedding = engine.module.get_input_embeddings()
        hook = embedding.register_forward_pre_hook(lambda _, args, tokens=tokens: tokens.append(args[0].numel()))
        with engine.train_mode():
            engine.train_batch(part_of(batch, rank, world, 1)[0], loss_function("scsdpo_jsd", "token-mean"))
        hook.remove()
        run[name] = sum(tokens)
    probes = 8 * 2  # two forwards of a model that is seen for the first time
    return {"ours": run["sc_sdpo"] - probes, "all": run["sdpo"], "drawn": sum(
        2 * len(batch["responses"][i]) + len(batch["prompts"][i]) + len(batch["teacher_prompts"][i])
        for i in range(len(batch["uid"]))
    )}  # fmt: skip


def run(rank: int, world: int, folder, results: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    init = f"file://{results}.rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    failures = {}
    for name, case in CASES.items():
        try:
            steps(rank, world, folder, **case)
        except Exception:
            failures[name] = traceback.format_exc()
    torch.save((failures, tokens_run(rank, world, folder)), f"{results}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def results(request, folder, tmp_path_factory) -> list[tuple[dict[str, str], dict[str, int]]]:
    """Failures by case and tokens, of every process; one start of verl for all."""
    results = str(tmp_path_factory.mktemp("results") / "results")
    mp.spawn(run, (request.param, folder, results), nprocs=request.param)
    return [torch.load(f"{results}.{rank}") for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_eager_pytorch(results, case):
    for rank, (failed, _) in enumerate(results):
        if case in failed:
            pytest.fail(f"process {rank}: {failed[case]}")


def test_tokens_run_are_those_of_rollouts_with_a_weight(results):
    """4 of 32 rollouts, one at a time: docs/verl.md has the ratio."""
    ours, run = (sum(tokens[name] for _, tokens in results) for name in ("ours", "all"))
    assert run == results[0][1]["drawn"]
    print(f"tokens through student and teacher, ours / all: {ours / run:.3f} on {len(results)} processes")
    assert ours / run <= 0.17


def test_question_weights_are_advantages():
    batch = whole_batch()
    weights, pass_rates = advantages_of(batch)
    raw = torch.tensor([0.25, 0, 3 / 16, 0]).sqrt()
    raw = raw / raw[raw > 0].mean()
    for i, own in enumerate(weights):
        mask = batch["response_mask"][i]
        torch.testing.assert_close(own, raw[i // ROLLOUTS] * mask)
        torch.testing.assert_close(pass_rates[i], [0.5, 0.0, 0.25, 1.0][i // ROLLOUTS] * mask)


def test_question_weights_follow_the_config():
    batch = whole_batch()
    batch["rewards"] = batch["rewards"] * 0.4
    assert not torch.cat(advantages_of(batch)[0]).any()  # below SDPO's threshold of 0.5
    config = {"question_weight_exponent": 1.0, "question_success_threshold": 0.3}
    weights, _ = advantages_of(batch, config=config)
    assert weights[0][0].item() == pytest.approx(0.25 / (7 / 32))
    weights, pass_rates = advantages_of(batch, config={"question_success_threshold": None})
    assert pass_rates[0][0].item() == pytest.approx(0.2)
    assert weights[12][0].item() > 0  # a mean reward of 0.4 is no pass rate of 1


def test_sdpo_has_unit_weights():
    batch = whole_batch()
    weights, _ = advantages_of(batch, "sdpo")
    for own, mask in zip(weights, batch["response_mask"], strict=True):
        assert (own == mask).all()


def test_losses_need_the_engine():
    with pytest.raises(RuntimeError, match="VERL_ENGINE_VENDOR=scsdpo"):
        get_policy_loss_fn("scsdpo_jsd")(old_log_prob=None)
    with pytest.raises(RuntimeError, match="VERL_ENGINE_VENDOR=scsdpo"):
        get_distillation_loss_fn("scsdpo_reverse_kl")(config=None)


@pytest.fixture
def engine(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/{uuid.uuid4().hex}", rank=0, world_size=1)
    yield engine_of(folder, "untied", "fsdp2")
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", BETA)
def test_gradients_have_the_error_of_fp32(engine, folder, mode):
    """A mini-batch's, against full logits in float64: 1e-6 of the gradient, or three times what eager fp32 is off."""
    batch = whole_batch()
    batch["advantages"], _ = advantages_of(batch)
    eager = []
    for dtype in (torch.float64, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=dtype, attn_implementation="eager")
        eager_loss(model, batch, mode, "token-mean").backward()
        eager.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    data, _ = part_of(batch, 0, 1, 2)
    with engine.train_mode():
        engine.forward_backward_batch(data, loss_function(mode, "token-mean"))
        own = torch.cat([p.grad.full_tensor().double().flatten() for p in engine.module.parameters()])
    error, baseline = ((x - eager[0]).norm() / eager[0].norm() for x in (own, eager[1]))
    print(f"{mode}: gradient off by {error:.1e}, eager fp32 by {baseline:.1e}")
    assert eager[0].norm() > 0.01
    assert error <= max(1e-6, 3 * baseline)


def test_metrics_are_of_all_response_tokens(engine):
    """However many micro-batches have nothing to compute."""
    batch = whole_batch()
    batch["advantages"], _ = advantages_of(batch)
    logged = []
    for micro in (1, 16):
        with engine.train_mode():
            out = engine.infer_batch(part_of(batch, 0, 1, micro)[0], loss_function("scsdpo_jsd", "token-mean"))
        logged.append({name: Metric.aggregate_dp([x]) for name, x in out["metrics"].items()})
    kept = sum(int((a != 0).sum()) for i, a in enumerate(batch["advantages"]) if len(batch["teacher_prompts"][i]))
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
    assert logged[0]["scsdpo/rows_kept"] == pytest.approx(kept / sum(int(x.sum()) for x in batch["response_mask"]))
    assert logged[0]["scsdpo/divergence"] > 1e-3


def test_metrics_that_are_asked_for(engine, folder):
    """Recomputed from the model's own logits, over all response tokens."""
    batch, names = whole_batch(), ["importance_clipped", "top1_agreement"]
    batch["advantages"], _ = advantages_of(batch)
    model = AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.float32, attn_implementation="eager")
    sums = dict.fromkeys(names, 0)
    for i, response in enumerate(batch["responses"]):
        if not len(batch["teacher_prompts"][i]):
            continue
        with torch.no_grad():
            p, q = (
                (model(torch.cat([batch[x][i], response])[None]).logits[0, -len(response) - 1 : -1] / TEMPERATURE)
                for x in ("prompts", "teacher_prompts")
            )
        log_ratio = p.log_softmax(-1).gather(-1, response[:, None])[:, 0] - batch["old_log_probs"][i]
        flags = log_ratio.exp() > CLIP, p.argmax(-1) == q.argmax(-1)
        for name, flag in zip(names, flags, strict=True):
            sums[name] += int((flag & (batch["advantages"][i] != 0)).sum())
    tokens = sum(int(x.sum()) for x in batch["response_mask"])
    loss_fn = loss_function("scsdpo_jsd", "token-mean", options={"metrics": names})
    for micro in (1, 16):
        with engine.train_mode():
            out = engine.infer_batch(part_of(batch, 0, 1, micro)[0], loss_fn)
        for name in names:
            assert 0 < sums[name] < tokens
            logged = Metric.aggregate_dp([out["metrics"][f"scsdpo/{name}"]])
            assert logged == pytest.approx(sums[name] / tokens, rel=1e-6), name


def test_what_cannot_be_right_is_refused(engine):
    batch = whole_batch()
    batch["advantages"], _ = advantages_of(batch)

    def step(loss_fn):
        with engine.train_mode():
            engine.train_batch(part_of(batch, 0, 1, 2)[0], loss_fn)

    for name, value in {"entropy_coeff": 0.01, "use_kl_loss": True}.items():
        with pytest.raises(ValueError, match=f"actor.{name}: expected"):
            step(loss_function("scsdpo_jsd", "token-mean", **{name: value}))
    for name, value in {"use_task_rewards": True, "use_policy_gradient": True, "loss_max_clamp": 10.0}.items():
        loss_fn = loss_function("scsdpo_jsd", "token-mean", distillation=True)
        setting = loss_fn.keywords["distillation_config"].distillation_loss
        object.__setattr__(setting, name, value)
        with pytest.raises(ValueError, match=f"distillation_loss.{name}: expected"):
            step(loss_fn)
    loss_fn = loss_function("scsdpo_jsd", "token-mean", distillation=True)
    given = loss_fn.keywords["distillation_config"].distillation_loss
    object.__setattr__(given, "loss_mode", "forward_kl_topk")
    object.__setattr__(loss_fn.keywords["config"].policy_loss, "loss_mode", "scsdpo_jsd")
    with pytest.raises(ValueError, match=r"loss_mode: expected none of scsdpo\.verl"):
        step(loss_fn)
    batch["advantages"], _ = advantages_of(batch, "grpo")
    with pytest.raises(ValueError, match=r"algorithm\.adv_estimator"):
        step(loss_function("scsdpo_jsd", "token-mean"))


def test_a_batch_that_cannot_be_right_is_refused(engine):
    batch = whole_batch()
    batch["advantages"], _ = advantages_of(batch)

    def step(change=lambda data: data, options=None, aggregation="token-mean", **given):
        data = change(part_of(batch, 0, 1, 2, **given)[0])
        with engine.train_mode():
            engine.train_batch(data, loss_function("scsdpo_jsd", aggregation, options=options))

    with pytest.raises(ValueError, match=r"teacher_prompts: expected .*custom_sampler\.path=pkg://scsdpo\.verl"):
        step(lambda data: data.exclude("teacher_prompts"))
    with pytest.raises(ValueError, match=r"position_ids: expected 0, 1, \.\.\. in each sequence"):
        step(lambda data: data.update({"position_ids": data["position_ids"] + 1}))
    with pytest.raises(ValueError, match=r"actor\.ppo_max_token_len_per_gpu: expected at least the longest"):
        step(budget=5)
    with pytest.raises(ValueError, match=r"actor\.loss_scale_factor: expected a number"):
        step(aggregation="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match=r"policy_loss\.teacher: expected 'live' or 'ema' without LoRA, got 'base'"):
        step(options={"teacher": "base"})


def test_options_that_cannot_be_right_are_refused(folder):
    for name, value in {"teacher": "mean", "teacher_update_rate": 1.5, "metrics": ["entry_clipped"]}.items():
        with pytest.raises(ValueError, match=rf"actor\.policy_loss\.{name}: expected"):
            SelfDistillation(**{name: value})
    penalised = {"use_kl_in_reward": True}
    with pytest.raises(ValueError, match=r"algorithm\.use_kl_in_reward: expected False"):
        advantages_of(whole_batch(), config=penalised)


def test_a_forward_that_is_verls_own_is_refused(engine, folder):
    with pytest.raises(ValueError, match=r"model\.use_fused_kernels: expected False"):
        engine_of(folder, "untied", "fsdp2", use_fused_kernels=True)


def test_with_another_loss_the_engine_is_verls_own(engine, folder, monkeypatch):
    batch = whole_batch()
    batch["advantages"], _ = advantages_of(batch, "grpo")
    results = []
    for kind in (engine, None):
        if kind is None:
            monkeypatch.delenv("VERL_ENGINE_VENDOR")
            EngineRegistry._engines["language_model"]["fsdp2"].setdefault("cpu", FSDPEngineWithLMHead)
            kind = engine_of(folder, "untied", "fsdp2", expected=FSDPEngineWithLMHead)
            assert not isinstance(kind, SCSDPOEngine)
        with kind.train_mode():
            out = kind.train_batch(part_of(batch, 0, 1, 2)[0], loss_function("vanilla", "token-mean"))
        results.append((sum(out["loss"]), float(out["metrics"]["grad_norm"])))
    assert results[0] == results[1] and results[0][1] > 0.01


def test_the_entry_point_loads_it():
    """`import verl` alone registers everything."""
    code = (
        "import verl; from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY as a, POLICY_LOSS_REGISTRY as p;"
        "from verl.workers.engine import EngineRegistry as e;"
        "assert {'sc_sdpo', 'sdpo'} <= set(a) and 'scsdpo_jsd' in p;"
        "assert e._engines['language_model']['fsdp2'][('cuda', 'scsdpo')].__name__ == 'SCSDPOEngine'"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)


def test_a_missing_seam_is_named():
    code = "from verl.workers.engine import FSDPEngine as e; del e._build_fsdp_module; import scsdpo.verl"
    environment = os.environ | {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_ENGINE_VENDOR": "scsdpo"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert out.returncode != 0
    assert f"scsdpo.verl is made for verl{TESTED} (pip install" in out.stderr
    assert re.search(r"FSDPEngine of verl \S+ has no _build_fsdp_module", out.stderr)
    assert "VERL_ENGINE_VENDOR=scsdpo: expected to find its engine;" in out.stderr  # verl hides the exception itself
