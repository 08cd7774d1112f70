"""The layer that a head is, as a `Head`: its parameters, read from inside its own forward.

A linear layer and LoRA (PEFT) on one are the operator's own. Any other layer that is affine in its input is taken by
its own forward, on the unit vectors: `scsdpo.measured` sees whether it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scsdpo_kernels import Head, LoRA

from .forward import set_forward


def read(hidden: Tensor, head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Head:
    """What a head makes of hidden states, differentiable in all of its parameters; without what follows behind it."""
    layer = _at_work(head)
    if _is_linear(layer):
        return Head(layer.weight, layer.bias)
    if layer is not head:
        forward = layer
    return _with_lora(layer) or _by_its_forward(forward, hidden)


def _at_work(head: nn.Module) -> nn.Module:
    """The layer that does the work: under adapters (PEFT) that are off or merged, or in place of what they wrap."""
    if (copies := getattr(head, "modules_to_save", None)) is not None:
        names = [] if head.disable_adapters else [name for name in head.active_adapters if name in copies]
        return _at_work(copies[names[0]] if names else head.original_module)
    if not hasattr(head, "base_layer") or not hasattr(head, "disable_adapters"):
        return head
    idle = hasattr(head, "lora_A") and not any(name in head.lora_A for name in head.active_adapters)
    return _at_work(head.base_layer) if head.disable_adapters or head.merged or idle else head


def _is_linear(layer: object) -> bool:
    """And nothing else, as a subclass may be."""
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and set_forward(layer) is None


def _with_lora(layer: nn.Module) -> Head | None:
    """A linear layer under plain LoRA, of one adapter or several; None of anything else."""
    linear = getattr(layer, "base_layer", None)
    if not _is_linear(linear) or not hasattr(layer, "lora_A"):
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    pairs = [(layer.lora_A[name], layer.lora_B[name], layer.scaling[name]) for name in names]
    if not all(_is_linear(x) for a, b, _ in pairs for x in (a, b)) or any(a.bias is not None for a, _, _ in pairs):
        return None
    known = {id(x) for module in (linear, *(x for a, b, _ in pairs for x in (a, b))) for x in module.parameters()}
    if any(x.requires_grad and id(x) not in known for x in layer.parameters()) or _variants(layer, names):
        return None
    bias = linear.bias
    for _, b, scale in pairs:
        if b.bias is not None:
            bias = scale * b.bias + (0 if bias is None else bias)
    if len(pairs) == 1:
        ((a, b, scale),) = pairs
        return Head(linear.weight, bias, LoRA(a.weight, b.weight, scale))
    side_by_side = LoRA(
        torch.cat([a.weight for a, _, _ in pairs]), torch.cat([scale * b.weight for _, b, scale in pairs], dim=1)
    )
    return Head(linear.weight, bias, side_by_side)


def _variants(layer: nn.Module, names: list[str]) -> list[str]:
    """Adapters whose forward is not LoRA's: DoRA and its like."""
    return [x for x in names if x in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(x)]


def _by_its_forward(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Head:
    """W and b of a layer that is affine: what it makes of the unit vectors, and of 0. As D + 1 tokens in work."""
    width = hidden.shape[-1]
    points = torch.eye(width + 1, width, dtype=hidden.dtype, device=hidden.device)  # the last is 0
    image = forward(points)  # (D + 1, V)
    return Head((image[:-1] - image[-1]).T.contiguous(), image[-1].contiguous())


def refuse(name: str, head: nn.Module) -> None:
    """ValueError for what no measurement of values shows: dropout, and weights that are rounded where they are stored.

    name: of the model, for the message.
    """
    layer = _at_work(head)
    innermost = layer
    while hasattr(innermost, "base_layer"):
        innermost = innermost.base_layer
    if (stored := _quantised(innermost)) is not None:
        raise ValueError(
            f"{name}: expected an output head in 16 or 32 bits, got a quantised one ({type(innermost).__name__}, "
            f"{stored}); leave 'lm_head' out of the quantisation"
        )
    if getattr(head, "merged", False) and getattr(head, "disable_adapters", False):
        raise ValueError(f"{name}: adapters on the head are merged and disabled at once; call unmerge_adapter() first")
    dropout = [x for x in layer.modules() if isinstance(x, nn.modules.dropout._DropoutNd) and x.p > 0 and x.training]
    if dropout:
        raise ValueError(
            f"{name}: expected a head without dropout in training, got {type(layer).__name__} with dropout "
            f"{dropout[0].p}; set lora_dropout=0, or leave 'lm_head' out of target_modules"
        )


def _quantised(layer: nn.Module) -> str | None:
    """How the numbers of a layer are stored, if not as floating point of at least 16 bits."""
    for kind, tensors in (("parameter", layer.named_parameters()), ("buffer", layer.named_buffers())):
        for name, x in tensors:
            subclass = type(x.data).__module__.startswith("torchao")
            rounded = x.dtype != torch.bool and (x.element_size() == 1 or not x.is_floating_point())
            if subclass or rounded:
                dtype = type(x.data).__name__ if subclass else str(x.dtype).removeprefix("torch.")
                return f"{kind} {name} in {dtype}"
    return None


__all__ = ["read", "refuse"]
