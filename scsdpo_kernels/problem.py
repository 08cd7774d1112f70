"""What one call consists of: a tree of named tuples, of which every layer takes a branch whole, and its flat form.

torch.library takes no trees, so the operators' arguments are the leaves of a `Problem`, in one order: `SCHEMA` declares
them, `flatten` lists them, `unflatten` puts them together again.
"""

import functools
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_type_hints

from torch import Tensor


class LoRA(NamedTuple):
    """A low-rank adapter of an LM head, which adds λ (h Aᵀ) Bᵀ to the logits (arXiv 2106.09685).

    Args:
        a: A, (r, D), floating point.
        b: B, (V, r), floating point.
        scale: λ.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0


class Head(NamedTuple):
    """An LM head: z = c tanh(s (h Wᵀ + b + λ (h Aᵀ) Bᵀ) / c).

    Args:
        weight: W, (V, D), bf16, fp16 or fp32.
        bias: b, (V,), floating point. -inf forbids a token.
        lora: a low-rank adapter.
        logit_scale: s, as in Cohere's models; Granite's divide by 1/s.
        softcap: c > 0, as in Gemma's models. None or inf: none.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora: LoRA | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


class TopK(NamedTuple):
    """The divergence on the student's k likeliest tokens, with their true probabilities (SDPO, arXiv 2601.20802).

    The choice of the k has no gradient of its own.

    Args:
        k: at least 1.
        tail: what the divergence sees of the other tokens. "bucket": one more token with their total probability, at
            least 1e-7. "renormalize": nothing; the k probabilities are divided by their sum.
    """

    k: int
    tail: str = "bucket"


class TopLogprobs(NamedTuple):
    """The divergence on tokens that the teacher has named, as a server's top-K, in place of its hidden states.

    Args:
        ids: (..., K) integers in [0, V), each once in a row; -1 is an empty slot.
        logp: (..., K) floating point, nats: the teacher's own log-probabilities at this temperature.
        tail: as of `TopK`.
    """

    ids: Tensor
    logp: Tensor
    tail: str = "bucket"


class SampledToken(NamedTuple):
    """At beta=1, stop(log p - log q) · log p of `target_ids` in place of the divergence.

    Its expectation over tokens that p samples has the reverse KL's gradient (SDPO, arXiv 2601.20802).
    """


class PolicyGradient(NamedTuple):
    """A clipped policy-gradient loss of `target_ids` beside the divergence, from the same logits (PPO, GRPO, GSPO).

    Adds Σ_n coefficient_n L_n with L_n = -min(r_n A_n, clip(r_n, 1 - clip_low, 1 + clip_high) A_n) to the loss. The
    ratio r is e^(log p - old_logp), log p at the target and at the divergence's temperature; without old_logp it is 1,
    with the gradient of log p. Where the clip is active, L has no gradient. It needs target_ids. A token of weight 0
    that has an advantage is computed for it alone.

    Args:
        advantages: A, (...,) any finite numbers.
        clip_low, clip_high: at least 0; inf: no clip on that side.
        coefficient: a finite number, or one a token, (...,).
        ratio: (...,) r itself, detached, as GSPO's of a whole sequence: value and clip take it, and the gradient is
            that of -A r log p. None: the token's own.
    """

    advantages: Tensor
    clip_low: float = 0.2
    clip_high: float = 0.2
    coefficient: float | Tensor = 1.0
    ratio: Tensor | None = None


class Side(NamedTuple):
    """Student or teacher."""

    hidden: Tensor  # (..., D)
    head: Head


# KL(q‖p), KL(p‖q), between, and KL(q‖p) of bounded entries; then the other divergences of `ENDS`.
KINDS = ("forward", "reverse", "jensen_shannon", "clipped", "jeffreys", "skewed_forward", "skewed_reverse")

# The divergences of a share β, and which kinds they are at β = 0 and 1. None: 0 there, whatever the student does.
ENDS = {
    "jensen_shannon": ("forward", "reverse"),
    "jeffreys": ("forward", "reverse"),
    "skewed_forward": ("forward", None),
    "skewed_reverse": (None, "reverse"),
}


class Objective(NamedTuple):
    """What is computed of whole rows of logits; `objective_of` makes one."""

    kind: str  # one of KINDS; with token_beta one of ENDS, for tokens between the ends
    beta: float
    temperature: float
    entry_clip: float  # nats; 0: none
    token_beta: Tensor | None = None  # (...,) in place of beta. Of a chunk's rows (C,) float64


def share_range(divergence: str) -> str:
    at_0, at_1 = ENDS[divergence]
    return f"{'[' if at_0 else '('}0, 1{']' if at_1 else ')'}"


def objective_of(
    beta: float | Tensor, temperature: float = 1.0, entry_clip: float = 0.0, divergence: str = "jensen_shannon"
) -> Objective:
    if isinstance(beta, Tensor):
        return Objective(divergence, 0.5, float(temperature), float(entry_clip), beta)
    at_0, at_1 = ENDS[divergence]
    kind = "clipped" if entry_clip else {0.0: at_0, 1.0: at_1}.get(beta, divergence)
    return Objective(kind, float(beta), float(temperature), float(entry_clip))


class Support(NamedTuple):
    """The tokens that the divergence knows one by one: the student's likeliest k, the sampled one, or those given."""

    k: int  # 0: those given, or the sampled one
    renormalize: bool  # the other tokens are left out; otherwise they are one bucket
    sampled: bool
    ids: Tensor | None  # (..., K)
    logp: Tensor | None  # (..., K)

    @property
    def name(self) -> str:
        return "TopK" if self.k else "SampledToken" if self.sampled else "TopLogprobs"


class Target(NamedTuple):
    """Sampled tokens, whose log-probabilities are wanted."""

    ids: Tensor  # (...,)
    old_logp: Tensor | None  # (...,) at the time they were sampled
    importance_clip: float


class Policy(NamedTuple):
    """A policy-gradient loss of the target, as `PolicyGradient`."""

    advantages: Tensor  # (...,)
    coefficient: Tensor  # (...,)
    ratio: Tensor | None  # (...,)
    clip_low: float
    clip_high: float


# What `metrics` of a call may name, and the entries of the result's `metrics` that each gives.
METRICS = {
    "top1_agreement": ("top1_agreement",),
    "support_mass": ("student_support_mass", "teacher_support_mass"),
    "entry_clipped": ("entry_clipped",),
    "importance_clipped": ("importance_clipped",),
}


def entries_of(metrics: Sequence[str]) -> tuple[str, ...]:
    return tuple(entry for name in metrics for entry in METRICS[name])


class Part(NamedTuple):
    """This process's part of a vocabulary that is spread over a process group."""

    group: str
    start: int  # the vocabulary's entry that the heads begin with
    longest: int  # the most entries that any process has
    vocabulary: int  # all entries
    sequence_parallel: bool  # hidden states and all else per token are this process's own


class Problem(NamedTuple):
    student: Side
    teacher: Side | None  # None: support.logp is all that is known of it
    token_weight: Tensor  # (...,)
    rows: Tensor | None  # (R,) flat indices
    objective: Objective
    support: Support | None  # None: the whole vocabulary
    target: Target | None
    policy: Policy | None  # with a target
    part: Part | None  # None: the whole vocabulary is here
    vocabulary: int | None  # how many of the heads' first rows count here; None: all
    metrics: tuple[str, ...]  # of METRICS

    @property
    def counts(self) -> Tensor:
        """(...,) which tokens have a weight or a policy's loss: the others are not computed."""
        weighted, policy = self.token_weight != 0, self.policy
        return weighted if policy is None else weighted | ((policy.advantages != 0) & (policy.coefficient != 0))


class Gradients(NamedTuple):
    """One thing for each tensor that takes gradients."""

    hidden: Any
    weight: Any
    bias: Any
    lora_a: Any
    lora_b: Any


def is_spread(path: tuple[str, ...]) -> bool:
    """Whether a leaf of a problem has a row for each entry of the vocabulary."""
    return "head" in path and path[-1] in ("weight", "bias", "b")


def shortest_head(problem: Problem) -> int | None:
    """Rows of the shorter head, None where both have as many."""
    if problem.teacher is None or len(problem.student.head.weight) == len(problem.teacher.head.weight):
        return None
    return int(min(len(problem.student.head.weight), len(problem.teacher.head.weight)))


def cut(problem: Problem) -> Problem:
    """The same problem, of heads without the rows that do not count: views."""
    if problem.vocabulary is None:
        return problem
    problem, length = problem._replace(vocabulary=None), problem.vocabulary
    return mapped(lambda path, x: x[:length] if is_spread(path) else x, problem)


# ---------------------------------------------------------------------------------------------------------------------
# The flat form.

_KINDS = {Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str", tuple[str, ...]: "str[]"}


def _leaves(tree: type, before: tuple[str, ...] = (), optional: bool = False) -> Iterator[tuple[tuple[str, ...], str]]:
    """Path and torch.library's type of every value in a tree; those of a group that may be None may be None."""
    for name, (plain, may_be_none) in _fields(tree).items():
        may_be_none = may_be_none or optional
        if plain in _KINDS:
            yield (*before, name), _KINDS[plain] + ("?" if may_be_none else "")
        else:
            yield from _leaves(plain, (*before, name), may_be_none)


@functools.cache
def _fields(tree: type) -> dict[str, tuple[Any, bool]]:
    """Type of each field without None, and whether it may be None."""
    fields = {}
    for name, kind in get_type_hints(tree).items():
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        (plain,) = (x for x in kinds if x is not NoneType)
        fields[name] = plain, NoneType in kinds
    return fields


PATHS, _TYPES = zip(*_leaves(Problem), strict=True)
SCHEMA = ", ".join(f"{kind} {'_'.join(path)}" for path, kind in zip(PATHS, _TYPES, strict=True))
# What takes gradients, in the order of `Gradients`.
WRT = tuple(
    PATHS.index(path)
    for path in (
        ("student", "hidden"),
        ("student", "head", "weight"),
        ("student", "head", "bias"),
        ("student", "head", "lora", "a"),
        ("student", "head", "lora", "b"),
    )
)


def flatten(problem: Problem) -> list:
    return [_at(problem, path) for path in PATHS]


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = None if value is None else getattr(value, name)
    return value


def unflatten(values: Iterator, tree: type = Problem) -> Any:
    """Takes a tree's leaves from `values`. A group that may be None is None where its first value is."""
    fields = []
    for plain, may_be_none in _fields(tree).values():
        if plain in _KINDS:
            fields.append(next(values))
            continue
        group = unflatten(values, plain)
        first = group
        while isinstance(first, tuple):
            first = first[0]
        fields.append(None if may_be_none and first is None else group)
    return tree(*fields)


def mapped(function: Any, value: Any, path: tuple[str, ...] = ()) -> Any:
    """The same tree with function(path, tensor) in place of every tensor."""
    if isinstance(value, Tensor):
        return function(path, value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, x, (*path, name)) for name, x in value._asdict().items()))
    return value
