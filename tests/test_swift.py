"""scsdpo.swift_plugin in ms-swift's own program: losses and gradients of its GKD on full logits.

Runs where ms-swift is installed (its requirements on TRL differ from this package's: ./dev swift has an environment).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("swift", reason="ms-swift: ./dev swift")

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[1]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPTIONS = {
    "rlhf_type": "gkd", "model_type": "qwen3", "template": "qwen3", "torch_dtype": "float32", "tuner_type": "full",
    "lmbda": 0, "beta": 0.5, "temperature": 0.9, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "max_completion_length": 6, "report_to": "none",
    "save_strategy": "no", "use_cpu": "true", "bf16": "false", "fp16": "false", "gradient_checkpointing": "false",
    "split_dataset_ratio": 0, "dataloader_num_workers": 0, "dataset_num_proc": 1, "attn_impl": "eager", "seed": 3,
    "warmup_ratio": 0, "lora_rank": 4, "lora_dropout": 0, "add_version": "false", "eval_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two Qwen3 of one tokenizer, whose tokens are characters; questions with and without a prompt for the teacher."""
    root = tmp_path_factory.mktemp("swift")
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    letters = "0123456789abcdefghijklmnopqrstuvwxyz<>/+="
    words = {w: i for i, w in enumerate([*special, "<unk>", "\n", " ", *letters])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<unk>",
        chat_template=CHAT,
    )  # fmt: skip
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen3Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            vocab_size=len(words), initializer_range=0.3,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(root / name)
        fast.save_pretrained(root / name)
    rows = []
    for i in range(16):
        asked, told = f"{i} + {2 * i}", str(3 * i) * (1 + i % 3)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        rows.append({"messages": messages, "teacher_prompt": f"{asked} = {told}"})
    (root / "hinted.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = [{"messages": row["messages"]} for row in rows]
    (root / "plain.jsonl").write_text("\n".join(map(json.dumps, plain)))
    (root / "plugin.py").write_text("import scsdpo.swift_plugin\n")
    return root


def main(folder, out, ours, options):
    """In a process of its own: ms-swift's program; the log, and the gradients of the first optimiser step."""
    from swift.pipelines import rlhf_main
    from transformers import TrainerCallback

    torch.set_num_threads(1)
    given = {**OPTIONS, "model": f"{folder}/student", "dataset": f"{folder}/hinted.jsonl", "output_dir": f"{out}/run"}
    given |= {name: str(value).replace("FOLDER", folder) for name, value in json.loads(options).items()}
    arguments = [str(x) for name, value in given.items() for x in (f"--{name}", *str(value).split())]
    if ours == "ours":
        arguments += ["--external_plugins", f"{folder}/plugin.py"]
    found = {}

    class First(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            if not found:
                found.update({n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None})

        def on_train_end(self, args, state, control, **_):
            lines = [{k: line[k] for k in ("loss", "grad_norm")} for line in state.log_history if "loss" in line]
            torch.save({"log": lines, "gradients": found, "trainer": type(trainers[-1]).__name__}, f"{out}/found.pt")

    import swift.rlhf_trainers.gkd_trainer as gkd

    trainers, init = [], gkd.GKDTrainer.__init__

    def started(self, *a, **k):
        init(self, *a, **k)
        trainers.append(self)
        self.add_callback(First())

    gkd.GKDTrainer.__init__ = started
    rlhf_main(arguments)


def run(folder, tmp_path, ours, **options):
    out = tmp_path / ours
    out.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*sys.path])), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, folder, out, ours, json.dumps(options)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return torch.load(out / "found.pt")


CASES = {
    "self-distillation": {},
    "forward KL": {"beta": 0},
    "reverse KL, one row at a time": {"beta": 1, "per_device_train_batch_size": 1},
    "LoRA, the teacher without it": {"tuner_type": "lora", "teacher_model": "FOLDER/student",
                                     "target_modules": "q_proj lm_head", "init_weights": "false"},
    "another model": {"teacher_model": "FOLDER/teacher", "teacher_model_type": "qwen3",
                      "dataset": "FOLDER/plain.jsonl"},
    "rollouts of the student": {"lmbda": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_ms_swifts_loss(folder, tmp_path, name):
    stock, ours = (run(folder, tmp_path, kind, **CASES[name]) for kind in ("stock", "ours"))
    assert (stock["trainer"], ours["trainer"]) == ("GKDTrainer", "FusedGKDTrainer")
    assert len(stock["log"]) == len(ours["log"]) == 2 and stock["log"][0]["loss"] > 1e-3
    for a, b in zip(ours["log"], stock["log"], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert ours["gradients"].keys() == stock["gradients"].keys() and len(ours["gradients"]) >= 2
    whole = {kind: torch.cat([x.flatten() for x in found["gradients"].values()]) for kind, found in
             (("stock", stock), ("ours", ours))}  # fmt: skip
    assert (whole["ours"] - whole["stock"]).norm() <= 1e-6 * whole["stock"].norm()


def test_the_command_of_the_page_runs(folder, tmp_path):
    """With a tiny model, its type, and two steps in fp32."""
    page = (ROOT / "docs" / "trainers.md").read_text()
    (command,) = (code for code in re.findall(r"```bash\n(.*?)```", page, re.S) if "swift rlhf" in code)
    (tmp_path / "data.jsonl").write_text((folder / "hinted.jsonl").read_text())
    given = set(re.findall(r"--(\w+)", command))
    further = [f"--{name} {value}" for name, value in {**OPTIONS, "max_completion_length": 6}.items()
               if name not in given or name == "max_completion_length"]  # fmt: skip
    command = command.rstrip().replace("MODEL", str(folder / "student")) + " " + " ".join(further)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (log,) = tmp_path.rglob("logging.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 2


def test_what_needs_logits_raises(folder, tmp_path):
    with pytest.raises(AssertionError, match="gkd_logits_topk: expected None; the divergence has the whole vocabulary"):
        run(folder, tmp_path, "ours", gkd_logits_topk=5)


def test_the_file_itself_is_no_plugin():
    """Its folder would come first in sys.path, and trl.py there be taken for TRL."""
    from swift.utils import import_external_file

    file = ROOT / "python" / "scsdpo" / "swift_plugin.py"
    before = list(sys.path)
    try:
        with pytest.raises(ImportError, match="--external_plugins: expected a file of yours with the line"):
            import_external_file(str(file))
    finally:
        sys.path[:] = before


if __name__ == "__main__":
    main(*sys.argv[1:])
