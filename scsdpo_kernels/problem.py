"""What one call consists of: a tree of named tuples, of which every layer takes a branch whole, and its flat form.

torch.library takes no trees, so the operators' arguments are the leaves of a `Problem`, in one order: `SCHEMA` declares
them, `flatten` lists them, `unflatten` puts them together again.
"""

import math
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

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
        main_grad: (V, D) fp32, to which every backward pass adds the weight's gradient in place of `weight.grad`,
            without rounding to the weight's dtype: Megatron's `weight.main_grad`, or another buffer of micro-batches'
            gradients. Of a student's head whose weight requires grad; not with schedule="reference" nor under
            torch.compile. Until backward 4 V D bytes wait for it, or of a bf16 weight with N ≤ 2D tokens 2 N (V + D).
            A weight that has Megatron's attribute `grad_added_to_main_grad` gets it set, and a gradient of zeros, so
            that its hooks run; others get none.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora: LoRA | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    main_grad: Tensor | None = None


class RoutedHeads(NamedTuple):
    """LM heads of K teachers, one of which teaches each token: a rollout's domain, say, has its own expert.

    A token is projected once by the student's head and once by its teacher's.

    Args:
        heads: K tensors (V, D_k) or `Head`, each of its own width and of its own teacher's dtype. One tensor may be in
            several of them, as with adapters on one base model.
        index: (...,) integers in [0, K), the number of each token's teacher. It is not looked at where a token is not
            computed, except that teachers whose hidden states are given for their own tokens alone have all tokens of
            that index.
    """

    heads: Sequence[Tensor | Head]
    index: Tensor


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
    token_beta: Tensor | None = None  # (...,) in place of beta. Of a chunk's rows (C,) float64, or `Kernels.shares`'


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
    # Empty: support.logp is all that is known. With a route, hidden may be (n, D) of the n tokens that it leads there.
    teachers: tuple[Side, ...]
    route: Tensor | None  # (...,) integers: which teacher each token has. None: there is one
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


Path = tuple[str | int, ...]  # names of fields, and numbers in tuples


def is_spread(path: Path) -> bool:
    """Whether a leaf of a problem has a row for each entry of the vocabulary."""
    return "head" in path and path[-1] in ("weight", "bias", "b", "main_grad")


def shortest_head(problem: Problem) -> int | None:
    """Rows of the shortest head, None where all have as many."""
    student = len(problem.student.head.weight)
    lengths = [len(teacher.head.weight) for teacher in problem.teachers]
    return None if all(length == student for length in lengths) else int(min(student, *lengths))


def cut(problem: Problem) -> Problem:
    """The same problem, of heads without the rows that do not count: views."""
    if problem.vocabulary is None:
        return problem
    problem, length = problem._replace(vocabulary=None), problem.vocabulary
    return mapped(lambda path, x: x[:length] if is_spread(path) else x, problem)


# ---------------------------------------------------------------------------------------------------------------------
# The flat form.

_KINDS = {Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str", tuple[str, ...]: "str[]"}
# A list of numbers has this in place of None; no number of a head is infinite.
_NO_NUMBER = math.inf


class _Layout(NamedTuple):
    """A tree of named tuples, of which a problem may have one, none or a tuple."""

    tree: type
    fields: "tuple[_Layout | None, ...]"  # None: a value
    paths: tuple[tuple[str, ...], ...]  # of all values; a tuple of trees has two, a list of tensors and one of numbers
    kinds: tuple[str, ...]  # torch.library's types of them
    are_tensors: tuple[bool, ...]
    may_be_none: bool
    is_tuple: bool


def _layout(tree: type, may_be_none: bool = False, is_tuple: bool = False) -> _Layout:
    """The values of a group that may be None may be None."""
    fields, paths, kinds = [], [], []
    for name, kind in get_type_hints(tree).items():
        options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        (plain,) = (x for x in options if x is not NoneType)
        optional = may_be_none or NoneType in options
        if plain in _KINDS:
            fields.append(None)
            paths.append((name,))
            kinds.append(_KINDS[plain] + ("?" if optional else ""))
            continue
        many = get_origin(plain) is tuple
        group = _layout(get_args(plain)[0] if many else plain, optional, many)
        fields.append(group)
        paths += ((name, *path) for path in ((("tensors",), ("numbers",)) if many else group.paths))
        kinds += ("Tensor?[]", "float[]") if many else group.kinds
    are_tensors = tuple(kind.startswith("Tensor") for kind in kinds)
    return _Layout(tree, tuple(fields), tuple(paths), tuple(kinds), are_tensors, may_be_none, is_tuple)


_PROBLEM = _layout(Problem)
PATHS = _PROBLEM.paths
SCHEMA = ", ".join(f"{kind} {'_'.join(path)}" for path, kind in zip(PATHS, _PROBLEM.kinds, strict=True))
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
    return _flat(problem, _PROBLEM)


def _flat(group: Any, layout: _Layout) -> list:
    if group is None:
        return [None] * len(layout.paths)
    values = []
    for value, inner in zip(group, layout.fields, strict=True):
        if inner is None:
            values.append(value)
        elif inner.is_tuple:
            tensors, numbers = [], []
            for x in value:
                for leaf, is_tensor in zip(_flat(x, inner), inner.are_tensors, strict=True):
                    if is_tensor:
                        tensors.append(leaf)
                    else:
                        numbers.append(_NO_NUMBER if leaf is None else leaf)
            values += (tensors, numbers)
        else:
            values += _flat(value, inner)
    return values


def unflatten(values: Iterator, layout: _Layout = _PROBLEM) -> Any:
    """Takes a tree's leaves from `values`. A group that may be None is None where its first value is."""
    fields = []
    for inner in layout.fields:
        if inner is None:
            fields.append(next(values))
        elif inner.is_tuple:
            fields.append(tuple(_groups(next(values), next(values), inner)))
        else:
            group = unflatten(values, inner)
            first = group
            while isinstance(first, tuple):
                first = first[0]
            fields.append(None if inner.may_be_none and first is None else group)
    return layout.tree(*fields)


def _groups(tensors: list[Tensor | None], numbers: list[float], layout: _Layout) -> Iterator[Any]:
    rest, other = iter(tensors), (None if x == _NO_NUMBER else x for x in numbers)
    for _ in range(len(tensors) // sum(layout.are_tensors)):
        yield unflatten(iter([next(rest) if is_tensor else next(other) for is_tensor in layout.are_tensors]), layout)


def leaves(group: Any, layout: _Layout = _PROBLEM, before: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value of a tree with its path."""
    names = layout.tree._fields
    for name, inner, value in zip(names, layout.fields, group or [None] * len(names), strict=True):
        path = (*before, name)
        if inner is None:
            yield path, value
        elif inner.is_tuple:
            for number, x in enumerate(value):
                yield from leaves(x, inner, (*path, number))
        else:
            yield from leaves(value, inner, path)


def mapped(function: Any, value: Any, path: Path = ()) -> Any:
    """The same tree with function(path, tensor) in place of every tensor."""
    if isinstance(value, Tensor):
        return function(path, value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        names = zip(value._fields, value, strict=True)
        return type(value)(*[x if x is None else mapped(function, x, (*path, name)) for name, x in names])
    if isinstance(value, tuple):
        return tuple(mapped(function, x, (*path, number)) for number, x in enumerate(value))
    return value
