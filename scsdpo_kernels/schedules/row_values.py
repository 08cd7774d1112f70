"""What a chunk of logits comes to: row scalars over the whole vocabulary, on a part of it, or on a support."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.contract import Logits, PerRow, Scalars
from ..kernels.of_target import of_target
from ..problem import Objective, Support, entries_of
from .metrics import of_logits, of_rows
from .rows import Rows
from .shards import Shard
from .support import divergence_on_support


def row_values(
    logits: Logits,  # changed
    rows: Rows,  # the chunk's; their weights are the gradient's
    objective: Objective,
    support: Support | None,
    kernels: Kernels,
    shard: Shard,
    gradient: Tensor | None,  # (C, V) fp32 or bf16 out; may lie over logits.student. None: values only
    metrics: Sequence[str] = (),
) -> tuple[Tensor, ...]:  # `rows.given.scalars` × (C,) fp32, in the order of Scalars, and the metrics' entries
    if rows.beta is not None:
        objective = objective._replace(token_beta=rows.beta)
    on_support = None
    found = of_logits(metrics, logits, objective, kernels, shard)
    if support is not None:
        values, on_support = divergence_on_support(logits, rows, objective, support, kernels, shard, gradient)
    elif shard.group is not None:
        values = divergence_on_part(logits, rows, objective, kernels, shard, gradient)
    else:
        values = kernels.row_divergence(logits, rows.given, objective, gradient)
    if not metrics:
        return values
    values = values[: rows.given.scalars]
    found |= of_rows(metrics, Scalars.of(values), rows.given, on_support)
    return *values, *(found[entry] for entry in entries_of(metrics))


def divergence_on_part(
    logits: Logits, rows: Rows, objective: Objective, kernels: Kernels, shard: Shard, gradient: Tensor | None
) -> tuple[Tensor, ...]:
    """Row scalars over the whole vocabulary, and the weighted gradient of this process's part of it."""
    temperature, given = objective.temperature, rows.given
    target = shard.target_logits(kernels, logits, given.target)
    known = shard.statistics(kernels, logits, temperature)
    fields, logps = [known.student_entropy, known.teacher_entropy], [None]
    if target is not None:
        logps = [target[0] / temperature - known.student_lse, target[1] / temperature - known.teacher_lse]
        fields += logps
    more, weight, slope = of_target(logps[0], given)
    fields += more
    of_gradient = PerRow(weight)
    if slope is not None:
        of_gradient = PerRow(weight, shard.local(given.target), policy=given.policy._replace(coefficient=slope.float()))
    if shard.size:
        own = kernels.row_terms(logits, objective, known)
    else:
        own = torch.zeros(4, len(logits.student), dtype=torch.float64, device=logits.student.device)
    terms = shard.gather(own).sum(0)
    divergence = kernels.row_gradient(logits, objective, known, terms, of_gradient, gradient)
    return tuple(x.float() for x in (divergence, *fields))
