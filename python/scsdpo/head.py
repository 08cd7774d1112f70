"""The output head of a Hugging Face model as the place where distillation happens.

A wrapper (DDP, FSDP2, ZeRO-3) gathers the head's weight around the head's own forward and reduces its gradient
afterwards. So the loss has to be computed there, and inside the wrapper's forward:

    patch_lm_head(model)                      once, before the model is wrapped or after
    teacher = hidden_states(teacher_model, input_ids, attention_mask)         (B, L, D), without gradient
    result = distill(model, input_ids, attention_mask, tokens, teacher_hidden=teacher[:, -T-1:-1], ...)

`distill` runs the backbone and then `lm_head(hidden, distill_args)`, whose forward is `linear_divergence` on the weight
that it finds in itself. A teacher whose head is another comes with `teacher_head=head_of(teacher_model, in_full=True)`.
Without distill_args the head is what it was: generation and evaluation notice nothing.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scsdpo_kernels import Head, LinearDivergence, LoRA, linear_divergence, scsdpo_loss

# What a text config calls them; every other name like these is refused, unless it says that there is none.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_LIKE_THESE = re.compile(r"(logits?_|_logits?$|_logits?_|lm_head_mult|soft_?cap)")
_OF_SOMETHING_ELSE = re.compile(r"(attn|attention|router|aux|to_keep|output_logits|temperature|init_value)")


def patch_lm_head(model: nn.Module) -> nn.Module:
    """Teaches a model's output head to distil; returns the head. On this instance only, and once however often called.

    The head's forward takes `distill_args`, keyword arguments of `linear_divergence` without the student's (or, where
    `mask` is among them, of `scsdpo_loss`), and then returns a LinearDivergence in place of logits. Bias, softcap and
    logit scale come from the head and the model's config; a single LoRA adapter (PEFT) on the head goes the operator's
    own way.

    Raises:
        ValueError: a head that this cannot be right for: prompt learning, modules_to_save, DoRA, LoRA with dropout or
            several active adapters, a softcap or scale of a name that is not known, a head that is not a linear layer.
    """
    base = base_model(model)
    head = base.get_output_embeddings()
    _refuse(model, base, head)
    if not isinstance(vars(head).get("forward"), _HeadForward):
        head.forward = _HeadForward(base, head)
    return head


class _HeadForward:
    """A patched head's forward; an object, not a closure, so that a copy of the model has its own head's."""

    def __init__(self, base: nn.Module, head: nn.Module):
        self.base, self.original = base, head.forward

    def __call__(self, hidden: Tensor, *args: Any, distill_args: "dict | _Opaque | None" = None, **kwargs: Any):
        if distill_args is None:
            return self.original(hidden, *args, **kwargs)
        given = dict(distill_args.content if isinstance(distill_args, _Opaque) else distill_args)
        head, teacher, teacher_head = head_of(self.base), given.get("teacher_hidden"), given.get("teacher_head")
        if teacher is not None and teacher_head is None:  # mixed precision: what this head computes in
            given["teacher_hidden"] = teacher.to(head.weight.dtype)
        elif teacher is not None:  # gathered in the precision of the optimiser
            given["teacher_head"] = _in_dtype(teacher_head, teacher.dtype)
        loss = scsdpo_loss if "mask" in given else linear_divergence
        return loss(hidden, head, **given)


class _Opaque:
    """Arguments that a wrapper does not look into: FSDP2 would round every float among them to its param_dtype."""

    def __init__(self, content: dict[str, Any]):
        self.content = content


def unpatch_lm_head(model: nn.Module) -> None:
    """The head's forward as the class has it."""
    vars(base_model(model).get_output_embeddings()).pop("forward", None)


def distill(
    model: nn.Module,  # wrapped or not
    input_ids: Tensor,  # (B, L)
    attention_mask: Tensor | None,  # (B, L); None: every token is one, or position_ids tell packed sequences apart
    tokens: int | Tensor,  # T: the last so many of L are the response. Or (R,): positions, in B·L, that predict one
    *,
    backbone: dict[str, Any] | None = None,  # further arguments of the backbone, as position_ids
    **distill_args: Any,
) -> LinearDivergence:  # (B, T) fields, or (R,)
    """Runs the student and, as its head's forward, `linear_divergence`, all inside the wrapper's forward.

    distill_args are keyword arguments of `linear_divergence`, as teacher_hidden (B, T, D_t), token_weight (B, T), or,
    where `mask` (B, T) is among them, of `scsdpo_loss`.
    """

    def student(inner: nn.Module) -> LinearDivergence:
        hidden = _run_backbone(inner, input_ids, attention_mask, backbone)
        hidden = hidden[:, -tokens - 1 : -1] if isinstance(tokens, int) else hidden.flatten(0, 1)[tokens]
        return base_model(inner).get_output_embeddings()(hidden, distill_args=_Opaque(distill_args))

    return inside_forward(model, student)


def hidden_states(
    model: nn.Module,  # wrapped or not
    input_ids: Tensor,  # (B, L)
    attention_mask: Tensor | None,  # (B, L)
    *,
    backbone: dict[str, Any] | None = None,
) -> Tensor:  # (B, L, D)
    """What a model hands to its head. Call it under torch.no_grad() for a teacher.

    Accelerate puts autocast around the forward that this replaces: under mixed_precision, call this and `distill`
    inside accelerator.autocast().
    """
    return inside_forward(model, lambda inner: _run_backbone(inner, input_ids, attention_mask, backbone))


def head_of(model: nn.Module, *, in_full: bool = False) -> Head:
    """What the head of a model, wrapped or not, is to `linear_divergence`: parameters, and numbers of the config.

    in_full: for a teacher. Parameters are detached, and gathered where they are sharded (FSDP2, ZeRO-3). They exist in
    full for as long as this is held: gather once a step. A teacher whose head is the student's own needs none.
    """
    base = base_model(model)
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    linear, lora, scale = getattr(head, "base_layer", head), None, 1.0  # the layer under an adapter
    if (active := _active_adapters(head)) and not head.disable_adapters:
        (adapter,) = active
        lora = LoRA(head.lora_A[adapter].weight, head.lora_B[adapter].weight, head.scaling[adapter])
    for name in _SCALES:
        scale *= _number(config, name)
    for name in _DIVISORS:
        scale /= _number(config, name)
    softcaps = [float(getattr(config, name)) for name in _SOFTCAPS if getattr(config, name, None)]
    softcap = softcaps[0] if softcaps else None
    weight, bias = linear.weight, getattr(linear, "bias", None)
    if in_full:
        weight, bias = _in_full(weight), None if bias is None else _in_full(bias)
        lora = None if lora is None else LoRA(_in_full(lora.a), _in_full(lora.b), lora.scale)
    return Head(weight, bias, lora, logit_scale=scale, softcap=softcap)


def inside_forward(model: nn.Module, run: Callable[[nn.Module], Any]) -> Any:
    """run(inner model), from inside the forward of the model that wraps it: hooks before and after are its own."""
    inner = _unwrapped(model)
    original = vars(inner).get("forward")

    def forward() -> Any:
        restore()
        return run(inner)

    def restore() -> None:
        if original is None:
            vars(inner).pop("forward", None)
        else:
            inner.forward = original

    inner.forward = forward
    try:
        return model()
    finally:
        restore()


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers and PEFT."""
    inner = _unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model") else inner


def _active_adapters(head: nn.Module) -> list[str]:
    """Those that are on the head."""
    adapters = getattr(head, "lora_A", None)
    return [] if adapters is None else [name for name in head.active_adapters if name in adapters]


def _number(config: Any, name: str) -> float:
    value = getattr(config, name, None)
    return 1.0 if value is None else float(value)


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def _run_backbone(inner: nn.Module, input_ids, attention_mask, backbone) -> Tensor:
    base = base_model(inner)
    decoder = base.get_decoder()
    if decoder is base:
        raise ValueError(f"{type(base).__name__}: expected a model whose backbone get_decoder() returns")
    options = {"use_cache": False, **(backbone or {})}
    return decoder(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state


def _in_dtype(head: Head | Tensor, dtype: torch.dtype) -> Head:
    """With weight and bias in it."""
    head = head if isinstance(head, Head) else Head(head)
    return head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


def _in_full(parameter: Tensor) -> Tensor:
    """Detached, and all of it."""
    if hasattr(parameter, "full_tensor"):  # FSDP2
        return parameter.detach().full_tensor()
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def _refuse(model: nn.Module, base: nn.Module, head: nn.Module | None) -> None:
    name = type(base).__name__
    if head is None:
        raise ValueError(f"{name}: expected a model with an output head, get_output_embeddings() returned None")
    peft = getattr(_unwrapped(model), "peft_config", None) or {}
    for adapter in peft.values():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"{name}: prompt learning (PEFT) puts tokens in front of the backbone's input, which a distilled head "
                "does not see; use LoRA"
            )
    if hasattr(head, "modules_to_save"):
        raise ValueError(
            f"{name}: the head is in modules_to_save, a copy beside the head that is patched; train it in full, or put "
            "'lm_head' into LoRA's target_modules"
        )
    if active := _active_adapters(head):
        dropout = [x for x in active if not isinstance(head.lora_dropout[x], nn.Identity)]
        variant = [x for x in active if getattr(head, "use_dora", {}).get(x)]
        if len(active) > 1 or dropout or variant:
            raise ValueError(
                f"{name}: LoRA on the head has to be one active adapter without dropout and DoRA, got adapters "
                f"{active}, with dropout {dropout}, with DoRA {variant}; or leave 'lm_head' out of target_modules"
            )
    linear = getattr(head, "base_layer", head)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name}: expected a linear output head, got {type(linear).__name__}")
    known = (*_SOFTCAPS, *_SCALES, *_DIVISORS)
    for key, value in base.config.get_text_config().to_dict().items():
        like = _LIKE_THESE.search(key) and not _OF_SOMETHING_ELSE.search(key)
        if like and key not in known and not isinstance(value, bool) and value not in (None, 1, 1.0, 0):
            raise ValueError(
                f"{name}: its config has {key}={value}, which may change the logits behind the head and is not known "
                "here; compute its loss from hidden states with linear_divergence and the arguments that it needs"
            )


__all__ = ["distill", "head_of", "hidden_states", "patch_lm_head", "unpatch_lm_head"]
