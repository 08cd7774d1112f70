"""One figure of both parts. Each title is a sentence made of the numbers."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from statistics import fmean, median, stdev

from implementations import COLOURS, HAND_FILTERED
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter

from . import comparison
from .comparison import AXES, OURS, PLAIN
from .kernel import METHODS, WAYS, Comparison
from .learning import Runs

OF_LEARNING = {OURS: COLOURS["chunked"], PLAIN: COLOURS["SDPO, eager"], comparison.HARD: COLOURS[HAND_FILTERED]}
STYLES = {OURS: "-", PLAIN: "-", comparison.HARD: "--"}
OF_DTYPE = {"bf16": 1.0, "fp32": 0.35}  # opacity


def draw(runs: Runs, found: Comparison | None, path: Path) -> None:
    """The learning part, and below it the kernel part where there is one."""
    rows = 1 if found is None else 2
    figure = Figure(figsize=(12.5, 0.4 + 4.5 * rows), layout="constrained", dpi=120)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    panels = figure.subfigures(rows, 2, squeeze=False, wspace=0.04, hspace=0.04)
    for panel, axis in zip(panels[0], ("rollouts trained on", "CPU time"), strict=True):
        learning_curves(panel, runs, axis)
    if found is not None:
        cost(panels[1, 0], found)
        token_errors(panels[1, 1], found)
    figure.savefig(path)


def titled(panel: SubFigure, text: str) -> None:
    panel.suptitle(textwrap.fill(text, 54), x=0.03, ha="left", fontsize=12.5, fontweight="bold")


def bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


# Learning.


def learning_title(runs: Runs, axis: str) -> str:
    equal, level = comparison.at_equal(runs, axis), comparison.highest_level(runs)
    if axis == "rollouts trained on" and level is not None:
        ratio = comparison.ratio(comparison.until(runs, axis, level))
        return f"To reach {level:.2f}, SC-SDPO trains on {comparison.times(ratio)} the rollouts of SDPO"
    where = {1: "ahead of", -1: "behind", 0: "not told apart from"}
    over = equal.over(PLAIN)
    return f"At equal {axis} SC-SDPO is {where[over.sign]} SDPO: {over}"


def learning_curves(panel: SubFigure, runs: Runs, axis: str) -> None:
    axes, of = panel.subplots(), AXES[axis]
    for name, own in runs.items():
        tests = list(zip(*own, strict=True))  # the points of all seeds after the same steps
        x = [fmean(map(of, points)) for points in tests]
        rates = [[point.pass_rate for point in points] for points in tests]
        y, off = [fmean(r) for r in rates], [stdev(r) / math.sqrt(len(r)) for r in rates]
        axes.plot(x, y, STYLES[name], color=OF_LEARNING[name], label=name, linewidth=2)
        axes.plot(x[-1:], y[-1:], "o", color=OF_LEARNING[name])
        low, high = ([a + sign * b for a, b in zip(y, off, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=OF_LEARNING[name], alpha=0.15, linewidth=0)
    if (level := comparison.highest_level(runs)) is not None:
        needed = comparison.until(runs, axis, level)
        axes.annotate(
            "", (needed[OURS], level), (needed[PLAIN], level), arrowprops={"arrowstyle": "->", "linewidth": 1.5}
        )
        text = f"{comparison.times(comparison.ratio(needed))} to reach {level:.2f}"
        axes.annotate(text, (max(needed[OURS], needed[PLAIN]), level), (8, -14), textcoords="offset points")
    titled(panel, learning_title(runs, axis))
    labels = {
        "rollouts trained on": "rollouts trained on",
        "CPU time": "seconds of CPU, sampling included",
    }
    axes.set(xlabel=f"{labels[axis]} (dots: after {runs[OURS][0][-1].step} steps)", xlim=0)
    axes.set_ylabel(f"held-out pass rate, {len(runs[OURS])} seeds ± s.e.")
    axes.legend(loc="lower right", frameon=False)
    bare(axes)


# The kernel.


def cost_title(found: Comparison) -> str:
    memory, seconds = (found.ratio(what, HAND_FILTERED) for what in ("peak_mib", "seconds"))
    of_memory = "" if math.isnan(memory) else f"{memory:.2f} × the memory and "
    return f"In bf16, fused takes {of_memory}{seconds:.2f} × the time of hand-filtered eager"


def cost(panel: SubFigure, found: Comparison) -> None:
    """Bars of memory and of time."""
    left, right = panel.subplots(1, 2, sharey=True)
    quantities = {
        left: ([found.records[way].peak_mib for way in WAYS], "peak MiB over inputs", ".0f"),
        right: ([found.records[way].seconds for way in WAYS], "seconds", ".2f"),
    }
    for axes, (values, name, form) in quantities.items():
        values = [0.0 if math.isnan(value) else value for value in values]
        for row, ((method, dtype), value) in enumerate(zip(WAYS, values, strict=True)):
            axes.barh(row, value, color=COLOURS[METHODS[method]], alpha=OF_DTYPE[dtype], height=0.75)
            axes.text(value, row, f" {value:{form}}" if value else " not measured", va="center", fontsize=10)
        axes.set(xlabel=name, xlim=(0, 1.25 * max(*values, 1e-9)), ylim=(len(WAYS) - 0.4, -0.6))
        bare(axes)
        axes.grid(visible=False, axis="y")
    left.set_yticks(range(len(WAYS)), [", ".join(way) for way in WAYS])
    titled(panel, cost_title(found))


def error_title(found: Comparison) -> str:
    eager, fused = (median(found.records[method, "bf16"].token_errors) for method in ("eager", "fused"))
    return f"A token's gradient is {eager:.1%} off in eager bf16, {fused:.2%} in fused bf16 (medians)"


def token_errors(panel: SubFigure, found: Comparison) -> None:
    """A dot is a token."""
    axes = panel.subplots()
    for method, dtype in WAYS:
        if method == HAND_FILTERED:  # eager's errors, on eager's tokens
            continue
        off = [max(x, 1e-9) for x in found.records[method, dtype].token_errors]
        style = {"color": COLOURS[METHODS[method]], "alpha": 0.6 if dtype == "bf16" else 0.3, "linewidths": 0}
        marker = {"marker": "o", "s": 14} if dtype == "bf16" else {"marker": "D", "s": 8}
        axes.scatter([max(x, 1e-9) for x in found.divergences], off, label=f"{method}, {dtype}", **style, **marker)
    axes.set(xscale="log", yscale="log", xlabel="KL of teacher and student at that token of SmolLM2-135M, nats")
    axes.set(ylabel="error of a token's gradient", ylim=(None, 30))  # room for the legend
    axes.set_yticks([10.0**n for n in range(-6, 1)])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.legend(loc="upper center", ncols=2, frameon=False, markerscale=2)
    titled(panel, error_title(found))
    bare(axes)
