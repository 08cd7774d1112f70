"""The matrix products that the fused loss is made of, alone, and in which precision a GPU's library adds them up.

    python benchmarks/matmuls.py [--repeats 7] [--output FOLDER]

At Qwen3-8B's head: logits, the hidden gradient with its sum rounded by the library or kept in fp32, and the head's
gradient added up in fp32 chunk by chunk or written once; and a copy. An error is of the whole product, beside what a
float64 product of the same bf16 operands gives, once before and once after rounding to bf16: where the library adds
parts of a sum in bf16, the former is far over fp32's own, and the latter over the rounding's. Needs PyTorch alone.

Writes FOLDER/matmuls-<machine>.json and prints a table.
"""

import argparse
import json
import platform
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
WIDTH, VOCABULARY = 4096, 151936  # Qwen3-8B
CHUNKS = (150, 256, 512, 1024)  # tokens
GROUPS = (256, 512, 1024, 2048, 8192)  # tokens of which a head's gradient is one product
ERRORS = "error", "error in bf16", "rounding"
ADAPTER = 16  # a LoRA's rank


def milliseconds(run, repeats: int) -> float:
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def logit_gradient(hidden: Tensor, weight: Tensor) -> Tensor:
    """(C, V) bf16: p - q of a teacher that stands a little beside the student."""
    teacher = hidden + 0.1 * torch.randn_like(hidden)
    p, q = (torch.mm(x, weight.t(), out_dtype=torch.float32).softmax(-1) for x in (hidden, teacher))
    return (p - q).bfloat16()


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def hidden_gradients(hidden: Tensor, weight: Tensor, repeats: int) -> list[dict]:
    """G W, and G B of an adapter, by both kinds of product."""
    records = []
    adapter = torch.randn(VOCABULARY, ADAPTER, device="cuda").bfloat16()
    for rows in CHUNKS:
        gradient = logit_gradient(hidden[:rows], weight)
        for name, right in (("G W", weight), (f"G B, rank {ADAPTER}", adapter)):
            exact = gradient.double() @ right.double()
            kinds = {
                "bf16": partial(torch.mm, gradient, right),
                "fp32": partial(torch.mm, gradient, right, out_dtype=torch.float32),
            }
            for kind, run in kinds.items():
                got = run()
                records.append(
                    {"product": name, "tokens": rows, "result": kind, "ms": milliseconds(run, repeats),
                     "error": error(got, exact), "error in bf16": error(got.bfloat16(), exact),
                     "rounding": error(exact.bfloat16(), exact)}
                )  # fmt: skip
    return records


def head_gradients(hidden: Tensor, repeats: int) -> list[dict]:
    """Gᵀ h, added to an fp32 sum, or into a bf16 or fp32 result that nothing else adds to."""
    total = torch.zeros(VOCABULARY, WIDTH, device="cuda")
    rounded = torch.zeros(VOCABULARY, WIDTH, device="cuda", dtype=torch.bfloat16)
    records = []
    for rows in GROUPS:
        gradient = torch.randn(rows, VOCABULARY, device="cuda").bfloat16()
        states = hidden[:rows]
        kinds = {
            "added to fp32": partial(
                torch.addmm, total, gradient.t(), states, out_dtype=torch.float32, beta=1, out=total
            ),
            "fp32": partial(torch.mm, gradient.t(), states, out_dtype=torch.float32, out=total),
            "bf16": partial(torch.mm, gradient.t(), states, out=rounded),
        }
        for kind, run in kinds.items():
            records.append({"product": "Gᵀ h", "tokens": rows, "result": kind, "ms": milliseconds(run, repeats)})
        del gradient
    return records


def logits(hidden: Tensor, weight: Tensor, repeats: int) -> list[dict]:
    records = []
    for rows in (512, 1024, 2048):
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            out = torch.empty(rows, VOCABULARY, device="cuda", dtype=dtype)
            run = partial(torch.mm, hidden[:rows], weight.t(), out=out)
            if dtype == torch.float32:
                run = partial(run, out_dtype=dtype)
            records.append({"product": "h Wᵀ", "tokens": rows, "result": kind, "ms": milliseconds(run, repeats)})
    return records


def table(result: dict) -> str:
    """One result file as Markdown."""
    host = result["machine"]
    lines = [
        f"{host['device']}, CUDA {host['cuda']}, torch {host['versions']['torch']}, "
        f"medians of {result['repeats']}; a copy runs at {result['copy, GB/s']:.0f} GB/s, a product of 8192³ at "
        f"{result['8192³, TFLOP/s']:.0f} TFLOP/s.",
        "",
        "| product | tokens | result | ms | TFLOP/s | " + " | ".join(ERRORS) + " |",
        "|---" * (5 + len(ERRORS)) + "|",
    ]
    for x in result["products"]:
        errors = " | ".join(f"{x[name]:.1e}" if name in x else "" for name in ERRORS)
        rest = f"{x['result']} | {x['ms']:.3f} | {x['TFLOP/s']:.0f} | {errors}"
        lines.append(f"| {x['product']} | {x['tokens']} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(8192, WIDTH, device="cuda").bfloat16()
    weight = (torch.randn(VOCABULARY, WIDTH, device="cuda") * (2 * WIDTH**-0.5)).bfloat16()
    records = []
    for part in (logits, hidden_gradients):
        records += part(hidden, weight, arguments.repeats)
    records += head_gradients(hidden, arguments.repeats)
    for record in records:
        width = ADAPTER if "rank" in record["product"] else WIDTH
        record["TFLOP/s"] = 2e-9 * record["tokens"] * width * VOCABULARY / record["ms"]
    source, to = torch.empty(2, 2**31, dtype=torch.uint8, device="cuda")
    copied = 2e-9 * source.nbytes / (milliseconds(lambda: to.copy_(source), arguments.repeats) * 1e-3)
    square = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    rate = 2e-9 * 8192**3 / milliseconds(lambda: square[0] @ square[1], arguments.repeats)
    host = {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__},
    }
    result = {"machine": host, "repeats": arguments.repeats, "copy, GB/s": copied, "8192³, TFLOP/s": rate,
              "products": records}  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"matmuls-{'-'.join(host['device'].lower().split())}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
