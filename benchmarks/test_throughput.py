"""pytest-benchmark: forward, backward and both, by every implementation, grouped for --benchmark-compare.

    ./dev bench-compare [arguments of pytest]      e.g. --benchmark-save=mine, --benchmark-compare, -k "both and KL"

On a CPU at sizes that end in minutes, on a GPU at those of real heads. Inputs are `reasoning`'s. Before a time counts,
gradients are compared with float64 on a subsample; a benchmark whose implementation is off keeps its time and says
`wrong` in its extra_info, with the error. An implementation that cannot run is skipped with the reason.

pytest-benchmark times one function after the other: its times are for following one machine over versions. Tables of
the README come from headline.py, whose repeats are interleaved.
"""

import functools

import pytest
import torch
from headline import ERROR_LIMIT, SUBSAMPLE, machine
from implementations import IMPLEMENTATIONS, label
from inputs import reasoning
from torch import Tensor

from scsdpo_kernels import linear_divergence

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = {  # D, V
    "Qwen3-0.6B": (1024, 151936),
    "Qwen3-1.7B": (2048, 151936),
    "Qwen3-8B": (4096, 151936),
    "OLMo-3-7B": (4096, 100278),
    "small": (512, 32000),
}
OBJECTIVES = {"forward KL": 0.0, "Jensen-Shannon": 0.5, "reverse KL": 1.0}
# head, rows, objective, share of rows whose weight is 0, whether the head is trained
CPU = [("small", 512, name, 0.0, True) for name in OBJECTIVES]
CPU += [
    ("small", 512, "Jensen-Shannon", 0.63, True),
    ("small", 512, "Jensen-Shannon", 0.0, False),
    ("Qwen3-0.6B", 256, "Jensen-Shannon", 0.0, True),
]
GPU = [
    (head, rows, "Jensen-Shannon", 0.0, True)
    for head in ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B", "OLMo-3-7B")
    for rows in (256, 2048, 8192, 16384)
]
GPU += [("Qwen3-8B", 8192, name, 0.0, True) for name in ("forward KL", "reverse KL")]
GPU += [("Qwen3-8B", 8192, "Jensen-Shannon", share, True) for share in (0.63, 0.78)]
GPU += [("Qwen3-8B", 8192, "Jensen-Shannon", 0.0, False)]
CASES = CPU if DEVICE.type == "cpu" else GPU
DTYPES = ("float32", "bfloat16") if DEVICE.type == "cpu" else ("bfloat16",)


@functools.lru_cache(maxsize=1)
def problem(head: str, rows: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    width, vocabulary = HEADS[head]
    return tuple(x.to(DEVICE) for x in reasoning(rows, width, vocabulary, getattr(torch, dtype)))


def run(loss, tensors, beta: float, trained: bool, phase: str):
    """What is timed, and what is done before it each time."""
    hidden, weight, teacher = (x.detach() for x in tensors)
    hidden.requires_grad_()
    weight.requires_grad_(trained)

    def clear():
        hidden.grad = weight.grad = None

    def wait():
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def forward():
        with torch.no_grad():
            result = loss(hidden, weight, teacher, beta)
        wait()
        return result

    def both():
        loss(hidden, weight, teacher, beta).backward()
        wait()

    def backward(value):
        value.backward()
        wait()

    def before_backward():
        clear()
        return (loss(hidden, weight, teacher, beta),), {}

    def before():
        clear()
        return (), {}

    return {"forward": (forward, before), "both": (both, before), "backward": (backward, before_backward)}[phase]


def weighted(share: float, rows: int):
    """Ours with that share of the rows at weight 0, in whole sequences of 64."""
    sequence = torch.arange(rows, device=DEVICE) // 64
    count = int(sequence.max()) + 1
    weight = (sequence >= round(share * count)).float()

    def loss(hidden, head, teacher, beta):
        return linear_divergence(hidden, head, teacher, beta=beta, token_weight=weight).loss

    return loss, weight.mean().item()


@functools.lru_cache(maxsize=64)
def errors(name: str, head: str, rows: int, dtype: str, beta: float) -> tuple[float, float]:
    """Of both gradients, against float64 on the first rows."""
    hidden, weight, teacher = problem(head, rows, dtype)
    given = hidden[:SUBSAMPLE], weight, teacher[:SUBSAMPLE]
    results = []
    for loss, double in ((IMPLEMENTATIONS[name].loss, False), (IMPLEMENTATIONS["reference"].loss, True)):
        own = [x.detach().double() if double else x.detach().clone() for x in given]
        own[0].requires_grad_()
        own[1].requires_grad_()
        loss(*own, beta).backward()
        results.append((own[0].grad.double(), own[1].grad.double()))
    return tuple(((got - exact).norm() / exact.norm()).item() for got, exact in zip(*results, strict=True))


@functools.lru_cache(maxsize=64)
def seconds_of_products(head: str, rows: int, dtype: str, count: int) -> float:
    """The matrix products that an implementation cannot do without, by the library, at best of three."""
    import time

    hidden, weight, _ = problem(head, rows, dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        logits = hidden @ weight.T
        if count > 1:
            _ = hidden @ weight.T
        if count > 2:
            _ = logits @ weight
        if count > 3:
            _ = logits.T @ hidden
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize("phase", ["both", "forward", "backward"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[1]} rows, {case[2]}, {case[3]:.0%} zero"
                         + ("" if case[4] else ", frozen head"))  # fmt: skip
def test_throughput(benchmark, case, dtype, name, phase):
    head, rows, objective, share, trained = case
    implementation, beta = IMPLEMENTATIONS[name], OBJECTIVES[objective]
    if why_not := implementation.why_not(DEVICE):
        pytest.skip(f"{name}: {why_not}")
    if name == "reference" and rows * HEADS[head][1] > 2**28:
        pytest.skip("reference: full logits in float64 are too large")
    tensors = problem(head, rows, dtype)
    loss, kept = implementation.loss, 1.0
    if share and name == "chunked":
        loss, kept = weighted(share, rows)  # no peer has weights: they compute every row
    off = errors(name, head, rows, dtype, beta)
    timed, before = run(loss, tensors, beta, trained, phase)
    benchmark.group = f"{head}, {rows} rows, {objective}, {share:.0%} zero, {dtype}, {phase}" + (
        "" if trained else ", frozen head"
    )
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(timed, setup=before, rounds=3 if DEVICE.type == "cpu" else 20, warmup_rounds=1)
    width, vocabulary = HEADS[head]
    needed = 2 if phase == "forward" else 4 if trained else 3
    operations = 2.0 * rows * kept * width * vocabulary * needed
    benchmark.extra_info.update(
        {
            "label": label(name),
            "rows": rows,
            "width": width,
            "vocabulary": vocabulary,
            "dtype": dtype,
            "device": str(DEVICE),
            "kept rows": kept,
            "error of hidden, weight": off,
            "wrong": max(off) > ERROR_LIMIT[dtype],
            "bytes of inputs": sum(x.nbytes for x in tensors),
            "machine": machine(),
        }
    )
    if phase != "backward":
        bound = seconds_of_products(head, rows, dtype, needed)
        median = benchmark.stats.stats.median
        benchmark.extra_info["TFLOP/s of needed products"] = operations / median / 1e12
        benchmark.extra_info["share of the products' bound"] = bound / median
    if DEVICE.type == "cuda":
        benchmark.extra_info["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
