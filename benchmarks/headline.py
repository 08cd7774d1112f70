"""Time and memory of the fused loss beside its own matrix products and the peers, in one run on one machine.

    python benchmarks/headline.py [--rows 1024] [--width 1024] [--vocabulary 151936] [--repeats 3] [--output FOLDER]

Forward and backward of Σ_n D(p_n, q_n) (Jensen-Shannon, β = 0.5, shared head) over all rows, by every implementation on
the same inputs: medians of interleaved repeats, warm-up excluded. Ratios hold between machines, absolute times do not.
Gradients are compared with float64 on a subsample, and a time whose gradients are off is marked. Peak memory is that of
the second step of a fresh process, over its inputs and gradients. A peer that is not installed says so and has no row.

Writes FOLDER/headline-<machine>.json and prints its table; `--readme` puts the tables of all such files into README.md.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import implementations
import torch
from torch import Tensor

from scsdpo_kernels import linear_divergence

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BETA = 0.5
ZERO_SHARE = 0.63  # zero-weight questions in SC-SDPO's first 50 steps
SUBSAMPLE = 64
ERROR_LIMIT = {"float32": 1e-4, "bfloat16": 1e-2}  # of a gradient that is right for its dtype


def problem(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and the teacher's hidden states: logits of deviation 2, a teacher near the student."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    teacher = hidden + 0.1 * torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * (2 * width**-0.5)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), teacher.to(dtype)


def ours(hidden: Tensor, weight: Tensor, teacher: Tensor, token_weight: Tensor | None = None) -> Tensor:
    return linear_divergence(hidden, weight, teacher, beta=BETA, token_weight=token_weight).loss


PEERS = {"eager PyTorch": None, "chunked JSD, compiled": "liger-kernel", "chunked_divergence": "trl"}
IMPLEMENTATIONS = {"scsdpo_kernels": (ours, None)} | {
    name: (implementations.IMPLEMENTATIONS[name].loss, package) for name, package in PEERS.items()
}


def products(hidden: Tensor, weight: Tensor, teacher: Tensor) -> None:
    """The four matrix products alone, by the library, at the same shapes and in the inputs' dtype."""
    hidden, weight = hidden.detach(), weight.detach()
    student_logits = hidden @ weight.T
    teacher @ weight.T
    student_logits @ weight
    student_logits.T @ hidden


def step(loss: Callable, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    for x in tensors[:2]:
        x.grad = None
    loss(*tensors).backward()


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gradient_errors(loss: Callable, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Relative errors of both gradients against float64 on the first rows."""
    hidden, weight, teacher = (x.detach() for x in tensors)
    hidden, teacher = hidden[:SUBSAMPLE], teacher[:SUBSAMPLE]
    exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
    linear_divergence(*exact, teacher.double(), beta=BETA, schedule="reference").loss.backward()
    got = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(*got, teacher).backward()
    return tuple(((g.grad.double() - e.grad).norm() / e.grad.norm()).item() for g, e in zip(got, exact, strict=True))


def peak_mib(name: str, rows: int, arguments: argparse.Namespace, dtype: str) -> float:
    """Peak memory over inputs and gradients, MiB, of one step in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--rows", str(rows), "--width", str(arguments.width),
               "--vocabulary", str(arguments.vocabulary), "--dtypes", dtype]  # fmt: skip
    return float(subprocess.check_output(command, text=True).split()[-1])


def print_peak(arguments: argparse.Namespace) -> None:
    loss = IMPLEMENTATIONS[arguments.peak_of][0]
    dtype = getattr(torch, arguments.dtypes[0])
    step(loss, problem(min(arguments.rows, 1024), arguments.width, arguments.vocabulary, dtype))  # imports, compilation
    tensors = problem(arguments.rows, arguments.width, arguments.vocabulary, dtype)

    print(peak_over_gradients(lambda: step(loss, tensors), tensors[:2]))


def peak_over_gradients(run: Callable, leaves: tuple[Tensor, ...]) -> float:
    """MiB, of the process, over what it had before and the gradients that it leaves."""

    def status(field: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before - sum(x.grad.nbytes for x in leaves) / 2**20


def measure(dtype: str, arguments: argparse.Namespace) -> dict:
    tensors = problem(arguments.rows, arguments.width, arguments.vocabulary, getattr(torch, dtype))
    kept = torch.ones(arguments.rows)
    kept[: round(ZERO_SHARE * arguments.rows)] = 0  # whole sequences, one after the other
    zeros = f"scsdpo_kernels, {ZERO_SHARE:.0%} of the rows at weight 0"
    runs = {
        "four products": lambda: products(*tensors),
        "scsdpo_kernels": functools.partial(step, ours, tensors),
        zeros: lambda: step(functools.partial(ours, token_weight=kept), tensors),
    }
    records: dict[str, dict] = {"four products": {}, "scsdpo_kernels": {}, zeros: {}}
    for name, (loss, package) in IMPLEMENTATIONS.items():
        try:
            version = metadata.version(package) if package else None
        except metadata.PackageNotFoundError:
            print(f"{name}: {package} is not installed", flush=True)
            continue
        errors = gradient_errors(loss, tensors)
        records[name] = {
            "package": version and f"{package} {version}",
            "error_hidden": errors[0],
            "error_weight": errors[1],
        }
        runs[name] = functools.partial(step, loss, tensors)

    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 1):
        for name, run in runs.items():
            elapsed = seconds(run)
            print(f"{dtype} {'warm-up' if repeat == 0 else repeat} {name}: {elapsed:.2f} s", flush=True)
            if repeat:
                times[name].append(elapsed)
    for name, values in times.items():
        records[name]["seconds"] = statistics.median(values)
        records[name]["all_seconds"] = values
    for name in IMPLEMENTATIONS:
        if name in records:
            records[name]["peak_mib"] = peak_mib(name, arguments.rows, arguments, dtype)
    records["scsdpo_kernels"]["peak_mib_of_8_times_the_rows"] = peak_mib(
        "scsdpo_kernels", 8 * arguments.rows, arguments, dtype
    )
    return records


def machine() -> dict:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(result: dict) -> str:
    """One result file as Markdown."""
    shape, host = result["shape"], result["machine"]
    lines = [
        f"{host['cpu']}, {host['threads']} threads, torch {host['torch']}; N = {shape['rows']}, D = {shape['width']}, "
        f"V = {shape['vocabulary']}; JSD β = 0.5, forward and backward, median of {result['repeats']}.",
    ]
    for dtype, records in result["dtypes"].items():
        bound = records["four products"]["seconds"]
        dense = records["scsdpo_kernels"]["seconds"]
        lines += [
            "",
            f"| {dtype} | time / four products | time / ours | peak over inputs and gradients | error of ∂h, ∂W |",
            "|---|---|---|---|---|",
        ]
        for name, record in records.items():
            peak = f"{record['peak_mib']:.0f} MiB" if "peak_mib" in record else ""
            errors = ", ".join(
                f"{error:.1e}" if error <= ERROR_LIMIT[dtype] else f"**{error:.1e}**"
                for error in (record.get("error_hidden"), record.get("error_weight"))
                if error is not None
            )
            label = f"{record['package']} {name}" if record.get("package") else name
            ratios = f"{record['seconds'] / bound:.2f} | {record['seconds'] / dense:.2f}"
            lines.append(f"| {label} | {ratios} | {peak} | {errors} |")
        lines += ["", f"The four products took {bound:.1f} s. With {8 * shape['rows']} rows ours peaks at "
                  f"{records['scsdpo_kernels']['peak_mib_of_8_times_the_rows']:.0f} MiB."]  # fmt: skip
    return "\n".join(lines)


BEGIN, END = "<!-- benchmarks/headline.py --readme -->\n", "<!-- end -->"


def with_tables(readme: str) -> str:
    """README text with the tables of all result files between its two marks."""
    return tables_of("headline", table, BEGIN, readme)


def tables_of(name: str, table: Callable, begin: str, readme: str) -> str:
    """README text with the tables of all result files of a benchmark between `begin` and the END after it."""
    before, rest = readme.split(begin)
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-*.json"))]
    return before + begin + "\n\n".join(map(table, results)) + "\n" + END + rest.split(END, 1)[1]


def write(name: str, result: dict, folder: Path) -> Path:
    """A benchmark's result file of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = "-".join(result["machine"]["cpu"].lower().split()) + f"-{os.cpu_count()}-cores"
    path = folder / f"{name}-{slug}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--readme", action="store_true", help="only write the tables of the result files into README.md"
    )
    parser.add_argument("--peak-of", choices=list(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        return print_peak(arguments)
    if not arguments.readme:
        result = {
            "machine": machine(),
            "shape": {name: getattr(arguments, name) for name in ("rows", "width", "vocabulary")},
            "repeats": arguments.repeats,
            "dtypes": {dtype: measure(dtype, arguments) for dtype in arguments.dtypes},
        }
        write("headline", result, arguments.output)
        return print(table(result))
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))


if __name__ == "__main__":
    main()
