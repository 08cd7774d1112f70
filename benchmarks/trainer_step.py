"""Time, tokens and memory of an optimiser step of SC-SDPO, by this package's trainer and by TRL's, on a real model.

    python benchmarks/trainer_step.py [--per-device 1 4 8] [--zeros 0 0.63 0.75 0.78] [--processes 1 2] [--trainers ...]
                                      [--questions 32] [--repeats 1] [--add] [--model FOLDER] [--output FOLDER]

The model is SmolLM2-135M-Instruct, the questions are word problems (`smollm2.py`), 2 rollouts each. Rollouts are
scripted: solutions in words, right or wrong, which a reward function verifies, so that every trainer has the same ones
and exactly the share of questions without weight that is asked for: half of those have only right answers, half only
wrong ones. A step is what follows sampling: rewards, teacher's prompts, forward and backward passes of all
micro-batches, clipping, AdamW, the moving-average teacher. Settings are TRL's (bf16 mixed precision, moving-average
teacher) but for those in SETTINGS.

Trainers: "stock" is TRL's SDPOTrainer, which runs all rollouts and has no question weights. "hand-filtered" is what one
would write into it: each micro-batch loses its rollouts without weight by one index, and the rest has full logits.
"ours" is SCSDPOTrainer.

Of each, a first step is not timed, and has its peak memory taken: over what there was before, and over the gradients,
until the optimiser runs. Then the timed ones follow; the median counts, of the slower process. Trainers of one case
run one after the other, in one process, so that what disturbs the machine hits them alike. CPU time, of all processes
together, is written down beside the time: what else runs on the machine changes it little.

Writes FOLDER/trainer_step-<machine>.json after every case and prints a table; `benchmarks/report.py` puts it into
docs/benchmarks.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from measuring import RESULTS, freed_memory_is_kept, machine, path_of, resident_mib, timed, write
from smollm2 import Problem, folder, model, problems, tokenizer

MARK = "RECORDS "  # begins the line in which a process hands over its records
TRAINERS = ("stock", "hand-filtered", "ours")
ROLLOUTS = 2  # a question's
SETTINGS = {
    "distillation_mode": "full_logits", "distillation_alpha": 0.5, "dont_reprompt_on_self_success": False,
    "num_generations": ROLLOUTS, "max_completion_length": 64, "gradient_checkpointing": False, "learning_rate": 1e-6,
    "lr_scheduler_type": "constant", "shuffle_dataset": False, "use_cpu": True, "report_to": "none",
    "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "diagnostics_warning_interval": 0,
}  # fmt: skip


def outcomes(questions: int, zeros: float) -> list[tuple[bool, ...]]:
    """Which rollouts of each question are right; a share of the questions has all or none.

    They alternate, and the second half of the questions has the outcomes of the first: in step, two processes then have
    micro-batches without any teacher, of which TRL's trainer would wait for ever if only one had some.
    """
    half, count = questions // 2, round(zeros * questions)
    flat = (True,) * ROLLOUTS, (False,) * ROLLOUTS
    spread = [tuple(j % 2 == i % 2 for j in range(ROLLOUTS)) for i in range(half)]
    for i in range(count // 2):
        spread[i * half // (count // 2)] = flat[i % 2]
    found = spread + spread
    if count % 2:  # one more, all of whose rollouts are right and have a teacher
        found[next(i for i in range(half, questions) if len(set(found[i])) > 1)] = flat[0]
    return found


def scripted(asked: list[Problem], zeros: float) -> dict[str, list[str]]:
    """The rollouts of each question."""
    return {
        problem.question: [problem.solution if right else problem.mistake for right in outcome]
        for problem, outcome in zip(asked, outcomes(len(asked), zeros), strict=True)
    }


# ---------------------------------------------------------------------------------------------------------------------
# In the processes that are measured.


def classes(name: str) -> tuple[type, type]:
    """Trainer and config."""
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from scsdpo.trl import SCSDPOConfig, SCSDPOTrainer

    if name == "ours":
        return SCSDPOTrainer, SCSDPOConfig
    return (SDPOTrainer if name == "stock" else hand_filtered(SDPOTrainer)), SDPOConfig


def hand_filtered(stock: type) -> type:
    """TRL's trainer with question weights, whose micro-batches lose what has none before they run."""
    from scsdpo_kernels import question_weights

    class HandFiltered(stock):
        def _prepare_training_batch(self, inputs):
            batch = super()._prepare_training_batch(inputs)
            rewards = self.accelerator.gather(batch["rewards"])
            weights = question_weights(rewards, torch.arange(len(rewards)) // self.num_generations)
            start = self.accelerator.process_index * len(batch["rewards"])
            batch["weight"] = weights[start : start + len(batch["rewards"])] * batch["self_distillation_mask"]
            return batch

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            keep = inputs["weight"] != 0
            if not keep.any() and self.accelerator.num_processes == 1:
                return torch.zeros((), requires_grad=True)
            keep[0] |= not keep.any()  # DDP waits for a backward pass
            rows = {name: x[keep] for name, x in inputs.items() if torch.is_tensor(x) and len(x) == len(keep)}
            logits = self._compute_teacher_student_logits(model, self.teacher_model, rows)
            return self._weighted(logits, rows["weight"]) / len(keep) / self.current_gradient_accumulation_steps

        def _weighted(self, logits, weight):
            from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

            divergence = compute_full_logit_self_distillation_loss(
                logits.student_logits, logits.teacher_logits, distillation_alpha=self.args.distillation_alpha
            )
            mean = (divergence * logits.loss_mask).sum(1) / logits.loss_mask.sum(1).clamp(min=1.0)
            return (mean * weight).sum()

    return HandFiltered


def steps(name: str, where: Path, per_device: int, zeros: float, questions: int, repeats: int) -> dict:
    """Seconds of the timed steps; tokens through student and teacher, and peak MiB, of the first; its loss."""
    from datasets import Dataset
    from transformers import TrainerCallback

    trainer_class, config_class = classes(name)
    asked = problems(questions)
    given, processes = scripted(asked, zeros), int(os.environ.get("WORLD_SIZE", 1))
    by_question = {x.question: x for x in asked}

    def reward(prompts, completions, **_):
        given = zip(prompts, completions, strict=True)
        return [float(by_question[asked[-1]["content"]].is_solved_by(told[0]["content"])) for asked, told in given]

    tokens = tokenizer(where)
    ids = [tokens.apply_chat_template(x.messages, add_generation_prompt=True)["input_ids"] for x in asked]
    questions_of = {tuple(prompt): x.question for prompt, x in zip(ids, asked, strict=True)}

    def generate(prompt_ids):
        seen: Counter[str] = Counter()
        completions = []
        for ids in prompt_ids:
            question = questions_of[tuple(ids)]
            text = given[question][seen[question] % ROLLOUTS]
            completions.append([*tokens(text, add_special_tokens=False)["input_ids"], tokens.eos_token_id])
            seen[question] += 1
        return prompt_ids, completions

    with tempfile.TemporaryDirectory() as output:
        config = config_class(
            output_dir=output, per_device_train_batch_size=per_device, max_steps=1 + repeats, **SETTINGS,
            gradient_accumulation_steps=questions * ROLLOUTS // per_device // processes,
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": x.messages} for x in asked])
        trainer = trainer_class(
            model=model(where=where), reward_funcs=reward, args=config, train_dataset=data, processing_class=tokens
        )
        trainer._generate = generate
        found = {"seconds": [], "cpu_seconds": [], "tokens": 0}
        keep_memory = ExitStack()

        def count(_, args, kwargs):
            found["tokens"] += kwargs["input_ids"].numel()

        hooks = [
            x.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
            for x in (trainer.model, trainer.teacher_model)
        ]

        class Watch(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                trainer.accelerator.wait_for_everyone()
                if state.global_step == 0:
                    self.before = resident_mib(start=True)
                self.start = time.perf_counter(), time.process_time()

            def on_pre_optimizer_step(self, args, state, control, **_):
                if state.global_step == 0:
                    gradients = sum(x.grad.nbytes for x in trainer.model.parameters() if x.grad is not None)
                    found["peak_mib"] = resident_mib(peak=True) - self.before - gradients / 2**20

            def on_step_end(self, args, state, control, **_):
                if state.global_step > 1:
                    found["seconds"].append(time.perf_counter() - self.start[0])
                    found["cpu_seconds"].append(time.process_time() - self.start[1])
                    return
                for hook in hooks:
                    hook.remove()
                keep_memory.enter_context(freed_memory_is_kept())

        trainer.add_callback(Watch())
        with keep_memory:
            trainer.train()
        found["loss"] = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
        every = [found]
        if processes > 1:
            every = [None] * processes
            torch.distributed.all_gather_object(every, found)
        return {
            "seconds": [max(x) for x in zip(*(one["seconds"] for one in every), strict=True)],
            "cpu_seconds": [sum(x) for x in zip(*(one["cpu_seconds"] for one in every), strict=True)],
            "tokens": sum(x["tokens"] for x in every),
            "peak_mib": max(x["peak_mib"] for x in every),
            "loss": found["loss"],
        }


def worker(arguments: argparse.Namespace) -> None:
    """Prints the records of each case, as the first process has them."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("WORLD_SIZE", 1))))
    (per_device,) = arguments.per_device
    for zeros in arguments.zeros:
        records = {
            name: steps(name, arguments.model, per_device, zeros, arguments.questions, arguments.repeats)
            for name in arguments.trainers
        }
        if os.environ.get("RANK", "0") == "0":
            print(MARK + json.dumps(records), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# In the process that measures.


def measure(
    processes: int, per_device: int, zeros: list[float], trainers: list[str], where: Path, questions: int, repeats: int
) -> Iterator[dict]:
    """The record of one case after the other, from processes of their own."""
    arguments = ["--worker", "--model", where, "--per-device", per_device, "--zeros", *zeros, "--questions", questions,
                 "--repeats", repeats, "--trainers", *trainers]  # fmt: skip
    launch = [sys.executable, "-W", "ignore"]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*launch, __file__, *map(str, arguments)]
    remaining = iter(zeros)
    with tempfile.TemporaryFile("w+") as errors:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        for line in run.stdout:
            if line.startswith(MARK):
                yield {
                    "processes": processes, "per_device": per_device, "zeros": next(remaining), "questions": questions,
                    "repeats": repeats, "trainers": json.loads(line.removeprefix(MARK)),
                }  # fmt: skip
        if run.wait() or next(remaining, None) is not None:
            errors.seek(0)
            raise RuntimeError(f"trainer_step.py: a process failed:\n{errors.read()[-3000:]}")


def key(case: dict) -> tuple:
    return case["processes"], case["per_device"], case["zeros"]


def shares(record: dict, stock: dict) -> list[float]:
    """Time, CPU time, tokens and peak memory of a trainer over the stock trainer's."""
    times = [statistics.median(record[x]) / statistics.median(stock[x]) for x in ("seconds", "cpu_seconds")]
    return [*times, *(record[x] / stock[x] for x in ("tokens", "peak_mib"))]


def table(result: dict) -> str:
    """One result file as Markdown."""
    first = result["cases"][0]
    lines = [
        f"SmolLM2-135M-Instruct, {first['questions'] * ROLLOUTS} rollouts of {first['questions']} questions in a step, "
        f"on {timed(result['machine'])}. Of the stock trainer there are seconds, and MiB over parameters and gradients "
        "of one process; of the others time, CPU time, tokens and this memory, divided by the stock trainer's.",
        "",
        "| processes | per device | questions at weight 0 | stock | hand-filtered | ours |",
        "|---" * 6 + "|",
    ]
    for case in result["cases"]:
        stock = case["trainers"]["stock"]
        cells = [str(case["processes"]), str(case["per_device"]), f"{case['zeros']:.0%}"]
        cells.append(f"{statistics.median(stock['seconds']):.1f} s, {stock['peak_mib']:.0f} MiB")
        for name in TRAINERS[1:]:
            record = case["trainers"].get(name)
            cells.append(", ".join(f"{share:.2f}" for share in shares(record, stock)) if record else "—")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sentence(result: dict) -> str:
    """Time and memory over the stock trainer's, by the share of questions at weight 0, over all cases."""
    found: dict[float, dict[str, list[list[float]]]] = {}
    for case in result["cases"]:
        trainers, of_share = case["trainers"], found.setdefault(case["zeros"], {name: [] for name in TRAINERS[1:]})
        for name in of_share.keys() & trainers.keys():
            of_share[name].append(shares(trainers[name], trainers["stock"]))
    parts = []
    for zeros, of_share in sorted(found.items(), reverse=True):
        time, _, _, memory = (_range(x) for x in zip(*of_share["ours"], strict=True))
        by_hand = _range([time for time, *_ in of_share["hand-filtered"]])
        parts.append(f"with {zeros:.0%} {time} of the time (filtered by hand {by_hand}) and {memory} of the memory")
    settings = {(case["processes"], case["per_device"]) for case in result["cases"]}
    return (
        "What follows sampling in a step of `SCSDPOTrainer`, beside TRL's `SDPOTrainer`, by the share of questions at "
        f"weight 0: {'; '.join(parts)} (SmolLM2-135M, {len(settings)} settings of batch and processes, "
        f"{result['machine']['device']})."
    )


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "—"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--per-device", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.0, 0.63, 0.75, 0.78])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--add", action="store_true", help="to the cases of the file that is there, or in their place")
    parser.add_argument("--model", type=Path, help="folder of another model with a chat template")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments)
    where = arguments.model or folder()
    result = {"machine": machine(torch.device("cpu")), "cases": []}
    if arguments.add:
        there = json.loads(path_of("trainer_step", result["machine"], arguments.output).read_text())
        if there["machine"] != result["machine"]:
            parser.error("--add: expected a file of this machine and these versions")
        result["cases"] = there["cases"]
    for processes in arguments.processes:
        for per_device in arguments.per_device:
            of = arguments.zeros, arguments.trainers, where, arguments.questions, arguments.repeats
            for case in measure(processes, per_device, *of):
                result["cases"] = sorted([*(x for x in result["cases"] if key(x) != key(case)), case], key=key)
                write("trainer_step", result, arguments.output)
                print(f"{processes} processes, {per_device} per device, {case['zeros']:.0%} at weight 0", flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
