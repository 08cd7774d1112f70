"""What follows from the log-probability of a row's target, in PyTorch's operators."""

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import PerRow


def _importance_ratio(logp: Tensor, old_logp: Tensor, clip: float) -> Tensor:
    """By how much more likely the student finds a token than the policy that sampled it, bounded."""
    return (logp - old_logp).clamp(-20, 20).exp().clamp(max=clip)


class OfTarget(NamedTuple):
    """What follows from the log-probability of a row's target."""

    scalars: list[Tensor]  # of Scalars, those behind both log-probabilities
    weight: Tensor  # (C,) fp32: multiplies the divergence's gradient
    slope: Tensor | None  # (C,) c A r, where there is a policy: multiplies p_v - [v = y]


def of_target(logp: Tensor | None, given: PerRow) -> OfTarget:
    """As the row kernels do it for whole rows. No log-probability: no target, and the weight alone."""
    scalars, weight, slope = [], given.weight, None
    if given.old_logp is not None:
        scalars.append(_importance_ratio(logp, given.old_logp, given.importance_clip))
        weight = torch.where(weight == 0, 0.0, weight * scalars[0]).float()  # the ratio may be NaN
    if given.policy is not None:
        policy_loss, clipped, slope = _policy_terms(logp, given)
        scalars = [*(scalars or [torch.ones_like(logp)]), policy_loss, clipped]
    return OfTarget(scalars, weight, slope)


def _policy_terms(logp: Tensor, given: PerRow) -> tuple[Tensor, Tensor, Tensor]:
    """(C,) each: the policy's loss, whether it is clipped, and its coefficient's share of -∂loss/∂log p: c A r.

    A row without an advantage has nothing of them, whatever its ratio; one whose log p is NaN has a gradient of NaN.
    """
    advantage, coefficient, ratio, lowest, highest = given.policy
    if ratio is not None:
        ratio = ratio.to(logp.dtype)
    elif given.old_logp is not None:
        ratio = (logp - given.old_logp).exp()
    else:
        ratio = torch.ones_like(logp)
    ratio = torch.where(logp.isnan(), torch.nan, ratio)
    clipped = ((advantage > 0) & (ratio > highest)) | ((advantage < 0) & (ratio < lowest))
    bounded = torch.where(clipped, ratio.clamp(lowest, highest), ratio)
    none = advantage == 0
    slope = torch.where(none | clipped | (coefficient == 0), 0.0, coefficient * advantage * ratio)
    return torch.where(none, 0.0, -advantage * bounded), clipped.to(logp.dtype), slope
