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
# These are imported once, in a process that all ranks are forked from.
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
        answers, deadline = {}, time.monotonic() + SECONDS
        while missing := [pipe for pipe in pipes if pipe not in answers]:
            for pipe in wait(missing, max(0, deadline - time.monotonic())):
                try:
                    answers[pipe], error = pipe.recv()
                except EOFError:
                    error = "its process has ended"
                if error is not None:
                    rank = self.pipes.index(pipe)
                    self.stop()  # another rank may wait for this one
                    raise RuntimeError(f"rank {rank}:\n{error}")
            if time.monotonic() > deadline:
                self.stop()
                raise TimeoutError(f"{len(missing)} of {len(pipes)} ranks have not answered: one waits for another")
        return [answers[pipe] for pipe in pipes]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def over(*sizes: int) -> Callable:
    """A test that runs in every process of groups of these sizes, with its `group` as the first argument."""

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
