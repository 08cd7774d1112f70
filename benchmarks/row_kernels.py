"""The row kernels beside a copy of what they read and write, and the value alone beside the library's product.

    python benchmarks/row_kernels.py [--device cpu] [--seconds S] [--repeats 5] [--output FOLDER]

A kernel takes two fp32 logits to the weighted gradient over them. Its share is what a copy of each logit once and of
the gradient once would take, over its time: 1 is a kernel that waits for nothing but memory. The value is the
divergence without gradients, as a share of the rate of the library's product of the same size.

Writes FOLDER/row_kernels-<machine>.json after every part and prints its tables.
"""

import argparse
import functools
import itertools
import math
import time
from pathlib import Path

import torch
from inputs import reasoning
from measuring import RESULTS, interleaved, machine, medians, timed, write

from scsdpo_kernels import linear_divergence
from scsdpo_kernels.kernels import kernels_of
from scsdpo_kernels.kernels.contract import Logits, PerRow, objective_of
from scsdpo_kernels.schedules.chunked import ALIGNMENT

BETAS = (0.0, 0.5, 1.0)
PRODUCTS = 2  # a value alone takes these


def row_kernels(vocabulary: int, distance: float, device: torch.device, repeats: int) -> dict:
    """A device's row kernel, on logits that are larger than any cache."""
    rows = 2 ** (28 if device.type == "cuda" else 24) // vocabulary
    padded = -(-vocabulary // ALIGNMENT) * ALIGNMENT  # as the fused loss has them
    student, noise = torch.randn(2, rows, padded, device=device)
    student *= 2
    teacher = noise.mul_(distance).add_(student)[:, :vocabulary]
    student = student[:, :vocabulary]
    logits, weight = Logits(student, teacher, difference=False, softcap=0.0), PerRow(torch.ones(rows, device=device))
    source, to = torch.empty(2, 4 * student.numel(), dtype=torch.uint8, device=device)
    runs, kernel = {"copy": lambda: to.copy_(source)}, kernels_of(device).row_divergence
    for beta, dtype in itertools.product(BETAS, ("bfloat16", "float32")):
        gradient = torch.empty(rows, padded, dtype=getattr(torch, dtype), device=device)[:, :vocabulary]
        runs[beta, dtype] = functools.partial(kernel, logits, weight, objective_of(beta), gradient)
    times = medians(interleaved(runs, repeats, device))
    copied = 2 * source.nbytes / times.pop("copy")
    name, records = "cpu" if device.type == "cpu" else "triton", []
    for (beta, dtype), median in times.items():
        rate = (8 + getattr(torch, dtype).itemsize) * student.numel() / median
        records.append({"kernel": name, "beta": beta, "gradient": dtype, "seconds": median, "share": rate / copied})
    return {"rows": rows, "vocabulary": vocabulary, "distance": distance, "copy, B/s": copied,
            "kernels": records}  # fmt: skip


def value(rows: int, width: int, vocabulary: int, dtype: str, device: torch.device, repeats: int) -> dict:
    """The divergence without gradients."""
    hidden, weight, teacher = reasoning(rows, width, vocabulary, getattr(torch, dtype), device=device)
    logits = hidden @ weight.T
    runs = {"product": lambda: torch.mm(hidden, weight.T, out=logits)}
    for beta in BETAS:
        runs[beta] = functools.partial(linear_divergence, hidden, weight, teacher, beta=beta)
    times = medians(interleaved(runs, repeats, device))
    product = times.pop("product")
    records = [
        {"schedule": "chunked", "beta": beta, "seconds": median, "share": PRODUCTS * product / median}
        for beta, median in times.items()
    ]
    return {"rows": rows, "width": width, "vocabulary": vocabulary, "dtype": dtype, "product": product,
            "TFLOP/s": 2.0 * rows * width * vocabulary / product / 1e12, "values": records}  # fmt: skip


def table(result: dict) -> str:
    """One result file as Markdown."""
    lines = [f"{timed(result['machine'])}, medians of {result['repeats']}."]
    for part in result["parts"]:
        if "kernels" in part:
            lines += [
                "",
                f"| {part['rows']} tokens, V = {part['vocabulary']}, teacher's logits {part['distance']} away | β | "
                "gradient | ms | time of a copy / time |",
                "|---|---|---|---|---|",
                *(f"| {x['kernel']} | {x['beta']} | {x['gradient']} | {1e3 * x['seconds']:.2f} | {x['share']:.2f} |"
                  for x in part["kernels"]),
                "",
                f"The copy ran at {part['copy, B/s'] / 1e9:.0f} GB/s.",
            ]  # fmt: skip
        else:
            lines += [
                "",
                f"| the value alone, N = {part['rows']}, D = {part['width']}, V = {part['vocabulary']}, "
                f"{part['dtype']} | β | ms | time of its matmuls / time |",
                "|---|---|---|---|",
                *(f"| {x['schedule']} | {x['beta']} | {1e3 * x['seconds']:.2f} | {x['share']:.2f} |"
                  for x in part["values"]),
                "",
                f"The library's product ran at {part['TFLOP/s']:.2f} TFLOP/s.",
            ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no part after so long")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device, started = torch.device(arguments.device), time.monotonic()
    end = (device, arguments.repeats)
    if device.type == "cuda":
        cases = [(151936, 0.1), (151936, 0.5), (151936, 3.0), (100278, 0.5), (262144, 0.5)]
        parts = [lambda v=v, d=d: row_kernels(v, d, *end) for v, d in cases]
        parts.append(lambda: value(8192, 4096, 151936, "bfloat16", *end))
    else:
        parts = [lambda d=d: row_kernels(151936, d, *end) for d in (0.1, 3.0)]
        parts += [lambda dtype=dtype: value(512, 1024, 32000, dtype, *end) for dtype in ("float32", "bfloat16")]
    result = {"machine": machine(device), "repeats": arguments.repeats, "parts": []}
    for part in parts:
        if time.monotonic() - started > arguments.seconds:
            print(f"time is up after {len(result['parts'])} of {len(parts)} parts", flush=True)
            break
        result["parts"].append(part())
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write("row_kernels", result, arguments.output)
    print(table(result))


if __name__ == "__main__":
    main()
