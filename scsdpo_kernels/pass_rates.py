"""Question weights from pass rates that are kept across steps, with a prior.

    s_j ← d s_j + successes of question j in this step        n_j ← d n_j + its rollouts in this step
    p̂_j = (a + s_j) / (a + b + n_j)        w_j = (p̂_j (1 - p̂_j))^α, normalised as in `question_weights`

p̂ is the mean of the Beta distribution that begins as Beta(a, b) and has seen s_j successes of n_j rollouts, of which
those of k earlier steps count d^k each. With a = b = 0 and d = 0 these are the weights of `question_weights`
(SC-SDPO, arXiv 2605.27765, eq. 15-16).
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .question_weights import check_numbers, check_rewards, normalised_weights, successes_of

QuestionId = int | str


class PassRates:
    """What is known of each question's pass rate, over steps.

        rates = PassRates(prior=(1.0, 1.0), decay=0.5)
        weight = rates.update(rewards, question_ids)        once a step, on the whole training batch

    An id names the same question in every step. Ids that are made anew each step, as verl's `uid`, know nothing of
    earlier ones: take the number of the question in the dataset.

    An entry is kept for each question that was ever seen: without `limit` the memory, and what `state_dict` saves,
    grows with the number of different ids and never shrinks.

    Args:
        prior: (a, b), pseudo-counts of successes and failures, finite and at least 0. With both above 0 no question is
            degenerate: one whose rollouts all succeed keeps a weight, which falls as they go on to.
        decay: d in [0, 1], by which earlier rollouts of a question count less each time that it is in a step again. 0:
            only the step's own. 1: all alike. Steps without the question change nothing.
        limit: the most questions to keep, at least 1; those that were not in a step for longest are forgotten first,
            after the weights are made, and begin at the prior again. None: no limit.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """

    def __init__(self, prior: tuple[float, float] = (0.0, 0.0), decay: float = 0.0, limit: int | None = None):
        if not isinstance(prior, tuple | list) or len(prior) != 2:
            raise TypeError(f"prior: expected two numbers (a, b), got {prior!r}")
        for name, number, most in (("prior", prior[0], math.inf), ("prior", prior[1], math.inf), ("decay", decay, 1.0)):
            if not isinstance(number, int | float) or isinstance(number, bool):
                raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
            if not (0 <= number <= most and number < math.inf):
                expected = "finite numbers of at least 0" if name == "prior" else "a number in [0, 1]"
                raise ValueError(f"{name}: expected {expected}, got {number}")
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
            raise TypeError(f"limit: expected an integer or None, got {type(limit).__name__}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        self.prior = float(prior[0]), float(prior[1])
        self.decay = float(decay)
        self.limit = limit
        self._counts: dict[QuestionId, tuple[float, float]] = {}  # s and n, the question seen last at the end

    def __len__(self) -> int:
        """Questions that are known."""
        return len(self._counts)

    def rate(self, question_id: QuestionId) -> float:
        """p̂ of a question; of one that is not known the prior's mean, NaN where there is no prior."""
        successes, rollouts = self._counts.get(question_id, (0.0, 0.0))
        total = sum(self.prior) + rollouts
        return (self.prior[0] + successes) / total if total > 0 else math.nan

    def update(
        self,
        rewards: Tensor,
        question_ids: "Tensor | Sequence[QuestionId]",
        *,
        exponent: float = 0.5,
        success_threshold: float | None = None,
        group: "dist.ProcessGroup | None" = None,
    ) -> Tensor:
        """Takes in a step's rollouts; the normalised weight of each one's question, (B,) fp32, without gradient.

        Weights are normalised over the questions of this step. On a GPU this waits for the device.

        Args:
            rewards: (B,) numbers, one per rollout.
            question_ids: (B,) integers or strings (a tensor, a list, an array); rollouts of a question share one.
            exponent: α; the paper's is 1/2.
            success_threshold: a rollout succeeds where its reward is at least this. None: rewards are in [0, 1], and
                what counts as successes is their sum.
            group: process group over whose ranks the step is spread: each takes in the rollouts of all and gets the
                weights of its own. Every rank needs the same earlier calls. Collective; what one rank refuses raises on
                all, and nothing is taken in.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
        """
        own, error = None, None  # a rank whose arguments are refused tells the others
        try:
            rewards = torch.as_tensor(rewards)
            check_numbers(exponent, success_threshold)
            check_rewards(rewards.cpu(), success_threshold)
            ids = _ids(question_ids, len(rewards))
            own = ids, successes_of(rewards.detach().cpu(), success_threshold).tolist()
        except (TypeError, ValueError) as raised:
            if group is None:
                raise
            error = raised
        if group is None:
            (ids, successes), mine = own, slice(None)
        else:
            (ids, successes), mine = _gathered(own, error, self._described(), group)
        ordered = sorted(set(ids))
        number = {question: i for i, question in enumerate(ordered)}
        question = torch.tensor([number[x] for x in ids], dtype=torch.long)
        success = torch.tensor(successes, dtype=torch.float64)
        in_step = [torch.zeros(len(ordered), dtype=torch.float64) for _ in range(2)]
        for count, of_rollout in zip(in_step, (success, torch.ones_like(success)), strict=True):
            count.index_add_(0, question, of_rollout)
        for i, x in enumerate(ordered):
            before = self._counts.pop(x, (0.0, 0.0))
            now = tuple(self.decay * kept + new[i].item() for kept, new in zip(before, in_step, strict=True))
            self._counts[x] = now
        known = torch.tensor([self._counts[x] for x in ordered], dtype=torch.float64).view(-1, 2)
        a, b = self.prior
        weights = normalised_weights(a + known[:, 0], a + b + known[:, 1], exponent)
        while self.limit is not None and len(self._counts) > self.limit:
            del self._counts[next(iter(self._counts))]
        return weights[question][mine].float().to(rewards.device)

    def state_dict(self) -> dict[str, Any]:
        """What is known, as lists of plain numbers and strings, the question seen last at the end.

        The same on every rank. Prior, decay and limit are not in it: they are the constructor's.
        """
        successes, rollouts = zip(*self._counts.values(), strict=True) if self._counts else ((), ())
        return {
            "question_ids": list(self._counts),
            "successes": list(successes),
            "rollouts": list(rollouts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Knows what `state_dict` has saved, and nothing else.

        Raises:
            ValueError, TypeError: it is not such a state; nothing has changed then.
        """
        if not isinstance(state, dict) or set(state) != {"question_ids", "successes", "rollouts"}:
            got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: expected question_ids, successes and rollouts, got {got}")
        ids = _ids(state["question_ids"], len(state["question_ids"]))
        successes, rollouts = ([float(x) for x in state[name]] for name in ("successes", "rollouts"))
        if not len(ids) == len(set(ids)) == len(successes) == len(rollouts):
            raise ValueError(
                f"state: expected each question once, with its counts, got {len(set(ids))} different of {len(ids)} "
                f"questions, {len(successes)} successes and {len(rollouts)} rollouts"
            )
        if not all(0 <= s <= n < math.inf for s, n in zip(successes, rollouts, strict=True)):
            raise ValueError("state: expected finite counts with no more successes than rollouts, got others")
        self._counts = dict(zip(ids, zip(successes, rollouts, strict=True), strict=True))

    def _described(self) -> tuple[Any, ...]:
        """What ranks have to agree in."""
        return self.prior, self.decay, self.limit, len(self._counts), math.fsum(n for _, n in self._counts.values())


def _ids(question_ids: Any, count: int) -> list[QuestionId]:
    """Integers or strings, as Python has them."""
    if isinstance(question_ids, Tensor) and (question_ids.is_floating_point() or question_ids.dtype == torch.bool):
        raise TypeError(f"question_ids: expected integers or strings, got {question_ids.dtype}")
    ids = question_ids.tolist() if hasattr(question_ids, "tolist") else list(question_ids)
    if not isinstance(ids, list) or len(ids) != count:
        got = f"{len(ids)} of them" if isinstance(ids, list) else "one number"
        raise ValueError(f"question_ids: expected one for each of {count} rollouts, got {got}")
    is_integer = [isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in ids]
    for x, integer in zip(ids, is_integer, strict=True):
        if not integer and not isinstance(x, str):
            raise TypeError(f"question_ids: expected integers or strings, got {type(x).__name__}")
    if len(set(is_integer)) > 1:
        raise TypeError("question_ids: expected integers or strings, got both")
    return [int(x) if integer else str(x) for x, integer in zip(ids, is_integer, strict=True)]


def _gathered(
    own: tuple[list[QuestionId], list[float]] | None,
    error: Exception | None,
    described: tuple[Any, ...],
    group: "dist.ProcessGroup",
) -> tuple[tuple[list[QuestionId], list[float]], slice]:
    """All ranks' ids and successes, and where this rank's own are among them."""
    every: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, (own, None if error is None else str(error), described), group=group)
    if error is not None:
        raise error
    refused = [f"rank {rank}: {message}" for rank, (_, message, _) in enumerate(every) if message is not None]
    if refused:
        raise ValueError(f"group: arguments were refused on other ranks, {'; '.join(refused)}")
    for rank, (_, _, other) in enumerate(every):
        if other != every[0][2]:
            raise ValueError(
                "group: expected the same prior, decay, limit, number of questions and of rollouts on every rank, got "
                f"{every[0][2]} on rank 0 and {other} on rank {rank}"
            )
    ids, successes = ([x for part, _, _ in every for x in part[i]] for i in range(2))
    if len({type(x) for x in ids}) > 1:
        raise TypeError("question_ids: expected integers or strings, got integers on one rank and strings on another")
    rank = dist.get_rank(group)
    start = sum(len(part[0]) for part, _, _ in every[:rank])
    return (ids, successes), slice(start, start + len(own[0]))
