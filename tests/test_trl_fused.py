"""FusedSDFTTrainer and FusedDistillationTrainer beside TRL's own: the same losses, gradient norms and entropies."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl", reason="trl: pip install '.[trl]'")

import trl
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl_models import BASE, MODELS, QUESTIONS, SIZES, finish, run_two_processes, save, sharded

import scsdpo.trl
from scsdpo.trl import FusedSDFTConfig, FusedSDFTTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models"))


def sdft(trainer, config, folder, model="qwen3", **options):
    where = folder / model
    loaded = MODELS[model][1].from_pretrained(where, dtype=torch.float32)
    data = QUESTIONS.add_column("privileged_context", [f"{i} 9 9 {i}" for i in range(len(QUESTIONS))])
    names = ("max_prompt_length", "diagnostics_warning_interval")
    base = {name: value for name, value in BASE.items() if name not in names}
    run = trainer(
        model=loaded, train_dataset=data, processing_class=PreTrainedTokenizerFast.from_pretrained(where),
        args=config(output_dir=str(folder / "out"), **{**base, "max_completion_length": 16, **options}),
    )  # fmt: skip
    run.train()
    return [line for line in run.state.log_history if "loss" in line], loaded


SDFT = {
    "Jensen-Shannon": {},
    "skipped tokens": {"num_loss_tokens_to_skip": 3},
    "reverse KL, live": {"distillation_alpha": 1.0, "teacher_model_kind": "live"},
    "base, sampled token, clip": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0, "num_iterations": 2,
                                  "distillation_is_clip": 1.2, "teacher_model_kind": "base"},
    "from the teacher": {"generate_from_teacher": True, "num_iterations": 2},
    "1 x 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", SDFT)
def test_sdft(folder, name):
    options = {"teacher_model_kind": "ema", "num_generations": 1, **SDFT[name]}
    stock, stock_model = sdft(SDFTTrainer, SDFTConfig, folder, **options)
    ours, our_model = sdft(FusedSDFTTrainer, FusedSDFTConfig, folder, **options)
    assert len(ours) == len(stock) == 3 and max(abs(line["loss"]) for line in stock) > 1e-3
    for a, b in zip(ours, stock, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-7)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5, abs=2e-6)
        name = "self_distillation/distillation_loss"
        assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7)
    for a, b in zip(our_model.parameters(), stock_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_a_stock_config_is_refused(folder):
    with pytest.raises(TypeError, match="args: expected a FusedSDFTConfig, got SDFTConfig"):
        sdft(FusedSDFTTrainer, SDFTConfig, folder)


@pytest.fixture(scope="module")
def teacher(folder):
    """Another model with another width."""
    torch.manual_seed(9)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 48, "num_hidden_layers": 1})).save_pretrained(
        folder / "another"
    )
    return folder / "another"


def distilled(trainer, folder, teacher, model="qwen3", config=None, prepare=None, **options):
    where = folder / model
    loaded = MODELS[model][1].from_pretrained(where, dtype=torch.float32)
    names = ("num_generations", "distillation_mode", "distillation_alpha", "max_prompt_length",
             "diagnostics_warning_interval")  # fmt: skip
    base = {name: value for name, value in BASE.items() if name not in names}
    run = trainer(
        model=loaded, teacher_model=LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        train_dataset=QUESTIONS, processing_class=PreTrainedTokenizerFast.from_pretrained(where),
        args=(config or trl.DistillationConfig)(output_dir=str(folder / "out"), **{**base, **options}),
    )  # fmt: skip
    if prepare is not None:
        prepare(run)
    run.train()
    assert run.is_fsdp_enabled == ("fsdp" in options)
    return [line for line in run.state.log_history if "loss" in line]


DISTILLED = {
    "default": ("qwen3", {}),
    "Jensen-Shannon": ("qwen3, tied", {"beta": 0.5}),
    "forward KL, temperature": ("qwen3", {"beta": 0.0, "temperature": 0.7}),
    "softcap": ("gemma2", {"beta": 1.0}),
    "checkpointing": ("llama", {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("name", DISTILLED)
def test_distillation(folder, teacher, name):
    """Within 5e-7 of the stock trainer, which projects tiles as well."""
    if not hasattr(trl, "DistillationTrainer"):
        with pytest.raises(ImportError, match="FusedDistillationTrainer is made for trl"):
            scsdpo.trl.FusedDistillationTrainer  # noqa: B018
        pytest.skip("TRL has no DistillationTrainer before 1.10")
    model, options = DISTILLED[name]
    stock = distilled(trl.DistillationTrainer, folder, teacher, model, **options)
    ours = distilled(scsdpo.trl.FusedDistillationTrainer, folder, teacher, model, **options)
    assert len(ours) == len(stock) == 3 and stock[0]["loss"] > 1e-2
    for step, (a, b) in enumerate(zip(ours, stock, strict=True)):
        for key in ("loss", "grad_norm", "entropy"):
            assert a[key] == pytest.approx(b[key], rel=5e-7 if step == 0 else 5e-6), (key, step)


has_distillation = pytest.mark.skipif(
    not hasattr(trl, "DistillationTrainer"), reason="TRL has no DistillationTrainer before 1.10"
)


@has_distillation
def test_metrics_of_a_distillation(folder, teacher):
    """The mean over all tokens of a step, not over micro-batches; everything else is logged as without."""
    sums = []

    def watch(run):
        compute_loss = run._compute_loss

        def seen(student, inputs, count):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            there = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            width, mask = inputs["completion_ids"].shape[1], inputs["completion_mask"]
            with torch.no_grad():
                top = [x(input_ids=ids, attention_mask=there).logits[:, -width - 1 : -1].argmax(-1)
                       for x in (student, run.teacher_model)]  # fmt: skip
            sums.append((run.state.global_step, ((top[0] == top[1]) * mask).sum().item(), mask.sum().item()))
            return compute_loss(student, inputs, count)

        run._compute_loss = seen

    trainer, config = scsdpo.trl.FusedDistillationTrainer, scsdpo.trl.FusedDistillationConfig
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-2}
    plain = distilled(trainer, folder, teacher, **options)
    lines = distilled(trainer, folder, teacher, config=config, prepare=watch, divergence_metrics=["top1_agreement"],
                      **options)  # fmt: skip
    for step, (line, without) in enumerate(zip(lines, plain, strict=True)):
        agree, tokens = (sum(x[i] for x in sums if x[0] == step) for i in (1, 2))
        assert line.pop("scsdpo/top1_agreement") == pytest.approx(agree / tokens, rel=1e-6)
        assert line.keys() == without.keys() and line["loss"] == without["loss"]
    with pytest.raises(ValueError, match="divergence_metrics: expected some of top1_agreement with these settings"):
        distilled(trainer, folder, teacher, config=config, divergence_metrics=["support_mass"])


def test_metrics_of_sdft(folder):
    lines, _ = sdft(FusedSDFTTrainer, FusedSDFTConfig, folder, teacher_model_kind="live", num_generations=1,
                    divergence_metrics=["top1_agreement"])  # fmt: skip
    values = [line["scsdpo/top1_agreement"] for line in lines]
    assert len(values) == 3 and all(0 < x < 1 for x in values)


@has_distillation
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_distillation_on_two_processes(folder, teacher, wrapper):
    """Both models wrapped: losses, gradient norms and entropies are those of the stock trainer."""
    stock, ours = run_two_processes(__file__, wrapper, folder, teacher)
    for a, b in zip(ours, stock, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def main(wrapper, folder, teacher):
    torch.set_num_threads(1)
    options, found = sharded() if wrapper == "fsdp" else {}, []
    for trainer in (trl.DistillationTrainer, scsdpo.trl.FusedDistillationTrainer):
        lines = distilled(trainer, Path(folder), Path(teacher), max_steps=2, **options)
        found.append([[line[key] for key in ("loss", "grad_norm", "entropy")] for line in lines])
    finish(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
