"""Processes of a torch.distributed group that stay between tests, since starting them takes longer than a test."""

import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60  # after which a rank that has not answered waits for another
GRACE = 5  # the same, where another has failed


def serve(rank: int, world: int, backend: str, setup: Callable | None, rendezvous: str, pipe) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world, timeout=timeout)
    if setup is not None:
        setup()
    while (task := pipe.recv()) is not None:
        case, arguments = task
        try:
            pipe.send((case(**arguments), None))
        except BaseException:  # pytest's own failures too
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Runs a function of a test's module in every process; returns what each has returned, by rank.

    setup: what every process runs first, such as making groups.
    """

    def __init__(self, folder, world: int, backend: str = "gloo", setup: Callable | None = None):
        self.folder, self.world, self.backend, self.setup = folder, world, backend, setup
        self.processes, self.pipes = [], []

    def start(self) -> None:
        context, rendezvous = mp.get_context("spawn"), f"file://{self.folder}/{uuid.uuid4().hex}"
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            given = rank, self.world, self.backend, self.setup, rendezvous, theirs
            process = context.Process(target=serve, args=given, daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)

    def __call__(self, case: Callable, last: int | None = None, **arguments) -> list[Any]:
        """last: only so many processes run it, the last ones."""
        if not self.processes:
            self.start()
        pipes = self.pipes if last is None else self.pipes[-last:]
        for pipe in pipes:
            pipe.send((case, arguments))
        answers, failures, deadline = {}, [], time.monotonic() + SECONDS
        while len(answers) < len(pipes) and (left := deadline - time.monotonic()) > 0:
            for pipe in wait([x for x in pipes if x not in answers], left):
                answers[pipe], error = pipe.recv()
                if error is not None:
                    failures.append(f"rank {self.pipes.index(pipe)}:\n{error}")
                    deadline = min(deadline, time.monotonic() + GRACE)
        missing = [self.pipes.index(pipe) for pipe in pipes if pipe not in answers]
        if missing:
            self.stop()
            failures.append(f"ranks {missing} have not answered: one waits for another")
        if failures:
            raise RuntimeError("\n".join(failures))
        return [answers[pipe] for pipe in pipes]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []
