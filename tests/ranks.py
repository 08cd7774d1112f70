"""Processes of a torch.distributed group that stay between tests, since starting them takes longer than a test."""

import functools
import inspect
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60  # after which a rank that has not answered waits for another
GRACE = 5  # the same, where another has failed

# What a process has when it starts: imported once, in one that they are all forked from.
IMPORTED = ["pytest", "scsdpo_kernels", "torch.distributed.tensor", "torch._dynamo"]
GROUPS: dict[int, dist.ProcessGroup] = {}  # in each process, by size: of the last processes


def serve(rank: int, world: int, backend: str, rendezvous: str, pipe) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world, timeout=timeout)
    for size in range(1, world + 1):
        GROUPS[size] = dist.new_group(range(world - size, world))
    while (task := pipe.recv()) is not None:
        case, arguments = task
        try:
            pipe.send((case(**arguments), None))
        except BaseException:  # pytest's own failures too
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Runs a function of a test's module in every process; returns what each has returned, by rank."""

    def __init__(self, folder, world: int, backend: str = "gloo"):
        self.folder, self.world, self.backend = folder, world, backend
        self.processes, self.pipes = [], []

    def start(self) -> None:
        context, rendezvous = mp.get_context("forkserver"), f"file://{self.folder}/{uuid.uuid4().hex}"
        context.set_forkserver_preload(IMPORTED)
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            given = rank, self.world, self.backend, rendezvous, theirs
            process = context.Process(target=serve, args=given, daemon=True)
            process.start()
            theirs.close()
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
                try:
                    answers[pipe], error = pipe.recv()
                except EOFError:
                    error, deadline = "its process has ended", 0.0
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


def over(*sizes: int) -> Callable:
    """A test that runs in every process of groups of these sizes, each of which has its `group` as an argument.

    It asserts after its last exchange, so that where it fails the processes stay in step.
    """

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def started(ranks, size, **given):
            if size > ranks.world:
                pytest.skip(f"needs {size} GPUs")
            ranks(_in_group, last=size, test=started, size=size, given=given)

        _, *others = inspect.signature(test).parameters.values()
        ours = [inspect.Parameter(x, inspect.Parameter.POSITIONAL_OR_KEYWORD) for x in ("ranks", "size")]
        started.__signature__ = inspect.Signature([*ours, *others])
        return pytest.mark.parametrize("size", sizes, ids="{} processes".format)(started)

    return decorate


def _in_group(test: Callable, size: int, given: dict) -> None:
    test.__wrapped__(GROUPS[size], **given)
