"""Time, memory and exactness on a GPU, beside the library's own matrix products and the peers, in one run.

    python benchmarks/gpu.py --output FOLDER [--seconds 240] [--rows 512 2048 8192] [--width 4096] [--vocabulary 151936]

Forward and backward of Σ_n w_n D(p_n, q_n) in bf16 with a shared head, by every schedule and every peer that is
installed, on the same inputs. Times are medians of repeats that are interleaved, by events, warm-up excluded; the
library's four products are measured in the same run and every time is given as a multiple of theirs. Peak memory is
over inputs and gradients. Errors are those of both gradients against float64 on the first 64 rows. The row kernel is
set beside the bandwidth of a copy, and the tiled schedule's value beside the rate of the library's product.

Every case is appended to FOLDER/gpu-<device>.jsonl when it is done; the table is printed at the end, or when the time
is up.
"""

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import triton
from objectives import cases
from torch import Tensor

from scsdpo_kernels import linear_divergence
from scsdpo_kernels.kernels import kernels_of

DTYPE = torch.bfloat16
SUBSAMPLE = 64
ERROR_LIMIT = 1e-2  # of a bf16 gradient that is right


def problem(rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and the teacher's hidden states: logits of deviation 2, a teacher near the student."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device="cuda")
    teacher = hidden + 0.1 * torch.randn(rows, width, generator=generator, device="cuda")
    weight = torch.randn(vocabulary, width, generator=generator, device="cuda") * (2 * width**-0.5)
    return hidden.to(DTYPE).requires_grad_(), weight.to(DTYPE).requires_grad_(), teacher.to(DTYPE)


def ours(schedule: str) -> Callable:
    def loss(hidden, weight, teacher, token_weight, beta):
        return linear_divergence(hidden, weight, teacher, token_weight=token_weight, beta=beta, schedule=schedule).loss

    return loss


def liger(hidden, weight, teacher, token_weight, beta):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=beta)(hidden, weight, teacher, weight.detach(), None) * len(hidden)


@functools.cache
def _liger_loss(beta: float) -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=True)


def liger_chunked(hidden, weight, teacher, token_weight, beta):
    labels = torch.zeros(len(hidden), dtype=torch.long, device="cuda")  # none is ignored; the hard loss has weight 0
    return _liger_loss(beta)(hidden, weight, teacher, weight.detach(), labels) * len(hidden)


def trl(hidden, weight, teacher, token_weight, beta):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    rows = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, weight.detach(), None, beta)[0]
    return (rows * token_weight).sum()


IMPLEMENTATIONS = {
    "chunked": (ours("chunked"), None),
    "tiled": (ours("tiled"), None),
    "liger fused_linear_jsd": (liger, "liger-kernel"),
    "liger chunked JSD, compiled": (liger_chunked, "liger-kernel"),
    "trl chunked_divergence": (trl, "trl"),
}


def milliseconds(run: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def medians(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            elapsed = milliseconds(run)
            if repeat:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def products(tensors: tuple[Tensor, ...]) -> Callable:
    """The four matrix products by the library, each into memory that is there already."""
    hidden, weight, teacher = (x.detach() for x in tensors)
    logits, grad_hidden, grad_weight = hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)

    def run():
        torch.mm(teacher, weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    return run


def step(loss: Callable, tensors: tuple[Tensor, ...], token_weight: Tensor, beta: float) -> None:
    for x in tensors[:2]:
        x.grad = None
    loss(*tensors, token_weight, beta).backward()


def gradient_errors(loss: Callable, tensors: tuple[Tensor, ...], beta: float) -> list[float]:
    hidden, weight, teacher = (x.detach() for x in tensors)
    hidden, teacher = hidden[:SUBSAMPLE], teacher[:SUBSAMPLE]
    ones = torch.ones(len(hidden), device="cuda")
    exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
    linear_divergence(*exact, teacher.double(), beta=beta, schedule="reference").loss.backward()
    got = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(*got, teacher, ones, beta).backward()
    return [((g.grad.double() - e.grad).norm() / e.grad.norm()).item() for g, e in zip(got, exact, strict=True)]


def peak_mib(run: Callable, tensors: tuple[Tensor, ...]) -> float:
    for x in tensors:
        x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    gradients = sum(x.grad.nbytes for x in tensors if x.grad is not None)
    return (torch.cuda.max_memory_allocated() - before - gradients) / 2**20


def case(rows: int, width: int, vocabulary: int, beta: float, zeros: float, frozen_head: bool, repeats: int) -> dict:
    """Every implementation on one problem. `zeros`: share of rows at weight 0, in whole sequences."""
    tensors = problem(rows, width, vocabulary)
    tensors[1].requires_grad_(not frozen_head)
    sequence = torch.arange(rows, device="cuda") // 256
    token_weight = ((sequence * 0.618034) % 1 >= zeros).float()  # spread evenly
    runs, records = {"four products": products(tensors)}, {"four products": {}}
    for name, (loss, package) in IMPLEMENTATIONS.items():
        # a peer without row weights computes all rows, whatever the weights
        try:
            record = {"package": f"{package} {metadata.version(package)}" if package else None}
            if not frozen_head:
                record["errors"] = gradient_errors(loss, tensors, beta)

            def run(loss=loss):
                step(loss, tensors, token_weight, beta)

            run()
            record["peak_mib"] = peak_mib(run, tensors)
        except Exception as error:  # a peer that is not installed, or cannot run here: the row says why
            if package is None:
                raise
            records[name] = {"skipped": f"{type(error).__name__}: {error}"[:300]}
            torch.cuda.empty_cache()
            continue
        runs[name], records[name] = run, record
    for name, median in medians(runs, repeats).items():
        records[name]["milliseconds"] = median
    return {
        "rows": rows, "width": width, "vocabulary": vocabulary, "beta": beta, "zeros": zeros,
        "frozen_head": frozen_head, "kept_share": token_weight.mean().item(), "repeats": repeats,
        "implementations": records,
    }  # fmt: skip


def row_kernels(vocabulary: int, distance: float, repeats: int) -> dict:
    """Every row kernel on the same logits. A share of 1 is a copy of each logit once and the gradient once."""
    rows = 2**28 // vocabulary  # 1 GiB of fp32 logits a side: no cache holds them
    student = torch.randn(rows, vocabulary, device="cuda") * 2
    teacher = student + distance * torch.randn_like(student)
    weight = torch.ones(rows, device="cuda")
    source, to = torch.empty(2, 2**31, dtype=torch.uint8, device="cuda")
    runs, skipped = {"copy": lambda: to.copy_(source)}, {}
    gradients = {name: torch.empty_like(student, dtype=getattr(torch, name)) for name in ("bfloat16", "float32")}
    for name in ("triton", "cuda-cluster", "cuda-streaming"):
        try:
            kernel = kernels_of(student.device, name).row_divergence
        except ValueError as error:
            skipped[name] = str(error)
            continue
        for beta in (0.0, 0.5, 1.0):
            for dtype, gradient in gradients.items():
                options = {"beta": beta, "temperature": 1.0, "teacher_is_difference": False, "gradient": gradient}
                runs[name, beta, dtype] = functools.partial(kernel, student, teacher, weight, None, **options)
    times = medians(runs, repeats)
    copied = 2 * source.numel() / times.pop("copy") / 1e6
    lines = []
    for (name, beta, dtype), time_ in times.items():
        rate = (8 + gradients[dtype].element_size()) * rows * vocabulary / time_ / 1e6
        lines.append({"kernel": name, "beta": beta, "gradient": dtype, "milliseconds": time_,
                      "share of copy": rate / copied})  # fmt: skip
    return {"row_kernels": lines, "copy GB/s": copied, "rows": rows, "vocabulary": vocabulary, "distance": distance,
            "skipped": skipped}  # fmt: skip


def evaluation(rows: int, width: int, vocabulary: int, repeats: int) -> dict:
    """The value alone: the tiled walks beside the library's product of the same size."""
    tensors = [x.detach() for x in problem(rows, width, vocabulary)]
    logits = tensors[0] @ tensors[1].T
    runs = {"product": lambda: torch.mm(tensors[0], tensors[1].T, out=logits)}
    walks = {0.0: 1, 0.5: 2, 1.0: 1}
    for schedule in ("tiled", "chunked"):
        for beta in walks:
            runs[f"{schedule} {beta}"] = lambda schedule=schedule, beta=beta: linear_divergence(
                *tensors, beta=beta, schedule=schedule
            )
    times = medians(runs, repeats)
    operations = 2 * rows * width * vocabulary
    result = {"library TFLOP/s": operations / times["product"] / 1e9, "rows": rows, "width": width}
    for beta, count in walks.items():
        rate = 2 * count * operations / times[f"tiled {beta}"] / 1e9
        result[f"tiled {beta}"] = {
            "milliseconds": times[f"tiled {beta}"], "TFLOP/s": rate,
            "share of library": rate / result["library TFLOP/s"], "chunked milliseconds": times[f"chunked {beta}"],
        }  # fmt: skip
    return {"evaluation": result}


def objectives(rows: int, width: int, vocabulary: int, repeats: int) -> dict:
    """Every objective and part of a head, forward and backward with a frozen head, beside the plain divergence."""

    def on_device(x):
        return x.detach().cuda() if isinstance(x, Tensor) else x

    hidden, weight, teacher = problem(rows, width, vocabulary)
    runs = {}
    for name, options in cases(torch.empty(rows, width), torch.empty(vocabulary, width)).items():
        options = {key: on_device(x) for key, x in options.items()}
        if "student_lora" in options:
            options["student_lora"] = tuple(map(on_device, options["student_lora"]))

        def run(options=options):
            own = None if "support_ids" in options else teacher
            hidden.grad = None
            linear_divergence(hidden, weight.detach(), own, **options).loss.backward()

        runs[name] = run
    times = medians(runs, repeats)
    plain = next(iter(times.values()))
    return {"objectives": {name: {"milliseconds": x, "/ plain": x / plain} for name, x in times.items()},
            "rows": rows, "width": width, "vocabulary": vocabulary}  # fmt: skip


def table(lines: list[dict]) -> str:
    out = []
    for line in lines:
        if "row_kernels" in line:
            out += [
                "",
                f"Row kernels, N = {line['rows']}, V = {line['vocabulary']}, teacher's logits {line['distance']} away; "
                f"copy {line['copy GB/s']:.0f} GB/s",
                "",
                "| | β | gradient | ms | share of copy |",
                "|---|---|---|---|---|",
                *(f"| {x['kernel']} | {x['beta']} | {x['gradient']} | {x['milliseconds']:.2f} | "
                  f"{x['share of copy']:.0%} |" for x in line["row_kernels"]),
                *(f"| {name} | skipped: {why} | | | |" for name, why in line["skipped"].items()),
            ]  # fmt: skip
            continue
        if "implementations" not in line:
            out += ["", "```", json.dumps(line, indent=1), "```"]
            continue
        bound = line["implementations"]["four products"]["milliseconds"]
        share = f", {line['zeros']:.0%} of the questions at weight 0" if line["zeros"] else ""
        out += [
            "",
            f"N = {line['rows']}, D = {line['width']}, V = {line['vocabulary']}, β = {line['beta']}{share}"
            f"{', frozen head' if line['frozen_head'] else ''}",
            "",
            "| | ms | / four products | peak MiB | error of ∂h, ∂W |",
            "|---|---|---|---|---|",
        ]
        for name, record in line["implementations"].items():
            if "skipped" in record:
                out.append(f"| {name} | skipped: {record['skipped'].splitlines()[0][:80]} | | | |")
                continue
            errors = ", ".join(f"{e:.1e}" if e <= ERROR_LIMIT else f"**{e:.1e}**" for e in record.get("errors", []))
            peak = f"{record['peak_mib']:.0f}" if "peak_mib" in record else ""
            ms = record["milliseconds"]
            out.append(f"| {name} | {ms:.2f} | {ms / bound:.2f} | {peak} | {errors} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after so long")
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 512, 2048])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    started = time.monotonic()
    size = {"width": arguments.width, "vocabulary": arguments.vocabulary, "repeats": arguments.repeats}
    plain = {"beta": 0.5, "zeros": 0.0, "frozen_head": False, **size}
    most = max(arguments.rows)
    cases = [
        lambda: row_kernels(arguments.vocabulary, 0.1, arguments.repeats),
        lambda: case(arguments.rows[0], **plain),
        lambda: evaluation(arguments.rows[0], arguments.width, arguments.vocabulary, arguments.repeats),
        lambda: objectives(arguments.rows[-1], arguments.width, arguments.vocabulary, arguments.repeats),
        *(lambda zeros=zeros: case(most, **{**plain, "zeros": zeros}) for zeros in (0.63, 0.78)),
        *(lambda rows=rows: case(rows, **plain) for rows in arguments.rows[1:]),
        *(lambda beta=beta: case(most, **{**plain, "beta": beta}) for beta in (0.0, 1.0)),
        lambda: case(most, **{**plain, "frozen_head": True}),
        *(lambda width=width: case(most, **{**plain, "width": width}) for width in (1024, 2048)),
        lambda: row_kernels(arguments.vocabulary, 3.0, arguments.repeats),
        *(lambda vocabulary=vocabulary: row_kernels(vocabulary, 0.1, arguments.repeats)
          for vocabulary in (50257, 100278, 262144)),
    ]  # fmt: skip
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"gpu-{'-'.join(machine['device'].lower().split())}.jsonl"
    lines = []
    for run in cases:
        if time.monotonic() - started > arguments.seconds:
            print(f"time is up after {len(lines)} of {len(cases)} cases", flush=True)
            break
        line = {**run(), **machine}
        torch.cuda.empty_cache()
        lines.append(line)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(table([line]), flush=True)


if __name__ == "__main__":
    main()
