"""How all benchmarks time, weigh, check and write down."""

import ctypes
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from scsdpo_kernels.kernels import native

RESULTS = Path(__file__).parent / "results"
SUBSAMPLE = 64  # rows whose gradients are compared with float64
ERROR_LIMIT = {"float32": 1e-3, "bfloat16": 1e-2}  # a gradient beyond it is another function's
PACKAGES = ("scsdpo-kernels", "torch", "triton", "liger-kernel", "trl", "transformers")


def machine(device: torch.device) -> dict:
    """What a result file says of where it comes from."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    host = {"python": platform.python_version(), "versions": versions}
    if device.type == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = (line.split(":")[1].strip() for line in lines if "model name" in line)
        return {
            "device": next(models, platform.processor()),
            "threads": torch.get_num_threads(),
            "instruction_set": native.instruction_sets()[-1],
            **host,
        }
    return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or torch.version.hip, **host}


def described(host: dict) -> str:
    """Where a table or a plot comes from."""
    versions = host["versions"]
    if "threads" in host:
        instructions = f", {host['instruction_set']}" if "instruction_set" in host else ""
        return f"{host['device']}{instructions}, {host['threads']} threads, torch {versions['torch']}"
    return f"{host['device']}, CUDA {host['cuda']}, torch {versions['torch']}, triton {versions['triton']}"


def timed(host: dict) -> str:
    """Where a table of times comes from."""
    return f"{described(host)} (absolute times move between machines and runs)"


def path_of(name: str, host: dict, folder: Path) -> Path:
    """A benchmark's result file of this machine."""
    words = re.sub(r"\(.*?\)", "", host["device"]).lower().split()
    if "threads" in host:
        words += [f"{os.cpu_count()}-cores", *([native.CPU_CAPABILITY] if native.CPU_CAPABILITY else [])]
    slug = "-".join(words).replace("_", "-")
    return folder / f"{name}-{slug}.json"


def write(name: str, result: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(name, result["machine"], folder)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def seconds(run: Callable, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """By the process, on a CPU as PyTorch does on a GPU: no run then waits for pages that it is the first to touch.

    Full logits are the most to touch, so that this is to the advantage of those that have them.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    largest, trim = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    libc.mallopt(largest, 0)
    libc.mallopt(trim, -1)
    try:
        yield
    finally:
        libc.mallopt(largest, 65536)
        libc.mallopt(trim, 128 * 1024)
        libc.malloc_trim(0)


def interleaved(
    runs: dict, repeats: int, device: torch.device, before: dict[str, Callable] | None = None
) -> dict[str, list[float]]:
    """Seconds of every repeat of every run, in turns, of which a first one does not count.

    before: what is done before a run, and not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    with freed_memory_is_kept():
        for repeat in range(repeats + 1):
            for name, run in runs.items():
                if before:
                    before[name]()
                elapsed = seconds(run, device)
                if repeat:
                    times[name].append(elapsed)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def products(hidden: Tensor, weight: Tensor, teacher: Tensor, gradients: int = 2) -> Callable:
    """The matrix products that no exact loss can do without, by the library, at these shapes and in this dtype.

    gradients: 2, or 1 where the head is frozen, or 0 for the value alone.
    """
    hidden, weight, teacher = hidden.detach(), weight.detach(), teacher.detach()

    def product(left: Tensor, right: Tensor) -> Tensor:
        shape = left.shape[0], right.shape[1]
        on_huge_pages = left.device.type == "cpu"  # as the fused loss has them: the system gives them to luck otherwise
        allocate = native.empty if on_huge_pages else partial(torch.empty, device=left.device)
        return torch.mm(left, right, out=allocate(*shape, dtype=left.dtype))

    def run() -> None:
        logits = product(hidden, weight.T)
        product(teacher, weight.T)
        if gradients > 0:
            product(logits, weight)
        if gradients > 1:
            product(logits.T, hidden)

    return run


def peak_mib(run: Callable, leaves: Iterable[Tensor], device: torch.device) -> float:
    """Over what there was before, and over the gradients that it leaves.

    On a CPU it is what the process holds, and exact only before `freed_memory_is_kept`: see `alone`.
    """
    leaves = list(leaves)
    for leaf in leaves:
        leaf.grad = None
    if device.type == "cpu":
        before = resident_mib(start=True)
        run()
        peak = resident_mib(peak=True) - before
    else:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak - sum(x.grad.nbytes for x in leaves if x.grad is not None) / 2**20


def resident_mib(*, start: bool = False, peak: bool = False) -> float:
    """What this process holds, or the most since the last start."""
    if start:
        ctypes.CDLL(None).malloc_trim(0)  # what is free, and would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    field = "VmHWM" if peak else "VmRSS"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def alone(function: Callable, *arguments: object) -> object:
    """What a function of a module returns in a process of its own, in which nobody has kept memory before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def error(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖, a part after the other: a head's gradient in float64 is gigabytes."""
    off = norm = 0.0
    for a, b in zip(*(x.detach().flatten().split(2**24) for x in (got, exact)), strict=True):
        off += (a.double() - b).square().sum()
        norm += b.square().sum()
    return (off / norm).sqrt().item()
