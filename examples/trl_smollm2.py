"""A real run on a CPU: SmolLM2-135M-Instruct learns sums with TRL, by SC-SDPO, SDPO or a hard filter.

python examples/trl_smollm2.py MODEL [sc-sdpo | sdpo | hard-filter]          (a folder or a name)
"""

import random
import re
import sys
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from scsdpo.trl import SCSDPOConfig, SCSDPOTrainer

METHODS = {  # which rollouts are run, and what they weigh
    "sc-sdpo": {"question_weighting": "sc-sdpo"},
    "sdpo": {"question_weighting": "none"},
    "hard-filter": {"question_weighting": "sc-sdpo", "question_weight_exponent": 0.0},
}
SETTINGS = {
    "num_generations": 8, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4,
    "max_completion_length": 24, "learning_rate": 1e-5, "lr_scheduler_type": "constant", "warmup_steps": 2,
    "distillation_mode": "full_logits", "distillation_alpha": 0.5, "dont_reprompt_on_self_success": True,
    "bf16": True, "use_cpu": True, "gradient_checkpointing": False, "max_steps": 10_000, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "output_dir": "trl-smollm2",
}  # fmt: skip
HELD_OUT, EVERY = 200, 5  # questions, and steps between answers to them


def questions(count: int) -> list[dict]:
    """Sums and differences of numbers with one to three digits, no two alike."""
    numbers, found = random.Random(0), {}
    while len(found) < count:
        digits = numbers.choice((1, 2, 2, 3))
        b, a = sorted(numbers.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        sign, answer = numbers.choice((("+", a + b), ("-", a - b)))
        text = f"What is {a} {sign} {b}? Answer with the number only."
        found[text] = {"prompt": [{"role": "user", "content": text}], "answer": str(answer)}
    return list(found.values())


def is_right(text: str, answer: str) -> bool:
    return re.findall(r"-?\d+", text.replace(",", ""))[-1:] == [answer]


def reward(completions, answer, **_) -> list[float]:
    return [float(is_right(x[0]["content"], right)) for x, right in zip(completions, answer, strict=True)]


@torch.no_grad()
def pass_rate(model, tokenizer, asked: list[dict], batch: int = 50) -> float:
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
    """Counts the rollouts that it trains on and the time that this and sampling take."""

    rollouts, seconds = 0, 0.0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.rollouts += int((inputs["question_weight"] != 0).sum()) if inputs["runs"] else 0
        return super().compute_loss(model, inputs, *args, **kwargs)


class Answers(TrainerCallback):
    """Asks the held-out questions every few steps, and ends the run when its time is over."""

    def __init__(self, run: Run, held_out: list[dict], seconds: float):
        self.run, self.held_out, self.most = run, held_out, seconds
        self.points: list[dict] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % EVERY == 0:
            self.ask(state.global_step)
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.run.seconds += time.perf_counter() - self.began
        if self.run.seconds > self.most or state.global_step == args.max_steps:
            control.should_training_stop = True
            self.ask(state.global_step)

    def ask(self, step: int) -> None:
        self.run.model.eval()
        rate = pass_rate(self.run.model, self.run.processing_class, self.held_out)
        self.run.model.train()
        self.points.append(
            {"step": step, "rollouts": self.run.rollouts, "seconds": self.run.seconds, "pass_rate": rate}
        )
        print(self.points[-1], flush=True)


def main(model: str, method: str = "sc-sdpo", seed: int = 0, seconds: float = 600.0, **options) -> list[dict]:
    """What the run was like before it, every few steps, and at its end. options: settings that replace those above."""
    held_out, asked = questions(2000)[:HELD_OUT], questions(2000)[HELD_OUT:]
    random.Random(seed).shuffle(asked)
    config = SCSDPOConfig(seed=seed, **{**SETTINGS, **METHODS[method], **options})
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    run = Run(student, reward, config, train_dataset=Dataset.from_list(asked), processing_class=tokenizer)
    answers = Answers(run, held_out, seconds)
    run.add_callback(answers)
    run.train()
    return answers.points


if __name__ == "__main__":
    main(*sys.argv[1:])
