"""What each objective and each part of a head costs beside the plain Jensen-Shannon divergence, in one run.

    python benchmarks/objectives.py [--device cpu] [--rows 512] [--width 1024] [--vocabulary 151936] [--repeats 7]
                                    [--output FOLDER]

Three products (the head is frozen, but for its bias or adapter) and the rows, forward and backward, of fp32 inputs, or
bf16 on a GPU; and the rows alone, from resident logits to the weighted gradient over them. Medians of repeats that take
turns. Gradients are compared with float64 on a subsample. TRL's losses, which need full logits, run on those that
PyTorch projects.

Writes FOLDER/objectives-<machine>.json and prints its table; `benchmarks/report.py` puts it into docs/benchmarks.md.
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

from scsdpo_kernels import Head, LoRA, PolicyGradient, RoutedHeads, SampledToken, TopK, TopLogprobs, linear_divergence
from scsdpo_kernels.arguments import problem_of
from scsdpo_kernels.kernels import kernels_of
from scsdpo_kernels.kernels.contract import Logits, PerRow, RowPolicy
from scsdpo_kernels.linear_divergence import DEFAULTS
from scsdpo_kernels.problem import Problem
from scsdpo_kernels.schedules.products import apply_head
from scsdpo_kernels.schedules.row_values import row_values
from scsdpo_kernels.schedules.rows import Rows, shares
from scsdpo_kernels.schedules.shards import Shard


def cases(hidden: Tensor, weight: Tensor) -> dict[str, tuple[Head, dict]]:
    """Head and options of linear_divergence by the name of what they are; tensors have a row for each of `hidden`."""
    device = hidden.device
    generator = torch.Generator(device).manual_seed(1)
    vocabulary, width = weight.shape

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    target = {"target_ids": torch.randint(vocabulary, (len(hidden),), generator=generator, device=device)}
    ids = target["target_ids"][:, None] + torch.arange(100, device=device) * (vocabulary // 101)
    named = TopLogprobs(ids % vocabulary, torch.full(ids.shape, -5.0, device=device))
    lora = LoRA(randn(16, width).mul(width**-0.5).requires_grad_(), randn(vocabulary, 16).mul(0.1).requires_grad_())
    head, own, another = Head(weight), Head(weight.clone()), Head(weight.clone())
    turns = torch.arange(len(hidden), device=device) % 2
    return {
        "Jensen-Shannon, β = 0.5": (head, {}),
        "forward KL, β = 0": (head, {"beta": 0.0}),
        "reverse KL, β = 1": (head, {"beta": 1.0}),
        "Jeffreys, β = 0.5": (head, {"divergence": "jeffreys"}),
        "skewed forward KL, β = 0.1": (head, {"divergence": "skewed_forward", "beta": 0.1}),
        "skewed reverse KL, β = 0.9": (head, {"divergence": "skewed_reverse", "beta": 0.9}),
        "Jensen-Shannon, β of each token": (head, {"beta": torch.linspace(0, 1, len(hidden), device=device)}),
        "importance ratio": (head, {**target, "old_logp": torch.full((len(hidden),), -12.0, device=device)}),
        "TopK(100), bucket, β = 0.5": (head, {"support": TopK(100)}),
        "TopK(100), renormalize, β = 0.5": (head, {"support": TopK(100, tail="renormalize")}),
        "TopK(20), bucket, β = 1": (head, {"support": TopK(20), "beta": 1.0}),
        "TopLogprobs of 100": (head, {"support": named}),
        "SampledToken": (head, {**target, "support": SampledToken(), "beta": 1.0}),
        "entry_clip=0.05": (head, {"entry_clip": 0.05, "beta": 0.0}),
        "bias": (head._replace(bias=randn(vocabulary).requires_grad_()), {}),
        "softcap": (head._replace(softcap=30.0), {}),
        "logit scale": (head._replace(logit_scale=0.5), {}),
        "LoRA of rank 16": (head._replace(lora=lora), {}),
        "policy gradient": (head, {**target, "policy": PolicyGradient(randn(len(hidden)))}),
        "one teacher, a head of its own": (head, {"teacher_head": own}),
        "two teachers, taking turns": (head, {"teacher_head": RoutedHeads([own, another], turns)}),
    }


def first(options: dict, rows: int) -> dict:
    """The options of the first rows."""
    options = {name: x[:rows] if isinstance(x, Tensor) else x for name, x in options.items()}
    if isinstance(support := options.get("support"), TopLogprobs):
        options["support"] = support._replace(ids=support.ids[:rows], logp=support.logp[:rows])
    if (policy := options.get("policy")) is not None:
        options["policy"] = policy._replace(advantages=policy.advantages[:rows])
    if isinstance(other := options.get("teacher_head"), RoutedHeads):
        options["teacher_head"] = other._replace(index=other.index[:rows])
    return options


def teacher_of(options: dict, teacher: Tensor) -> Tensor | None:
    """The teacher's hidden states, where it has not named a support instead."""
    return None if isinstance(options.get("support"), TopLogprobs) else teacher


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
        "TopK(100), bucket, β = 0.5": partial(top_k, 100, 0.5, True),
        "TopK(100), renormalize, β = 0.5": partial(top_k, 100, 0.5, False),
        "TopK(20), bucket, β = 1": partial(top_k, 20, 1.0, True),
        "SampledToken": sampled,
    }


def rows_alone(logits: tuple[Tensor, Tensor], head: Head, options: dict) -> tuple[Callable, Callable]:
    """The row stage of one chunk, on copies that it may change: what restores them, and what runs it."""
    student, teacher = (x.clone() for x in logits)
    rows, vocabulary = student.shape
    hidden = student.new_zeros(rows, 1)
    head = head._replace(weight=student.new_zeros(vocabulary, 1))  # not multiplied with: the logits are there
    problem = problem_of(hidden, head, teacher_of(options, hidden), None, None, DEFAULTS | first(options, rows))
    target, support, index = problem.target, problem.support, torch.arange(rows, device=student.device)
    of_rows = Rows(
        kept=index,
        student=index,
        teacher=index,
        given=PerRow(student.new_ones(rows), *(() if target is None else target), policy=_row_policy(problem)),
        support_ids=None if support is None else support.ids,
        support_logp=None if support is None else support.logp,
        are_all=True,
        beta=shares(problem.objective, index, student.new_ones(rows)),
    )
    given = Logits(student, teacher if problem.teachers else None, difference=False, softcap=head.softcap or 0.0)
    kernels, shard = kernels_of(student.device), Shard(problem.part, vocabulary)

    def restore() -> None:
        student.copy_(logits[0])
        teacher.copy_(logits[1])

    def run() -> None:
        apply_head(hidden, problem.student.head, student, kernels)
        row_values(given, of_rows, problem.objective, support, kernels, shard, gradient=student)

    return restore, run


def _row_policy(problem: Problem) -> RowPolicy | None:
    if (policy := problem.policy) is None:
        return None
    return RowPolicy(policy.advantages, policy.coefficient, policy.ratio, 1 - policy.clip_low, 1 + policy.clip_high)


def eager(head: Head, hidden: Tensor, teacher: Tensor) -> Tensor:
    """Plain PyTorch's Jensen-Shannon divergence of the same head: how exact a dtype lets any of the objectives be."""

    def log_probabilities(states: Tensor) -> Tensor:
        z = F.linear(states, head.weight, head.bias)
        if head.lora is not None:
            z = z + head.lora.scale * (states @ head.lora.a.T) @ head.lora.b.T
        z = z * head.logit_scale
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
        return z.log_softmax(-1)

    log_p, log_q = log_probabilities(hidden), log_probabilities(teacher)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergences = (F.kl_div(log_m, x, log_target=True, reduction="sum") for x in (log_p, log_q))
    return sum(divergences) / 2


def in_dtype(head: Head | RoutedHeads, dtype: torch.dtype) -> Head | RoutedHeads:
    if isinstance(head, RoutedHeads):
        return head._replace(heads=[in_dtype(x, dtype) for x in head.heads])
    lora, bias = head.lora, head.bias
    return head._replace(
        weight=head.weight.to(dtype),
        bias=None if bias is None else bias.to(dtype),
        lora=None if lora is None else lora._replace(a=lora.a.to(dtype), b=lora.b.to(dtype)),
    )


def errors_hidden(head: Head, options: dict, hidden: Tensor, teacher: Tensor) -> tuple[float, float]:
    """Error of the hidden gradient against float64 on the first tokens: ours, and `eager`'s, the stick."""
    hidden, teacher = hidden[:SUBSAMPLE].detach(), teacher[:SUBSAMPLE]

    def ours(head: Head, hidden: Tensor, teacher: Tensor) -> Tensor:
        schedule = "reference" if hidden.dtype == torch.float64 else "auto"
        given = first(options, len(hidden))
        if "teacher_head" in given:
            given["teacher_head"] = in_dtype(given["teacher_head"], hidden.dtype)
        return linear_divergence(hidden, head, teacher_of(options, teacher), **given, schedule=schedule).loss

    def gradient(loss: Callable, dtype: torch.dtype) -> Tensor:
        start = hidden.to(dtype).requires_grad_()
        (result,) = torch.autograd.grad(loss(in_dtype(head, dtype), start, teacher.to(dtype)), start)
        return result

    off, stick = (error(gradient(f, hidden.dtype), gradient(f, torch.float64)) for f in (ours, eager))
    return off, stick


def measure(arguments: argparse.Namespace, device: torch.device) -> dict:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = arguments.rows, arguments.width, arguments.vocabulary
    hidden, weight, teacher = reasoning(*shape, dtype, device=device)
    hidden.requires_grad_()
    all_cases = cases(hidden, weight)
    peers = losses_of_trl(hidden, weight, teacher, all_cases["SampledToken"][1]["target_ids"])
    logits = (hidden[:256] @ weight.T).detach().float(), (teacher[:256] @ weight.T).float()

    def ours(head: Head, options: dict) -> None:
        hidden.grad = None
        linear_divergence(hidden, head, teacher_of(options, teacher), **options).loss.backward()

    def theirs(loss: Callable) -> None:
        hidden.grad = None
        loss().backward()

    runs = {("ours", name): partial(ours, *case) for name, case in all_cases.items()}
    runs |= {("trl", name): partial(theirs, loss) for name, loss in peers.items()}
    times = medians(interleaved(runs, arguments.repeats, device))
    without_products = {
        name: (head, options)
        for name, (head, options) in all_cases.items()
        if head.lora is None and "teacher_head" not in options
    }
    stages = {name: rows_alone(logits, *case) for name, case in without_products.items()}
    before, stages = ({name: stage[i] for name, stage in stages.items()} for i in range(2))
    of_rows = medians(interleaved(stages, arguments.repeats, device, before))
    records = {}
    for name, (head, options) in all_cases.items():
        off, stick = errors_hidden(head, options, hidden, teacher)
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
