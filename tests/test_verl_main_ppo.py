"""verl's own `main_ppo` with Ray, by the commands of docs/verl.md: rollouts, rewards, weights, checkpoints, resumption.

A tiny model on a CPU, the rollout engine of `verl_cpu_rollouts`, three steps of eight rollouts.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("verl_on_cpu", reason="verl: ./dev verl", exc_type=ImportError)

import pandas
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "verl.md"
pytestmark = pytest.mark.timeout(1800)

# Rewards of the two rollouts of each question, four questions a step. In the second step nothing has a weight, in the
# third there is one rollout with a weight and a teacher: one of two processes has none.
REWARDS = ("10", "00", "11", "01", "11", "00", "11", "00", "10", "11", "00", "11")
RATE, TEMPERATURE, CLIP = 0.3, 0.9, 2.0
CHAT = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWARD = """
import collections
calls = collections.Counter()
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    number, pattern = ground_truth.split()
    calls[number] += 1
    score = float(pattern[(calls[number] - 1) % len(pattern)])
    return {"score": score, "feedback": "" if score else f"wrong {number}"}
"""


def bash_blocks(section: str) -> list[str]:
    """The shell commands of a section of docs/verl.md."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("main_ppo")
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    words = [*special, "<unk>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1], unk_token="<unk>",
        padding_side="left", chat_template=CHAT,
    ).save_pretrained(root / "model")  # fmt: skip
    torch.manual_seed(1)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        vocab_size=len(words), initializer_range=0.2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(root / "model")
    rows = [
        {
            "data_source": "test",
            "prompt": [{"role": "system", "content": "ab"}, {"role": "user", "content": f"{i} {i + 7}"}],
            "reward_model": {"style": "rule", "ground_truth": f"{i} {pattern}"},
            "extra_info": {"index": i},
        }
        for i, pattern in enumerate(REWARDS)
    ]
    pandas.DataFrame(rows).to_parquet(root / "data.parquet")
    (root / "reward.py").write_text(REWARD)
    (root / "train.sh").write_text(bash_blocks("Settings")[0])
    return root


class Run(NamedTuple):
    logged: list[dict]  # by step
    steps: list[list[dict]]  # what each process's engine was given, by step
    seconds: float


def main_ppo(folder: Path, name: str, command: str, processes: int, *overrides: str) -> Run:
    record = folder / name
    record.mkdir()
    settings = [
        f"+ray_kwargs.ray_init.num_gpus={processes}",  # Ray's logical ones
        "ray_kwargs.ray_init.num_cpus=16",
        "+ray_kwargs.ray_init.include_dashboard=False",
        f"data.train_files={folder}/data.parquet", f"data.val_files={folder}/data.parquet",
        "data.train_batch_size=4", "data.max_prompt_length=64", "data.max_response_length=8",
        "data.dataloader_num_workers=0", "data.shuffle=False",
        f"actor_rollout_ref.model.path={folder}/model",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "actor_rollout_ref.model.use_remove_padding=True",
        "actor_rollout_ref.rollout.name=hf_cpu", "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1", "actor_rollout_ref.rollout.agent.num_workers=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
        f"actor_rollout_ref.rollout.temperature={TEMPERATURE}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.optim.lr=1e-2", "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        f"reward.custom_reward_function.path={folder}/reward.py", "reward.num_workers=1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        f"trainer.n_gpus_per_node={processes}", "trainer.nnodes=1", "trainer.device=cpu", "trainer.logger=[file]",
        "trainer.val_before_train=False", "trainer.test_freq=-1",
        "trainer.total_training_steps=3", "trainer.total_epochs=3",
        f"trainer.default_local_dir={folder}/checkpoints", *overrides,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(TESTS),
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "0,1",  # as many as Ray is told of; none is used
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_usage_stats_enabled": "0",
        "VERL_ENGINE_DEVICE": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu_rollouts",
        "VERL_FILE_LOGGER_PATH": str(record / "log.jsonl"),
        "SCSDPO_TEST_RECORD": str(record),
    }
    start = time.perf_counter()
    out = subprocess.run(
        ["bash", "-euc", command, "bash", *settings], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert out.returncode == 0, out.stdout[-6000:] + out.stderr[-6000:]
    print(f"{name}: {seconds:.0f} s")
    lines = [json.loads(line) for line in (record / "log.jsonl").read_text().splitlines()]
    steps = [[torch.load(record / f"{i}-{rank}.pt") for rank in range(processes)] for i in range(len(lines))]
    return Run([line["data"] for line in lines], steps, seconds)


@pytest.fixture(scope="module")
def moving_average(folder) -> Run:
    """On one process, with the second command of the page; a checkpoint after the second step."""
    override = f"actor_rollout_ref.actor.policy_loss.teacher_update_rate={RATE}"
    return main_ppo(folder, "first", bash_blocks("Settings")[1], 1, override, "trainer.save_freq=2")


@pytest.fixture(scope="module")
def resumed(folder, moving_average) -> Run:
    """Its third step once more, from the checkpoint."""
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.write_text("2")  # the run has saved its last step, too
    override = f"actor_rollout_ref.actor.policy_loss.teacher_update_rate={RATE}"
    return main_ppo(folder, "resumed", bash_blocks("Settings")[1], 1, override, "trainer.save_freq=-1")


@pytest.fixture(scope="module")
def two_processes(folder) -> Run:
    """By the first command of the page, without the forward for old log-probabilities."""
    (bypass,) = re.findall(r"^\| `(algorithm\.rollout_correction\.bypass_mode=True)`", PAGE.read_text(), re.MULTILINE)
    return main_ppo(
        folder, "two", bash_blocks("Settings")[0], 2, "trainer.save_freq=-1", "trainer.resume_mode=disable",
        bypass, "actor_rollout_ref.rollout.calculate_log_probs=True",
    )  # fmt: skip


class Row(NamedTuple):
    """A rollout of a step, from whichever process."""

    uid: str
    fields: dict[str, torch.Tensor]
    reward: float


def rows_of(step: list[dict]) -> list[Row]:
    found = []
    for record in step:
        for i, uid in enumerate(record["uid"]):
            fields = {name: x[i] for name, x in record["rows"].items()}
            found.append(Row(uid, fields, fields["rm_scores"].sum().item()))
    return found


def expected_weights(rows: list[Row]) -> list[float]:
    """(p (1 - p))^½ of each question, over its mean over the questions that have one (arXiv 2605.27765, eq. 16)."""
    rewards = defaultdict(list)
    for row in rows:
        rewards[row.uid].append(row.reward)
    rate = {uid: sum(own) / len(own) for uid, own in rewards.items()}
    raw = [(rate[row.uid] * (1 - rate[row.uid])) ** 0.5 for row in rows]
    positive = {row.uid: w for row, w in zip(rows, raw, strict=True) if w > 0}
    mean = sum(positive.values()) / max(1, len(positive))
    return [w / mean if w else 0.0 for w in raw]


def logits_of(model, prompt: torch.Tensor, row: Row) -> torch.Tensor:
    response = row.fields["responses"]
    return (model(torch.cat([prompt, response])[None]).logits[0, -len(response) - 1 : -1] / TEMPERATURE).log_softmax(-1)


@torch.no_grad()
def recomputed(folder: Path, step: list[dict]) -> tuple[float, float]:
    """The loss and the share of tokens that have one, by eager PyTorch on full logits."""
    rows = rows_of(step)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2))
    student.load_state_dict(step[0]["state"])
    teacher.load_state_dict(step[0]["state"] | (step[0]["average"] or {}))
    loss, kept, tokens = 0.0, 0, sum(int(row.fields["response_mask"].sum()) for row in rows)
    for row, weight in zip(rows, expected_weights(rows), strict=True):
        given, mask = row.fields, row.fields["response_mask"]
        torch.testing.assert_close(given["advantages"], weight * mask.float())
        p = logits_of(student, given["prompts"], row)
        own = p.gather(-1, given["responses"][:, None])[:, 0]
        if "rollout_log_probs" in given:  # the server had this step's weights
            torch.testing.assert_close(given["rollout_log_probs"], own, atol=2e-4, rtol=0)
        if weight == 0 or not len(given["teacher_prompts"]):
            continue
        q = logits_of(teacher, given["teacher_prompts"], row)
        m = (0.5 * (p.exp() + q.exp())).log()
        divergence = 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))
        ratio = (own - given["old_log_probs"]).exp().clamp(max=CLIP)
        loss += (weight * ratio * divergence * mask).sum().item() / tokens
        kept += int(mask.sum())
    return loss, kept / tokens


def check(folder: Path, run: Run) -> None:
    assert len(run.logged) == len(run.steps)
    for logged, step in zip(run.logged, run.steps, strict=True):
        assert {record["engine"] for record in step} == {"scsdpo.verl.engine.SCSDPOEngine"}
        loss, kept = recomputed(folder, step)
        assert logged["actor/scsdpo/rows_kept"] == pytest.approx(kept)
        assert logged["actor/scsdpo/loss"] == pytest.approx(loss, rel=2e-4, abs=1e-7)
        assert logged["actor/loss"] == pytest.approx(loss, rel=2e-4, abs=1e-7)


def test_one_process_with_a_moving_average_teacher(folder, moving_average):
    check(folder, moving_average)
    first, second, third = moving_average.logged
    assert first["actor/scsdpo/loss"] > 1e-4 and third["actor/scsdpo/loss"] > 1e-4
    assert second["actor/scsdpo/loss"] == 0 and second["scsdpo/zero_weight_questions"] == 1
    assert first["scsdpo/pass_rate"] == 0.5 and first["scsdpo/zero_weight_questions"] == 0.5
    average = moving_average.steps[0][0]["state"]
    for before, after in zip(moving_average.steps, moving_average.steps[1:], strict=False):
        average = {name: x.lerp(after[0]["state"][name], RATE) for name, x in average.items()}
        for name, x in after[0]["average"].items():
            torch.testing.assert_close(x, average[name])
        assert any(not torch.equal(x, before[0]["state"][name]) for name, x in after[0]["state"].items())


def test_a_checkpoint_resumes_model_and_teacher(folder, moving_average, resumed):
    check(folder, resumed)
    (step,), last = resumed.steps, moving_average.steps[2]
    for kind in ("state", "average"):
        for name, x in last[0][kind].items():
            assert torch.equal(step[0][kind][name], x), f"{kind}: {name}"


def test_two_processes_of_which_one_has_no_weight(folder, two_processes):
    check(folder, two_processes)
    run = [[sum(record["tokens"]) for record in step] for step in two_processes.steps]
    assert run[1] == [2, 2]  # nothing has a weight
    assert sorted(run[2])[0] == 2 < sorted(run[2])[1]


def test_the_self_teacher_sees_question_solution_and_feedback(folder, moving_average):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    rows = rows_of(moving_average.steps[0])
    for row in rows:
        seen = tokenizer.decode(row.fields["teacher_prompts"])
        question = tokenizer.decode(row.fields["prompts"]).split("user\n")[1].split("<|im_end|>")[0]
        others = [x for x in rows if x.uid == row.uid and x is not row and x.reward == 1]
        if row.reward == 0:
            assert f"wrong {question.split()[0]}" in seen
        if others:
            assert tokenizer.decode(others[0].fields["responses"], skip_special_tokens=True) in seen
        assert (seen == "") == (row.reward == 1 and not others)
        if seen:
            assert seen.startswith("<|im_start|>system\nab<|im_end|>\n<|im_start|>user\n" + question)
            assert seen.endswith("<|im_end|>\n<|im_start|>assistant\n")
