"""Errors of loss and gradients against float64 as the teacher comes near the student, for every implementation.

    python benchmarks/accuracy.py [--rows 64] [--width 256] [--vocabulary 8192] [--output FOLDER]

Near-equal distributions are self-distillation's normal state. All implementations have the same inputs (`reasoning` of
inputs.py), rounded to a dtype before; float64 is the reference schedule's, which tests compare with formulas that share
nothing with it, on these rounded inputs. The teacher's distance is swept from far to next to nothing; what is written
beside each error is the mean KL(q‖p) that it makes.

Writes FOLDER/accuracy-<machine>.json and accuracy-<machine>.png and prints the table; `--readme` puts the tables of all
such files into README.md.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from headline import RESULTS, ROOT, machine, tables_of, write
from implementations import IMPLEMENTATIONS, label
from inputs import reasoning
from torch import Tensor

from scsdpo_kernels import linear_divergence

BEGIN = "<!-- benchmarks/accuracy.py --readme -->\n"
DISTANCES = (4.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 4e-4)
SHOWN = (1.0, 0.1, 0.01, 1e-3)  # in the README
OBJECTIVES = {0.0: "forward KL", 0.5: "Jensen-Shannon", 1.0: "reverse KL"}


def gradients(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...], beta: float) -> dict[str, Tensor]:
    hidden, weight, teacher = (x.clone() for x in tensors)
    value = loss(hidden.requires_grad_(), weight.requires_grad_(), teacher, beta)
    value.backward()
    return {"loss": value.detach(), "hidden": hidden.grad, "weight": weight.grad}


def exact(hidden: Tensor, weight: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return linear_divergence(hidden, weight, teacher, beta=beta, schedule="reference").loss


def measure(arguments: argparse.Namespace, device: torch.device) -> list[dict]:
    records = []
    for dtype in ("float32", "bfloat16"):
        for distance in DISTANCES:
            tensors = reasoning(
                arguments.rows, arguments.width, arguments.vocabulary, getattr(torch, dtype), distance=distance
            )
            tensors = tuple(x.to(device) for x in tensors)
            doubles = tuple(x.double() for x in tensors)
            kl = (exact(*doubles, 0.0) / arguments.rows).item()
            for beta in OBJECTIVES:
                expected = gradients(exact, doubles, beta)
                for name, implementation in IMPLEMENTATIONS.items():
                    record = {"dtype": dtype, "distance": distance, "kl": kl, "beta": beta, "implementation": name}
                    why_not = implementation.why_not(device)
                    if why_not:
                        record["why_not"] = why_not
                    else:
                        got = gradients(implementation.loss, tensors, beta)
                        record["errors"] = {
                            what: ((got[what].double() - x).norm() / x.norm()).item() for what, x in expected.items()
                        }
                        record["label"] = label(name)
                    records.append(record)
    return records


def table(result: dict) -> str:
    shape, host = result["shape"], result["machine"]
    lines = [
        f"Relative error of ∂h against float64, for forward KL / Jensen-Shannon / reverse KL, as the mean KL falls; "
        f"N = {shape['rows']}, D = {shape['width']}, V = {shape['vocabulary']}, {host['cpu']}, torch {host['torch']}. "
        f"In bold: over one per cent.",
    ]
    for dtype in ("float32", "bfloat16"):
        own = [x for x in result["records"] if x["dtype"] == dtype and "errors" in x and x["distance"] in SHOWN]
        distances = {x["distance"]: x["kl"] for x in own}
        lines += [
            "",
            f"| {dtype}; mean KL: | " + " | ".join(f"{kl:.0e}" for kl in distances.values()) + " |",
            "|---" * (1 + len(distances)) + "|",
        ]
        for name in dict.fromkeys(x["implementation"] for x in own):
            row = [x for x in own if x["implementation"] == name]
            cells = (" / ".join(_cell(x["errors"]["hidden"]) for x in row if x["distance"] == d) for d in distances)
            lines.append(f"| {row[0]['label']} | " + " | ".join(cells) + " |")
    absent = {x["implementation"]: x["why_not"] for x in result["records"] if "why_not" in x}
    lines += ["", "Not run: " + "; ".join(f"{name}: {why}" for name, why in absent.items()) + "."] if absent else []
    return "\n".join(lines)


def _cell(error: float) -> str:
    return f"**{error:.0e}**" if not error <= 0.01 else f"{error:.0e}"


def plot(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for row, dtype in enumerate(("float32", "bfloat16")):
        for column, (beta, objective) in enumerate(OBJECTIVES.items()):
            axis = axes[row, column]
            own = [x for x in result["records"] if (x["dtype"], x["beta"]) == (dtype, beta) and "errors" in x]
            for name in dict.fromkeys(x["implementation"] for x in own):
                if name == "reference":
                    continue
                line = [x for x in own if x["implementation"] == name]
                ours = name in ("chunked", "tiled")
                axis.loglog(
                    [x["kl"] for x in line],
                    [max(x["errors"]["hidden"], 1e-9) for x in line],
                    marker="o", markersize=3, linewidth=2.5 if ours else 1, label=line[0]["label"],
                )  # fmt: skip
            axis.set_title(f"{objective}, {dtype}", fontsize=9)
            axis.grid(alpha=0.3)
    axes[0, 0].invert_xaxis()
    for axis in axes[1]:
        axis.set_xlabel("mean KL(teacher ‖ student), nats")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of ∂h")
    axes[0, 0].legend(fontsize=7)
    host = result["machine"]
    figure.suptitle(f"Error against float64 as the teacher nears the student ({host['cpu']}, torch {host['torch']})")
    figure.savefig(path, dpi=110)


def with_tables(readme: str) -> str:
    """README text with the tables of all result files between its two marks."""
    return tables_of("accuracy", table, BEGIN, readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--readme", action="store_true", help="only write the tables of the result files into README.md"
    )
    arguments = parser.parse_args()
    if arguments.readme:
        readme = ROOT / "README.md"
        readme.write_text(with_tables(readme.read_text()))
        return
    shape = {name: getattr(arguments, name) for name in ("rows", "width", "vocabulary")}
    result = {"machine": machine(), "shape": shape, "records": measure(arguments, torch.device(arguments.device))}
    print(table(result))
    path = write("accuracy", result, arguments.output)
    plot(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
