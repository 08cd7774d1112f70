"""Every file of examples/, on tiny models; two processes against eager PyTorch on full logits in float64."""

import copy
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from problems import problem

from scsdpo_kernels import TopK, question_weights

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
EXAMPLES = {"fsdp2", "fused_loss", "hf_trainer", "trl_sdpo", "trl_smollm2"}
ROLLOUTS, RESPONSE, VOCABULARY = 8, 5, 63
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
         "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
         "initializer_range": 0.3}  # fmt: skip
LEARNING_RATE = 1.0


def test_examples_are_short_and_say_how_they_run():
    paths = list((ROOT / "examples").glob("*.py"))
    assert {path.stem for path in paths} == EXAMPLES
    for path in paths:
        first, second, third, *rest = path.read_text().splitlines()
        assert first.startswith('"""') and not second and f"examples/{path.name}" in third and rest[0] == '"""', path
        assert len(rest) <= (160 if path.stem == "trl_smollm2" else 90), path  # that is a whole experiment


# A batch of rollouts, models, and what a step of them has to give.


def tiny(seed: int):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def whole_batch() -> dict[str, torch.Tensor]:
    """Two questions of four rollouts, which lie on both of two processes; responses are of many lengths."""
    generator = torch.Generator().manual_seed(0)
    response = torch.randint(3, VOCABULARY, (ROLLOUTS, RESPONSE), generator=generator)
    batch = {"mask": (torch.arange(RESPONSE) < torch.tensor([5, 3, 4, 1, 5, 2, 5, 0])[:, None]).long()}
    for side, prompt in (("", 4), ("teacher_", 7)):
        ids = torch.randint(3, VOCABULARY, (ROLLOUTS, prompt), generator=generator)
        batch[f"{side}input_ids"] = torch.cat([ids, response], dim=1)
        batch[f"{side}attention_mask"] = torch.ones_like(batch[f"{side}input_ids"])
        batch[f"{side}attention_mask"][1, :2] = 0
    batch["rewards"] = torch.tensor([1, 0, 1, 0, 1, 0, 0, 0.0])
    batch["question_ids"] = torch.arange(ROLLOUTS) % 2
    return batch


def expected(student, teacher, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The step's loss and every parameter's gradient, of full logits in float64: a mean over all response tokens."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()

    def log_softmax(model, side):
        logits = model(batch[f"{side}input_ids"], attention_mask=batch[f"{side}attention_mask"]).logits
        return logits[:, -RESPONSE - 1 : -1].log_softmax(-1)

    with torch.no_grad():
        log_q = log_softmax(teacher, "teacher_")
    divergence = oracle.between(log_softmax(student, ""), log_q, 0.5)
    weight = question_weights(batch["rewards"], batch["question_ids"]).double()
    loss = (weight[:, None] * batch["mask"] * divergence).sum() / batch["mask"].sum()
    return loss.detach(), list(torch.autograd.grad(loss, list(student.parameters())))


def distances(gradients, exact) -> float:
    """The largest of an entry from float64, over the largest entry of any gradient."""
    most = max(x.abs().max() for x in exact)
    return max(((x.double() - y).abs().max() / most).item() for x, y in zip(gradients, exact, strict=True))


# fused_loss.py


def test_fused_loss():
    """Three losses and the sum of their gradients."""
    example = importlib.import_module("fused_loss")
    batch = whole_batch()
    given = problem((ROLLOUTS, RESPONSE), 24, 307, 0.5, scale=2.0)
    leaves = given.leaves()
    losses = example.main(leaves.hidden, leaves.head, leaves.teacher, batch["rewards"], batch["question_ids"],
                          batch["mask"])  # fmt: skip
    weight = question_weights(batch["rewards"], batch["question_ids"])[:, None] * batch["mask"]
    given = given.but(token_weight=weight / batch["mask"].sum())
    full, of_top = oracle.expected(given, beta=0.5), oracle.expected(given, beta=0.5, support=TopK(20))
    for got, exact in zip(losses, (full, full, of_top), strict=True):
        torch.testing.assert_close(got.double(), exact[0].loss, rtol=1e-5, atol=0)
    for got, x, y in zip(leaves.trained, full[1:], of_top[1:], strict=True):
        assert oracle.relative_error(got.grad, 2 * x + y) < 1e-5


def test_fused_loss_as_a_script():
    printed = subprocess.check_output([sys.executable, str(ROOT / "examples" / "fused_loss.py")], text=True)
    at_once, in_parts, of_top = map(float, re.findall(r"\d\.\d+", printed))
    assert 0 < of_top < at_once and math.isclose(at_once, in_parts, rel_tol=2e-2)  # inputs in bf16


# trl_sdpo.py


def test_trl_sdpo(tmp_path, monkeypatch):
    """Questions of which some rollouts are right: they alone are kept, and move every layer."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl", reason="trl: pip install '.[trl]'")
    from trl_models import BASE, MODELS, save

    example = importlib.import_module("trl_sdpo")
    folder = save(tmp_path) / "qwen3"
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    before = [x.detach().clone() for x in MODELS["qwen3"][1].from_pretrained(folder, dtype=torch.float32).parameters()]
    options = {**BASE, "output_dir": str(tmp_path / "out"), "num_generations": 8, "per_device_train_batch_size": 8,
               "max_steps": 4, "model_init_kwargs": {"dtype": "float32"}}  # fmt: skip
    trainer = example.main(str(folder), largest=20, **options)
    log = [line for line in trainer.state.log_history if "loss" in line]
    kept = [line["scsdpo/rows_kept"] for line in log]
    assert len(log) == 4 and 0 < max(kept) < 1
    for line in log:
        assert (line["grad_norm"] > 0) == (line["scsdpo/rows_kept"] > 0) == (line["scsdpo/zero_weight_questions"] < 1)
    after = trainer.model.parameters()
    assert all((x != y.cpu()).any() for x, y in zip(before, after, strict=True))


def test_the_reward_of_trl_sdpo():
    pytest.importorskip("trl", reason="trl: pip install '.[trl]'")
    example = importlib.import_module("trl_sdpo")
    said = [[{"role": "assistant", "content": x}] for x in ("It is 12 .", "112", "")]
    assert example.reward(completions=said, answer=["12", "12", "12"], trainer_state=None) == [1.0, 0.0, 0.0]
    rows = example.questions(50, 20)
    assert all(eval(row["prompt"][0]["content"].removesuffix("=")) == int(row["answer"]) for row in rows)


# trl_smollm2.py


@pytest.fixture
def smollm2_example(tmp_path, monkeypatch):
    """The example with fewer questions, and a folder with a tiny model in SmolLM2's place."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl", reason="trl: pip install '.[trl]'")
    from trl_models import save

    example = importlib.import_module("trl_smollm2")
    for name, value in {"HELD_OUT": 7, "WARM": 20, "EVERY": 2}.items():
        monkeypatch.setattr(example, name, value)
    folder = save(tmp_path) / "qwen3"
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return example, str(folder)


@pytest.mark.parametrize("method, trained_on", [("sc-sdpo", 16), ("sdpo", 32), ("hard-filter", 16)])
def test_trl_smollm2(tmp_path, monkeypatch, smollm2_example, method, trained_on):
    """Of three questions in each step all, half and none of the rollouts are right; the last has no teacher."""
    from trl_models import BASE

    example, folder = smollm2_example
    monkeypatch.setattr(example, "reward", lambda completions, **_: [1.0] * 4 + [1.0, 0.0] * 2 + [0.0] * 4)
    options = {**BASE, "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 6, "max_steps": 4}
    points = example.main(folder, method, **options)
    assert [point["step"] for point in points] == [0, 2, 4]
    first, between, last = points
    assert first["rollouts"] == first["sampling"] == first["training"] == 0
    assert last["sampling"] > between["sampling"] > 0 and last["training"] > between["training"] > 0
    assert last["rollouts"] == trained_on and 0 <= last["pass_rate"] <= 1


def test_the_warm_up_of_trl_smollm2(tmp_path, monkeypatch, smollm2_example):
    """Half of the questions have a solution, as SDPO's teacher is shown it; none is asked later."""
    example, folder = smollm2_example
    read, trainer = [], example.SFTTrainer
    monkeypatch.setattr(
        example, "SFTTrainer", lambda *args, **kwargs: read.append(kwargs["train_dataset"]) or trainer(*args, **kwargs)
    )
    where = str(tmp_path / "warm")
    options = {"output_dir": str(tmp_path / "out"), "bf16": False, "per_device_train_batch_size": 4}
    example.warm_up(folder, where, **options)
    before, after = (example.load(name).state_dict() for name in (folder, where))
    assert any((before[name] != after[name]).any() for name in before)
    texts = [row["prompt"][0]["content"] for row in read[0]]
    answers = [row["completion"][0]["content"] for row in read[0]]
    shown = [f"\nCorrect solution: {answer}" for answer in answers]
    assert [x.endswith(y) for x, y in zip(texts, shown, strict=True)] == [False, True] * 10
    asked = {row["prompt"][0]["content"] for row in example.questions()[7:27]}
    assert {x.partition("\n")[0] for x in texts} == asked


def test_a_run_of_every_method_and_seed(tmp_path, monkeypatch, smollm2_example, capsys):
    """benchmarks/real_run.py in small: what it writes, goes on with, says and draws."""
    import real_run

    example, folder = smollm2_example
    calls = []
    monkeypatch.setattr(
        real_run, "alone", lambda function, *arguments: calls.append(function.__name__) or function(*arguments)
    )
    monkeypatch.setattr(example, "reward", lambda completions, **_: [1.0, 0.0, 0.0, 1.0])
    for name, value in (("per_device_train_batch_size", 4), ("num_generations", 4), ("gradient_accumulation_steps", 1)):
        monkeypatch.setitem(example.SETTINGS, name, value)
    arguments = ["real_run.py", "--steps", "3", "--model", folder, "--warm", str(tmp_path / "warm")]
    arguments += ["--output", str(tmp_path / "results")]
    for more in (["--seeds", "2"], ["--seeds", "3", "--add"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        real_run.main()
    assert calls == ["warm_up", *["run"] * 9]  # what is there is not run again
    (path,) = (tmp_path / "results").glob("real_run-*.json")
    result = json.loads(path.read_text())
    assert list(result["runs"]) == ["SC-SDPO", "SDPO", "hard filter"]
    for runs in result["runs"].values():
        assert [[point["step"] for point in run] for run in runs] == [[0, 2, 3]] * 3
        assert len({run[0]["pass_rate"] for run in runs}) == 1  # one warm-up
    assert {run[-1]["rollouts"] for run in result["runs"]["SDPO"]} == {12}
    out = capsys.readouterr().out
    assert "mean of 3 seeds" in out and "SC-SDPO against SDPO" in out and "of an SDPO step" in out
    real_run.plot(result).savefig(tmp_path / "plot.png")


def test_the_questions_of_trl_smollm2():
    example = importlib.import_module("trl_smollm2")
    asked = example.questions()
    assert len({row["prompt"][0]["content"] for row in asked}) == len(asked) == 99 * 99 + 99 * 100 / 2
    for row in asked:
        a, sign, b = row["prompt"][0]["content"].removeprefix("What is ").removesuffix("?").split()
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
    said = {"It is 123.": True, "123 - no, 12": False, "": False, "-123": False}
    assert {text: example.is_right(text, "123") for text in said} == said


# hf_trainer.py


def trained(folder, **options) -> tuple[list[torch.Tensor], dict, list[dict]]:
    """Gradients, as one step of SGD shows them; the batch; and the log."""
    from datasets import Dataset

    example = importlib.import_module("hf_trainer")
    student, teacher, batch = tiny(1), tiny(2), whole_batch()
    before = copy.deepcopy(student)
    names = ("input_ids", "attention_mask", "teacher_input_ids", "teacher_attention_mask")
    labels = batch["input_ids"].clone()
    labels[:, :-RESPONSE] = -100
    labels[:, -RESPONSE:][batch["mask"] == 0] = -100
    rows = {name: batch[name].tolist() for name in names} | {"labels": labels.tolist()}
    rows["question_weight"] = question_weights(batch["rewards"], batch["question_ids"]).tolist()
    data = Dataset.from_dict(rows)
    settings = {"output_dir": str(folder), "max_steps": 1, "learning_rate": LEARNING_RATE, "optim": "sgd",
                "bf16": False, "lr_scheduler_type": "constant", "max_grad_norm": 0, "report_to": "none",
                "use_cpu": True, "eval_steps": 1, "logging_steps": 1, "save_strategy": "no",
                "disable_tqdm": True}  # fmt: skip
    trainer = example.main(student, teacher, data, data, RESPONSE, **{**settings, **options})
    gradients = [
        (x - y).detach() / LEARNING_RATE for x, y in zip(before.parameters(), student.parameters(), strict=True)
    ]
    return gradients, {"before": before, "after": student, "teacher": teacher, **batch}, trainer.state.log_history


ACCUMULATED = {
    "at once": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("options", ACCUMULATED.values(), ids=ACCUMULATED)
def test_hf_trainer(tmp_path, options):
    """A step is the mean over all its tokens, however many a micro-batch has; evaluation, the mean over a batch's."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    gradients, given, log = trained(tmp_path, per_device_eval_batch_size=8, **options)
    loss, exact = expected(given["before"], given["teacher"], given)
    assert distances(gradients, exact) < 1e-5
    (step,) = [line["loss"] for line in log if "loss" in line]
    (evaluated,) = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert math.isclose(step, loss, rel_tol=1e-3)  # the log rounds
    assert math.isclose(evaluated, expected(given["after"], given["teacher"], given)[0], rel_tol=1e-3)


def test_hf_trainer_in_bf16(tmp_path):
    """Under autocast a gradient has the error of bf16 matmuls, which fp32 has not."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    gradients, given, _ = trained(tmp_path, bf16=True, **ACCUMULATED["accumulated"])
    _, exact = expected(given["before"], given["teacher"], given)
    assert 1e-4 < distances(gradients, exact) < 5e-2


# Two processes.


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory) -> dict:
    """What both examples give, one after the other: the processes' start takes longer."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    from trl_models import run_two_processes

    return run_two_processes(__file__, tmp_path_factory.mktemp("hf_trainer"))


def test_hf_trainer_on_two_processes(on_two_processes):
    """Trainer counts the labels of both, and DDP averages their gradients."""
    assert on_two_processes["hf_trainer"]["distance"] < 1e-5


def test_fsdp2(on_two_processes):
    """A question's rollouts are on both processes, and one process has more tokens."""
    found = on_two_processes["fsdp2"]
    assert found["distance"] < 1e-5 and found["loss"] < 1e-5


def test_fsdp2_as_a_script(tmp_path):
    """The whole loop, as the user runs it."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    tiny(1).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "examples" / "fsdp2.py"), str(tmp_path)]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    steps = re.findall(r"loss (\S+), gradient norm (\S+)", run.stdout)
    assert len(steps) == 3 and all(float(x) > 0 for step in steps for x in step)


def fsdp2_gradients() -> dict[str, float]:
    import torch.distributed as dist

    example = importlib.import_module("fsdp2")
    share, batch = ROLLOUTS // dist.get_world_size(), whole_batch()
    own = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    model = tiny(1)
    loss, exact = expected(model, model, batch)
    got = example.backward(example.shard(model), {name: values[own] for name, values in batch.items()})
    gradients = [x.grad.full_tensor() for x in model.parameters()]
    return {"distance": distances(gradients, exact), "loss": abs(got.item() / loss.item() - 1)}


def hf_trainer_gradients(folder: str) -> dict[str, float]:
    gradients, given, _ = trained(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    return {"distance": distances(gradients, expected(given["before"], given["teacher"], given)[1])}


if __name__ == "__main__":
    from trl_models import finish

    of_trainer = hf_trainer_gradients(sys.argv[1])  # which makes the process group
    finish({"hf_trainer": of_trainer, "fsdp2": fsdp2_gradients()})
