"""Metrics of optimiser steps whose rollouts may run anywhere: sums by the micro-batch and process that drew them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from scsdpo_kernels import METRICS, LinearDivergence

MEANS = ("divergence", "student_entropy", "teacher_entropy")


@dataclass
class MetricsOptions:
    """What is logged of a step's tokens beside MEANS."""

    divergence_metrics: list[str] = field(
        default_factory=list, metadata={"help": "Names of linear_divergence's `metrics`, whose means are logged."}
    )


def check_metrics(names: Sequence[str], has: Collection[str]) -> None:
    """ValueError for a name that is not in `has`, which a trainer's other settings allow."""
    if wrong := [name for name in names if name not in has]:
        allowed = ", ".join(name for name in METRICS if name in has)
        expected = f"some of {allowed} with these settings" if allowed else "none with these settings"
        raise ValueError(f"divergence_metrics: expected {expected}, got {wrong[0]!r}")


class StepMetrics:
    """Training and evaluation have sums of their own; a mode is "train" or "eval".

    Columns of the sums: tokens that have a weight, their loss, the fields of MEANS, the entries of `metrics`, all
    positions that were drawn.
    """

    def __init__(self, accelerator: Accelerator, metrics: Sequence[str] = ()):
        self.accelerator = accelerator
        self.entries = tuple(entry for name in dict.fromkeys(metrics) for entry in METRICS[name])
        self._sums: dict[str, Tensor] = {}  # (micro-batches · processes, columns), of this step
        self._totals: dict[str, Tensor] = {}  # (columns,), since the last log

    def begin(self, mode: str, micro_batches: int) -> None:
        shape = (micro_batches * self.accelerator.num_processes, 3 + len(MEANS) + len(self.entries))
        self._sums[mode] = torch.zeros(shape, device=self.accelerator.device)

    def drawn(self, mode: str, micro_batch: int, positions: int) -> None:
        """This process's micro-batch, of so many positions."""
        row = micro_batch * self.accelerator.num_processes + self.accelerator.process_index
        self._sums[mode][row, -1] += positions

    def add(
        self,
        mode: str,
        result: LinearDivergence,  # (B, T) fields
        mask: Tensor,  # (B, T) 1 at tokens that have a loss
        question_weight: Tensor,  # (B,)
        origin: Tensor,  # (B,) micro-batch · processes + process
    ) -> None:
        kept = mask * (question_weight != 0).unsqueeze(1)
        ratio = 1.0 if result.importance_ratio is None else result.importance_ratio
        fields = [ratio * result.divergence, *(getattr(result, name) for name in MEANS)]
        fields += [result.metrics[entry] for entry in self.entries]
        rows = torch.stack([kept.sum(1), *((x * kept).sum(1) for x in fields)], dim=1).float()
        self._sums[mode][:, :-1].index_add_(0, origin, rows)

    def finish(self, mode: str) -> float:
        """At the end of a step, on all processes. Returns TRL's metric: the mean of each micro-batch's own mean."""
        sums = self.accelerator.reduce(self._sums[mode], "sum").double().cpu()
        self._totals[mode] = self._totals.get(mode, 0.0) + sums.sum(0)
        return (sums[:, 1] / sums[:, 0].clamp(min=1.0)).mean().item()

    def since_last_log(self, mode: str) -> dict[str, float]:
        """Means over tokens, which are not there without a token that has a weight."""
        if (totals := self._totals.pop(mode, None)) is None:
            return {}
        count, _, *sums, positions = totals.tolist()
        names = (*MEANS, *self.entries)
        means = {name: total / count for name, total in zip(names, sums, strict=True)} if count else {}
        return {"rows_kept": count / positions, **means}


__all__ = ["MEANS", "MetricsOptions", "StepMetrics", "check_metrics"]
