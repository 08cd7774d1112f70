"""A real run on a CPU: SmolLM2-135M-Instruct learns sums with TRL, by SC-SDPO, SDPO or a hard filter.

python examples/trl_smollm2.py MODEL [sc-sdpo | sdpo | hard-filter]          (a folder or a name)
"""

import itertools
import random
import re
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from scsdpo.trl import SCSDPOConfig, SCSDPOTrainer

METHODS = {  # which rollouts are run, and what they weigh
    "sc-sdpo": {"question_weighting": "sc-sdpo"},
    "sdpo": {"question_weighting": "none"},
    "hard-filter": {"question_weighting": "sc-sdpo", "question_weight_exponent": 0.0},
}
ON_A_CPU = {
    "bf16": True, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "logging_strategy": "no", "output_dir": "trl-smollm2",
}  # fmt: skip
WARM_UP = {"per_device_train_batch_size": 32, "num_train_epochs": 1, "learning_rate": 1e-4, "warmup_steps": 3}
SETTINGS = {
    "num_generations": 8, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4,
    "max_completion_length": 6, "learning_rate": 1.5e-5, "lr_scheduler_type": "constant", "warmup_steps": 2,
    "distillation_mode": "full_logits", "distillation_alpha": 0.5, "dont_reprompt_on_self_success": True,
    "solution_template": "\nCorrect solution: {successful_previous_attempt}", "reprompt_template": "{prompt}{solution}",
    "max_steps": 30,
}  # fmt: skip
HELD_OUT, WARM, EVERY = 500, 480, 10  # questions of tests and of the warm-up, and steps between tests


def questions() -> list[dict]:
    """Sums and differences of numbers below 100, in an order of chance; no answer is below 0."""
    asked = []
    for a, b in itertools.product(range(1, 100), repeat=2):
        for sign, answer in (("+", a + b), ("-", a - b)):
            if answer >= 0:
                question = {"role": "user", "content": f"What is {a} {sign} {b}?"}
                asked.append({"prompt": [question], "answer": str(answer)})
    random.Random(0).shuffle(asked)
    return asked


def is_right(text: str, answer: str) -> bool:
    return re.findall(r"-?\d+", text)[-1:] == [answer]


def reward(completions, answer, **_) -> list[float]:
    return [float(is_right(x[0]["content"], right)) for x, right in zip(completions, answer, strict=True)]


def load(model: str):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def warm_up(model: str, folder: str, **options) -> None:
    """Writes a model to a folder that answers some questions right, and all whose solution is shown.

    It reads right answers for some minutes. Every other question has its solution.
    """
    answered = []
    for i, x in enumerate(questions()[HELD_OUT : HELD_OUT + WARM]):
        solution = SETTINGS["solution_template"].format(successful_previous_attempt=x["answer"])
        question = {"role": "user", "content": x["prompt"][0]["content"] + (solution if i % 2 else "")}
        answered.append({"prompt": [question], "completion": [{"role": "assistant", "content": x["answer"]}]})
    config = SFTConfig(**{**ON_A_CPU, **WARM_UP, **options})
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    run = SFTTrainer(load(model), config, train_dataset=Dataset.from_list(answered), processing_class=tokenizer)
    run.train()
    run.save_model(folder)


@torch.no_grad()
def pass_rate(model, tokenizer, asked: list[dict], batch: int = 125) -> float:
    """The share of questions that greedy answers get right."""
    right = 0
    for some in (asked[i : i + batch] for i in range(0, len(asked), batch)):
        prompts = [x["prompt"] for x in some]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        whole = model.generate(**inputs, do_sample=False, max_new_tokens=SETTINGS["max_completion_length"])
        answers = tokenizer.batch_decode(whole[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(is_right(text, x["answer"]) for text, x in zip(answers, some, strict=True))
    return right / len(asked)


class Run(SCSDPOTrainer):
    """Counts the rollouts that it trains on and the CPU seconds of sampling."""

    rollouts, sampling = 0, 0.0

    def _prepare_inputs(self, batch):
        began = time.process_time()
        inputs = super()._prepare_inputs(batch)
        self.sampling += time.process_time() - began
        return inputs

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.rollouts += int((inputs["question_weight"] != 0).sum()) if inputs["runs"] else 0
        return super().compute_loss(model, inputs, *args, **kwargs)


class Answers(TrainerCallback):
    """Asks the held-out questions every few steps and after the last."""

    def __init__(self, run: Run, held_out: list[dict]):
        self.run, self.held_out = run, held_out
        self.seconds = 0.0  # of CPU, in all steps
        self.points: list[dict] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % EVERY == 0:
            self.ask(state.global_step)
        self.began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.began
        if state.global_step == state.max_steps:
            self.ask(state.global_step)

    def ask(self, step: int) -> None:
        self.run.model.eval()
        rate = pass_rate(self.run.model, self.run.processing_class, self.held_out)
        self.run.model.train()
        sampling = self.run.sampling
        point = {"step": step, "rollouts": self.run.rollouts, "sampling": sampling, "training": self.seconds - sampling}
        self.points.append({**point, "pass_rate": rate})
        print(self.points[-1], flush=True)


def main(model: str, method: str = "sc-sdpo", seed: int = 0, **options) -> list[dict]:
    """What the run was like before it, every few steps, and at its end. options: settings that replace those above."""
    held_out, asked = questions()[:HELD_OUT], questions()[HELD_OUT + WARM :]
    random.Random(seed).shuffle(asked)
    config = SCSDPOConfig(seed=seed, **{**ON_A_CPU, **SETTINGS, **METHODS[method], **options})
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    run = Run(load(model), reward, config, train_dataset=Dataset.from_list(asked), processing_class=tokenizer)
    answers = Answers(run, held_out)
    run.add_callback(answers)
    run.train()
    return answers.points


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if not Path("trl-smollm2-warm").exists():
        warm_up(name, "trl-smollm2-warm")
    main("trl-smollm2-warm", *rest)
