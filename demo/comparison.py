"""What the runs of several seeds say: means of paired differences with their standard errors, and sentences of them.

Runs are paired by seed, which gives all methods the same questions. Between two tests, a run's pass rate is a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, stdev
from typing import NamedTuple

from .learning import Point, Run, Runs

OURS, PLAIN, HARD = "SC-SDPO", "SDPO", "hard filter"
AXES: dict[str, Callable[[Point], float]] = {
    "steps": lambda point: point.step,
    "rollouts trained on": lambda point: point.rollouts,
    "CPU time": lambda point: point.sampling + point.training,
}
# Student's t at 97.5 % by degrees of freedom, from 1; the last for all that are more.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


class Difference(NamedTuple):
    mean: float
    error: float  # standard error of the mean
    pairs: int

    @property
    def sign(self) -> int:
        """1 or -1 where the 95 % interval has no 0 in it, else 0."""
        if abs(self.mean) <= T[min(self.pairs - 1, len(T)) - 1] * self.error or self.mean == 0:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


def paired(ours: list[float], theirs: list[float]) -> Difference:
    """The mean of ours − theirs, seed by seed.

    Raises:
        ValueError: fewer than two pairs, which have no standard error.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        raise ValueError(f"ours: expected at least 2 seeds, got {len(differences)}")
    return Difference(fmean(differences), stdev(differences) / math.sqrt(len(differences)), len(differences))


def value_at(run: Run, axis: str, x: float) -> float:
    """The pass rate of a run at x of an axis.

    Raises:
        ValueError: x is outside of the run.
    """
    of = AXES[axis]
    if not of(run[0]) <= x <= of(run[-1]):
        raise ValueError(f"x: expected {of(run[0])} to {of(run[-1])}, got {x}")
    for before, after in pairwise(run):
        if of(before) <= x < of(after):
            share = (x - of(before)) / (of(after) - of(before))
            return before.pass_rate + share * (after.pass_rate - before.pass_rate)
    return run[-1].pass_rate


def first_at(run: Run, axis: str, level: float) -> float | None:
    """Where on an axis a run's pass rate reaches a level first; None where it does not."""
    of = AXES[axis]
    if run[0].pass_rate >= level:
        return of(run[0])
    for before, after in pairwise(run):
        if before.pass_rate < level <= after.pass_rate:
            share = (level - before.pass_rate) / (after.pass_rate - before.pass_rate)
            return of(before) + share * (of(after) - of(before))
    return None


def highest_level(runs: Runs) -> float | None:
    """The highest twentieth that every run reaches after its start; None where there is none."""
    every = [run for of_method in runs.values() for run in of_method]
    lowest, start = min(max(p.pass_rate for p in run) for run in every), max(run[0].pass_rate for run in every)
    level = math.floor(20 * lowest + 1e-9) / 20
    return level if level > start else None


class Equal(NamedTuple):
    """All methods where, seed by seed, the one that has the least of an axis ends."""

    x: float  # mean over seeds
    rates: dict[str, list[float]]  # by method, seed by seed

    def mean(self, method: str) -> float:
        return fmean(self.rates[method])

    def over(self, other: str) -> Difference:
        """SC-SDPO's pass rate less another method's."""
        return paired(self.rates[OURS], self.rates[other])


def at_equal(runs: Runs, axis: str) -> Equal:
    ends = [min(AXES[axis](run[-1]) for run in of_seed) for of_seed in zip(*runs.values(), strict=True)]
    rates = {name: [value_at(run, axis, x) for run, x in zip(own, ends, strict=True)] for name, own in runs.items()}
    return Equal(fmean(ends), rates)


def until(runs: Runs, axis: str, level: float) -> dict[str, float]:
    """What a method needs to reach a level that every run reaches, in the mean over seeds."""
    return {name: fmean(first_at(run, axis, level) for run in own) for name, own in runs.items()}


def spent(runs: Runs, what: Callable[[Point], float]) -> dict[str, float]:
    """What a method has of something at the end, in the mean over seeds."""
    return {name: fmean(what(run[-1]) for run in own) for name, own in runs.items()}


def ratio(values: dict[str, float], other: str = PLAIN) -> float:
    """SC-SDPO's over another method's; NaN where that has nothing."""
    return values[OURS] / values[other] if values[other] else math.nan


# Text.


def times(value: float) -> str:
    """A ratio as text."""
    return "—" if math.isnan(value) else f"{value:.2f} ×"


def table(runs: Runs) -> str:
    """At most 100 columns."""
    starts = [run[0].pass_rate for run in runs[OURS]]
    lines = [f"Held-out pass rate, mean of {len(starts)} seeds from one warm start ({fmean(starts):.3f})"]
    lines.append(f"{'':33}" + "".join(f"{name:>12}" for name in runs) + f"{'− SDPO':>15}{'− hard filter':>15}")
    for axis in AXES:
        equal = at_equal(runs, axis)
        x = f"{equal.x:.1f} s" if axis == "CPU time" else f"{equal.x:.0f}"
        means = "".join(f"{equal.mean(name):12.3f}" for name in runs)
        lines.append(f"{f'equal {axis} ({x})':33}{means}{equal.over(PLAIN)!s:>15}{equal.over(HARD)!s:>15}")
    quantities = {
        "rollouts trained on": (spent(runs, lambda p: p.rollouts), ".0f"),
        "CPU seconds, sampling": (spent(runs, lambda p: p.sampling), ".2f"),
        "CPU seconds, training": (spent(runs, lambda p: p.training), ".2f"),
    }
    if (level := highest_level(runs)) is not None:
        quantities[f"rollouts until {level:.2f}"] = until(runs, "rollouts trained on", level), ".0f"
        quantities[f"CPU seconds until {level:.2f}"] = until(runs, "CPU time", level), ".2f"
    for what, (values, form) in quantities.items():
        cells = "".join(f"{value:12{form}}" for value in values.values())
        lines.append(f"{what:33}{cells}{times(ratio(values)):>15}{times(ratio(values, HARD)):>15}")
    return "\n".join([*lines, "− and ×: SC-SDPO less, and over, the other; ± is the standard error over seeds"])


WORDS = {1: "ahead", -1: "behind", 0: "not told apart"}


def conclusion(over_plain: dict[str, Difference], over_hard: Difference, rollouts: float) -> str:
    """What the numbers say, whatever they are.

    Args:
        over_plain: SC-SDPO's pass rate less SDPO's, by axis.
        over_hard: SC-SDPO's less the hard filter's, at equal rollouts trained on.
        rollouts: those that SC-SDPO trained on, over SDPO's.
    """
    found = [f"{WORDS[d.sign]} at equal {axis} ({d})" for axis, d in over_plain.items()]
    text = f"SC-SDPO against SDPO: {', '.join(found)}; it trained on {times(rollouts)} the rollouts. "
    said = {
        1: "Weighting the other questions helps here, beyond leaving out those of weight 0",
        -1: "Weighting the other questions costs accuracy here",
        0: "Beyond leaving out questions of weight 0, the weights have no effect here that these seeds show",
    }
    return text + f"{said[over_hard.sign]}: SC-SDPO less the hard filter is {over_hard} at equal rollouts trained on."


def conclusion_of(runs: Runs) -> str:
    over_plain = {axis: at_equal(runs, axis).over(PLAIN) for axis in AXES}
    over_hard = at_equal(runs, "rollouts trained on").over(HARD)
    return conclusion(over_plain, over_hard, ratio(spent(runs, lambda p: p.rollouts)))


def share_of_sampling(runs: Runs) -> str:
    """How much faster a step is, by how much of it is sampling, which no method saves."""
    sampling, training = spent(runs, lambda p: p.sampling), spent(runs, lambda p: p.training)
    if not spent(runs, lambda p: p.rollouts)[PLAIN]:
        return "No step trained on anything."
    cost = ratio(training)
    here = sampling[PLAIN] / (sampling[PLAIN] + training[PLAIN])
    faster = " / ".join(f"{1 / (s + cost * (1 - s)):.2f}" for s in (0.2, 0.5, 0.8))
    return (
        f"Sampling is {here:.0%} of an SDPO step here, and training costs SC-SDPO {times(cost)} as much. Where "
        f"sampling is 20 / 50 / 80% of a step, that is {faster} × the steps per hour."
    )
