"""What each objective and each part of a head costs beside the plain Jensen-Shannon divergence, in one run.

    python benchmarks/objectives.py [--device cpu] [--rows 512] [--width 1024] [--vocabulary 151936] [--repeats 7]
                                    [--output FOLDER]

Three products (the head is frozen, but for its bias or adapter) and the rows, forward and backward, of fp32 inputs, or
bf16 on a GPU; and the rows alone, from resident logits to the weighted gradient over them. Medians of repeats that take
turns. Gradients are compared with float64 on a subsample. TRL's losses, which need full logits, run on those that
PyTorch projects.

Writes FOLDER/objectives-<machine>.json and prints its table; `benchmarks/report.py` puts it into README.md.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from inputs import reasoning
from measuring import RESULTS, SUBSAMPLE, described, error, interleaved, machine, medians, write
from torch import Tensor

from scsdpo_kernels import linear_divergence
from scsdpo_kernels.arguments import student_head
from scsdpo_kernels.chunked import _finish, _row_values
from scsdpo_kernels.kernels import kernels_of
from scsdpo_kernels.linear_divergence import _arguments
from scsdpo_kernels.rows import Rows
from scsdpo_kernels.shards import Shard


def cases(hidden: Tensor, weight: Tensor) -> dict[str, dict]:
    """Options of linear_divergence by the name of what they are; tensors have a row for each of `hidden`."""
    device = hidden.device
    generator = torch.Generator(device).manual_seed(1)
    vocabulary, width = weight.shape

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    target = {"target_ids": torch.randint(vocabulary, (len(hidden),), generator=generator, device=device)}
    support_ids = target["target_ids"][:, None] + torch.arange(100, device=device) * (vocabulary // 101)
    support_logp = torch.full(support_ids.shape, -5.0, device=device)
    support = {"support_ids": support_ids % vocabulary, "support_logp": support_logp}
    lora = randn(16, width).mul(width**-0.5).requires_grad_(), randn(vocabulary, 16).mul(0.1).requires_grad_(), 1.0
    return {
        "Jensen-Shannon, β = 0.5": {},
        "forward KL, β = 0": {"beta": 0.0},
        "reverse KL, β = 1": {"beta": 1.0},
        "importance ratio": {**target, "old_logp": torch.full((len(hidden),), -12.0, device=device)},
        "top_k=100, bucket, β = 0.5": {"top_k": 100},
        "top_k=100, renormalize, β = 0.5": {"top_k": 100, "tail": "renormalize"},
        "top_k=20, bucket, β = 1": {"top_k": 20, "beta": 1.0},
        "support_ids of 100": support,
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

    def logits() -> tuple[Tensor, Tensor]:
        """In fp32, as accelerate hands a model's outputs over."""
        with torch.no_grad():
            teacher_logits = (teacher @ weight.T).float()
        return (hidden @ weight.T).float(), teacher_logits

    def top_k(k: int, beta: float, tail: bool) -> Tensor:
        return loss_utils.compute_topk_self_distillation_loss(
            *logits(), distillation_topk=k, distillation_alpha=beta, distillation_add_tail=tail
        ).sum()

    def sampled() -> Tensor:
        return loss_utils.compute_sampled_token_self_distillation_loss(
            *logits(), target_ids, distillation_alpha=1.0
        ).sum()

    return {
        "top_k=100, bucket, β = 0.5": partial(top_k, 100, 0.5, True),
        "top_k=100, renormalize, β = 0.5": partial(top_k, 100, 0.5, False),
        "top_k=20, bucket, β = 1": partial(top_k, 20, 1.0, True),
        "sampled_token": sampled,
    }


def rows_alone(logits: tuple[Tensor, Tensor], options: dict) -> tuple[Callable, Callable]:
    """The row stage of one chunk, on copies that it may change: what restores them, and what runs it."""
    student, teacher = (x.clone() for x in logits)
    rows = len(student)
    hidden = student.new_zeros(rows, 1)
    teacher_hidden = None if "support_ids" in options else hidden
    given = first(options, rows)
    tensors, numbers = _arguments(hidden, student.new_zeros(student.shape[1], 1), teacher_hidden, None, **given)
    everything = torch.arange(rows, device=student.device)
    of_rows = Rows(everything, everything, everything, student.new_ones(rows), tensors.target_ids, tensors.old_logp,
                   tensors.support_ids, tensors.support_logp, True)  # fmt: skip
    kernels, shard = kernels_of(student.device), Shard(numbers, student.shape[1])

    def restore() -> None:
        student.copy_(logits[0])
        teacher.copy_(logits[1])

    def run() -> None:
        _finish(hidden, student_head(tensors, numbers), student, kernels)
        given_teacher = None if teacher_hidden is None else teacher
        _row_values(student, given_teacher, of_rows, numbers, kernels, shard, False, student)

    return restore, run


def eager(options: dict, hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    """Plain PyTorch's Jensen-Shannon divergence of the same head: how exact a dtype lets any of the objectives be."""

    def log_probabilities(states: Tensor) -> Tensor:
        z = states @ weight.T
        if lora := options.get("student_lora"):
            z = z + lora[2] * (states @ lora[0].T) @ lora[1].T
        z = (z + options.get("student_bias", 0.0)) * options.get("student_logit_scale", 1.0)
        if softcap := options.get("student_softcap"):
            z = softcap * torch.tanh(z / softcap)
        return z.log_softmax(-1)

    log_p, log_q = log_probabilities(hidden), log_probabilities(teacher)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergences = (F.kl_div(log_m, x, log_target=True, reduction="sum") for x in (log_p, log_q))
    return sum(divergences) / 2


def errors_hidden(options: dict, hidden: Tensor, weight: Tensor, teacher: Tensor) -> tuple[float, float]:
    """Of the hidden gradient against float64 on the first rows: ours, and the measuring stick, `eager` in the dtype."""
    hidden, teacher = hidden[:SUBSAMPLE].detach(), teacher[:SUBSAMPLE]

    def ours(options: dict, hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        exact = hidden.dtype == torch.float64
        own = None if "support_ids" in options else teacher
        schedule = "reference" if exact else "auto"
        return linear_divergence(hidden, weight, own, **first(options, len(hidden)), schedule=schedule).loss

    def gradient(loss: Callable, dtype: torch.dtype) -> Tensor:
        start = hidden.to(dtype).requires_grad_()
        converted = {
            name: tuple(y.to(dtype) if isinstance(y, Tensor) else y for y in x)
            if isinstance(x, tuple)
            else x.to(dtype)
            if name == "student_bias"
            else x
            for name, x in options.items()
        }
        (result,) = torch.autograd.grad(loss(converted, start, weight.to(dtype), teacher.to(dtype)), start)
        return result

    off, stick = (error(gradient(f, hidden.dtype), gradient(f, torch.float64)) for f in (ours, eager))
    return off, stick


def measure(arguments: argparse.Namespace, device: torch.device) -> dict:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = arguments.rows, arguments.width, arguments.vocabulary
    hidden, weight, teacher = reasoning(*shape, dtype, device=device)
    hidden.requires_grad_()
    all_cases = cases(hidden, weight)
    peers = losses_of_trl(hidden, weight, teacher, all_cases["sampled_token"]["target_ids"])
    logits = (hidden[:256] @ weight.T).detach().float(), (teacher[:256] @ weight.T).float()

    def ours(options: dict) -> None:
        own = None if "support_ids" in options else teacher
        hidden.grad = None
        linear_divergence(hidden, weight, own, **options).loss.backward()

    def theirs(loss: Callable) -> None:
        hidden.grad = None
        loss().backward()

    runs = {("ours", name): partial(ours, options) for name, options in all_cases.items()}
    runs |= {("trl", name): partial(theirs, loss) for name, loss in peers.items()}
    times = medians(interleaved(runs, arguments.repeats, device))
    stages = {name: rows_alone(logits, options) for name, options in all_cases.items() if name != "LoRA of rank 16"}
    before, stages = ({name: stage[i] for name, stage in stages.items()} for i in range(2))
    of_rows = medians(interleaved(stages, arguments.repeats, device, before))
    records = {}
    for name, options in all_cases.items():
        off, stick = errors_hidden(options, hidden, weight, teacher)
        records[name] = {"seconds": times["ours", name], "error_hidden": off, "error_hidden_eager": stick}
        if name in of_rows:
            records[name]["seconds_of_256_rows"] = of_rows[name]
        if ("trl", name) in times:
            records[name]["seconds_of_trl"] = times["trl", name]
    return records


def table(result: dict) -> str:
    """One result file as Markdown."""
    shape, records = result["shape"], result["objectives"]
    plain, trl = next(iter(records.values())), result["machine"]["versions"]["trl"] or ""
    dtype = "fp32" if "threads" in result["machine"] else "bf16"
    lines = [
        f"{described(result['machine'])}; N = {shape['rows']}, D = {shape['width']}, V = {shape['vocabulary']}, "
        f"{dtype}, head frozen; medians of {result['repeats']}.",
        "",
        f"| | time / Jensen-Shannon's | rows alone | trl {trl} on full logits / ours | error of ∂h |",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result = {
        "machine": machine(device),
        "shape": {name: getattr(arguments, name) for name in ("rows", "width", "vocabulary")},
        "repeats": arguments.repeats,
        "objectives": measure(arguments, device),
    }
    write("objectives", result, arguments.output)
    print(table(result))


if __name__ == "__main__":
    main()
