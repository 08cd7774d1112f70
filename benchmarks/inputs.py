"""Hidden states, heads and teachers to measure on.

`reasoning` has output distributions like those that are reported of Qwen3-8B on reasoning rollouts: over half of the
tokens have an entropy below 0.01 nats, 20 % one above 0.67. A token's own logit stands m above the log-sum-exp of all
others, m normal, with the mean and the deviation that make it so: with p = 1 / (1 + e^m) the mass of the others and H
their entropy, a token's entropy is h(p) + p H, h being that of a coin. `rollouts` are the lengths and weights of one
optimiser step of SC-SDPO.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from scsdpo_kernels import question_weights

LOW, HIGH = (0.50, 0.01), (0.80, 0.67)  # a share of the tokens has at most that entropy, nats
DEVIATION = 2.0  # logits of tokens that mean nothing
# Responses of the paper's runs: 180 to 370 tokens in the mean, at most 2048. Log-normal is an assumption, and so is its
# deviation, with which the longest of 256 is about that.
MEAN_LENGTH, LONGEST, DEVIATION_OF_LENGTHS = 280, 2048, 0.9
QUESTIONS, ROLLOUTS = 32, 8  # one step's


def reasoning(
    rows: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    *,
    distance: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Student's hidden states (N, D), head (V, D) and teacher's hidden states (N, D), which share the head.

    distance: deviation of the teacher's logits from the student's, of every token.

    Raises:
        ValueError: too few dimensions for a distribution like that.
    """
    generator = torch.Generator(device).manual_seed(seed)
    at_random = {"generator": generator, "device": device}
    hidden = torch.randn(rows, width, **at_random)
    weight = torch.randn(vocabulary, width, **at_random).mul_(DEVIATION * width**-0.5)
    own = torch.randint(vocabulary, (rows,), **at_random)
    margin = _margins(rows, vocabulary, at_random)
    stretch = torch.zeros(rows, device=device)
    towards = weight[own]
    for _ in range(20):  # the others' log-sum-exp moves a little with the own logit's stretch
        state = hidden + stretch[:, None] * towards
        variance = state.square().sum(1) * DEVIATION**2 / width
        wanted = margin + math.log(vocabulary) + variance / 2
        stretch = stretch + (wanted - (state * towards).sum(1)) / towards.square().sum(1)
    if not (wanted - (state * towards).sum(1)).abs().max() < 0.1:
        raise ValueError(f"width: expected more than {width}, in which tokens' own logits and all others' are one")
    hidden = hidden + stretch[:, None] * towards
    teacher = hidden + distance / DEVIATION * torch.randn(rows, width, **at_random)
    return hidden.to(dtype), weight.to(dtype), teacher.to(dtype)


def _margins(rows: int, vocabulary: int, at_random: dict) -> Tensor:
    others = math.log(vocabulary) - DEVIATION**2 / 2  # their entropy
    low, high = (_margin(entropy, others) for _, entropy in (LOW, HIGH))
    normal = NormalDist()
    deviation = (low - high) / (normal.inv_cdf(HIGH[0]) - normal.inv_cdf(LOW[0]))
    mean = low + deviation * normal.inv_cdf(LOW[0])
    return mean + deviation * torch.randn(rows, **at_random)


def _margin(entropy: float, others: float) -> float:
    """m of a token with this entropy, by bisection."""
    low, high = -20.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        p = 1 / (1 + math.exp(middle))
        coin = -p * math.log(p) - (1 - p) * math.log1p(-p)
        low, high = (middle, high) if coin + p * others > entropy else (low, middle)
    return low


def rollouts(zeros: float, *, shorter: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lengths and question weights (256,) of one step's rollouts, question by question.

    zeros: share of the questions that no rollout, or every one, has solved. shorter: divides the lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    count = QUESTIONS * ROLLOUTS
    normal = torch.randn(count, generator=generator) * DEVIATION_OF_LENGTHS
    lengths = torch.exp(normal - DEVIATION_OF_LENGTHS**2 / 2) * (MEAN_LENGTH / shorter)
    lengths = lengths.round().clamp(1, LONGEST // shorter).long()
    solved = torch.randint(1, ROLLOUTS, (QUESTIONS,), generator=generator)
    degenerate = torch.randperm(QUESTIONS, generator=generator)[: round(zeros * QUESTIONS)]
    solved[degenerate] = ROLLOUTS * torch.randint(2, (len(degenerate),), generator=generator)
    rewards = (torch.arange(ROLLOUTS) < solved[:, None]).float().flatten()
    return lengths, question_weights(rewards, torch.arange(count) // ROLLOUTS)


def entropies(hidden: Tensor, weight: Tensor) -> Tensor:
    """(N,) nats."""
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    return torch.special.entr(log_p.exp()).sum(-1)
