"""What each objective and each part of a head costs beside the plain Jensen-Shannon divergence, in one run.

    python benchmarks/objectives.py [--device cpu] [--rows 512] [--width 1024] [--vocabulary 151936] [--repeats 7]
                                    [--output FOLDER]

Three products (the head is frozen, but for its bias or adapter) and the rows, forward and backward, of fp32 inputs, or
bf16 on a GPU; and the rows alone, from resident logits to the weighted gradient over them: row kernels by themselves,
and of an objective on a part of the vocabulary what a call of narrow hidden states takes beyond Jensen-Shannon's, whose
products are the same. Medians of repeats that take turns. Gradients are compared with float64 on a subsample. TRL's
losses, which need full logits, run on those that PyTorch projects.

Writes FOLDER/objectives-<machine>.json and prints its table; `benchmarks/report.py` puts it into docs/benchmarks.md.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from inputs import reasoning
from measuring import RESULTS, SUBSAMPLE, described, error, interleaved, machine, medians, write
from torch import Tensor

from scsdpo_kernels import Head, LoRA, PolicyGradient, RoutedHeads, SampledToken, TopK, TopLogprobs, linear_divergence
from scsdpo_kernels.kernels import kernels_of, native
from scsdpo_kernels.kernels.contract import Logits, PerRow, RowPolicy, objective_of

PLAIN, PROJECTION = "Jensen-Shannon, β = 0.5", "projection"
# Narrow calls: tokens, so many that a GPU takes longer than its host, and numbers of a hidden state, few enough.
NARROW = {"cpu": (256, 96), "gpu": (4096, 160)}


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
        PLAIN: (head, {}),
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
    """The row kernels of one chunk, on copies that they may change: what restores them, and what runs them."""
    student, teacher = (x.clone() for x in logits)
    ones, kernels = student.new_ones(len(student)), kernels_of(student.device)
    options = first(options, len(student))
    beta, clip = options.get("beta", 0.5), options.get("entry_clip") or 0.0
    objective = objective_of(beta, 1.0, clip, options.get("divergence", "jensen_shannon"))
    if objective.token_beta is not None:
        objective = objective._replace(token_beta=kernels.shares(objective.kind, beta.double()))
    policy = options.get("policy")
    if policy is not None:
        policy = RowPolicy(policy.advantages, ones, None, 1 - policy.clip_low, 1 + policy.clip_high)
    given = PerRow(ones, options.get("target_ids"), options.get("old_logp"), policy=policy)
    bias, softcap = None if head.bias is None else head.bias.detach(), head.softcap or 0.0

    def restore() -> None:
        student.copy_(logits[0])
        teacher.copy_(logits[1])

    def run() -> None:
        if bias is not None or head.logit_scale != 1.0 or softcap:
            kernels.head_logits(student, bias, head.logit_scale, softcap)
        kernels.row_divergence(Logits(student, teacher, False, softcap), given, objective, student)

    return restore, run


def narrow_calls(vocabulary: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    """Of Jensen-Shannon and of every objective on a part of the vocabulary; and a projection of as many tokens."""
    tokens, width = NARROW["cpu" if device.type == "cpu" else "gpu"]
    hidden, weight, teacher = reasoning(tokens, width, vocabulary, dtype, device=device)
    hidden.requires_grad_()
    teacher_head = weight.clone()  # both sides' logits, and no difference of them

    def call(head: Head, options: dict) -> None:
        hidden.grad = None
        other = teacher_of(options, teacher)
        linear_divergence(hidden, head, other, None if other is None else teacher_head, **options).loss.backward()

    states, logits = hidden.detach()[:256], torch.empty(256, vocabulary, device=device)

    def project() -> None:
        """To fp32, as a call does it."""
        for _ in range(0, tokens, len(states)):
            if device.type == "cpu":
                native.matmul(states, weight.T, logits)
            else:
                torch.mm(states, weight.T, out_dtype=torch.float32, out=logits)

    chosen = {name: case for name, case in cases(hidden, weight).items() if name == PLAIN or "support" in case[1]}
    return {name: partial(call, *case) for name, case in chosen.items()} | {PROJECTION: project}


def seconds_of_rows(
    all_cases: dict[str, tuple[Head, dict]], logits: tuple[Tensor, Tensor], repeats: int, dtype: torch.dtype
) -> dict[str, float]:
    """Of 256 rows, by name. Those of a part of the vocabulary are differences, which want an idle machine."""
    device, vocabulary = logits[0].device, logits[0].shape[1]
    others = ("support", "teacher_head")  # a part of the vocabulary, and other products
    whole = {x: case for x, case in all_cases.items() if case[0].lora is None and not any(o in case[1] for o in others)}
    stages = {name: rows_alone(logits, *case) for name, case in whole.items()}
    before, stages = ({name: stage[i] for name, stage in stages.items()} for i in range(2))
    seconds = medians(interleaved(stages, repeats, device, before))
    narrow = interleaved(narrow_calls(vocabulary, dtype, device), repeats, device)
    scale = 256 / NARROW["cpu" if device.type == "cpu" else "gpu"][0]
    for name, (_, options) in all_cases.items():
        if "support" in options:
            projections = int(isinstance(options["support"], TopLogprobs))  # that it does without
            turns = zip(narrow[name], narrow[PLAIN], narrow[PROJECTION], strict=True)
            beyond = statistics.median(own - plain + projections * product for own, plain, product in turns)
            seconds[name] = seconds[PLAIN] + beyond * scale
    return seconds


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


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Records by name: of whole calls, then with the rows alone."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = arguments.rows, arguments.width, arguments.vocabulary
    hidden, weight, teacher = reasoning(*shape, dtype, device=device)
    hidden.requires_grad_()
    all_cases = cases(hidden, weight)
    peers = losses_of_trl(hidden, weight, teacher, all_cases["SampledToken"][1]["target_ids"])

    def ours(head: Head, options: dict) -> None:
        hidden.grad = None
        linear_divergence(hidden, head, teacher_of(options, teacher), **options).loss.backward()

    def theirs(loss: Callable) -> None:
        hidden.grad = None
        loss().backward()

    runs = {("ours", name): partial(ours, *case) for name, case in all_cases.items()}
    runs |= {("trl", name): partial(theirs, loss) for name, loss in peers.items()}
    times = medians(interleaved(runs, arguments.repeats, device))
    records = {}
    for name, (head, options) in all_cases.items():
        off, stick = errors_hidden(head, options, hidden, teacher)
        records[name] = {"seconds": times["ours", name], "error_hidden": off, "error_hidden_eager": stick}
        if ("trl", name) in times:
            records[name]["seconds_of_trl"] = times["trl", name]
    yield records
    logits = (hidden[:256] @ weight.T).detach().float(), (teacher[:256] @ weight.T).float()
    for name, seconds in seconds_of_rows(all_cases, logits, arguments.repeats, dtype).items():
        records[name]["seconds_of_256_rows"] = seconds
    yield records


def table(result: dict) -> str:
    """One result file as Markdown."""
    shape, records = result["shape"], result["objectives"]
    plain, trl = next(iter(records.values())), result["machine"]["versions"]["trl"] or ""
    dtype = "fp32" if "threads" in result["machine"] else "bf16"
    lines = [
        f"{described(result['machine'])}; N = {shape['rows']}, D = {shape['width']}, V = {shape['vocabulary']}, "
        f"{dtype}, head frozen; medians of {result['repeats']}.",
        "",
        f"| | time / Jensen-Shannon's | row kernel alone | trl {trl} on full logits / ours | error of ∂h |",
        "|---|---|---|---|---|",
    ]
    for name, record in records.items():
        ratio = record["seconds"] / plain["seconds"]
        rows = record.get("seconds_of_256_rows", 0) / plain["seconds_of_256_rows"]
        peer = record.get("seconds_of_trl", 0) / record["seconds"]
        shown = (f"{ratio:.2f}", f"{rows:.2f}" if rows else "", f"{peer:.1f}" if peer else "")
        lines.append(f"| {name} | {' | '.join(shown)} | {record['error_hidden']:.1e} |")
    share = plain["seconds_of_256_rows"] * shape["rows"] / 256 / plain["seconds"]
    return "\n".join([*lines, "", f"The row kernel takes {share:.0%} of Jensen-Shannon's time, the matmuls the rest."])


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
    }
    for result["objectives"] in measure(arguments, device):
        write("objectives", result, arguments.output)
    print(table(result))


if __name__ == "__main__":
    main()
