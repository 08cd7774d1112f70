"""The output head of a Hugging Face model as the place where distillation happens.

    teacher = hidden_states(teacher_model, teacher_ids, teacher_attention_mask, T)        under torch.no_grad()
    result = distill(model, input_ids, attention_mask, T, mask=mask, teacher_hidden=teacher,
                     teacher_head=head_of(teacher_model), question_weight=weight)

Both run a model's own forward and take what its head is given: layers behind the backbone, images and adapters are in
it. `distill` then runs the loss as the head's forward, where a wrapper (DDP, FSDP2, ZeRO-3) has gathered the head's
weight. Generation and evaluation notice nothing.

Nothing about a head is taken from names. A model is measured when it comes here first, and again when its adapters, its
head, or numbers of its config have changed: two forwards of 8 tokens say what stands behind the head, and that its own
logits are what the operator computes (`scsdpo.measured`). A head for which they are not is refused with ValueError.
"""

import functools
import hashlib
import numbers
import warnings
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scsdpo_kernels import Head, LinearDivergence, RoutedHeads, linear_divergence, scsdpo_loss

from . import forward, measured
from .forward import base_model, inside_forward
from .layers import read


def patch_lm_head(model: nn.Module) -> nn.Module:
    """Lets a model's head distil, and measures the model where its weights are whole; returns the head.

    `distill` does so by itself. Called before training, it refuses then what would be refused at the first step.

    Raises:
        ValueError: the model has no head, or one that this cannot be right for: quantised, not affine in its input,
            with dropout in training, not called once with one hidden state a token, with something else behind it
            than a scale and a softcap. The message has the reason and, where it is one, the size of the difference.
    """
    head = forward.unwrapped(forward.output_head(base_model(model)))
    forward.patch(head)
    inner = forward.unwrapped(model)
    if measured.is_whole(inner):
        measured.measured(inner)
    return head


def unpatch_lm_head(model: nn.Module) -> None:
    """The head's forward as it was before."""
    forward.unpatch(forward.unwrapped(forward.output_head(base_model(model))))


def distill(
    model: nn.Module,  # wrapped or not
    input_ids: Tensor,  # (B, L)
    attention_mask: Tensor | None,  # (B, L); None: every token is one, or position_ids tell packed sequences apart
    tokens: int | Tensor,  # T: the last so many of L are the response. Or (R,): positions, in B·L, that predict one
    *,
    mask: Tensor | None,  # (B, T) 1 at response tokens that have a teacher. None: token_weight says it all
    teacher_hidden: Tensor | None = None,  # (B, T, D_t), or (R, D_t), from hidden_states; None with TopLogprobs
    teacher_head: Head | Tensor | None = None,  # head_of(teacher); None: the student's own
    question_ids: Tensor | Sequence[Hashable] | None = None,  # (B,) integers, strings or other ids, with rewards
    backbone: dict[str, Any] | None = None,  # further inputs of the model, as position_ids or pixel_values
    **distill_args: Any,
) -> LinearDivergence:  # (B, T) fields, or (R,)
    """Runs the student and, as its head's forward, `scsdpo_loss`, all inside the wrapper's forward.

    Patches the head where it is not patched. With mask=None it is `linear_divergence`, whose loss is a sum over all
    tokens times token_weight: write it out if that is what you want.

    Args:
        distill_args: further keyword arguments of `scsdpo_loss` (question_weight, denominator, beta, ...), or of
            `linear_divergence` where mask is None.

    Raises:
        ValueError, TypeError: as `patch_lm_head` and the loss; `tokens` outside of the sequence; a response token of
            `mask` that attention_mask calls padding, as in a batch that is padded on the right (on a GPU the loss is
            NaN then); teacher_hidden of another head than the student's without teacher_head.
    """
    if isinstance(teacher_head, RoutedHeads):
        raise TypeError("teacher_head: expected a Head, a tensor or None, got RoutedHeads; distill takes one teacher")
    _check_tokens(tokens, input_ids)
    if mask is None and question_ids is not None:
        raise ValueError("question_ids: expected None with mask=None, whose loss has no questions")
    if mask is not None and not isinstance(tokens, int):
        raise ValueError("mask: expected None with positions as tokens; token_weight has one number for each")
    found = measured.measured(model)
    if mask is not None:
        mask = _without_padding(mask, attention_mask, tokens)
    if (made := getattr(teacher_hidden, "_made", None)) is not None:
        made.check(model, found, teacher_head is not None)
        mask = mask if mask is None else made.without_padding(mask)
    if question_ids is not None:
        distill_args["question_ids"] = question_numbers(question_ids, device=input_ids.device)
    if mask is not None:
        distill_args["mask"] = mask

    def loss(hidden: Tensor, layer: nn.Module, original: Any) -> LinearDivergence:
        head = found.behind(read(hidden, layer, original))
        teacher, other = teacher_hidden, teacher_head
        if teacher is not None and other is None:  # mixed precision: what this head computes in
            teacher = teacher.to(head.weight.dtype)
        elif teacher is not None:  # gathered in the precision of the optimiser
            other = _in_dtype(other, teacher.dtype)
        function = linear_divergence if mask is None else scsdpo_loss
        return function(hidden, head, teacher, other, **distill_args)

    def student(inner: nn.Module) -> LinearDivergence:
        state = _at_head(inner, found, input_ids, attention_mask, backbone)
        return forward.visit(inner, state._replace(hidden=_at(state.hidden, tokens)), loss)

    return inside_forward(model, student)


def hidden_states(
    model: nn.Module,  # wrapped or not
    input_ids: Tensor,  # (B, L)
    attention_mask: Tensor | None,  # (B, L)
    tokens: int | Tensor,  # T or (R,), as of distill
    *,
    backbone: dict[str, Any] | None = None,  # further inputs of the model, as position_ids or pixel_values
) -> Tensor:  # (B, T, D), or (R, D): what distill takes as teacher_hidden
    """What a model hands to its head at the tokens that predict the response. Under torch.no_grad() for a teacher.

    Accelerate puts autocast around the forward of a model that it has prepared; a teacher that it has not is called
    inside accelerator.autocast().

    Raises:
        ValueError, TypeError: as `patch_lm_head`; `tokens` outside of the sequence.
    """
    _check_tokens(tokens, input_ids)
    found = measured.measured(model)

    def teacher(inner: nn.Module) -> Tensor:
        return _at(_at_head(inner, found, input_ids, attention_mask, backbone).hidden, tokens)

    hidden = inside_forward(model, teacher)
    hidden._made = _Made(model, found, attention_mask, tokens)
    return hidden


def head_of(model: nn.Module) -> Head:
    """A teacher's head for `distill`: all of it, detached, measured. A teacher that is the student needs none.

    Parameters that are sharded or offloaded are gathered (a collective) and exist in full for as long as this is held:
    call it once a step. Otherwise they are the model's own and follow it.

    Raises:
        ValueError: as `patch_lm_head`.
    """
    found = measured.measured(model)
    layer = forward.unwrapped(forward.output_head(base_model(model)))
    stays = measured.is_whole(layer)

    def gathered(hidden: Tensor, layer: nn.Module, original: Any) -> Head:
        with torch.no_grad():
            head = read(hidden, layer, original)

        def own(x: Tensor | None) -> Tensor | None:
            return x if x is None else x.detach() if stays else x.detach().clone()

        lora = head.lora and head.lora._replace(a=own(head.lora.a), b=own(head.lora.b))
        return found.behind(Head(own(head.weight), own(head.bias), lora))

    return inside_forward(model, lambda inner: forward.visit(inner, found.at_head, gathered))


class TeacherHead:
    """A teacher's head, which is gathered once an optimiser step, since it may follow the student's weights."""

    def __init__(self):
        self._step, self._head = -1, None

    def at(self, step: int, teacher: nn.Module) -> Head:
        if self._step != step:
            self._step, self._head = step, head_of(teacher)
        return self._head


def question_numbers(
    ids: "Tensor | Sequence[Hashable]", *, device: "torch.device | str | None" = None
) -> Tensor:  # (B,) int64
    """Question ids of any kind (integers, strings, uids) as the integers that `question_weights` takes.

    The same id has the same number in every process. Warns, once, where there is one process and no id occurs twice:
    each question then has one rollout, a pass rate of 0 or 1, and weight 0 for ever.

    Raises:
        TypeError: ids that are not one-dimensional, or numbers that are not integers.
    """
    if isinstance(ids, Tensor) and ids.device.type != "cpu":
        return ids  # not looked at: that would wait for the device
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if isinstance(ids, Tensor) and (ids.dim() != 1 or ids.is_floating_point()):
        raise TypeError(f"question_ids: expected integers of shape (B,), got {ids.dtype} of shape {tuple(ids.shape)}")
    if any(isinstance(x, float | list) for x in values):
        raise TypeError(f"question_ids: expected integers, strings or other ids, got {type(values[0]).__name__}")
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    if len(values) > 1 and len(set(values)) == len(values) and (alone or torch.distributed.get_world_size() == 1):
        _warn_once(
            f"question_ids: none of {len(values)} occurs twice, so every question has one rollout and weight 0; "
            "rollouts of one question share its id"
        )
    if not all(isinstance(x, numbers.Integral) for x in values):
        digests = (hashlib.blake2b(str(x).encode(), digest_size=8).digest() for x in values)
        values = [int.from_bytes(x, "big", signed=True) for x in digests]
    return torch.tensor([int(x) for x in values], dtype=torch.int64, device=device)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


class _Made:
    """What hidden states were made by: goes along with them, as an attribute, as long as they are not changed."""

    def __init__(self, model: nn.Module, found: measured.Measured, attention_mask: Tensor | None, tokens: int | Tensor):
        self.head = weakref.ref(forward.unwrapped(forward.output_head(base_model(model))))
        self.state, self.attention_mask, self.tokens = found.state.head, attention_mask, tokens

    def check(self, student: nn.Module, found: measured.Measured, has_head: bool) -> None:
        own = forward.unwrapped(forward.output_head(base_model(student)))
        if not has_head and (self.head() is not own or self.state != found.state.head):
            raise ValueError(
                "teacher_head: expected head_of(teacher), got None, with hidden states of another head than the "
                "student's, or of the same head with other adapters"
            )

    def without_padding(self, mask: Tensor) -> Tensor:
        return _without_padding(mask, self.attention_mask, self.tokens) if isinstance(self.tokens, int) else mask


def _check_tokens(tokens: int | Tensor, input_ids: Tensor) -> None:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected shape (B, L), got {tuple(input_ids.shape)}")
    if not isinstance(tokens, Tensor):
        length = input_ids.shape[1]
        if isinstance(tokens, bool) or not isinstance(tokens, int):
            raise TypeError(f"tokens: expected an int, or positions of shape (R,), got {type(tokens).__name__}")
        if not 1 <= tokens < length:
            raise ValueError(f"tokens: expected 1 to {length - 1}, of sequences of {length} tokens, got {tokens}")
        return
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(
            f"tokens: expected an int, or positions of shape (R,) and dtype int64, got shape {tuple(tokens.shape)} and "
            f"{tokens.dtype}"
        )
    if tokens.device.type == "cpu" and tokens.numel() and not (tokens.min() >= 0 and tokens.max() < input_ids.numel()):
        raise ValueError(
            f"tokens: expected positions from 0 to {input_ids.numel() - 1}, got {tokens.min()} to {tokens.max()}"
        )


def _without_padding(mask: Tensor, attention_mask: Tensor | None, tokens: int) -> Tensor:
    """The mask; ValueError, or NaN in it on a GPU, where it has a token that is padding or that padding predicts."""
    if attention_mask is None or attention_mask.dim() != 2 or mask.shape != (len(attention_mask), tokens):
        return mask
    there = attention_mask[:, -tokens - 1 :] != 0
    wrong = (mask != 0) & ~(there[:, 1:] & there[:, :-1])
    if mask.device.type != "cpu":
        return torch.where(wrong, float("nan"), mask.float())
    if wrong.any():
        row = int(wrong.any(1).nonzero()[0])
        raise ValueError(
            f"mask: expected response tokens among the last {tokens} of a sequence, got {int(wrong.sum())} that are "
            f"padding or follow it by attention_mask, first in row {row}; pad prompts on the left"
        )
    return mask


def _at_head(
    inner: nn.Module, found: measured.Measured, input_ids: Tensor, attention_mask: Tensor | None, backbone: dict | None
) -> forward.AtHead:
    def no_logits(hidden: Tensor) -> Tensor:
        return hidden.new_empty(*hidden.shape[:-2], 0, found.vocabulary)

    return forward.at_head(inner, no_logits, input_ids, attention_mask, **(backbone or {}))


def _at(hidden: Tensor, tokens: int | Tensor) -> Tensor:
    return hidden[:, -tokens - 1 : -1] if isinstance(tokens, int) else hidden.flatten(0, 1).index_select(0, tokens)


def _in_dtype(head: Head | Tensor, dtype: torch.dtype) -> Head:
    """With weight and bias in it."""
    head = head if isinstance(head, Head) else Head(head)
    return head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


__all__ = ["TeacherHead", "distill", "head_of", "hidden_states", "patch_lm_head", "question_numbers", "unpatch_lm_head"]
