"""What a model does with its head, measured: its own logits on a few tokens beside those that the head's layer gives.

    logits = c tanh(s (layer(hidden)) / c)

s and c are not looked up in a config, where their names differ and their use, too: numbers are put in place of the
head's output, and the model's forward shows what it makes of them. Then the model's own logits are compared with the
formula. A model is measured again when what may change this has changed: `state_of`.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scsdpo_kernels import Head

from .formula import compare_logits
from .forward import (
    AtHead,
    at_head,
    base_model,
    inside_forward,
    output_head,
    patch,
    path_to,
    set_forward,
    unwrapped,
    visit,
    without_trace,
)
from .layers import read, refuse

TOKENS = 8  # the probe's length
STATES = 32  # that are remembered of a head


class Measured(NamedTuple):
    """What stands behind a head's layer, and the state of the model in which it did."""

    scale: float
    softcap: float | None
    vocabulary: int
    at_head: AtHead  # one hidden state, for its shape, dtype and device
    state: "State"

    def behind(self, head: Head) -> Head:
        return head._replace(logit_scale=self.scale, softcap=self.softcap)


class State(NamedTuple):
    """What describes a head, and what may stand behind it."""

    head: tuple["Described", ...]  # the output layer, and the layers in it
    around: tuple["Described", ...]  # the model, and what is on the way from it to the head
    config: tuple  # names and values of the numbers in it


class Described(NamedTuple):
    """One module: class, forward, hooks and plain attributes, each with its name."""

    module: int
    kind: type
    forward: int
    hooks: tuple
    attributes: tuple[tuple[str, Any], ...]


Attributes = frozenset[tuple[int, str]]  # of modules, by name

_MEASURED: "weakref.WeakKeyDictionary[nn.Module, dict[State, Measured]]" = weakref.WeakKeyDictionary()
# Attributes that a forward changes, as counters of ZeRO-3 on the modules that it gathers: they describe no head.
_COUNTERS: "weakref.WeakKeyDictionary[nn.Module, Attributes]" = weakref.WeakKeyDictionary()


def measured(model: nn.Module) -> Measured:
    """A model's head in its present state, measured if that is new. Collective for a model that is spread.

    Raises:
        ValueError: what the head gives is not what the model's own forward gives; the message has the difference and
            the likely reason.
    """
    base = base_model(model)
    head = unwrapped(output_head(base))
    refuse(type(base).__name__, head)
    known, counters = _MEASURED.setdefault(head, {}), _COUNTERS.get(head, frozenset())
    state = state_of(base, counters)
    if state not in known:
        if len(known) >= STATES:
            known.clear()
        result = _measure(model, base, state)
        counters |= _changed(state, state_of(base, counters))
        _COUNTERS[head], state = counters, state_of(base, counters)
        known[state] = result._replace(state=state)
    return known[state]


def is_whole(model: nn.Module) -> bool:
    """Whether all parameters are here: none on meta, offloaded, or sharded (FSDP, ZeRO-3, tensor parallel)."""
    return not any(
        x.is_meta or hasattr(x, "ds_id") or hasattr(x, "placements") or x.numel() == 0 for x in model.parameters()
    ) and all(type(x).__name__ != "FullyShardedDataParallel" for x in model.modules())


# ---------------------------------------------------------------------------------------------------------------------
# What a measurement depends on.


def state_of(base: nn.Module, without: Attributes = frozenset()) -> State:
    """Classes, hooks, plain attributes, numbers of the config.

    Tensors are not in it, since training changes them: they are read anew each time.
    """
    outer = output_head(base)
    above = [base, *(module for module, _ in path_to(base, outer)[1:])]

    def described(x: nn.Module, forward: Any, attributes: tuple) -> Described:
        kept = tuple((name, value) for name, value in attributes if (id(x), name) not in without)
        return Described(id(x), type(x), id(forward), tuple(x._forward_hooks), kept)

    return State(
        tuple(described(x, set_forward(x), _plain(x)) for x in outer.modules()),
        tuple(described(x, vars(x).get("forward"), _numbers(x)) for x in above),
        _numbers(base.config, deep=True),
    )


def _changed(before: State, after: State) -> Attributes:
    """Attributes of the same modules that differ, or are only there before or after."""
    modules = zip((*before.head, *before.around), (*after.head, *after.around), strict=False)
    pairs = ((x.module, set(x.attributes) ^ set(y.attributes)) for x, y in modules if x.module == y.module)
    return frozenset((module, name) for module, differences in pairs for name, _ in differences)


_OF_EVERY = frozenset(vars(nn.Module()))  # the mode, hooks, ...


def _plain(module: nn.Module) -> tuple[tuple[str, str], ...]:
    own = vars(module).items()
    return tuple((name, repr(value)) for name, value in own if name not in _OF_EVERY and _is_plain(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(x) for x in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(x) for x in value)
    return value is None or isinstance(value, str | int | float)


def _numbers(of: Any, deep: bool = False) -> tuple:
    """Names and values of the numbers and switches among an object's attributes, and of configs among them."""
    found = []
    for name, value in vars(of).items():
        if isinstance(value, int | float) and name not in _OF_EVERY and name[0] != "_":
            found.append((name, value))
        elif deep and hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            found += _numbers(value, deep=True)
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------
# The measurement.


def _measure(model: nn.Module, base: nn.Module, state: State) -> Measured:
    inner, name, head = unwrapped(model), type(base).__name__, output_head(base)
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name}: expected a decoder, got an encoder-decoder, whose two inputs distill() does not have; compute "
            "its loss from hidden states with linear_divergence"
        )
    ids = _probe(base, next(inner.parameters()).device)
    ones = torch.ones_like(ids)
    named = [v for _, v in _numbers(base.config, deep=True) if not isinstance(v, bool)]

    def run(inner: nn.Module) -> Measured:
        patched = patch(unwrapped(head))
        own = at_head(inner, head, ids, ones)
        if patched.further:
            raise ValueError(
                f"{name}: expected a forward that calls its head with hidden states, it has further arguments "
                f"{patched.further}, as aLoRA (PEFT) on the head; leave 'lm_head' out of target_modules"
            )
        answered = []

        def answer(hidden: Tensor) -> Tensor:
            logits = head(hidden)
            answered.append(_ladder(logits))
            return answered[0]

        shown = _logits(at_head(inner, answer, ids, ones).output)
        scale, softcap = _behind(name, answered[0], shown, named)
        one = AtHead(own.hidden[:1, :1].clone(), None, own.autocast)
        result = Measured(scale, softcap, answered[0].shape[-1], one, state)

        def compare(hidden: Tensor, layer: nn.Module, forward: Any) -> None:
            compare_logits(name, layer, hidden, result.behind(read(hidden, layer, forward)), _logits(own.output))

        visit(inner, own, compare)
        return result

    with without_trace(inner):
        try:
            return inside_forward(model, run)
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"{name}: expected a forward that takes token ids alone, it failed on {TOKENS} of them with "
                f"{type(error).__name__}: {error}"
            ) from error


def _probe(base: nn.Module, device: torch.device) -> Tensor:
    """Token ids from all over the vocabulary, none of which the config names."""
    table = base.get_input_embeddings()
    count = getattr(table, "num_embeddings", None) or base.config.get_text_config().vocab_size
    named = {v for name, v in _numbers(base.config, deep=True) if name.endswith(("_id", "_index"))}
    step = max(1, count // (TOKENS + 1))
    ids = []
    for start in range(step, step * TOKENS + 1, step):
        ids.append(next((x % count for x in range(start, start + count) if x % count not in named), start % count))
    return torch.tensor([ids], device=device if device.type != "meta" else None)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


def _ladder(like: Tensor) -> Tensor:
    """(..., L, V) fp32 in place of logits: rows of 0, of small numbers, of numbers of all sizes up and down."""
    size = like.shape[-1]
    places = torch.linspace(0, 1, size, device=like.device)
    small = 1e-3 * (1 + places)
    sizes = 10.0 ** (-3 + 12 * places)
    signs = 1.0 - 2.0 * (torch.arange(size, device=like.device) % 2)
    rows = torch.stack([torch.zeros_like(small), signs * small, signs * sizes, -signs.flip(0) * sizes.flip(0)])
    return rows.repeat(-(-like.shape[-2] // 4), 1)[: like.shape[-2]].expand(like.shape).contiguous()


def _behind(name: str, given: Tensor, shown: Any, named: list[float]) -> tuple[float, float | None]:
    """Scale and softcap by which a model has made `shown` of `given`; numbers that its config has are meant exactly."""
    if not isinstance(shown, Tensor) or shown.shape != given.shape:
        got = tuple(shown.shape) if isinstance(shown, Tensor) else type(shown).__name__
        raise ValueError(
            f"{name}: expected logits of the shape that its head gives, {tuple(given.shape)}, got {got}; what it cuts "
            "or adds behind its head is not known here"
        )
    given, shown = given.flatten(0, -2), shown.flatten(0, -2)
    precision = 8 * torch.finfo(shown.dtype).eps if shown.is_floating_point() else 0.0
    given, shown = given.cpu().double(), shown.cpu().double()
    if len(others := shown[0][shown[0].abs() > 1e-6]):
        raise ValueError(
            f"{name}: expected logits of 0 where its head gives 0, got {len(others)} of {shown.shape[-1]} others, as "
            f"{others[0].item():.3g}: its forward forbids tokens, or adds a bias, behind its head"
        )
    scale = _as_named((shown[1] / given[1]).median().item(), precision, named)
    small = (scale * given).abs() < 6e4  # an fp16's range
    if ((shown - scale * given).abs() <= precision * (scale * given).abs() + 1e-30)[small].all():
        return scale, None
    softcap = _as_named(shown.abs().max().item(), precision, named)
    expected = softcap * torch.tanh(scale * given / softcap)
    off = (shown - expected).abs().max().item()
    if scale == 0 or not off <= precision * softcap:
        raise ValueError(
            f"{name}: expected logits that are scaled or softcapped behind its head, got up to {off:.3g} away from "
            f"{softcap:.6g} tanh({scale:.6g} z / {softcap:.6g}): its forward does something else with them"
        )
    return scale, softcap


def _as_named(value: float, precision: float, named: list[float]) -> float:
    candidates = [1.0, *(float(x) for x in named if x), *(1 / x for x in named if x)]
    nearest = min(candidates, key=lambda x: abs(x - value))
    return nearest if abs(nearest - value) <= precision * abs(value) else value


__all__ = ["Measured", "is_whole", "measured", "state_of"]
