"""What the tests give to the package: one builder of problems, and what tests ask of a problem."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from scsdpo_kernels import Head, LoRA, linear_divergence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What a head of each kind has beside its weight; of a LoRA the rank.
HEADS = {
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": 0.25},
    "lora": {"lora": 3},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 1.7, "lora": 5},
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Both sides, which it unpacks into, and the weight of each token."""

    hidden: Tensor  # (..., D)
    head: Tensor | Head
    teacher: Tensor | None  # (..., D), or (..., teacher_width) with a head of its own
    teacher_head: Tensor | Head | None = None  # None: the student's
    token_weight: Tensor | None = None  # (...)

    def __iter__(self) -> Iterator:
        return iter((self.hidden, self.head, self.teacher, self.teacher_head))

    def but(self, **changed: Any) -> "Problem":
        return dataclasses.replace(self, **changed)

    def to(self, dtype: torch.dtype) -> "Problem":
        """In another dtype, but for the weights of the tokens."""
        return Problem(*tree_map_only(Tensor, lambda x: x.to(dtype), tuple(self)), self.token_weight)

    def leaves(self) -> "Problem":
        """The same numbers, with a student whose tensors all take gradients."""
        hidden, head = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), (self.hidden, self.head))
        return self.but(hidden=hidden, head=head)

    def tokens(self, some: Any) -> "Problem":
        """Some of them."""
        weight = None if self.token_weight is None else self.token_weight[some]
        return self.but(hidden=self.hidden[some], teacher=self.teacher[some], token_weight=weight)

    @property
    def trained(self) -> list[Tensor]:
        """The student's tensors: hidden states, then the head's in the order of its fields."""
        return [x for x in tree_leaves((self.hidden, self.head)) if isinstance(x, Tensor)]

    def call(self, op: Callable = linear_divergence, **options) -> Any:
        if self.token_weight is not None:
            options = {"token_weight": self.token_weight, **options}
        return op(*self, **options)

    def run(self, op: Callable = linear_divergence, of: Callable = lambda result: result.loss, **options) -> tuple:
        """What `op` returns, and the gradients of everything of the student's, of the loss or of another sum."""
        leaves = self.leaves()
        result = leaves.call(op, **options)
        return result, *torch.autograd.grad(of(result), leaves.trained)


def problem(rows: int | tuple[int, ...] = 37, width=48, vocabulary=701, distance=0.3, scale=1.0, dtype=torch.float32,
            teacher_width=None, seed=0, *, head="plain", teacher_head=None, weighted=False) -> Problem:  # fmt: skip
    """A teacher whose hidden states are `distance` away and whose head is the student's; another with a width of its
    own. The heads may be of a kind in `HEADS`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    leading = (rows,) if isinstance(rows, int) else rows
    hidden, weight = randn(*leading, width) * scale, randn(vocabulary, width) * width**-0.5
    if teacher_width is None:
        teacher, other = hidden + distance * randn(*leading, width), None
    else:
        teacher, other = randn(*leading, teacher_width), randn(vocabulary, teacher_width) * teacher_width**-0.5
    hidden, weight, teacher, other = (x if x is None else x.to(dtype) for x in (hidden, weight, teacher, other))
    if teacher_head is not None:
        other = head_of(teacher_head, weight if other is None else other, seed=2)
    token_weight = randn(*leading) if weighted else None
    return Problem(hidden, weight if head == "plain" else head_of(head, weight), teacher, other, token_weight)


def head_of(kind: str, weight: Tensor, seed: int = 1) -> Tensor | Head:
    """A head of this weight with what else such a head has."""
    if kind == "plain":
        return weight
    generator = torch.Generator().manual_seed(seed)
    vocabulary, width = weight.shape
    given = dict(HEADS[kind])
    if "bias" in given:
        given["bias"] = torch.randn(vocabulary, generator=generator)
    if "lora" in given:
        a = torch.randn(given["lora"], width, generator=generator) * width**-0.5
        given["lora"] = LoRA(a, torch.randn(vocabulary, given["lora"], generator=generator), 0.5)
    return Head(weight, **given)


def known(result: Any) -> dict[str, Tensor]:
    """What a result has of each token, by name."""
    return {name: x for name, x in result._asdict().items() if x is not None and name != "loss"}
