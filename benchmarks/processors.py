"""Time of the dense fused loss as if the processor had less, beside PyTorch's own fp32 products at the same level.

    python benchmarks/processors.py [--shapes N,D,V ...] [--repeats 5] [--output FOLDER]

Forward and backward of the Jensen-Shannon divergence in fp32, bf16 and fp16, and the four fp32 products that no exact
loss can do without, in turns, in a process of its own for each instruction set that the processor has: kernels by
SCSDPO_CPU_CAPABILITY, PyTorch and its libraries by variables of their own. Ratios hold between machines, absolute times
do not.

Writes FOLDER/processors-<machine>.json and prints a table.
"""

import argparse
import os
from pathlib import Path

import torch
from inputs import reasoning
from levels import environment
from measuring import RESULTS, alone, described, interleaved, machine, medians, products, write

from scsdpo_kernels import linear_divergence
from scsdpo_kernels.kernels import native

SHAPES = ("512,512,32000", "512,1024,151936")
DTYPES = ("float32", "bfloat16", "float16")


def times(rows: int, width: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Seconds of the products and of a step in each dtype, on what this process may use."""
    given = reasoning(rows, width, vocabulary)
    runs = {"products": products(*given)}
    for dtype in DTYPES:
        hidden, weight, teacher = (x.to(getattr(torch, dtype)) for x in given)
        hidden.requires_grad_()
        weight.requires_grad_()

        def step(hidden=hidden, weight=weight, teacher=teacher) -> None:
            hidden.grad = weight.grad = None
            linear_divergence(hidden, weight, teacher).loss.backward()

        runs[dtype] = step
    return medians(interleaved(runs, repeats, torch.device("cpu")))


def measure(shapes: list[str], repeats: int) -> list[dict]:
    records = []
    names = native.instruction_sets()
    for name in names[1:] or names:
        os.environ |= environment(name)  # for the processes that are started next
        for shape in shapes:
            rows, width, vocabulary = map(int, shape.split(","))
            seconds = alone(times, rows, width, vocabulary, repeats)
            records.append({"instruction_set": name, "rows": rows, "width": width, "vocabulary": vocabulary, **seconds})
            print(records[-1], flush=True)
    return records


def table(result: dict) -> str:
    """One result file as Markdown."""
    lines = [
        f"{described(result['machine'])}; time / four fp32 matmuls of PyTorch, medians of {result['repeats']}",
        "",
        "| instruction set | N, D, V | fp32 | bf16 | fp16 |",
        "|---|---|---|---|---|",
    ]
    for record in result["records"]:
        shape = ", ".join(str(record[name]) for name in ("rows", "width", "vocabulary"))
        shown = " | ".join(f"{record[dtype] / record['products']:.2f}" for dtype in DTYPES)
        lines.append(f"| {record['instruction_set']} | {shape} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    records = measure(arguments.shapes, arguments.repeats)
    result = {"machine": machine(torch.device("cpu")), "repeats": arguments.repeats, "records": records}
    write("processors", result, arguments.output)
    print(table(result))


if __name__ == "__main__":
    main()
