"""scsdpo.trl beside the stock trainer: the same losses and gradient norms over several optimiser steps."""

import functools
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from test_package import LargestTensor

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl", reason="trl: pip install '.[trl]'")

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, TrainerCallback
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer, sdpo_trainer
from trl_models import BASE, MODELS, QUESTIONS, SIZES, WORDS, finish, reward, run_two_processes, save, sharded

from scsdpo.ema_teacher import EMATeacher
from scsdpo.trl import SCSDPOConfig, SCSDPOTrainer
from scsdpo_kernels import METRICS
from scsdpo_kernels.schedules import chunked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models"))


def train(trainer, config, folder, model, prepare=None, reward=reward, data=None, resume=None, **options):
    """The log's lines of a short training, and its model."""
    where = folder / model
    loaded = MODELS[model][1].from_pretrained(where, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(where)
    extra = {name: options.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in options}
    arguments = config(**{"output_dir": str(folder / "out"), **BASE, **options})
    run = trainer(model=loaded, reward_funcs=reward, args=arguments, train_dataset=data or QUESTIONS,
                  processing_class=tokenizer, **extra)  # fmt: skip
    if prepare is not None:
        prepare(run)
    run.train(resume_from_checkpoint=resume)
    return [line for line in run.state.log_history if "loss" in line], loaded


CONFIGURATIONS = {
    "forward KL": ("qwen3", {"distillation_alpha": 0.0}),
    "Jensen-Shannon": ("qwen3", {}),
    "reverse KL": ("qwen3", {"distillation_alpha": 1.0}),
    "tied, Jensen-Shannon": ("qwen3, tied", {}),
    "tied, reverse KL": ("qwen3, tied", {"distillation_alpha": 1.0}),
    "IS clip, temperature": ("qwen3", {"num_iterations": 2, "temperature": 0.7, "distillation_is_clip": 1.5}),
    "checkpointing": ("qwen3", {"gradient_checkpointing": True}),
    "live teacher": ("qwen3", {"teacher_model_kind": "live"}),
    "live teacher, tied": ("qwen3, tied", {"teacher_model_kind": "live", "distillation_alpha": 1.0}),
    "base teacher": ("qwen3", {"teacher_model_kind": "base"}),
    "EMA teacher": ("llama", {"teacher_model_kind": "ema", "teacher_update_rate": 0.5}),
    "top-K": ("llama", {"distillation_mode": "topk_logits", "distillation_topk": 5}),
    "top-K, renormalized": ("llama", {"distillation_mode": "topk_logits", "distillation_topk": 5,
                                      "distillation_add_tail": False, "distillation_alpha": 1.0}),
    "sampled token": ("qwen3", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
    "sampled token, IS clip": ("llama", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0,
                                         "num_iterations": 2, "distillation_is_clip": 1.2}),
    "softcap": ("gemma2", {}),
    "softcap, top-K": ("gemma2", {"distillation_mode": "topk_logits", "distillation_topk": 7}),
    "olmo": ("olmo3", {"distillation_alpha": 0.0}),
    "truncated completions masked": ("qwen3", {"mask_truncated_completions": True}),
}  # fmt: skip


def assert_same(ours, stock, first=1e-6, later=1e-5):
    """Losses and gradient norms; after an update, Adam's division by small gradients has made them less equal."""
    assert len(ours) == len(stock) >= 3 and max(abs(line["loss"]) for line in stock) > 1e-3
    for step, (a, b) in enumerate(zip(ours, stock, strict=True)):
        share = first if step == 0 else later
        assert a["loss"] == pytest.approx(b["loss"], rel=share, abs=1e-7)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=share, abs=2e-6)
        assert a.get("completions/mean_length") == b.get("completions/mean_length")


def assert_same_metric(ours, stock):
    name = "self_distillation/distillation_loss"
    for a, b in zip(ours, stock, strict=True):
        assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_without_weights_it_is_trls(folder, name, monkeypatch):
    model, options = CONFIGURATIONS[name]
    if "distillation_topk" in options:  # TRL's tail bucket is off by 2e-4 of the gradient in fp32
        forward = SDPOTrainer._forward_logits
        monkeypatch.setattr(SDPOTrainer, "_forward_logits", lambda *a, **k: forward(*a, **k).double())
    stock, stock_model = train(SDPOTrainer, SDPOConfig, folder, model, **options)
    ours, our_model = train(SCSDPOTrainer, SCSDPOConfig, folder, model, **options, question_weighting="none")
    assert_same(ours, stock)
    assert_same_metric(ours, stock)
    for a, b in zip(our_model.parameters(), stock_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # Adam divides by gradients that may be near 0


POLICIES = {
    "default": {},
    "policy alone": {"distillation_weight": 0.0},
    "grpo": {"loss_type": "grpo", "temperature": 0.7},
    "grpo, sequences": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "bnpo": {"loss_type": "bnpo", "distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    "dr_grpo, top-K": {"loss_type": "dr_grpo", "distillation_mode": "topk_logits", "distillation_topk": 5},
    "off-policy": {"num_iterations": 3, "epsilon": 0.02, "epsilon_high": 0.03, "max_steps": 6},
    "off-policy, alone": {"num_iterations": 3, "distillation_weight": 0.0, "epsilon": 0.02, "max_steps": 6,
                          "distillation_is_clip": None},
    "1 x 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "masked": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "no reprompts": {"success_reward_threshold": 5.0},
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_loss_is_trls(folder, name, monkeypatch):
    """Blended with the divergence or alone, for rollouts with a teacher and without; the policy's own log, too."""
    options = {"distillation_weight": 0.4, "max_completion_length": 12, **POLICIES[name]}
    if "distillation_topk" in options:  # as above
        forward = SDPOTrainer._forward_logits
        monkeypatch.setattr(SDPOTrainer, "_forward_logits", lambda *a, **k: forward(*a, **k).double())
    stock, stock_model = train(SDPOTrainer, SDPOConfig, folder, "qwen3", **options)
    ours, our_model = train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", **options, question_weighting="none")
    assert_same(ours, stock)
    for a, b in zip(ours, stock, strict=True):
        for metric in ("policy_loss", "distillation_loss"):
            metric = f"self_distillation/{metric}"
            if metric in b:
                assert a[metric] == pytest.approx(b[metric], rel=1e-5, abs=1e-6)
    assert any(line["grad_norm"] > 1e-2 for line in stock)  # on-policy the loss of a group is 0, not its gradient
    for a, b in zip(our_model.parameters(), stock_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


class ByHand(SDPOTrainer):
    """The stock trainer, its per-token loss multiplied by question weights written out in Python."""

    weights = ()

    def _prepare_training_batch(self, inputs):
        batch = super()._prepare_training_batch(inputs)
        groups = self.accelerator.gather(batch["rewards"]).view(-1, self.num_generations).tolist()
        rates = [sum(r >= self.args.success_reward_threshold for r in group) / len(group) for group in groups]
        raw = [(rate * (1 - rate)) ** 0.5 for rate in rates]
        there = [w for w in raw if w > 0]
        weights = [w / (sum(there) / len(there)) if w > 0 else 0.0 for w in raw]
        every = torch.tensor(weights).repeat_interleave(self.num_generations)
        start = self.accelerator.process_index * len(batch["rewards"])
        batch["by_hand"] = every[start : start + len(batch["rewards"])]
        return batch

    def compute_loss(self, model, inputs, *arguments, **options):
        ByHand.weights = inputs["by_hand"]
        return super().compute_loss(model, inputs, *arguments, **options)


@pytest.fixture
def weighted_losses(monkeypatch):
    for name in ("compute_full_logit_self_distillation_loss", "compute_topk_self_distillation_loss",
                 "compute_sampled_token_self_distillation_loss"):  # fmt: skip
        loss = getattr(sdpo_trainer, name)
        monkeypatch.setattr(sdpo_trainer, name,
                            lambda *a, loss=loss, **k: loss(*a, **k) * ByHand.weights.unsqueeze(1))  # fmt: skip


@pytest.mark.parametrize("name", ["Jensen-Shannon", "reverse KL", "sampled token, IS clip", "tied, Jensen-Shannon",
                                  "EMA teacher", "softcap"])  # fmt: skip
def test_with_weights_it_is_trls_loss_times_the_weights(folder, name, weighted_losses):
    model, options = CONFIGURATIONS[name]
    options = {**options, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    stock, _ = train(ByHand, SDPOConfig, folder, model, **options)
    ours, _ = train(SCSDPOTrainer, SCSDPOConfig, folder, model, **options)
    assert_same(ours, stock)
    assert any(0 < line["scsdpo/zero_weight_questions"] < 1 for line in ours if "scsdpo/pass_rate" in line)


def test_metrics(folder):
    lines, _ = train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", question_weight_exponent=1.0)
    means = ("divergence", "student_entropy", "teacher_entropy")
    for line in lines:
        for name in ("pass_rate", "zero_weight_questions", "rows_kept"):
            assert 0 <= line[f"scsdpo/{name}"] <= 1, name
        for name in means:  # not there without a token that has a weight
            assert (f"scsdpo/{name}" in line) == (line["scsdpo/rows_kept"] > 0), name
    kept = [line for line in lines if line["scsdpo/rows_kept"] > 0]
    assert kept and all(line["scsdpo/student_entropy"] > 0.1 and line["scsdpo/divergence"] > 0 for line in kept)
    assert {line["scsdpo/pass_rate"] for line in lines} <= {i / 8 for i in range(9)}


def test_metrics_do_not_depend_on_micro_batches(folder):
    """They are means over the tokens of an optimiser step that have a weight, whichever micro-batch has them."""
    values = []
    for size, dealt in ((8, True), (1, True), (1, False)):
        (line,), _ = train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", per_device_train_batch_size=size, max_steps=1,
                           gradient_accumulation_steps=8 // size, deal_rollouts=dealt)  # fmt: skip
        values.append([line[f"scsdpo/{x}"] for x in ("divergence", "student_entropy", "teacher_entropy", "rows_kept")])
    assert values[0][3] > 0
    for others in values[1:]:
        assert others == pytest.approx(values[0], rel=1e-5)


def full_logits(inputs, student, teacher, temperature):
    """Log-probabilities of both sides at completions, by the models' own forwards."""
    completion, mask = inputs["completion_ids"], inputs["completion_mask"]
    ids = torch.cat([inputs["prompt_ids"], completion], 1), inputs["teacher_input_ids"]
    there = torch.cat([inputs["prompt_mask"], mask], 1), inputs["teacher_attention_mask"]
    with torch.no_grad():
        for model, *given in zip((student, teacher), ids, there, strict=True):
            z = model(input_ids=given[0], attention_mask=given[1]).logits[:, -completion.shape[1] - 1 : -1]
            yield (z.double() / temperature).log_softmax(-1)


LOGGED = {
    "top 1": {"divergence_metrics": ["top1_agreement"]},
    "top-K": {"divergence_metrics": ["support_mass", "top1_agreement"], "distillation_mode": "topk_logits",
              "distillation_topk": 5},
    "importance": {"divergence_metrics": ["importance_clipped"], "num_iterations": 2, "distillation_is_clip": 1.01,
                   "learning_rate": 1e-2, "max_steps": 4},
    "a policy, too": {"divergence_metrics": ["top1_agreement"], "distillation_weight": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", LOGGED)
def test_metrics_that_are_asked_for(folder, name):
    """Means over all tokens of an optimiser step that have a weight; some of its micro-batches are empty."""
    sums, ran = [], []

    def watch(run):
        distill = run._distill

        def seen(model, inputs):
            p, q = full_logits(inputs, model, run.teacher_model, run.temperature)
            mask = (inputs["loss_mask"] * (inputs["question_weight"] != 0)[:, None]).double()
            top = p.topk(5).indices
            found = {
                "top1_agreement": p.argmax(-1) == q.argmax(-1),
                "student_support_mass": p.gather(-1, top).exp().sum(-1),
                "teacher_support_mass": q.gather(-1, top).exp().sum(-1),
            }
            if (old := inputs.get("old_per_token_logps")) is not None:
                own = p.gather(-1, inputs["completion_ids"][..., None])[..., 0]
                found["importance_clipped"] = own - old > math.log(1.01)
            sums.append(
                {x: (values * mask).sum().item() for x, values in found.items()} | {"tokens": mask.sum().item()}
            )
            ran.append(run.state.global_step)
            return distill(model, inputs)

        run._distill = seen

    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 3, **LOGGED[name]}
    lines, _ = train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", prepare=watch, **options)
    plain, _ = train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", **{**options, "divergence_metrics": []})
    entries = [entry for x in options["divergence_metrics"] for entry in METRICS[x]]
    values = []
    for step, line in enumerate(lines):
        of_step = [x for x, at in zip(sums, ran, strict=True) if at == step]
        tokens = sum(x["tokens"] for x in of_step)
        for entry in entries:
            assert (f"scsdpo/{entry}" in line) == (tokens > 0)
            if tokens:
                values.append(line[f"scsdpo/{entry}"])
                assert values[-1] == pytest.approx(sum(x[entry] for x in of_step) / tokens, rel=1e-5, abs=1e-9)
    assert any(0 < x < 1 for x in values)
    assert name == "a policy, too" or len(ran) < 8 * len(lines), "no micro-batch was empty"
    for line, without in zip(lines, plain, strict=True):
        others = {x: value for x, value in line.items() if x.removeprefix("scsdpo/") not in entries}
        assert others.keys() == without.keys() and others["loss"] == without["loss"]
        assert others["grad_norm"] == without["grad_norm"]


class Count:
    """Shapes that student and teacher run, by what for; generation is not counted."""

    def __init__(self, trainer):
        self.shapes, self.phase = [], None
        self.trainer = trainer
        for name, model in {"student": trainer.model, "teacher": trainer.teacher_model}.items():
            if name == "student" or model is not trainer.model:
                model.model.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self.seen(name, kwargs["input_ids"]), with_kwargs=True
                )
        for name in ("compute_loss", "_with_old_logps", "_compute_rollout_logps"):
            if hasattr(trainer, name):
                setattr(trainer, name, self.during(name, getattr(trainer, name)))

    def during(self, phase, function):
        def counted(*arguments, **options):
            self.phase = phase
            try:
                return function(*arguments, **options)
            finally:
                self.phase = None

        return counted

    def seen(self, name, ids):
        if self.phase is not None:
            self.shapes.append((name if self.phase == "compute_loss" else "old", self.trainer._step, *ids.shape))

    def tokens(self):
        return sum(rows * length for *_, rows, length in self.shapes)


def counted(trainer, config, folder, **options):
    """The log, the model, and what was run in update phases."""
    found = []
    lines, model = train(trainer, config, folder, "qwen3", prepare=lambda run: found.append(Count(run)), **options)
    return lines, model, found[0]


def one_in_four(completion_ids, prompts, **_):
    """Three questions of four are all wrong; of the others every second rollout is right."""
    return [float(i % 2 and int(prompt.split()[0]) % 4 == 0) for i, prompt in enumerate(prompts)]


def test_rollouts_of_weight_0_are_not_run(folder):
    """Neither by the student nor by the teacher, but for two tokens in the last micro-batch of a step without any."""
    lines, _, count = counted(SCSDPOTrainer, SCSDPOConfig, folder, per_device_train_batch_size=4, max_steps=6,
                              gradient_accumulation_steps=2, reward=one_in_four)  # fmt: skip
    weighted = [0 < line["scsdpo/zero_weight_questions"] < 1 for line in lines]
    assert any(weighted) and not all(weighted)
    for step, has_weight in enumerate(weighted):
        for model in ("student", "teacher"):
            run = [shape[2:] for shape in count.shapes if shape[0] == model and shape[1] // 2 == step]
            assert sum(rows for rows, _ in run) == 4 if has_weight else run == [(1, 2)]


def test_flat_groups_have_a_loss_of_0_and_no_gradient(folder):
    lines, model = train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", success_reward_threshold=5.0)
    before = MODELS["qwen3"][1].from_pretrained(folder / "qwen3", dtype=torch.float32)
    assert all(line["loss"] == 0 and line["grad_norm"] == 0 and line["scsdpo/rows_kept"] == 0 for line in lines)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_iterations": 2,
     "distillation_is_clip": 1.5},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8, "max_steps": 5},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "steps_per_generation": 2, "max_steps": -1,
     "num_train_epochs": 1},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "distillation_mode": "sampled_token",
     "distillation_alpha": 1.0, "temperature": 0.8, "teacher_model_kind": "live"},
], ids=["1 x 16", "iterations", "longer generation", "shorter generation", "last step", "sampled token"])  # fmt: skip
def test_dealing_changes_neither_losses_nor_gradients(folder, options, weighted_losses):
    """Step by step, of rollouts of many lengths: the stock trainer's, and our own where they were drawn."""
    options = {"max_completion_length": 24, **options}
    stock, stock_model = train(ByHand, SDPOConfig, folder, "qwen3", **options)
    drawn, drawn_model, as_drawn = counted(SCSDPOTrainer, SCSDPOConfig, folder, **options, deal_rollouts=False)
    dealt, dealt_model, count = counted(SCSDPOTrainer, SCSDPOConfig, folder, **options)
    assert count.tokens() < as_drawn.tokens()
    assert_same(dealt, stock)
    assert_same(dealt, drawn)
    assert_same_metric(dealt, drawn)
    for a, b, c in zip(*(x.parameters() for x in (dealt_model, drawn_model, stock_model)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
        torch.testing.assert_close(a, c, rtol=0, atol=2e-4)


def test_old_log_probabilities_are_of_rollouts_with_a_weight(folder):
    lines, _, count = counted(SCSDPOTrainer, SCSDPOConfig, folder, per_device_train_batch_size=4, max_steps=6,
                              gradient_accumulation_steps=2, num_iterations=2, distillation_is_clip=2.0,
                              reward=one_in_four)  # fmt: skip
    run = [shape[2] for shape in count.shapes if shape[0] == "old"]
    weighted = sum("scsdpo/pass_rate" in line and line["scsdpo/zero_weight_questions"] < 1 for line in lines)
    assert weighted and sum(run) == 4 * weighted


def test_where_all_processes_are_needed_a_stand_in_of_two_tokens_runs(folder, monkeypatch):
    """As with sharded parameters: every micro-batch runs, with the same losses."""
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "reward": one_in_four,
               "num_iterations": 2, "distillation_is_clip": 2.0, "max_steps": 6}  # fmt: skip
    left_out, _, few = counted(SCSDPOTrainer, SCSDPOConfig, folder, **options)
    monkeypatch.setattr(SCSDPOTrainer, "_is_alone_until_the_last", lambda self: False)
    run, _, every = counted(SCSDPOTrainer, SCSDPOConfig, folder, **options)
    assert [(x["loss"], x["grad_norm"]) for x in run] == [(x["loss"], x["grad_norm"]) for x in left_out]
    for model, calls in (("student", 6 * 8), ("teacher", 6 * 8), ("old", 3 * 8)):
        shapes = [x[2:] for x in every.shapes if x[0] == model]
        assert len(shapes) == calls and {x for x in shapes if x[1] == 2} == {(1, 2)}
        assert [x for x in shapes if x != (1, 2)] == [x[2:] for x in few.shapes if x[0] == model and x[2:] != (1, 2)]


def one_in_eight(completion_ids, prompts, **_):
    """Seven questions of eight are all wrong; of the others every second rollout is right."""
    return [float(i % 2 and int(prompt.split()[0]) % 8 == 0) for i, prompt in enumerate(prompts)]


SPLITS = [(8, 4), (4, 8), (2, 16), (1, 32)]


def table_of_tokens():
    """Ours / stock, by rollouts in a micro-batch and micro-batches: docs/trainers.md's two columns."""
    page = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text()
    rows = re.findall(r"^\| (\d+) × (\d+) \| (0\.\d+) \| (0\.\d+) \|$", page, re.M)
    return {(int(size), int(steps)): [float(x) for x in shares] for size, steps, *shares in rows}


@pytest.mark.parametrize("size, steps", SPLITS)
def test_tokens_at_12_percent_with_a_weight(folder, size, steps, monkeypatch):
    """At most 0.17 of the stock trainer's, whatever the micro-batches; docs/trainers.md has the table."""

    def tokens(trainer, config):
        lines, _, count = counted(trainer, config, folder, per_device_train_batch_size=size, max_steps=2,
                                  gradient_accumulation_steps=steps, reward=one_in_eight, max_completion_length=24,
                                  data=QUESTIONS.select(range(16)), shuffle_dataset=False)  # fmt: skip
        assert all(line.get("scsdpo/zero_weight_questions", 0.875) == 0.875 for line in lines)
        return count.tokens()

    stock, ours = tokens(SDPOTrainer, SDPOConfig), tokens(SCSDPOTrainer, SCSDPOConfig)
    monkeypatch.setattr(
        SCSDPOTrainer, "_is_alone_until_the_last", lambda self: False
    )  # every micro-batch runs, as when sharded
    share, sharded = ours / stock, tokens(SCSDPOTrainer, SCSDPOConfig) / stock
    print(f"{size} × {steps}: {ours} / {stock} = {share:.3f}; {sharded:.3f} where every micro-batch runs")
    assert share <= sharded <= 0.17
    assert [share, sharded] == pytest.approx(table_of_tokens()[size, steps], abs=0.015)


@pytest.mark.parametrize("kind", ["live", "base"])
def test_a_head_that_both_share_is_not_gathered(folder, kind):
    heads = []

    def watch(run):
        gather = run._head_of_teacher
        run._head_of_teacher = lambda: heads.append(gather()) or heads[-1]

    train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", watch, teacher_model_kind=kind, max_steps=1)
    assert (heads == []) == (kind == "live")
    assert all(head.weight.shape == (len(WORDS), SIZES["hidden_size"]) for head in heads)


def test_evaluation_and_generation_are_untouched(folder):
    from scsdpo.head import unpatch_lm_head

    def check(trainer):
        model, ids = trainer.model, torch.tensor([[5, 6, 7]])
        patched = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        unpatch_lm_head(model)
        assert torch.equal(patched, model(ids).logits)
        assert torch.equal(tokens, model.generate(ids, max_new_tokens=4, do_sample=False))
        from scsdpo.head import patch_lm_head

        patch_lm_head(model)
        assert "eval_loss" in trainer.evaluate(QUESTIONS.select(range(4)))

    train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", prepare=check, max_steps=1, eval_strategy="no",
          per_device_eval_batch_size=4)  # fmt: skip


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_without_weight_can_leave_out_its_update(folder, skip):
    """Otherwise Adam's momentum, weight decay and the moving-average teacher go on, as in the stock trainer."""
    flat = []

    def reward(completion_ids, **_):
        return [float(i % 2 and not flat) for i in range(len(completion_ids))]

    class Watch(TrainerCallback):
        def __init__(self):
            self.moved, self.before = [], None

        def on_step_begin(self, args, state, control, **_):
            flat[:] = [True] if state.global_step >= 2 else []
            now = [x.detach().clone() for model in self.models for x in model.parameters()]
            if self.before is not None:
                self.moved.append([not torch.equal(a, b) for a, b in zip(now, self.before, strict=True)])
            self.before = now

    watch = Watch()
    lines, _ = train(
        SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", reward=reward, max_steps=5, weight_decay=0.1,
        skip_zero_steps=skip, teacher_update_rate=0.5, callbacks=[watch],
        prepare=lambda run: setattr(watch, "models", (run.model, run.teacher_model)),
    )  # fmt: skip
    assert [line["loss"] > 1e-3 for line in lines] == [True, True, False, False, False]
    assert len(watch.moved) == 4 and all(watch.moved[0]) and all(watch.moved[1])
    for moved in watch.moved[2:]:
        assert not any(moved) if skip else all(moved)


def resumed(trainer, config, folder, tmp_path, peft_config, **options):
    """Losses of steps 4 to 6, in one run and after a checkpoint; and both teachers."""
    options = {"teacher_model_kind": "ema", "teacher_update_rate": 0.5, "max_steps": 6, "save_strategy": "steps",
               "save_steps": 3, "output_dir": str(tmp_path), "learning_rate": 1e-2, **options}  # fmt: skip
    losses, teachers = [], []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        extra = {} if peft_config is None else {"peft_config": peft_config()}
        lines, _ = train(trainer, config, folder, "qwen3", prepare=teachers.append, resume=resume, **extra, **options)
        losses.append([line["loss"] for line in lines][-3:])
    teachers = [[x.detach() for n, x in run.teacher_model.named_parameters() if extra == {} or "teacher" in n]
                for run in teachers]  # fmt: skip
    return losses, teachers


def lora():
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("peft_config", [None, lora], ids=["a model", "an adapter"])
def test_a_moving_average_teacher_is_resumed(folder, tmp_path, peft_config):
    losses, teachers = resumed(SCSDPOTrainer, SCSDPOConfig, folder, tmp_path, peft_config)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and any(x > 1e-3 for x in losses[0])
    for a, b in zip(*teachers, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_checkpoint_without_the_teacher_warns(folder, tmp_path):
    options = {"teacher_model_kind": "ema", "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    train(SDPOTrainer, SDPOConfig, folder, "qwen3", **options)
    with pytest.warns(UserWarning, match="expected the moving-average teacher, found none"):
        train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", resume=str(tmp_path / "checkpoint-2"), **options)


def test_weights_in_evaluation_do_not_depend_on_the_batch(folder):
    """A question's is (p (1 - p))^½, whichever others are beside it."""
    losses = []
    for size in (4, 8, 20):
        options = {"per_device_eval_batch_size": size, "eval_dataset": QUESTIONS.select(range(5)), "max_steps": 1}
        torch.manual_seed(0)
        rewards = iter([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0], [0.0] * 4, [1.0] * 4, [1.0, 1.0, 1.0, 0.0]])

        def reward(completion_ids, rewards=rewards, **_):
            return [x for _ in range(len(completion_ids) // 4) for x in next(rewards)]

        seen = []

        def check(run, seen=seen):
            prepare = run._prepare_training_batch

            def prepared(inputs):
                batch = prepare(inputs)
                seen.extend(batch["question_weight"].tolist())
                return batch

            run._prepare_training_batch = prepared
            losses.append(run.evaluate()["eval_loss"])
            run.reward_funcs = [lambda completion_ids, **_: [0.0] * len(completion_ids)]

        train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", prepare=check, reward=reward, **options)
        weights = [x for x in (3**0.5 / 4, 0.5, 0.0, 0.0, 3**0.5 / 4) for _ in range(4)]
        assert seen[:20] == pytest.approx(weights)
    assert all(x > 1e-3 for x in losses)


def test_the_model_card_cites_both_papers(folder, tmp_path):
    train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", max_steps=1, output_dir=str(tmp_path),
          prepare=lambda run: run.create_model_card(model_name="a model"))  # fmt: skip
    card = (tmp_path / "README.md").read_text()
    for paper in ("2605.27765", "2601.20802"):
        assert f"arXiv:{paper}" in card
    assert "trained with SC-SDPO" in card
    assert "trained with SC-SDPO" in card and "https://huggingface.co/papers/2605.27765" in card and "- sc-sdpo" in card


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "distillation_is_clip": 2.0},
                                     {"distillation_mode": "topk_logits", "distillation_topk": 5}])  # fmt: skip
def test_no_tensor_of_rows_by_vocabulary(folder, options, monkeypatch, tmp_path):
    """In whole steps with rollouts, their log-probabilities, teacher and backward; the stock trainer has several."""
    rows, vocabulary = 16 * 24, 1500
    (config, model, _), name = MODELS["qwen3"], "large"
    monkeypatch.setitem(MODELS, name, MODELS["qwen3"])
    model(config(**{**SIZES, "vocab_size": vocabulary})).save_pretrained(folder / name)
    PreTrainedTokenizerFast.from_pretrained(folder / "qwen3").save_pretrained(folder / name)
    monkeypatch.setattr(chunked, "MIN_ROWS", 32)
    monkeypatch.setitem(chunked.BUFFER_BYTES, "cpu", 0)
    largest = {}
    for trainer, arguments in ((SDPOTrainer, SDPOConfig), (SCSDPOTrainer, SCSDPOConfig)):
        with LargestTensor() as seen:
            train(trainer, arguments, folder, name, **options, per_device_train_batch_size=16, max_completion_length=24,
                  gradient_accumulation_steps=1, max_steps=2)  # fmt: skip
        largest[trainer] = seen.numel
    assert largest[SDPOTrainer] >= rows * vocabulary
    assert largest[SCSDPOTrainer] < rows * vocabulary // 3, largest


@pytest.mark.parametrize("options, message", [
    ({"question_weighting": "all"}, "question_weighting: expected 'sc-sdpo' or 'none', got 'all'"),
    ({"distillation_weight": 0.5, "loss_type": "ppo"}, "loss_type: expected grpo, bnpo, dapo or dr_grpo, got 'ppo'"),
    ({"distillation_weight": 0.5, "num_iterations": 3, "distillation_is_clip": None},
     "distillation_is_clip: expected a number with distillation_weight between 0 and 1"),
    ({"distillation_weight": 0.5, "num_iterations": 3, "loss_type": "grpo", "importance_sampling_level": "sequence"},
     "importance_sampling_level: expected 'token' with distillation_weight below 1"),
    ({"distillation_mode": "topk_logits"}, "distillation_topk: expected a number"),
    ({"divergence_metrics": ["support_mass"]},
     "divergence_metrics: expected some of top1_agreement with these settings, got 'support_mass'"),
    ({"divergence_metrics": ["importance_clipped"], "distillation_is_clip": 2.0},
     "divergence_metrics: expected some of top1_agreement with these settings, got 'importance_clipped'"),
    ({"divergence_metrics": ["entry_clipped"]},
     "divergence_metrics: expected some of top1_agreement with these settings, got 'entry_clipped'"),
    ({"divergence_metrics": ["top1_agreement"], "distillation_weight": 0.0},
     "divergence_metrics: expected none with these settings, got 'top1_agreement'"),
])  # fmt: skip
def test_what_it_does_not_have_raises(folder, options, message):
    with pytest.raises(ValueError, match=message):
        train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", **options)


ADAPTED = [(teacher, adapted) for teacher in ("live", "base") for adapted in ("others", "head", "copy of the head")]


@pytest.mark.parametrize("teacher, adapted", [*ADAPTED, ("ema", "others")])
def test_adapters(folder, teacher, adapted):
    """A teacher that is the student without its adapter has the head that goes with it."""
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "v_proj", *(["lm_head"] if adapted == "head" else [])]
    options = {"modules_to_save": ["lm_head"]} if adapted == "copy of the head" else {}
    results = []
    for trainer, config, extra in (
        (SDPOTrainer, SDPOConfig, {}),
        (SCSDPOTrainer, SCSDPOConfig, {"question_weighting": "none"}),
    ):
        torch.manual_seed(5)
        loaded = Qwen3ForCausalLM.from_pretrained(folder / "qwen3", dtype=torch.float32)
        arguments = config(
            output_dir=str(folder / "out"),
            **{**BASE, "teacher_model_kind": teacher, "teacher_update_rate": 0.5, "learning_rate": 1e-2, **extra},
        )
        run = trainer(model=loaded, reward_funcs=reward, args=arguments, train_dataset=QUESTIONS,
                      processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "qwen3"),
                      peft_config=peft.LoraConfig(r=4, target_modules=modules, **options))  # fmt: skip
        run.train()
        results.append([line for line in run.state.log_history if "loss" in line])
    assert_same(*reversed(results))
    assert_same_metric(*reversed(results))


def test_lora_on_the_head_with_a_moving_average_raises(folder):
    """TRL's own trainer then goes on with a head of zeros."""
    peft = pytest.importorskip("peft")
    options = {"teacher_model_kind": "ema", "max_steps": 1}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    _, stock = train(SDPOTrainer, SDPOConfig, folder, "qwen3", peft_config=config, **options)
    assert not stock.lm_head.base_layer.weight.any()
    with pytest.raises(ValueError, match="teacher_model_kind: expected 'live' or 'base'"):
        train(SCSDPOTrainer, SCSDPOConfig, folder, "qwen3", peft_config=config, **options)


# What two processes train, one after another: their start takes longer than a training.
ON_TWO = (
    "stock", "straddling", "one, drawn", "one, dealt", "one, twice, drawn", "one, twice, dealt",
    "one, reduced each time, drawn", "one, reduced each time, dealt", "stock, policy", "policy", "resumed",
)  # fmt: skip
SHARDED_ON_TWO = ("one, drawn", "one, twice, dealt", "policy", "one, teacher")


@functools.cache
def of_two_processes(wrapper, folder):
    return run_two_processes(__file__, wrapper, folder, *(SHARDED_ON_TWO if wrapper == "sharded" else ON_TWO))


def two_processes(what, folder):
    """The log of two processes, and the tokens that each of them ran."""
    wrapper = "sharded" if what.startswith("sharded") else "ddp"
    return of_two_processes(wrapper, folder)[what.removeprefix("sharded, ")]


def test_groups_that_straddle_processes(folder):
    """DDP on gloo: the weights are of the whole generation batch, whichever rank has a rollout."""
    (stock, _), (ours, _) = (two_processes(name, folder) for name in ("stock", "straddling"))
    assert_same(ours, stock)
    assert any(0 < line["scsdpo/pass_rate"] < 1 for line in ours)


@pytest.mark.parametrize("kind", ["one", "one, twice", "one, reduced each time"])
def test_rollouts_move_to_a_process_that_has_none(folder, kind):
    """All rollouts with a weight are drawn on one of two processes, whose tokens fall to at most 0.6."""
    (drawn, before), (dealt, after) = (two_processes(f"{kind}, {how}", folder) for how in ("drawn", "dealt"))
    assert_same(dealt, drawn)
    for a, b in zip(dealt, drawn, strict=True):
        for name in ("self_distillation/distillation_loss", "scsdpo/student_entropy", "scsdpo/rows_kept"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
    assert all(line["loss"] > 1e-3 for line in dealt)
    print(f"{kind}: tokens by process {before} -> {after}, the slower one's {max(after) / max(before):.3f}")
    assert max(after) <= 0.6 * max(before)


@pytest.mark.parametrize("what", ["one, drawn", "one, twice, dealt"])
def test_sharded_parameters(folder, what):
    """FSDP2: the losses and gradients of DDP, with stand-ins wherever a process has nothing to run."""
    (ddp, _), (fsdp, tokens) = (two_processes(name, folder) for name in (what, f"sharded, {what}"))
    for a, b in zip(fsdp, ddp, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    measured = 2 * 2 * 8  # once, when the parameters are gathered for the first time
    assert min(tokens) == 3 * 2 * 4 + measured if "drawn" in what else max(tokens) <= 1.1 * min(tokens)


def test_a_policy_loss_on_two_processes(folder):
    """Blended in: TRL's on DDP, and the same on FSDP2."""
    stock, ours, sharded = (two_processes(f"{x}policy", folder)[0] for x in ("stock, ", "", "sharded, "))
    assert_same(ours, stock)
    for a, b, c in zip(sharded, ours, stock, strict=True):
        for name in ("policy_loss", "distillation_loss"):
            name = f"self_distillation/{name}"
            assert b[name] == pytest.approx(c[name], rel=1e-4, abs=1e-6)
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert any(line["grad_norm"] > 1e-2 for line in ours)


def test_two_processes_resume_a_moving_average_teacher(folder):
    whole, resumed = two_processes("resumed", folder)
    assert resumed == pytest.approx(whole, rel=1e-5) and any(x > 1e-3 for x in whole)


def test_a_sharded_teacher_is_saved_and_read(folder):
    """The file has all of it, and each process gets its shards back."""
    shapes, distances = two_processes("sharded, one, teacher", folder)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(MODELS["qwen3"][0](**SIZES))
    assert shapes == {name: list(value.shape) for name, value in model.state_dict().items()}
    assert distances == [0.0, 0.0]


def distance_after_reading(trainer):
    """Shapes in the file, and how far parameters of the teacher are from what they were."""
    (callback,) = (x for x in trainer.callback_handler.callbacks if isinstance(x, EMATeacher))
    before = [x.to_local().clone() for x in trainer.teacher_model.parameters()]
    where = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    where.mkdir(parents=True, exist_ok=True)
    callback.on_save(trainer.args, trainer.state, trainer.control)
    torch.distributed.barrier()
    with torch.no_grad():
        for x in trainer.teacher_model.parameters():
            x.zero_()
    callback.resume_from(str(where))
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    after = [x.to_local() for x in trainer.teacher_model.parameters()]
    distances = [None, None]
    own = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True) if a.numel())
    torch.distributed.all_gather_object(distances, own)
    file = torch.load(where / "ema_teacher.pt", weights_only=True)
    return {name: list(x.shape) for name, x in file.items()}, distances


def every_second_on_the_first(completion_ids, **_):
    return [float(i % 2 and os.environ["RANK"] == "0") for i in range(len(completion_ids))]


def on_this_process(what, folder, sharding):
    """What `two_processes` has of one training."""
    if what == "resumed":
        return resumed(SCSDPOTrainer, SCSDPOConfig, folder, folder / "resumed", None, **sharding)[0]
    options = {"per_device_train_batch_size": 6, "num_generations": 4, "gradient_accumulation_steps": 1}
    trainer, config = SCSDPOTrainer, SCSDPOConfig
    if what == "stock":
        trainer, config = ByHand, SDPOConfig
    if what.endswith("policy"):
        options |= {"distillation_weight": 0.4, "max_completion_length": 12}
        if what.startswith("stock"):
            trainer, config = SDPOTrainer, SDPOConfig
        else:
            options["question_weighting"] = "none"
    if what.startswith("one"):
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 24,
                   "reward": every_second_on_the_first, "deal_rollouts": not what.endswith("drawn")}  # fmt: skip
        if "twice" in what:
            options |= {"num_iterations": 2, "distillation_is_clip": 1.5}
        if "each time" in what:  # left-out micro-batches would leave the other process waiting
            options["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    with pytest.MonkeyPatch.context() as patch:
        if what == "stock":
            loss = sdpo_trainer.compute_full_logit_self_distillation_loss
            patch.setattr(sdpo_trainer, "compute_full_logit_self_distillation_loss",
                          lambda *a, **k: loss(*a, **k) * ByHand.weights.unsqueeze(1))  # fmt: skip
        lines, _, count = counted(trainer, config, folder, **options, **sharding)
    assert count.trainer.is_fsdp_enabled == bool(sharding)
    if what.endswith("teacher"):
        return distance_after_reading(count.trainer)
    tokens = [None, None]
    torch.distributed.all_gather_object(tokens, count.tokens())
    return lines, tokens


def main(wrapper, folder, *names):
    torch.set_num_threads(1)
    sharding = sharded() if wrapper == "sharded" else {}
    finish({what: on_this_process(what, Path(folder), sharding) for what in names})


if __name__ == "__main__":
    main(*sys.argv[1:])
