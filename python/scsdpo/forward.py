"""A model's own forward, and what is done inside it: its head's input is taken, its head does something else.

A wrapper (DDP, FSDP2, ZeRO-3) gathers a module's parameters around that module's own forward and reduces their
gradients afterwards. So everything happens there: `inside_forward` within the wrapper's, `visit` within the head's.
"""

import inspect
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def inside_forward(model: nn.Module, run: Callable[[nn.Module], Any]) -> Any:
    """run(inner model), from inside the forward of the model that wraps it: hooks before and after are its own."""
    inner = unwrapped(model)
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


def unwrapped(model: nn.Module) -> nn.Module:
    """What DDP and the like wrap: a transformers model, or PEFT's around it."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers and PEFT."""
    inner = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model") else inner


# ---------------------------------------------------------------------------------------------------------------------
# The head's input.


class AtHead(NamedTuple):
    """What a model's own forward has shown at its head."""

    hidden: Tensor  # (B, L, D)
    output: Any  # the model's
    autocast: tuple[bool, torch.dtype]  # in which the head would have run


def at_head(
    inner: nn.Module, answer: Callable[..., Tensor], input_ids: Tensor, attention_mask: Tensor | None, **inputs: Any
) -> AtHead:
    """Runs a model's own forward with answer(hidden) in place of its head.

    Whatever stands before the head is in it: layers behind the backbone, images, what PEFT does at the model's input.

    Raises:
        ValueError: the head is not called once with one hidden state for every token.
    """
    base = base_model(inner)
    name, head = type(base).__name__, output_head(base)
    parent, key = path_to(base, head)[-1]
    stand_in = _StandIn(head, answer)
    parameters = inspect.signature(base.forward).parameters
    if "use_cache" in parameters or any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        inputs = {"use_cache": False, **inputs}
    parent._modules[key] = stand_in
    try:
        output = inner.forward(input_ids=input_ids, attention_mask=attention_mask, **inputs)
    except AttributeError as error:
        if getattr(base.config, "return_dict", True):
            raise
        raise ValueError(
            f"{name}: expected config.return_dict=True, got False, with which its own forward fails: {error}"
        ) from error
    finally:
        parent._modules[key] = head
    if len(stand_in.calls) != 1:
        raise ValueError(
            f"{name}: expected a forward that calls its output head {key!r} once, it called it {len(stand_in.calls)} "
            "times; compute its loss with linear_divergence from the hidden states that make its logits"
        )
    (hidden, autocast) = stand_in.calls[0]
    rows, length = input_ids.shape
    if hidden.dim() < 2 or hidden.numel() // hidden.shape[-1] != rows * length:
        raise ValueError(
            f"{name}: expected one hidden state for each of {rows} x {length} tokens at its head, got shape "
            f"{tuple(hidden.shape)}; prompt learning (PEFT), for one, puts tokens of its own in front, use LoRA instead"
        )
    return AtHead(hidden.reshape(rows, length, -1), output, autocast)


class _StandIn(nn.Module):
    """Stands where the head is, keeps what it is called with, and is asked for the head's attributes."""

    def __init__(self, head: nn.Module, answer: Callable[..., Tensor]):
        super().__init__()
        self.head = head  # a submodule, where PEFT looks for its layers
        self.training = head.training
        vars(self).update(answer=answer, calls=[])

    def __getattr__(self, name: str) -> Any:
        head = vars(self)["_modules"]["head"]
        return head if name == "head" else getattr(head, name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else next(iter(kwargs.values()))
        device = hidden.device.type
        self.calls.append((hidden, (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))))
        return self.answer(hidden)


def output_head(base: nn.Module) -> nn.Module:
    """A model's output head as it stands in it; ValueError without one."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList):
        raise ValueError(
            f"{type(base).__name__}: expected a model with one output head, get_output_embeddings() gave "
            f"{'None' if head is None else type(head).__name__}"
        )
    return head


def path_to(base: nn.Module, head: nn.Module) -> list[tuple[nn.Module, str]]:
    """From the model down to its head: each module and the name of the next in it. The shortest path."""
    paths: list[list[tuple[nn.Module, str]]] = [[]]
    while paths:
        longer = []
        for path in paths:
            module = path[-1][0]._modules[path[-1][1]] if path else base
            for name, child in module._modules.items():
                if child is head:
                    return [*path, (module, name)]
                if child is not None:
                    longer.append([*path, (module, name)])
        paths = longer
    raise ValueError(
        f"{type(base).__name__}: expected get_output_embeddings() to return one of its modules, got "
        f"{type(head).__name__}, which is none"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The head's forward.


class _HeadForward:
    """A patched head's forward, without a cycle of references. A copy of the model, or a pickled one, has its own."""

    def __init__(self, head: nn.Module, before: Callable | None = None):
        self.head, self.before = weakref.ref(head), before
        self.further: list[str] = []  # arguments beside the hidden states, in its last call

    def __reduce__(self):
        return _HeadForward, (self.head(), self.before)

    def original(self, *args: Any, **kwargs: Any) -> Tensor:
        head = self.head()
        return self.before(*args, **kwargs) if self.before else type(head).forward(head, *args, **kwargs)

    def __call__(self, *args: Any, visit: "Visit | None" = None, **kwargs: Any) -> Any:
        if visit is None:
            self.further = sorted(kwargs)
            return self.original(*args, **kwargs)
        return visit.run(args[0], self.head(), self.original)


class Visit:
    """What a head does in place of its product: run(hidden, head, its own forward).

    Opaque to wrappers, since FSDP2 would round every float that it finds among arguments to its param_dtype.
    """

    def __init__(self, run: Callable[[Tensor, nn.Module, Callable], Any]):
        self.run = run


def patch(head: nn.Module) -> _HeadForward:
    """Lets a head be visited. On this instance only, and once however often called."""
    place = _place(head)
    before = vars(head).get(place)
    if not isinstance(before, _HeadForward):
        setattr(head, place, _HeadForward(head, before if place == "forward" else None))
    return vars(head)[place]


def unpatch(head: nn.Module) -> None:
    place = _place(head)
    if isinstance(patched := vars(head).get(place), _HeadForward):
        vars(head).pop(place)
        if place == "_old_forward" or patched.before is not None:
            setattr(head, place, patched.before or type(head).forward.__get__(head))


def set_forward(module: nn.Module) -> Callable | None:
    """What somebody has set as a module's forward in place of its class's; accelerate's hooks and ours are none."""
    found = None if "_old_forward" in vars(module) else vars(module).get("forward")
    return found.before if isinstance(found, _HeadForward) else found


def visit(inner: nn.Module, state: AtHead, run: Callable[[Tensor, nn.Module, Callable], Any]) -> Any:
    """run(hidden, head, its own forward), from inside the head's forward, in the autocast that the model gives it."""
    head = output_head(base_model(inner))
    patch(unwrapped(head))
    enabled, dtype = state.autocast
    with torch.autocast(state.hidden.device.type, dtype=dtype, enabled=enabled):
        return head(state.hidden, visit=Visit(run))


def _place(head: nn.Module) -> str:
    """Where a head's innermost forward is: accelerate's hooks, which load offloaded weights, keep it beside theirs."""
    return "_old_forward" if "_old_forward" in vars(head) else "forward"


# ---------------------------------------------------------------------------------------------------------------------
# No trace.


@contextmanager
def without_trace(inner: nn.Module):
    """In evaluation mode, without gradients; afterwards modes, attributes, buffers and random states are as before."""
    device = next((x.device for x in inner.parameters()), torch.device("cpu"))
    devices = [device] if device.type not in ("cpu", "meta") else []
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in inner.modules()]
    device_type = device.type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=device_type), torch.no_grad():
        try:
            for module, _, _ in before:
                module.training = False
            yield
        finally:
            for module, attributes, buffers in before:
                for name, value in attributes.items():
                    if vars(module).get(name) is not value:
                        vars(module)[name] = value
                for name, value in buffers.items():
                    if module._buffers.get(name) is not value:
                        module._buffers[name] = value


__all__ = [
    "AtHead",
    "at_head",
    "base_model",
    "inside_forward",
    "output_head",
    "patch",
    "path_to",
    "set_forward",
    "unpatch",
    "unwrapped",
    "visit",
    "without_trace",
]
