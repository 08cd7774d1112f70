"""What a chunk of logits comes to: row scalars over the whole vocabulary, on a part of it, or on a support."""

import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.contract import Logits
from ..problem import Objective, Support
from .rows import Rows
from .shards import Shard, importance_ratio
from .support import divergence_on_support


def row_values(
    logits: Logits,  # changed
    rows: Rows,  # the chunk's; their weights are the gradient's
    objective: Objective,
    support: Support | None,
    kernels: Kernels,
    shard: Shard,
    gradient: Tensor | None,  # (C, V) fp32 or bf16 out; may lie over logits.student. None: values only
) -> tuple[Tensor, ...]:  # 3 × (C,) fp32, 5 with target, 6 with old_logp, in the order of Scalars
    if rows.beta is not None:
        objective = objective._replace(token_beta=rows.beta)
    if support is not None:
        return divergence_on_support(logits, rows, objective, support, kernels, shard, gradient)
    if shard.group is not None:
        return divergence_on_part(logits, rows, objective, kernels, shard, gradient)
    return kernels.row_divergence(logits, rows.given, objective, gradient)


def divergence_on_part(
    logits: Logits, rows: Rows, objective: Objective, kernels: Kernels, shard: Shard, gradient: Tensor | None
) -> tuple[Tensor, ...]:
    """Row scalars over the whole vocabulary, and the weighted gradient of this process's part of it."""
    temperature = objective.temperature
    target = shard.target_logits(logits, rows.given.target)
    known = shard.statistics(kernels, logits, temperature)
    fields, weight = [known.student_entropy, known.teacher_entropy], rows.given.weight
    if target is not None:
        fields += [target[0] / temperature - known.student_lse, target[1] / temperature - known.teacher_lse]
    if rows.given.old_logp is not None:
        fields.append(importance_ratio(fields[2], rows.given.old_logp, rows.given.importance_clip))
        weight = (weight * fields[-1]).float()
    if shard.size:
        own = kernels.row_terms(logits, objective, known)
    else:
        own = torch.zeros(4, len(logits.student), dtype=torch.float64, device=logits.student.device)
    terms = shard.gather(own).sum(0)
    divergence = kernels.row_gradient(logits, objective, known, terms, weight, gradient)
    return tuple(x.float() for x in (divergence, *fields))
