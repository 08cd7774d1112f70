"""What is said to row kernels, and what they return: a chunk of C rows of logits, and an objective."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from ..problem import Objective as Objective
from ..problem import objective_of as objective_of


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
