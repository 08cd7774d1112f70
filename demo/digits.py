"""A task that a small model learns by SC-SDPO in a minute on a CPU: to write a string of digits backwards.

A supervised warm-up leaves a three-layer decoder good at copying a solution that stands in its prompt, and otherwise
right on some questions, wrong on others and in between on many. That is what self-distillation needs: the same model
with a successful sibling's answer in its prompt is the teacher of every other rollout of that question.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from . import COLUMNS

TOKENS = "_.=>0123456789"  # pad, end, "answer:", "was solved by"; every other id of the vocabulary is unused
PAD, END = TOKENS.index("_"), TOKENS.index(".")
LENGTHS = range(3, 8)  # digits in a question: what makes it hard
WIDTH = 64  # D
ROLLOUTS = 8  # per question
CACHE = "cache" if "cache" in signature(Qwen3Model.forward).parameters else "past_key_values"  # its older name
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
    shape = {"vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": WIDTH // 4, "tie_word_embeddings": True}
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


def warm_up(vocabulary: int, steps: int, seed: int, exclude: frozenset[str] = frozenset()) -> Qwen3ForCausalLM:
    """Supervised steps, at most so many, until both prompt formats reach WARM_PASS_RATES.

    Prompts show the solution, but one in ten is plain while plain prompts are below their rate.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model, unused = build_model(len(TOKENS)), math.log(vocabulary - len(TOKENS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    plain = shown = 0.0
    with tqdm(desc="warm-up", total=steps, ncols=COLUMNS) as bar:
        for step in range(steps):
            share = 0.1 if plain < WARM_PASS_RATES[0] else 0.0
            _supervised_loss(model, draw_questions(48, rng, exclude), share, rng, unused).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if step % 20 == 19:
                fresh = draw_questions(60, rng, exclude)
                plain, shown = (pass_rates(model, fresh, shown=s).mean().item() for s in (False, True))
                bar.set_postfix_str(f"pass {plain:.2f}, with a solution {shown:.2f}")
                if plain > WARM_PASS_RATES[0] and shown > WARM_PASS_RATES[1]:
                    break
    return _with_vocabulary(model, vocabulary)


def _supervised_loss(model: Qwen3ForCausalLM, questions: list[str], share: float, rng: random.Random, unused: float):
    """Cross-entropy of right answers; share: of plain prompts.

    The ids that the task never uses keep their random initial rows, whose logits are near 0: here they stand in the
    softmax as one class, whose logit is the log of their number.
    """
    prompts = [prompt(q, None if rng.random() < share else answer(q)) for q in questions]
    targets, mask = encode([answer(q) for q in questions], "right")
    logits = model.lm_head(response_hidden(model, prompts, targets)[mask.bool()])
    return F.cross_entropy(F.pad(logits, (0, 1), value=unused), targets[mask.bool()])


def _with_vocabulary(model: Qwen3ForCausalLM, vocabulary: int) -> Qwen3ForCausalLM:
    """The model with further ids, which it never uses."""
    full = build_model(vocabulary)
    full.model.layers, full.model.norm = model.model.layers, model.model.norm
    with torch.no_grad():
        full.lm_head.weight[: len(TOKENS)] = model.lm_head.weight
    return full


# Rollouts.


@dataclass(frozen=True)
class Batch:
    """Rollouts, question by question."""

    prompts: list[str]
    teacher_prompts: list[str]
    response: Tensor  # (B, T) ids
    rewards: Tensor  # (B,)
    question_ids: Tensor  # (B,)
    mask: Tensor  # (B, T) 1 at response tokens that have a teacher

    def only(self, kept: Tensor) -> Batch:  # (K,) indices
        """The batch without its other rollouts."""
        prompts, teacher_prompts = ([x[i] for i in kept.tolist()] for x in (self.prompts, self.teacher_prompts))
        tensors = (x[kept] for x in (self.response, self.rewards, self.question_ids, self.mask))
        return Batch(prompts, teacher_prompts, *tensors)


@torch.no_grad()
def rollout(model: Qwen3ForCausalLM, prompts: list[str], generator: torch.Generator) -> Tensor:  # (B, T) ids
    """Sample at temperature 1 from the whole vocabulary; logits of the last position of unfinished rollouts only."""
    tokens, vocabulary = max(LENGTHS) + 1, model.config.vocab_size
    ids, attention = encode(prompts, "left")
    cache = {CACHE: DynamicCache(config=model.config)}
    response = torch.full((len(prompts), tokens), PAD)
    active = torch.arange(len(prompts))
    buffer = torch.empty(len(prompts), vocabulary)
    for t in range(tokens):
        hidden = model.model(input_ids=ids, attention_mask=attention, **cache).last_hidden_state
        logits = torch.mm(hidden[active, -1], model.lm_head.weight.T, out=buffer[: len(active)])
        cumulative = logits.sub_(logits.amax(-1, keepdim=True)).exp_().cumsum_(-1)
        threshold = torch.rand(len(active), 1, generator=generator) * cumulative[:, -1:]
        response[active, t] = torch.searchsorted(cumulative, threshold)[:, 0].clamp(max=vocabulary - 1)
        ids = response[:, t : t + 1]
        attention = torch.cat([attention, torch.ones_like(ids)], 1)
        active = active[ids[active, 0] != END]
        if not len(active):
            break
    return response


def sample_batch(
    model: Qwen3ForCausalLM, questions: list[str], rng: random.Random, generator: torch.Generator
) -> Batch:
    asked = [q for q in questions for _ in range(ROLLOUTS)]
    response = rollout(model, [prompt(q) for q in asked], generator)
    texts = [decode(ids) for ids in response]
    rewards = torch.tensor([float(text == answer(q)) for q, text in zip(asked, texts, strict=True)])
    question_ids = torch.arange(len(questions)).repeat_interleave(ROLLOUTS)
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
        rewards=rewards,
        question_ids=question_ids,
        mask=mask,
    )


def loss_operands(student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, batch: Batch) -> tuple[Tensor, ...]:
    """Hidden states (B, T, D) and LM head (V, D), the student's and the teacher's."""
    hidden = response_hidden(student, batch.prompts, batch.response)
    with torch.no_grad():
        teacher_hidden = response_hidden(teacher, batch.teacher_prompts, batch.response)
    return hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight
