"""On-policy SC-SDPO on a CPU, from random weights to a plot: ``python -m scsdpo.demo``.

A three-layer decoder with a vocabulary of Qwen3's size learns to write strings of digits backwards. A short supervised
warm-up leaves it good at copying a solution that stands in its prompt, and otherwise right on some questions, wrong on
others and in between on many. Then it teaches itself: every rollout is scored token by token by an exponential moving
average of the model, which reads the same question with a successful sibling's answer (SDPO, arXiv 2601.20802), and
questions count by how mixed their outcomes are, w = [p̂ (1 - p̂)]^1/2 (SC-SDPO, arXiv 2605.27765). Beside it stand the
same run without question weights, and the loss of its first step from full logits in plain torch.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import trange
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from scsdpo_kernels import question_weights, scsdpo_loss

TOKENS = "_.=>0123456789"  # pad, end, "answer:", "was solved by"; every other id of the vocabulary is unused
PAD, END = TOKENS.index("_"), TOKENS.index(".")
LENGTHS = range(3, 8)  # digits in a question: what makes it hard
T = max(LENGTHS) + 1  # response positions, the end token included
V, D = 151_936, 64
G = 8  # rollouts per question
BETA = 0.5
TEACHER_RATE = 0.05
WARM_PASS_RATES = 0.35, 0.95  # plain prompts, prompts with a solution

# The task: a question is a string of digits, its one right answer is the string backwards.


def draw_questions(count: int, rng: random.Random, exclude: frozenset[str] = frozenset()) -> list[str]:
    """Distinct questions, lengths in equal shares, in random order."""
    questions: dict[str, None] = {}
    while len(questions) < count:
        question = "".join(rng.choices("0123456789", k=LENGTHS[len(questions) % len(LENGTHS)]))
        if question not in exclude:
            questions[question] = None
    return rng.sample(list(questions), count)


def answer(question: str) -> str:
    return question[::-1] + "."


def prompt(question: str, solution: str | None = None) -> str:
    """The student's prompt; with a solution, the self-teacher's."""
    return question + "=" if solution is None else f"{question}>{solution.rstrip('.')}="


def encode(texts: list[str], side: str) -> tuple[Tensor, Tensor]:  # ids and attention mask, (B, longest)
    width = max(map(len, texts))
    padded = [text.rjust(width, "_") if side == "left" else text.ljust(width, "_") for text in texts]
    ids = torch.tensor([[TOKENS.index(token) for token in text] for text in padded])
    return ids, (ids != PAD).long()


def decode(ids: Tensor) -> str:  # (T,)
    """Text up to the end token, which is included if it is there."""
    text = "".join(TOKENS[i] if i < len(TOKENS) else "?" for i in ids.tolist())
    return text[: text.index(".") + 1] if "." in text else text


# The model. Only its backbone runs in transformers; the head's weight is read where it is needed.


def build_model(vocabulary: int) -> Qwen3ForCausalLM:
    shape = {"vocab_size": vocabulary, "hidden_size": D, "intermediate_size": 4 * D, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": D // 4, "tie_word_embeddings": True}
    ids = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads, **ids, max_position_embeddings=64))


def response_hidden(model: Qwen3ForCausalLM, prompts: list[str], response: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
    """Hidden states that predict each response token. Prompts are padded on the left, so responses stand together."""
    ids, attention = encode(prompts, "left")
    ids = torch.cat([ids, response], 1)
    attention = torch.cat([attention, torch.ones_like(response)], 1)
    hidden = model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    return hidden[:, -response.shape[1] - 1 : -1]


@torch.no_grad()
def pass_rates(model: Qwen3ForCausalLM, questions: list[str], *, shown: bool = False) -> Tensor:  # (Q,)
    """Pass rates at temperature 1 without sampling: the probability of the one right answer."""
    rates = []
    for start in range(0, len(questions), 32):
        part = questions[start : start + 32]
        targets, mask = encode([answer(q) for q in part], "right")
        hidden = response_hidden(model, [prompt(q, answer(q) if shown else None) for q in part], targets)
        rows = mask.bool()
        log_probs = torch.zeros(targets.shape)
        log_probs[rows] = -F.cross_entropy(hidden[rows] @ model.lm_head.weight.T, targets[rows], reduction="none")
        rates.append(log_probs.sum(1).exp())
    return torch.cat(rates)


def warm_up(args: argparse.Namespace, exclude: frozenset[str]) -> Qwen3ForCausalLM:
    """Supervised steps until both prompt formats reach WARM_PASS_RATES.

    Prompts show the solution, but one in ten is plain while plain prompts are below their rate. The ids that the task
    never uses keep their random initial rows, whose logits are near 0: here they stand in the softmax as one class of
    logit log(count), and the model gets its full vocabulary at the end.
    """
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model, unused = build_model(len(TOKENS)), math.log(V - len(TOKENS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    plain = shown = 0.0
    progress = trange(args.warmup_steps, desc="warm-up")
    for step in progress:
        questions = draw_questions(48, rng, exclude)
        share = 0.1 if plain < WARM_PASS_RATES[0] else 0.0
        prompts = [prompt(q, None if rng.random() < share else answer(q)) for q in questions]
        targets, mask = encode([answer(q) for q in questions], "right")
        logits = model.lm_head(response_hidden(model, prompts, targets)[mask.bool()])
        loss = F.cross_entropy(F.pad(logits, (0, 1), value=unused), targets[mask.bool()])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            fresh = draw_questions(60, rng, exclude)
            plain, shown = (pass_rates(model, fresh, shown=s).mean().item() for s in (False, True))
            progress.set_postfix_str(f"pass {plain:.2f}, with a solution {shown:.2f}, loss {loss.item():.3f}")
            if plain > WARM_PASS_RATES[0] and shown > WARM_PASS_RATES[1]:
                break
    full = build_model(V)
    full.model.layers, full.model.norm = model.model.layers, model.model.norm
    with torch.no_grad():
        full.lm_head.weight[: len(TOKENS)] = model.lm_head.weight
    return full


# One on-policy batch: B = Q * G verified rollouts, and the prompts from which the teacher will read them.


@dataclass(frozen=True)
class Batch:
    prompts: list[str]
    teacher_prompts: list[str]
    response: Tensor  # (B, T) ids
    outcome: dict[str, Tensor]  # rewards (B,), question_ids (B,), mask (B, T): response tokens that have a teacher


@torch.no_grad()
def rollout(model: Qwen3ForCausalLM, prompts: list[str], generator: torch.Generator) -> Tensor:  # (B, T) ids
    """Sample at temperature 1 from the whole vocabulary; logits of the last position of unfinished rows only."""
    ids, attention = encode(prompts, "left")
    cache = DynamicCache(config=model.config)
    response = torch.full((len(prompts), T), PAD)
    active = torch.arange(len(prompts))
    buffer = torch.empty(len(prompts), V)
    for t in range(T):
        hidden = model.model(input_ids=ids, attention_mask=attention, past_key_values=cache).last_hidden_state
        logits = torch.mm(hidden[active, -1], model.lm_head.weight.T, out=buffer[: len(active)])
        cumulative = logits.sub_(logits.amax(-1, keepdim=True)).exp_().cumsum_(-1)
        threshold = torch.rand(len(active), 1, generator=generator) * cumulative[:, -1:]
        response[active, t] = torch.searchsorted(cumulative, threshold)[:, 0].clamp(max=V - 1)
        ids = response[:, t : t + 1]
        attention = torch.cat([attention, torch.ones_like(ids)], 1)
        active = active[ids[active, 0] != END]
        if not len(active):
            break
    return response


def sample_batch(
    model: Qwen3ForCausalLM, questions: list[str], rng: random.Random, generator: torch.Generator
) -> Batch:
    asked = [q for q in questions for _ in range(G)]
    response = rollout(model, [prompt(q) for q in asked], generator)
    texts = [decode(ids) for ids in response]
    rewards = torch.tensor([float(text == answer(q)) for q, text in zip(asked, texts, strict=True)])
    question_ids = torch.arange(len(questions)).repeat_interleave(G)
    same = question_ids[:, None] == question_ids
    siblings = same & (rewards > 0) & ~torch.eye(len(asked), dtype=torch.bool)  # a rollout's own success excluded
    choices = [row.nonzero()[:, 0].tolist() for row in siblings]
    shown = [texts[rng.choice(choice)] if choice else None for choice in choices]
    spoken = (response == END).cumsum(1) - (response == END).long() == 0  # up to and with the end token
    mask = (spoken & siblings.any(1, keepdim=True)).float()
    return Batch(
        prompts=[prompt(q) for q in asked],
        teacher_prompts=[prompt(q, solution) for q, solution in zip(asked, shown, strict=True)],
        response=response,
        outcome={"rewards": rewards, "question_ids": question_ids, "mask": mask},
    )


# Training.


def sdpo(outcome: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same outcome with a weight of one for every question."""
    return {"question_weight": torch.ones_like(outcome["rewards"]), "mask": outcome["mask"]}


def token_weights(outcome: dict[str, Tensor]) -> Tensor:  # (B, T), what scsdpo_loss multiplies divergences by
    weights = outcome.get("question_weight")
    if weights is None:
        weights = question_weights(outcome["rewards"], outcome["question_ids"])
    return weights[:, None] * outcome["mask"] / outcome["mask"].sum().clamp(min=1)


def loss_operands(student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, batch: Batch) -> tuple[Tensor, ...]:
    """Hidden states (B, T, D) and head weight (V, D), the student's and the teacher's."""
    hidden = response_hidden(student, batch.prompts, batch.response)
    with torch.no_grad():
        teacher_hidden = response_hidden(teacher, batch.teacher_prompts, batch.response)
    return hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight


def distill(operands: tuple[Tensor, ...], outcome: dict[str, Tensor]) -> tuple[float, float]:
    """Adds a step's gradients to the student; returns the loss and the seconds in it, the head's products included."""
    hidden, *rest = operands
    leaf = hidden.detach().requires_grad_()  # cut here, so that the clock sees the head and not the backbone
    start = time.perf_counter()
    loss = scsdpo_loss(leaf, *rest, **outcome, beta=BETA).loss
    loss.backward()
    seconds = time.perf_counter() - start
    hidden.backward(leaf.grad)
    return loss.item(), seconds


@torch.no_grad()
def update_teacher(teacher: Qwen3ForCausalLM, student: Qwen3ForCausalLM) -> None:
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, TEACHER_RATE)


@dataclass(frozen=True)
class Run:
    steps: list[dict[str, float]]  # pass, zero, projected, skipped, loss, seconds of each step
    held_out: dict[int, float]  # pass rate after so many steps

    def curve(self, key: str) -> list[float]:
        return [step[key] for step in self.steps]


def train(warm: Qwen3ForCausalLM, held_out: list[str], args: argparse.Namespace, weighted: bool) -> Run:
    """Every run starts from the same model and random numbers; only the weights of the questions differ."""
    student, teacher = copy.deepcopy(warm), copy.deepcopy(warm)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    run = Run(steps=[], held_out={0: pass_rates(warm, held_out).mean().item()})
    progress = trange(1, args.steps + 1, desc="SC-SDPO" if weighted else "SDPO")
    for step in progress:
        batch = sample_batch(student, draw_questions(args.questions, rng, frozenset(held_out)), rng, generator)
        outcome = batch.outcome if weighted else sdpo(batch.outcome)
        loss, seconds = distill(loss_operands(student, teacher, batch), outcome)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        update_teacher(teacher, student)
        rewards, question_ids, mask = batch.outcome.values()
        zero = (question_weights(rewards, question_ids) == 0).float().mean().item()
        projected = int(token_weights(outcome).count_nonzero())
        record = {"pass": rewards.mean().item(), "zero": zero, "loss": loss, "seconds": seconds}
        run.steps.append(record | {"projected": projected, "skipped": mask.numel() - projected})
        if step % 10 == 0 or step == args.steps:
            run.held_out[step] = pass_rates(student, held_out).mean().item()
        progress.set_postfix_str(
            f"pass {record['pass']:.2f}, zero-weight {zero:.2f}, rows {projected} projected "
            f"{mask.numel() - projected} skipped, loss {loss:.4f}"
        )
    return run


# The same loss from full logits in plain torch.


def eager_loss(
    student_hidden: Tensor,  # (..., D)
    student_weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (..., D)
    teacher_weight: Tensor,  # (V, D)
    weights: Tensor,  # (...)
) -> Tensor:
    log_p = (student_hidden @ student_weight.T).log_softmax(-1)  # (..., V)
    with torch.no_grad():
        log_q = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(1 - BETA), log_q + math.log(BETA))
    kl_p = (log_p.exp() * (log_p - log_m)).sum(-1)
    kl_q = (log_q.exp() * (log_q - log_m)).sum(-1)
    return (weights * ((1 - BETA) * kl_p + BETA * kl_q)).sum()


def gradients(how: str, outcome: dict[str, Tensor], operands: list[Tensor]) -> list[Tensor]:
    """How: "fused"; "eager" on every position, or on "eager, kept rows"; "float64", in parts."""
    hidden, weight, teacher_hidden, teacher_weight = (x.double() if how == "float64" else x for x in operands)
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    if how == "fused":
        scsdpo_loss(hidden, weight, teacher_hidden, teacher_weight, **outcome, beta=BETA).loss.backward()
        return [hidden.grad, weight.grad]
    weights = token_weights(outcome)
    rows = torch.ones_like(weights).nonzero() if how == "eager" else weights.nonzero()
    for part in rows.split(32 if how == "float64" else len(rows) or 1):
        at = part.unbind(1)
        eager_loss(hidden[at], weight, teacher_hidden[at], teacher_weight, weights[at]).backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in (hidden, weight)]


def peak_memory(how: str, path: str) -> float:
    """Bytes above inputs and gradients: the kernel's high-water mark of this process, which must be a fresh one."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    outcome, operands = torch.load(path)
    gradients(how, outcome, [x[..., :256, :] for x in operands])  # a small vocabulary, to load every library
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
        before = status("VmRSS")
        kept = gradients(how, outcome, operands)
        return status("VmHWM") - before - sum(x.nbytes for x in kept)
    except OSError:  # not Linux, or not allowed
        return math.nan


def compare(warm: Qwen3ForCausalLM, held_out: list[str], args: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """First step's loss: median seconds, peak bytes, largest difference from eager, relative error from float64."""
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    batch = sample_batch(warm, draw_questions(args.questions, rng, frozenset(held_out)), rng, generator)
    operands = [x.detach() for x in loss_operands(warm, warm, batch)]
    ways = ("fused", "eager", "eager, kept rows")
    seconds, memory, found = {how: [] for how in ways}, {}, {}
    for i in trange(3 * len(ways), desc="fused and eager"):
        how = ways[i % len(ways)]
        start = time.perf_counter()
        found[how] = gradients(how, batch.outcome, operands)
        seconds[how].append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "operands.pt"))
        torch.save((batch.outcome, operands), path)
        for how in ways:
            with get_context("spawn").Pool(1) as pool:
                memory[how] = pool.apply(peak_memory, (how, path))
    exact = gradients("float64", batch.outcome, operands)
    table = {}
    for how in ways:
        difference = max((x - y).abs().max().item() for x, y in zip(found[how], found["eager"], strict=True))
        error = max(((x - y).norm() / y.norm()).item() for x, y in zip(found[how], exact, strict=True))
        table[how] = median(seconds[how]), memory[how], difference, error
    return table


# What happened.


def smooth(values: list[float], width: int = 8) -> list[float]:
    """Mean of the last ``width`` values, of fewer at the start."""
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def plot(runs: dict[str, Run], path: Path) -> None:
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(f"On-policy self-distillation, V = {V:,}, one start (curves over steps: means of the last 8)")
    (passes, zeros), (rows, losses) = figure.subplots(2, 2)
    for (name, run), color in zip(runs.items(), ("tab:blue", "tab:orange"), strict=True):
        steps = range(1, len(run.steps) + 1)
        passes.plot(list(run.held_out), list(run.held_out.values()), color=color, marker="o", label=f"{name}, held out")
        passes.plot(steps, smooth(run.curve("pass")), color=color, alpha=0.5, ls="--", label=f"{name}, rollouts")
        zeros.plot(steps, smooth(run.curve("zero")), color=color, label=name)
        losses.plot(steps, smooth(run.curve("loss")), color=color, label=name)
        rows.plot(steps, smooth(run.curve("projected")), color=color, label=f"{name}, projected")
    positions = [step["projected"] + step["skipped"] for step in run.steps]
    rows.plot(steps, positions, color="black", ls=":", label="all positions")
    kept = smooth(runs["SC-SDPO"].curve("projected"))
    rows.fill_between(steps, kept, positions, color="tab:blue", alpha=0.12, label="skipped by SC-SDPO")
    tops = {passes: 1, zeros: 1, rows: 1.3 * max(positions), losses: None}
    titles = ("pass rate", "share of questions of weight 0", "rows per step", "loss [nats]")
    for (axes, top), title in zip(tops.items(), titles, strict=True):
        axes.set(xlabel="step", ylabel=title, xlim=(0, len(positions)), ylim=(0, top))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=2, loc="lower right" if top == 1 else "upper right")
    figure.savefig(path, dpi=130)


def report(runs: dict[str, Run], comparison: dict[str, tuple[float, ...]]) -> str:
    lines = ["", f"{'':18}{'held-out pass rate':>20}{'rollouts, last 10':>20}{'rows projected':>18}{'s in loss':>12}"]
    for name, run in runs.items():
        projected = sum(run.curve("projected"))
        share = projected / (projected + sum(run.curve("skipped")))
        held_out = f"{run.held_out[0]:.3f} -> {run.held_out[len(run.steps)]:.3f}"
        last = fmean(run.curve("pass")[-10:])
        rows = f"{projected} ({share:.0%})"
        lines.append(f"{name:18}{held_out:>20}{last:>20.3f}{rows:>18}{sum(run.curve('seconds')):>12.1f}")
    lines += ["", f"{'first step':18}{'s in loss':>20}{'MiB at peak *':>20}{'from eager **':>18}{'error ***':>12}"]
    for how, (seconds, memory, difference, error) in comparison.items():
        lines.append(f"{how:18}{seconds:>20.2f}{memory / 2**20:>20.0f}{difference:>18.1e}{error:>12.1e}")
    lines += ["* above inputs and gradients, in a process of its own", "** largest difference of any gradient"]
    return "\n".join([*lines, "*** relative, in norm, from float64: the larger of hidden states and head", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="python -m scsdpo.demo")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each run")
    parser.add_argument("--questions", type=int, default=10, help="questions per step, 8 rollouts each")
    parser.add_argument("--warmup-steps", type=int, default=1200, help="supervised steps at most")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("scsdpo-demo.png"))
    args = parser.parse_args()

    start = time.perf_counter()
    held_out = draw_questions(200, random.Random("held out"))
    warm = warm_up(args, frozenset(held_out))
    rates, shown = pass_rates(warm, held_out), pass_rates(warm, held_out, shown=True)
    never, always = (rates < 0.05).float().mean(), (rates > 0.95).float().mean()
    print(
        f"held-out pass rate after the warm-up: {rates.mean():.3f} ({never:.0%} of questions below 0.05, {always:.0%} "
        f"above 0.95), with a solution in the prompt {shown.mean():.3f}"
    )
    comparison = compare(warm, held_out, args)
    runs = {"SC-SDPO": train(warm, held_out, args, weighted=True), "SDPO": train(warm, held_out, args, weighted=False)}
    print(report(runs, comparison))
    plot(runs, args.output)
    print(f"{time.perf_counter() - start:.0f} s in all on {torch.get_num_threads()} threads; curves in {args.output}")


if __name__ == "__main__":
    main()
