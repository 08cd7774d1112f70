"""Errors of loss and gradients against float64 as the teacher comes near the student, for every implementation.

    python benchmarks/accuracy.py [--device cpu] [--inputs TEXT ...] [--rows 64] [--width 256] [--vocabulary 8192]
                                  [--output FOLDER]

Near-equal distributions are self-distillation's normal state. All implementations have the same inputs (`reasoning` of
inputs.py), rounded to a dtype before; float64 is the reference schedule's, which tests compare with formulas that share
nothing with it, on these rounded inputs. The teacher's distance is swept from far to next to nothing; what is written
beside each error is the mean KL(q‖p) that it makes. The last inputs are the hidden states of a real model with itself
as its teacher (`smollm2.py`, where its wheel is installed).

Writes FOLDER/accuracy-<machine>.json after every kind of inputs and prints the table; `benchmarks/report.py` puts it
into docs/benchmarks.md and draws it.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from implementations import COLOURS, HAND_FILTERED, IMPLEMENTATIONS, label
from inputs import reasoning
from measuring import RESULTS, described, error, machine, write
from smollm2 import NAME as SMOLLM2
from smollm2 import is_there, self_teacher_states
from torch import Tensor

from scsdpo_kernels import linear_divergence

DISTANCES = (4.0, 2.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 4e-4, 1e-4, 2e-5)
SHOWN = ("distance 2.0", "distance 0.1", "distance 0.01", "distance 0.0004", SMOLLM2)  # in docs/benchmarks.md
OBJECTIVES = {0.0: "forward KL", 0.5: "Jensen-Shannon", 1.0: "reverse KL"}


def gradients(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...], beta: float) -> dict[str, Tensor]:
    hidden, weight, teacher = (x.clone() for x in tensors)
    value = loss(hidden.requires_grad_(), weight.requires_grad_(), teacher, beta)
    value.backward()
    return {"loss": value.detach(), "hidden": hidden.grad, "weight": weight.grad}


def exact(hidden: Tensor, weight: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return linear_divergence(hidden, weight, teacher, beta=beta, schedule="reference").loss


def inputs(arguments: argparse.Namespace) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """What they are; student's hidden states, head and teacher's, in fp32."""
    shape = arguments.rows, arguments.width, arguments.vocabulary
    makers: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        f"distance {distance}": partial(reasoning, *shape, distance=distance) for distance in DISTANCES
    }
    if is_there():
        makers[SMOLLM2] = partial(self_teacher_states, arguments.rows)
    for name, make in makers.items():
        if any(text in name for text in arguments.inputs):
            yield name, make()


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[list[dict]]:
    """The records of one kind of inputs after the other."""
    torch._dynamo.config.recompile_limit = 64  # for dtypes and objectives; past it a compiled peer would run uncompiled
    for what, given in inputs(arguments):
        records = []
        for dtype in ("float32", "bfloat16"):
            tensors = tuple(x.to(device, getattr(torch, dtype)) for x in given)
            doubles = tuple(x.double() for x in tensors)
            kl = (exact(*doubles, 0.0) / len(tensors[0])).item()
            for beta in OBJECTIVES:
                expected = gradients(exact, doubles, beta)
                for name, implementation in IMPLEMENTATIONS.items():
                    if name == HAND_FILTERED:  # all tokens have a weight here
                        continue
                    record = {"dtype": dtype, "inputs": what, "kl": kl, "beta": beta, "implementation": name}
                    why_not = implementation.why_not(device)
                    if why_not:
                        record["why_not"] = why_not
                    else:
                        got = gradients(implementation.loss, tensors, beta)
                        record["errors"] = {of: error(got[of], x) for of, x in expected.items()}
                        record["label"] = label(name)
                    records.append(record)
        yield records


def table(result: dict) -> str:
    """One result file as Markdown."""
    shape, measured = result["shape"], {x["inputs"] for x in result["records"]}
    of_model = f" Of {SMOLLM2}: D = 576, V = 49152."
    lines = [
        f"Relative error of ∂h against float64, for forward KL / Jensen-Shannon / reverse KL, as the mean KL falls; "
        f"N = {shape['rows']}, D = {shape['width']}, V = {shape['vocabulary']}, {described(result['machine'])}. "
        f"In bold: over one per cent.{of_model if SMOLLM2 in measured else ''}",
    ]
    for dtype in ("float32", "bfloat16"):
        own = [x for x in result["records"] if x["dtype"] == dtype and "errors" in x and x["inputs"] in SHOWN]
        columns = {x["inputs"]: f"{x['kl']:.0e}" + f", {x['inputs']}" * (x["inputs"] == SMOLLM2) for x in own}
        lines += [
            "",
            f"| {dtype}; mean KL: | " + " | ".join(columns.values()) + " |",
            "|---" * (1 + len(columns)) + "|",
        ]
        for name in dict.fromkeys(x["implementation"] for x in own):
            row = [x for x in own if x["implementation"] == name]
            cells = (" / ".join(_cell(x["errors"]["hidden"]) for x in row if x["inputs"] == of) for of in columns)
            lines.append(f"| {row[0]['label']} | " + " | ".join(cells) + " |")
    absent = {x["implementation"]: x["why_not"] for x in result["records"] if "why_not" in x}
    lines += ["", "Not run: " + "; ".join(f"{name}: {why}" for name, why in absent.items()) + "."] if absent else []
    return "\n".join(lines)


def _cell(error: float) -> str:
    return f"**{error:.0e}**" if not error <= 0.01 else f"{error:.0e}"


def _points(records: list[dict], of: str) -> tuple[list[float], list[float]]:
    return [x["kl"] for x in records], [max(x["errors"][of], 1e-9) for x in records]


def plot(result: dict):
    """One result file as a figure."""
    from matplotlib.figure import Figure

    quantities = {"loss": "loss", "hidden": "∂h", "weight": "∂W"}
    figure = Figure(figsize=(13, 15), layout="constrained", dpi=80)
    axes = figure.subplots(6, 3, sharex=True, sharey=True)
    for row, (dtype, of) in enumerate(itertools.product(("float32", "bfloat16"), quantities)):
        for axis, (beta, objective) in zip(axes[row], OBJECTIVES.items(), strict=True):
            own = [x for x in result["records"] if (x["dtype"], x["beta"]) == (dtype, beta) and "errors" in x]
            own = [x for x in own if x["implementation"] != "reference"]
            for name in dict.fromkeys(x["implementation"] for x in own):
                of_name = [x for x in own if x["implementation"] == name]
                line, points = ([x for x in of_name if (x["inputs"] == SMOLLM2) == real] for real in (False, True))
                style = {"color": COLOURS[name], "label": of_name[0]["label"]}
                if line:
                    x, y = _points(line, of)
                    axis.loglog(x, y, marker="o", markersize=3, linewidth=2.5 if name == "chunked" else 1, **style)
                    style.pop("label")
                axis.loglog(*_points(points, of), marker="*", markersize=8, linestyle="none", **style)
            axis.set_title(f"{objective}, {dtype}, {quantities[of]}", fontsize=9)
            axis.grid(alpha=0.3)
    axes[0, 0].invert_xaxis()
    for axis in axes[-1]:
        axis.set_xlabel("mean KL(teacher ‖ student), nats")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(
        f"Error against float64 as the teacher nears the student; stars: {SMOLLM2} ({described(result['machine'])})"
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", nargs="+", default=[""], help="those whose name has one of these texts in it")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    shape = {name: getattr(arguments, name) for name in ("rows", "width", "vocabulary")}
    result = {"machine": machine(device), "shape": shape, "records": []}
    for records in measure(arguments, device):
        result["records"] += records
        write("accuracy", result, arguments.output)
    print(table(result))


if __name__ == "__main__":
    main()
