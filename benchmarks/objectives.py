"""What each objective and each part of a head costs beside the plain Jensen-Shannon divergence, in one run.

    python benchmarks/objectives.py [--rows 512] [--width 1024] [--vocabulary 151936] [--repeats 7] [--output FOLDER]

Three products (the head is frozen, but for its bias or adapter) and the rows of fp32 inputs, forward and backward;
and the rows alone, from resident logits to the weighted gradient over them. Minima of interleaved repeats, since what
disturbs a machine only adds. Gradients are compared with float64 on a subsample. TRL's losses, which need full logits,
run on those that PyTorch projects.

Writes FOLDER/objectives-<machine>.json and prints its table; `--readme` puts those of all such files into README.md.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from headline import RESULTS, ROOT, SUBSAMPLE, machine, problem, seconds, tables_of, write
from torch import Tensor

from scsdpo_kernels import linear_divergence
from scsdpo_kernels.arguments import student_head
from scsdpo_kernels.chunked import _finish, _row_values
from scsdpo_kernels.kernels import kernels_of
from scsdpo_kernels.linear_divergence import _arguments
from scsdpo_kernels.rows import Rows

BEGIN = "<!-- benchmarks/objectives.py --readme -->\n"


def cases(hidden: Tensor, weight: Tensor) -> dict[str, dict]:
    """Options of linear_divergence by the name of what they are; tensors have a row for each of `hidden`."""
    generator = torch.Generator().manual_seed(1)
    vocabulary, width = weight.shape

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target = {"target_ids": torch.randint(vocabulary, (len(hidden),), generator=generator)}
    support_ids = target["target_ids"][:, None] + torch.arange(100) * (vocabulary // 101)
    support_ids = support_ids % vocabulary
    lora = randn(16, width).mul(width**-0.5).requires_grad_(), randn(vocabulary, 16).mul(0.1).requires_grad_(), 1.0
    return {
        "Jensen-Shannon, β = 0.5": {},
        "forward KL, β = 0": {"beta": 0.0},
        "reverse KL, β = 1": {"beta": 1.0},
        "importance ratio": {**target, "old_logp": torch.full((len(hidden),), -12.0)},
        "top_k=100, bucket, β = 0.5": {"top_k": 100},
        "top_k=100, renormalize, β = 0.5": {"top_k": 100, "tail": "renormalize"},
        "top_k=20, bucket, β = 1": {"top_k": 20, "beta": 1.0},
        "support_ids of 100": {"support_ids": support_ids, "support_logp": torch.full((len(hidden), 100), -5.0)},
        "sampled_token": {**target, "sampled_token": True, "beta": 1.0},
        "entry_clip=0.05": {"entry_clip": 0.05, "beta": 0.0},
        "bias": {"student_bias": randn(vocabulary).requires_grad_()},
        "softcap": {"student_softcap": 30.0},
        "logit scale": {"student_logit_scale": 0.5},
        "LoRA of rank 16": {"student_lora": lora},
    }


def first(options: dict, rows: int) -> dict:
    """The options of the first rows."""
    per_row = ("target_ids", "old_logp", "support_ids", "support_logp")
    return {name: x[:rows] if name in per_row else x for name, x in options.items()}


def losses_of_trl(hidden: Tensor, weight: Tensor, teacher: Tensor, target_ids: Tensor) -> dict[str, Callable]:
    """TRL's losses of the same objectives, on full logits; none where TRL is not installed."""
    try:
        from trl.experimental.sdpo import loss_utils
    except ImportError:
        return {}

    def top_k(k: int, beta: float, tail: bool) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher @ weight.T
        return loss_utils.compute_topk_self_distillation_loss(
            hidden @ weight.T, teacher_logits, distillation_topk=k, distillation_alpha=beta, distillation_add_tail=tail
        ).sum()

    def sampled() -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher @ weight.T
        return loss_utils.compute_sampled_token_self_distillation_loss(
            hidden @ weight.T, teacher_logits, target_ids, distillation_alpha=1.0
        ).sum()

    return {
        "top_k=100, bucket, β = 0.5": partial(top_k, 100, 0.5, True),
        "top_k=100, renormalize, β = 0.5": partial(top_k, 100, 0.5, False),
        "top_k=20, bucket, β = 1": partial(top_k, 20, 1.0, True),
        "sampled_token": sampled,
    }


def rows_alone(logits: tuple[Tensor, Tensor], options: dict) -> Callable:
    """The row stage of one chunk, on copies that it may change: returns what restores them and what runs it."""
    student, teacher = (x.clone() for x in logits)
    rows = len(student)
    hidden = student.new_zeros(rows, 1)
    teacher_hidden = None if "support_ids" in options else hidden
    given = first(options, rows)
    tensors, numbers = _arguments(hidden, student.new_zeros(student.shape[1], 1), teacher_hidden, None, **given)
    everything = torch.arange(rows)
    of_rows = Rows(everything, everything, everything, torch.ones(rows), tensors.target_ids, tensors.old_logp,
                   tensors.support_ids, tensors.support_logp, True)  # fmt: skip
    kernels = kernels_of(student.device)

    def run() -> None:
        _finish(hidden, student_head(tensors, numbers), student, kernels)
        _row_values(student, None if teacher_hidden is None else teacher, of_rows, numbers, kernels, False, student)

    def timed() -> float:
        student.copy_(logits[0])
        teacher.copy_(logits[1])
        return seconds(run)

    return timed


def error(options: dict, hidden: Tensor, weight: Tensor, teacher: Tensor) -> float:
    """Relative error of the hidden gradient against float64 on the first rows."""
    rows = SUBSAMPLE
    results = []
    for dtype, schedule in ((torch.float32, "auto"), (torch.float64, "reference")):
        start = hidden[:rows].detach().to(dtype).requires_grad_()
        own = None if "support_ids" in options else teacher[:rows].to(dtype)
        linear_divergence(start, weight.to(dtype), own, **first(options, rows), schedule=schedule).loss.backward()
        results.append(start.grad.double())
    return ((results[0] - results[1]).norm() / results[1].norm()).item()


def measure(arguments: argparse.Namespace) -> dict:
    hidden, weight, teacher = problem(arguments.rows, arguments.width, arguments.vocabulary, torch.float32)
    weight = weight.detach()
    all_cases = cases(hidden, weight)
    peers = losses_of_trl(hidden, weight, teacher, all_cases["sampled_token"]["target_ids"])
    with torch.no_grad():
        logits = hidden[:256] @ weight.T, teacher[:256] @ weight.T

    def ours(options: dict) -> None:
        own = None if "support_ids" in options else teacher
        linear_divergence(hidden, weight, own, **options).loss.backward()

    runs = {("ours", name): partial(seconds, partial(ours, options)) for name, options in all_cases.items()}
    runs |= {("trl", name): partial(seconds, lambda loss=loss: loss().backward()) for name, loss in peers.items()}
    times = {key: [] for key in runs}
    for repeat in range(arguments.repeats + 1):
        for key, run in runs.items():
            hidden.grad = None
            elapsed = run()
            if repeat > 0:
                times[key].append(elapsed)
    of_rows = {name: [] for name in all_cases}
    stages = {name: rows_alone(logits, options) for name, options in all_cases.items() if name != "LoRA of rank 16"}
    for _ in range(arguments.repeats):
        for name, timed in stages.items():
            of_rows[name].append(timed())
    records = {}
    for name, options in all_cases.items():
        records[name] = {"seconds": min(times["ours", name]), "error_hidden": error(options, hidden, weight, teacher)}
        if of_rows[name]:
            records[name]["seconds_of_256_rows"] = min(of_rows[name])
        if ("trl", name) in times:
            records[name]["seconds_of_trl"] = min(times["trl", name])
    return records


def table(result: dict) -> str:
    """One result file as Markdown."""
    shape, host, records = result["shape"], result["machine"], result["objectives"]
    plain = next(iter(records.values()))
    lines = [
        f"{host['cpu']}, {host['threads']} threads, torch {host['torch']}; N = {shape['rows']}, D = {shape['width']}, "
        f"V = {shape['vocabulary']}, fp32, head frozen; minima of {result['repeats']}.",
        "",
        f"| | time / Jensen-Shannon's | rows alone | {result['peer'] or 'TRL'} on full logits / ours | error of ∂h |",
        "|---|---|---|---|---|",
    ]
    for name, record in records.items():
        ratio = record["seconds"] / plain["seconds"]
        rows = record.get("seconds_of_256_rows", 0) / plain["seconds_of_256_rows"]
        peer = record.get("seconds_of_trl", 0) / record["seconds"]
        shown = (f"{ratio:.2f}", f"{rows:.2f}" if rows else "", f"{peer:.1f}" if peer else "")
        lines.append(f"| {name} | {' | '.join(shown)} | {record['error_hidden']:.1e} |")
    share = plain["seconds_of_256_rows"] * shape["rows"] / 256 / plain["seconds"]
    return "\n".join([*lines, "", f"The rows are {share:.0%} of Jensen-Shannon's time, products the rest."])


def with_tables(readme: str) -> str:
    """README text with the tables of all result files between its two marks."""
    return tables_of("objectives", table, BEGIN, readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--readme", action="store_true", help="only write the tables of the result files into README.md"
    )
    arguments = parser.parse_args()
    if not arguments.readme:
        try:
            peer = f"trl {metadata.version('trl')}"
        except metadata.PackageNotFoundError:
            peer = None
        result = {
            "machine": machine(),
            "shape": {name: getattr(arguments, name) for name in ("rows", "width", "vocabulary")},
            "repeats": arguments.repeats,
            "peer": peer,
            "objectives": measure(arguments),
        }
        write("objectives", result, arguments.output)
        return print(table(result))
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))


if __name__ == "__main__":
    main()
