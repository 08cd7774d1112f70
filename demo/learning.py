"""SC-SDPO, SDPO and a hard filter on one task, from one warm start, step by step in turns, over several seeds.

Every rollout is scored token by token by a moving average of the model, which reads the same question with a successful
sibling's answer (SDPO, arXiv 2601.20802). The methods differ in the weights of the questions, and in nothing else. As
the adapters of this package do, a step runs neither student nor teacher on rollouts whose weight is 0.
"""

from __future__ import annotations

import copy
import os
import pickle
import queue
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3ForCausalLM

from scsdpo_kernels import question_weights, scsdpo_loss

from . import COLUMNS
from .digits import Batch, draw_questions, loss_operands, pass_rates, sample_batch

METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # rewards (B,), question ids (B,) -> weights (B,)
    "SC-SDPO": question_weights,  # arXiv 2605.27765
    "SDPO": lambda rewards, ids: torch.ones_like(rewards),
    "hard filter": lambda rewards, ids: (question_weights(rewards, ids) != 0).float(),
}
BETA = 0.5
TEACHER_RATE = 0.05
LEARNING_RATE = 2e-4
BETWEEN_TESTS = 5  # steps


class Point(NamedTuple):
    """A run so far, and what its model then gets right of the questions that are held out."""

    step: int
    rollouts: int  # trained on
    sampling: float  # seconds of CPU
    training: float  # seconds of CPU
    pass_rate: float


Run = list[Point]
Runs = dict[str, list[Run]]  # by method, then by seed
Tell = Callable[[dict[str, float], int], None]  # pass rates by method, and after how many more steps they are these


@dataclass(frozen=True)
class Settings:
    steps: int
    questions: int  # a step
    held_out: tuple[str, ...]


class Learner:
    """A student, its teacher, and the clocks of both parts of their steps."""

    def __init__(self, method: str, warm: Qwen3ForCausalLM, seed: int):
        self.weigh = METHODS[method]
        self.student, self.teacher = copy.deepcopy(warm), copy.deepcopy(warm)
        parameters = self.student.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.rollouts, self.sampling, self.training = 0, 0.0, 0.0

    def step(self, questions: list[str]) -> None:
        start = time.process_time()
        batch = sample_batch(self.student, questions, self.rng, self.generator)
        sampled = time.process_time()
        self.train_on(batch)
        self.sampling += sampled - start
        self.training += time.process_time() - sampled

    def train_on(self, batch: Batch) -> None:
        weight = self.weigh(batch.rewards, batch.question_ids)
        kept = ((weight != 0) & batch.mask.any(1)).nonzero()[:, 0]
        if not len(kept):
            return
        part = batch.only(kept)
        operands = loss_operands(self.student, self.teacher, part)
        weights = {"question_weight": weight[kept], "mask": part.mask, "denominator": batch.mask.sum()}
        scsdpo_loss(*operands, **weights, beta=BETA).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.lerp_(fast, TEACHER_RATE)
        self.rollouts += len(kept)

    def at(self, step: int, held_out: tuple[str, ...]) -> Point:
        rate = pass_rates(self.student, list(held_out)).mean().item()
        return Point(step, self.rollouts, self.sampling, self.training, rate)


def run_seed(warm: Qwen3ForCausalLM, seed: int, settings: Settings, tell: Tell) -> dict[str, Run]:
    """All methods on the same questions, a step of each after the other, so that a busy machine is so for all."""
    rng, held_out = random.Random(seed), frozenset(settings.held_out)
    learners = {method: Learner(method, warm, seed) for method in METHODS}
    runs = {method: [learner.at(0, settings.held_out)] for method, learner in learners.items()}
    told = 0
    for step in range(1, settings.steps + 1):
        questions = draw_questions(settings.questions, rng, held_out)
        for learner in learners.values():
            learner.step(questions)
        if step % BETWEEN_TESTS == 0 or step == settings.steps:
            for method, learner in learners.items():
                runs[method].append(learner.at(step, settings.held_out))
            tell({method: run[-1].pass_rate for method, run in runs.items()}, step - told)
            told = step
    return runs


def compare(warm: Qwen3ForCausalLM, seeds: int, settings: Settings, processes: int | None = None) -> Runs:
    """All seeds, on as many processes of one thread as there are cores, but no more than seeds.

    The seeds are those of questions and sampling; the warm start is one for all.
    """
    processes = min(processes or os.cpu_count() or 1, seeds)
    with tqdm(desc="learning", total=seeds * settings.steps, ncols=COLUMNS) as bar:

        def tell(rates: dict[str, float], steps: int) -> None:
            bar.set_postfix_str(" · ".join(f"{method} {rate:.2f}" for method, rate in rates.items()), refresh=False)
            bar.update(steps)

        if processes == 1:
            found = [run_seed(warm, seed, settings, tell) for seed in range(seeds)]
        else:
            found = _in_processes(processes, warm, seeds, settings, tell)
    return {method: [runs[method] for runs in found] for method in METHODS}


def _in_processes(
    count: int, warm: Qwen3ForCausalLM, seeds: int, settings: Settings, tell: Tell
) -> list[dict[str, Run]]:
    spawn = get_context("spawn")  # a fork of a process that has threads may hang
    told, model = spawn.Queue(), pickle.dumps(warm)
    with ProcessPoolExecutor(count, spawn, initializer=_begin, initargs=(told,)) as pool:
        futures = [pool.submit(_run_in_process, model, seed, settings) for seed in range(seeds)]
        while True:
            try:
                tell(*told.get(timeout=0.2))
            except queue.Empty:
                if all(future.done() for future in futures):
                    return [future.result() for future in futures]


_told = None  # the queue of a process of the pool


def _begin(told) -> None:
    global _told
    _told = told
    torch.set_num_threads(1)


def _run_in_process(model: bytes, seed: int, settings: Settings) -> dict[str, Run]:
    return run_seed(pickle.loads(model), seed, settings, lambda *progress: _told.put(progress))
