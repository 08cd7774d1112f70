"""Where the time of one call goes on a GPU: every kernel of forward and backward, and what it waits for in between.

    python benchmarks/kernel_times.py [--output FOLDER]

Kernels' times are PyTorch's profiler's, of one call after three others; "busy" is their sum, "span" the time from the
first one's start to the last one's end, "host" what the call takes to return. "step" is the median time of a call that
is not profiled, and "products" that of the library's alone.

Writes FOLDER/kernel_times-<machine>.json and prints a table a case.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from inputs import reasoning
from measuring import RESULTS, interleaved, machine, medians, products, timed, write
from torch.profiler import ProfilerActivity, profile

from scsdpo_kernels import TopK, linear_divergence

CASES = {  # N, D, V, support
    "Qwen3-8B, 8192 tokens": (8192, 4096, 151936, None),
    "Qwen3-8B, 8192 tokens, TopK(100)": (8192, 4096, 151936, TopK(100)),
    "Qwen3-8B, 256 tokens": (256, 4096, 151936, None),
    "Qwen3-8B, 256 tokens, TopK(100)": (256, 4096, 151936, TopK(100)),
    "Qwen3-0.6B, 256 tokens": (256, 1024, 151936, None),
    "OLMo-3-7B, 8192 tokens": (8192, 4096, 100278, None),
}


def kernel_times(rows: int, width: int, vocabulary: int, support: TopK | None, repeats: int) -> dict:
    device = torch.device("cuda")
    hidden, weight, teacher = reasoning(rows, width, vocabulary, torch.bfloat16, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_divergence(hidden, weight, teacher, support=support).loss.backward()

    runs = {"step": step, "products": products(hidden, weight, teacher)}
    times = medians(interleaved(runs, repeats, device))
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    events = [x for x in profiled.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    by_name = defaultdict(lambda: [0, 0.0])
    for event in events:
        of = by_name[event.name[:120]]
        of[0] += 1
        of[1] += (event.time_range.end - event.time_range.start) / 1e3
    span = max(x.time_range.end for x in events) - min(x.time_range.start for x in events)
    kernels = [{"name": name, "launches": count, "ms": ms} for name, (count, ms) in by_name.items()]
    return {
        "step, ms": 1e3 * times["step"], "products, ms": 1e3 * times["products"], "host, ms": 1e3 * host,
        "busy, ms": sum(x["ms"] for x in kernels), "span, ms": span / 1e3, "launches": len(events),
        "kernels": sorted(kernels, key=lambda x: -x["ms"]),
    }  # fmt: skip


def table(result: dict) -> str:
    """One result file as Markdown."""
    lines = [f"{timed(result['machine'])}; bf16, Jensen-Shannon, forward and backward."]
    for name, case in result["cases"].items():
        numbers = ", ".join(f"{key[:-4]} {case[key]:.2f}" for key in case if key.endswith(", ms"))
        lines += [
            "",
            f"{name}: {numbers} ms; {case['launches']} kernels",
            "",
            "| kernel | launches | ms |",
            "|---|---|---|",
        ]
        lines += [f"| {x['name'][:70]} | {x['launches']} | {x['ms']:.3f} |" for x in case["kernels"][:9]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = {"machine": machine(torch.device("cuda")), "repeats": arguments.repeats, "cases": {}}
    for name, case in CASES.items():
        result["cases"][name] = kernel_times(*case, arguments.repeats)
        torch.cuda.empty_cache()
        write("kernel_times", result, arguments.output)
    print(table(result))


if __name__ == "__main__":
    main()
