"""What the self-teacher sees in place of a rollout's prompt (SDPO, arXiv 2601.20802).

The question, a solution of it that another rollout has found, and what the environment has said of this rollout.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

SOLUTION = "\n\nBelow is a solution of this question that has been checked and is right.\n\n{}"
FEEDBACK = "\n\nBelow is what came back when an attempt of yours at it was checked.\n\n{}"
REQUEST = "\n\nAnswer the question at the top."


class Attempt(NamedTuple):
    """A rollout, for a function that makes the self-teacher's prompt of it."""

    messages: list[dict[str, Any]]  # the question, as the dataset has it
    response: str
    reward: float
    solution: str | None  # the response of another rollout of the question that succeeded
    feedback: str | None  # the environment's, on this rollout
    reward_model: Any  # the dataset's column, with its ground_truth


def successful_siblings(uid: Sequence, rewards: Sequence[float], success_threshold: float = 0.5) -> list[int | None]:
    """For each rollout, the first other rollout of its question that succeeded, None where there is none (SDPO)."""
    succeeded: dict[Any, list[int]] = {}
    for rollout, (question, reward) in enumerate(zip(uid, rewards, strict=True)):
        if reward >= success_threshold:
            succeeded.setdefault(question, []).append(rollout)
    return [
        next((other for other in succeeded.get(question, ()) if other != rollout), None)
        for rollout, question in enumerate(uid)
    ]


def default_prompt(tokenizer: Any, attempt: Attempt, **template: Any) -> list[int]:
    """Token ids by the tokenizer's chat template; none without a solution and without feedback.

    Raises:
        ValueError: the last message is not the user's text.
    """
    if attempt.solution is None and attempt.feedback is None:
        return []
    *before, last = attempt.messages
    if last["role"] != "user" or not isinstance(last["content"], str):
        raise ValueError(
            "raw_prompt: expected a text of the user's as its last message, got "
            f"{type(last['content']).__name__} of {last['role']!r}; set trainer.v1.sampler.sampler_kwargs.prompt"
        )
    text = last["content"]
    if attempt.solution is not None:
        text += SOLUTION.format(attempt.solution)
    if attempt.feedback is not None:
        text += FEEDBACK.format(attempt.feedback)
    messages = [*before, {"role": "user", "content": text + REQUEST}]
    return tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False, **template
    )


__all__ = ["Attempt", "default_prompt", "successful_siblings"]
