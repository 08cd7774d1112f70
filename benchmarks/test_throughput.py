"""pytest-benchmark: forward, backward and both, by every implementation, grouped for --benchmark-compare.

    ./dev bench-compare [arguments of pytest]      e.g. --benchmark-save=mine, --benchmark-compare, -k "both and KL"

The cases and checks are throughput.py's. "forward" is the value without grad mode, "backward" what is left to do of a
value that has its graph: next to nothing for those that make gradients with it, as `chunked` and Liger do, so that
"both" is what a training step costs. A benchmark whose gradients are off keeps its time and says `wrong` in its
extra_info, with the error. An implementation that cannot run is skipped with the reason.

pytest-benchmark times one function after the other: its times are for following one machine over versions. The
documentation's tables come from throughput.py, whose repeats take turns.
"""

import functools

import pytest
import torch
from implementations import IMPLEMENTATIONS
from measuring import alone, freed_memory_is_kept, interleaved, machine, medians
from throughput import Case, cases, check, check_case, problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
CASES = [  # on a CPU those that take a second each
    case
    for case in cases(DEVICE.type)
    if ON_GPU or (case.layout in (None, "response") and case.rows < 1024 and case.width < 2048)
]
problem_of = functools.lru_cache(maxsize=1)(lambda case: problem(case, DEVICE))


@functools.cache
def records_of(case: Case) -> dict[str, dict]:
    """throughput.check's, on a CPU from a process whose memory nobody keeps."""
    return check(problem_of(case), DEVICE) if ON_GPU else alone(check_case, case, DEVICE)


@functools.cache
def seconds_of_products(case: Case) -> dict[str, float]:
    """Forward and both phases of the products alone."""
    given = problem_of(case)
    runs = {"forward": given.products(gradients=False), "both": given.products()}
    return medians(interleaved(runs, 3, DEVICE))


def phases(case: Case, loss) -> dict[str, tuple]:
    """What is timed, and what is done before it each time."""
    given = problem_of(case)
    hidden, teacher, token_weight = given.micro_batches[0]

    def wait() -> None:
        if ON_GPU:
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.no_grad():
            for own, others, weights in given.micro_batches:
                loss(own, given.weight, others, token_weight=weights, **given.options)
        wait()

    def both() -> None:
        given.step(loss)
        wait()

    def backward(value: torch.Tensor) -> None:
        value.backward()
        wait()

    def before_backward() -> tuple:
        hidden.grad = given.weight.grad = None
        value = loss(hidden, given.weight, teacher, token_weight=token_weight, **given.options)
        wait()
        return (value,), {}

    every = {"forward": (forward, None), "both": (both, None)}
    return every if len(given.micro_batches) > 1 else every | {"backward": (backward, before_backward)}


@pytest.mark.parametrize("phase", ["both", "forward", "backward"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_throughput(benchmark, case, name, phase):
    if phase == "backward" and case.layout:
        pytest.skip("backward alone is of one micro-batch")
    record, given = records_of(case)[name], problem_of(case)
    if "why_not" in record:
        pytest.skip(f"{name}: {record['why_not']}")
    timed, before = phases(case, IMPLEMENTATIONS[name].loss)[phase]
    benchmark.group = f"{case.name}, {phase}"
    with freed_memory_is_kept():
        benchmark.pedantic(timed, setup=before, rounds=20 if ON_GPU else 3, warmup_rounds=1)
    benchmark.extra_info |= {
        "N": given.rows,
        "V": case.vocabulary,
        "D": case.width,
        "dtype": case.dtype,
        "device": str(DEVICE),
        "share of rows with a weight": given.kept / given.rows,
        "bytes of inputs": given.bytes,
        "machine": machine(DEVICE),
        **record,
    }
    if phase in ("forward", "both"):
        median = benchmark.stats.stats.median
        benchmark.extra_info["TFLOP/s"] = given.operations(phase == "both") / median / 1e12
        benchmark.extra_info["share of products"] = seconds_of_products(case)[phase] / median
