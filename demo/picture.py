"""One figure of both parts. Each title is a sentence made of the numbers."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from statistics import fmean, median, stdev

from implementations import COLOURS, HAND_FILTERED
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import FuncFormatter, PercentFormatter

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
    figure = Figure(figsize=(12.5, 0.6 + 4.4 * rows), layout="constrained", dpi=120)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.add_gridspec(rows, 2)
    for place, axis in zip((grid[0, 0], grid[0, 1]), ("rollouts trained on", "CPU time"), strict=True):
        learning_curves(figure.add_subplot(place), runs, axis)
    if found is not None:
        cost(figure, grid[1, 0], found)
        token_errors(figure.add_subplot(grid[1, 1]), found)
    figure.savefig(path)


def titled(axes: Axes, text: str) -> None:
    axes.set_title(textwrap.fill(text, 62), loc="left", fontsize=11.5, fontweight="bold")


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


def learning_curves(axes: Axes, runs: Runs, axis: str) -> None:
    of = AXES[axis]
    for name, own in runs.items():
        tests = list(zip(*own, strict=True))  # the points of all seeds after the same steps
        x = [fmean(map(of, points)) for points in tests]
        rates = [[point.pass_rate for point in points] for points in tests]
        y, off = [fmean(r) for r in rates], [stdev(r) / math.sqrt(len(r)) for r in rates]
        axes.plot(x, y, STYLES[name], color=OF_LEARNING[name], label=name, linewidth=2)
        axes.plot(x[-1:], y[-1:], "o", color=OF_LEARNING[name])
        low, high = ([a + sign * b for a, b in zip(y, off, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=OF_LEARNING[name], alpha=0.15, linewidth=0)
    level = comparison.highest_level(runs)
    if level is not None:
        needed = comparison.until(runs, axis, level)
        axes.annotate(
            "",
            (needed[OURS], level),
            (needed[PLAIN], level),
            arrowprops={"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0},
        )
        text = f"{comparison.times(comparison.ratio(needed))} until {level:.2f}"
        axes.text(max(needed.values()), level, " " + text, va="center", fontsize=10)
    titled(axes, learning_title(runs, axis))
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
    of = [f"{found.ratio('seconds', other):.2f} × the time" for other in ("eager", HAND_FILTERED)]
    memory = [found.ratio("peak_mib", other) for other in ("eager", HAND_FILTERED)]
    if not any(map(math.isnan, memory)):
        of = [f"{m:.2f} × the memory and {text}" for m, text in zip(memory, of, strict=True)]
    return f"Fused, in bf16: {of[0]} of eager PyTorch; {of[1]} of hand-filtered eager"


def cost(figure: Figure, place: SubplotSpec, found: Comparison) -> None:
    """Bars of memory and of time."""
    places = place.subgridspec(1, 2, wspace=0.06)
    left = figure.add_subplot(places[0])
    right = figure.add_subplot(places[1], sharey=left)
    quantities = {
        left: ([found.records[way].peak_mib for way in WAYS], "peak MiB above inputs and gradients", ".0f"),
        right: ([found.records[way].seconds for way in WAYS], "seconds, forward and backward", ".2f"),
    }
    for axes, (values, name, form) in quantities.items():
        values = [0.0 if math.isnan(value) else value for value in values]
        for row, ((method, dtype), value) in enumerate(zip(WAYS, values, strict=True)):
            axes.barh(row, value, color=COLOURS[METHODS[method]], alpha=OF_DTYPE[dtype], height=0.75)
            axes.text(value, row, f" {value:{form}}" if value else " not measured", va="center", fontsize=10)
        axes.set(xlabel=name, xlim=(0, 1.18 * max(*values, 1e-9)), ylim=(len(WAYS) - 0.4, -0.6))
        bare(axes)
        axes.grid(visible=False, axis="y")
    left.set_yticks(range(len(WAYS)), [", ".join(way) for way in WAYS])
    right.tick_params(labelleft=False)
    titled(left, cost_title(found))


def error_title(found: Comparison) -> str:
    off = [median(found.records[method, "bf16"].token_errors) for method in ("eager", "fused")]
    return f"Half of the tokens' gradients are more than {off[0]:.1%} off in eager bf16, {off[1]:.2%} in fused bf16"


def token_errors(axes: Axes, found: Comparison) -> None:
    """A dot is a token."""
    for method, dtype in WAYS:
        if method == HAND_FILTERED:  # eager's errors, on eager's tokens
            continue
        off = [max(x, 1e-9) for x in found.records[method, dtype].token_errors]
        style = {"color": COLOURS[METHODS[method]], "alpha": 0.6 if dtype == "bf16" else 0.3, "linewidths": 0}
        marker = {"marker": "o", "s": 14} if dtype == "bf16" else {"marker": "D", "s": 8}
        axes.scatter([max(x, 1e-9) for x in found.divergences], off, label=f"{method}, {dtype}", **style, **marker)
    axes.set(xscale="log", yscale="log", xlabel="KL of teacher and student at the token, nats (SmolLM2-135M)")
    axes.set_ylabel("error of the token's gradient")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.legend(loc="upper right", frameon=False, fontsize=9, markerscale=1.8)
    titled(axes, error_title(found))
    bare(axes)
