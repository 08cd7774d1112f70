"""What is said to row kernels, and what they return: a chunk of C rows of logits, and an objective."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Objective as Objective
from ..problem import objective_of as objective_of

# The logarithm of the least mass that a support's rest counts as, 1 - e^-1e-7, as in SDPO's code.
LEAST_LOG_TAIL = math.log(-math.expm1(-1e-7))


def inverse_of(temperature: float) -> float:
    """1 / τ as kernels have it, rounded to fp32."""
    return (1 / torch.tensor(temperature, dtype=torch.float32)).item()


class Logits(NamedTuple):
    """One chunk, (C, V) with unit stride along V; -inf: an entry that does not count."""

    student: Tensor
    teacher: Tensor | None  # the teacher's, or teacher - student; None: only the support's are known
    difference: bool  # which of the two
    softcap: float  # c, where the student's are c tanh(x / c): gradients are those of x. 0: none


class RowPolicy(NamedTuple):
    """A row's policy-gradient loss L = -min(r A, clip(r) A) of its target: r = e^(log p - old_logp), 1 without it."""

    advantage: Tensor  # (C,) fp32, as the others: A
    coefficient: Tensor  # multiplies the gradient of L, as the weight that of the divergence
    ratio: Tensor | None  # r, where it is given: the gradient is then that of -A r log p
    lowest: float  # that r counts
    highest: float


class PerRow(NamedTuple):
    """What is given of each row of a chunk, (C,)."""

    weight: Tensor  # fp32; 0: so is the gradient, whatever the row holds
    target: Tensor | None = None  # int64; an id outside [0, V) gives NaN on a GPU
    old_logp: Tensor | None = None  # fp32, of the targets: asks for importance ratios
    importance_clip: float = 2.0
    policy: RowPolicy | None = None  # with a target

    @property
    def scalars(self) -> int:
        """How many numbers a row has in the end: `Scalars` begins with so many."""
        if self.policy is not None:
            return 8
        return 3 if self.target is None else 5 if self.old_logp is None else 6


class Scalars(NamedTuple):
    """Per row, (C,) fp32, in nats. csrc/row_divergence.h has the contract."""

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logp: Tensor | None  # at the row's target
    teacher_logp: Tensor | None
    importance_ratio: Tensor | None = None  # 1 with a policy but without old_logp
    policy_loss: Tensor | None = None
    policy_clipped: Tensor | None = None

    @staticmethod
    def of(numbers: Iterable[Tensor]) -> "Scalars":
        """As many as there are, in this order."""
        numbers = tuple(numbers)
        return Scalars(*numbers, *[None] * (len(Scalars._fields) - len(numbers)))


class RowStatistics(NamedTuple):
    """What is known of each row, (C,), of logits / temperature: enough to know every entry's probabilities.

    teacher_lse - student_lse = centre / temperature + log_ratio, the latter with all its digits as teacher -> student.
    """

    student_lse: Tensor  # float64
    teacher_lse: Tensor  # float64
    student_max: Tensor  # fp32, as the others: the largest logit
    centre: Tensor  # teacher's minus student's logit there
    log_ratio: Tensor
    student_entropy: Tensor  # nats
    teacher_entropy: Tensor


class SupportLogits(NamedTuple):
    """A chunk's logits on its rows' supports of K entries, float64."""

    ids: Tensor  # (C, K) int64; negative: an empty slot
    student: Tensor  # (C, K); -inf in an empty slot
    teacher: Tensor | None  # (C, K)
    teacher_logp: Tensor | None  # (C, K) floating point, where the teacher's logits are not known
    target: Tensor | None  # (sides, C) at the rows' targets; NaN: it has none


class SupportValues(NamedTuple):
    """What follows from them and the statistics of a row's other entries, its tail. (C,) float64, or as it says."""

    log_p: Tensor  # (C, K)
    log_q: Tensor  # (C, K)
    lse: Tensor  # log-sum-exp of all entries of the student
    log_tail: Tensor  # log-probability of its tail
    few: Logits  # short rows, (C, K + 1) or renormalised (C, K), whose divergence it is
    scalars: Tensor  # (`PerRow.scalars`, C) fp32: `Scalars`, without the divergence
    weight: Tensor  # fp32: multiplies the divergence's gradient
    slope: Tensor | None  # fp32: c A r of a policy, multiplies p_v - [v = y]
