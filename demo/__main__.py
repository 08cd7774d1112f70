"""Both parts of the demo, their tables, and the figure."""

from __future__ import annotations

import argparse
import random
import textwrap
import time
from pathlib import Path

import torch
import transformers

from . import comparison, digits, kernel, learning, picture

FULL = {"seeds": 8, "steps": 60, "warmup_steps": 1200, "tokens": 512, "repeats": 3}
QUICK = {"seeds": 2, "steps": 30, "warmup_steps": 450, "tokens": 192, "repeats": 1}
V = 4096
PAPER = (
    "This is a toy, in which the teacher of an easy question does no harm. For Qwen3-8B the paper (arXiv 2605.27765) "
    "reports 3.2 points (mean@16) over SDPO."
)


def arguments(given: list[str] | None) -> argparse.Namespace:
    about = "SC-SDPO on a CPU: what it learns, and what its loss costs"
    parser = argparse.ArgumentParser(description=about, prog="./dev demo")
    parser.add_argument("--quick", action="store_true", help="fewer seeds, steps and tokens")
    parser.add_argument("--seeds", type=int, help="of questions and sampling; at least 2")
    parser.add_argument("--steps", type=int, help="of each method and seed")
    parser.add_argument("--questions", type=int, default=10, help="of a step, with 8 rollouts each")
    parser.add_argument("--warmup-steps", type=int, help="supervised steps at most")
    parser.add_argument("--tokens", type=int, help="of SmolLM2's answers")
    parser.add_argument("--repeats", type=int, help="of each timing")
    parser.add_argument("--processes", type=int, help="for the seeds; one per core where it is not given")
    parser.add_argument("--model", type=Path, help="a folder with a model in place of SmolLM2")
    parser.add_argument("--output", type=Path, default=Path("scsdpo-demo.png"), help="the figure")
    parser.set_defaults(**(QUICK if parser.parse_args(given).quick else FULL))
    found = parser.parse_args(given)
    if found.seeds < 2:
        parser.error(f"--seeds: expected at least 2, which have a standard error, got {found.seeds}")
    return found


def say(*paragraphs: str) -> None:
    """Prints tables as they are, and folds sentences."""
    for text in paragraphs:
        print(text if "\n" in text else textwrap.fill(text, 98), end="\n\n")


def learn(options: argparse.Namespace) -> learning.Runs:
    """On one thread a process: the model is so small that more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    held_out = tuple(digits.draw_questions(200, random.Random("held out")))
    warm = digits.warm_up(V, options.warmup_steps, 0, frozenset(held_out))
    settings = learning.Settings(options.steps, options.questions, held_out)
    runs = learning.compare(warm, options.seeds, settings, options.processes)
    sentences = comparison.conclusion_of(runs), comparison.share_of_sampling(runs), PAPER
    say("", comparison.table(runs), *sentences)
    torch.set_num_threads(threads)
    return runs


def weigh(options: argparse.Namespace) -> kernel.Comparison | None:
    if (reason := kernel.why_not(options.model)) is not None:
        say(f"The kernel part was left out.\n{reason}")
        return None
    found = kernel.measure(options.tokens, options.repeats, options.model)
    say("", kernel.table(found), kernel.conclusion(found))
    return found


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    runs = learn(options)
    picture.draw(runs, weigh(options), options.output)
    print(f"{time.perf_counter() - start:.0f} s in all; the figure is {options.output}")


if __name__ == "__main__":
    main()
