"""How time and memory grow: with rows, vocabulary, the share of rows that has a weight, and threads.

    python benchmarks/scaling.py [--device cpu] [--rows 512] [--width 512] [--vocabulary 32000] [--repeats 5]
                                 [--output FOLDER]

Time: forward and backward of ours, medians of repeats that take turns over all points, the time per row that has a
weight, and the exponent that fits time ~ x^exponent. Memory: peak over inputs and gradients of a second step, in a
fresh process on a CPU, for every implementation. Inputs are `reasoning`'s, fp32 on a CPU and bf16 on a GPU;
Jensen-Shannon.

Writes FOLDER/scaling-<machine>.json after every point and prints its tables; `benchmarks/report.py` puts them into
docs/benchmarks.md and draws them.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from implementations import COLOURS, IMPLEMENTATIONS, colour_of, label
from inputs import reasoning
from measuring import RESULTS, alone, described, interleaved, machine, medians, peak_mib, timed, write
from torch import Tensor

from scsdpo_kernels import linear_divergence

FACTORS = {"rows": (0.5, 1.0, 2.0, 4.0, 8.0), "vocabulary": (0.5, 1.0, 2.0, 4.0)}
SHARES = (0.1, 0.22, 0.37, 0.5, 0.75, 1.0)  # rows with a weight; the paper's batches have 0.37 to 0.22


def points(arguments: argparse.Namespace) -> dict[str, dict[float, dict]]:
    """By what grows: its value, and the sizes of the point."""
    base = {"rows": arguments.rows, "vocabulary": arguments.vocabulary, "kept": 1.0, "threads": torch.get_num_threads()}
    grown = {
        what: {int(f * base[what]): {**base, what: int(f * base[what])} for f in factors}
        for what, factors in FACTORS.items()
    }
    many = 4 * base["rows"]
    grown["kept rows"] = {int(s * many): {**base, "rows": many, "kept": s} for s in SHARES}
    if arguments.device == "cpu":
        grown["threads"] = {n: {**base, "threads": n} for n in range(1, base["threads"] + 1)}
    return grown


def inputs(arguments: argparse.Namespace, rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    hidden, weight, teacher = reasoning(rows, arguments.width, vocabulary, dtype, device=arguments.device)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher


def times(arguments: argparse.Namespace) -> dict[str, list[dict]]:
    threads = torch.get_num_threads()
    biggest = inputs(arguments, int(max(FACTORS["rows"]) * arguments.rows), arguments.vocabulary)
    by_vocabulary = {arguments.vocabulary: biggest}

    def step(sizes: dict) -> None:
        hidden, weight, teacher = (x.detach() for x in by_vocabulary[sizes["vocabulary"]])
        hidden, teacher = hidden[: sizes["rows"]].requires_grad_(), teacher[: sizes["rows"]]
        token_weight = (torch.arange(len(hidden), device=hidden.device) < round(sizes["kept"] * len(hidden))).float()
        torch.set_num_threads(sizes["threads"])
        linear_divergence(hidden, weight.requires_grad_(), teacher, token_weight=token_weight).loss.backward()
        torch.set_num_threads(threads)

    runs = {}
    for what, of in points(arguments).items():
        for x, sizes in of.items():
            if sizes["vocabulary"] not in by_vocabulary:
                by_vocabulary[sizes["vocabulary"]] = inputs(arguments, sizes["rows"], sizes["vocabulary"])
            runs[what, x] = partial(step, sizes)
    result: dict[str, list[dict]] = {}
    for (what, x), median in medians(interleaved(runs, arguments.repeats, torch.device(arguments.device))).items():
        sizes = points(arguments)[what][x]
        per_row = median / round(sizes["rows"] * sizes["kept"])
        result.setdefault(what, []).append({"x": x, "seconds": median, "seconds per kept row": per_row})
    return result


def exponent(series: list[dict]) -> float:
    """The exponent of time ~ x^exponent, by least squares of the logarithms. NaN for one x, as of one thread."""
    if len({p["x"] for p in series}) < 2:
        return math.nan
    pairs = [(math.log(p["x"]), math.log(p["seconds"])) for p in series]
    mean_x, mean_y = (statistics.fmean(of) for of in zip(*pairs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in pairs) / sum((x - mean_x) ** 2 for x, _ in pairs)


def peak(name: str, rows: int, vocabulary: int, arguments: argparse.Namespace) -> float | None:
    loss, (hidden, weight, teacher) = IMPLEMENTATIONS[name].loss, inputs(arguments, rows, vocabulary)

    def step() -> None:
        loss(hidden, weight, teacher).backward()

    try:
        step()  # imports, compilation
        return peak_mib(step, (hidden, weight), torch.device(arguments.device))
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def peaks(arguments: argparse.Namespace) -> Iterator[dict]:
    """The records of one point after the other; peak_mib is None where memory did not suffice."""
    device, known = torch.device(arguments.device), {}
    for name, implementation in IMPLEMENTATIONS.items():
        if name == "reference" or implementation.why_not(device):
            continue
        for what in FACTORS:
            for x, sizes in points(arguments)[what].items():
                at = name, sizes["rows"], sizes["vocabulary"]
                if at not in known:
                    known[at] = alone(peak, *at, arguments) if device.type == "cpu" else peak(*at, arguments)
                yield {"label": label(name), "what": what, "x": x, "peak_mib": known[at]}


def table(result: dict) -> str:
    """One result file as Markdown."""
    shape = result["shape"]
    dtype = "fp32" if "threads" in result["machine"] else "bf16"
    lines = [
        f"{timed(result['machine'])}; ours, {dtype}, Jensen-Shannon, forward and backward, D = {shape['width']}; "
        f"N = {shape['rows']} and V = {shape['vocabulary']} where they do not grow; medians of {result['repeats']}.",
        "",
        "| what grows | from | to | time there / time here | time ~ x^ | µs per token with a weight, from | to |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, series in result["times"].items():
        first, last = series[0], series[-1]
        per_row = " | ".join(f"{1e6 * p['seconds per kept row']:.0f}" for p in (first, last))
        lines.append(
            f"| {what} | {first['x']} | {last['x']} | {last['seconds'] / first['seconds']:.2f} | "
            f"{exponent(series):.2f} | {per_row} |"
        )
    for what in FACTORS:
        of = list(dict.fromkeys(p["x"] for p in result["peaks"] if p["what"] == what))
        lines += ["", f"| peak MiB over inputs and gradients; {what}: | " + " | ".join(f"{x}" for x in of) + " |",
                  "|---" * (1 + len(of)) + "|"]  # fmt: skip
        for name in dict.fromkeys(p["label"] for p in result["peaks"]):
            series = {p["x"]: p["peak_mib"] for p in result["peaks"] if (p["label"], p["what"]) == (name, what)}
            cells = (f"{series[x]:.0f}" if series[x] is not None else "too much" for x in of if x in series)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(result: dict):
    """One result file as a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout="constrained", dpi=110)
    axes = figure.subplots(1, 3)
    kept = result["times"]["kept rows"]
    axes[0].plot([p["x"] for p in kept], [p["seconds"] for p in kept], marker="o", color=COLOURS["chunked"])
    axes[0].set(xlabel=f"tokens with a weight, of {kept[-1]['x']}", ylabel="seconds", title="ours", xlim=0, ylim=0)
    for axis, what in zip(axes[1:], FACTORS, strict=True):
        for name in dict.fromkeys(p["label"] for p in result["peaks"]):
            own = (p for p in result["peaks"] if (p["label"], p["what"]) == (name, what))
            series = [p for p in own if p["peak_mib"] is not None]
            style = {"marker": "o", "label": name, "color": colour_of(name)}
            axis.loglog([p["x"] for p in series], [max(p["peak_mib"], 1) for p in series], **style)
        at = list(dict.fromkeys(p["x"] for p in result["peaks"] if p["what"] == what))
        axis.set(xlabel=what, ylabel="peak MiB over inputs and gradients")
        axis.set_xticks(at, [f"{x}" for x in at])
        axis.set_xticks([], minor=True)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(described(result["machine"]))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in ("rows", "width", "vocabulary")}
    result = {"machine": machine(torch.device(arguments.device)), "shape": shape, "repeats": arguments.repeats,
              "times": times(arguments), "peaks": []}  # fmt: skip
    write("scaling", result, arguments.output)
    for record in peaks(arguments):
        print("{label}, {what} {x}: {peak_mib} MiB".format_map(record), flush=True)
        result["peaks"].append(record)
        write("scaling", result, arguments.output)
    print(table(result))


if __name__ == "__main__":
    main()
