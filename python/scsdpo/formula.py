"""The operator's formula on plain torch, in the model's precision, and how far a model's own logits are from it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scsdpo_kernels import Head

TILE = 2**24  # entries of the head that are compared at a time
SAMPLE = 4096  # entries looked at, in float64
FACTOR = 4  # times the error that the formula itself has in the model's precision


def compare_logits(name: str, layer: nn.Module, hidden: Tensor, head: Head, own: Tensor) -> None:
    """ValueError where a model's own logits (..., V) are further from the formula than rounding brings them.

    name, layer: of the model, and what its head is, for the message. hidden: (..., D), what that was given.
    """
    hidden, own = hidden.flatten(0, -2), own.flatten(0, -2)
    error, bound = _difference(hidden, head, own)
    if not (error <= bound).all():
        worst = (error / bound).nan_to_num(nan=float("inf")).argmax()
        raise ValueError(
            f"{name}: expected its own logits from {_formula(head)}, but they are {error[worst]:.3g} away from it on "
            f"{len(own)} tokens (root mean square; rounding gives {bound[worst]:.3g}); its head, a "
            f"{type(layer).__module__}.{type(layer).__qualname__}, may not be affine in its input, or a hook changes it"
        )


def _formula(head: Head) -> str:
    parts = "h Wᵀ" + " + b" * (head.bias is not None) + " + λ h Aᵀ Bᵀ" * (head.lora is not None)
    scaled = parts if head.logit_scale == 1 else f"{head.logit_scale:.6g} ({parts})"
    return scaled if head.softcap is None else f"{head.softcap:.6g} tanh({scaled} / {head.softcap:.6g})"


def _difference(hidden: Tensor, head: Head, own: Tensor) -> tuple[Tensor, Tensor]:
    """Per row: root mean square of own logits minus the formula's, and what rounding may make of it.

    The formula is computed by plain torch in the precision in which the model computes. The measuring stick is its own
    error there, against float64 on a sample of the vocabulary.
    """
    vocabulary = head.weight.shape[0]
    error, size, rounding = own.new_zeros(len(own)).float(), own.new_zeros(len(own)).float(), 0.0
    step = max(1, TILE // head.weight.shape[1])
    for start in range(0, vocabulary, step):
        rows = slice(start, start + step)
        plain = _logits_of(hidden, _rows(head, rows))
        rounding = max(rounding, torch.finfo(plain.dtype).eps)
        error += _squares(own[:, rows].float(), plain.float())
        size += plain.float().nan_to_num(posinf=0.0, neginf=0.0).square().sum(-1)
    sample = _rows(head, slice(None, None, -(-vocabulary // SAMPLE)))
    exactly = torch.float32 if hidden.device.type == "mps" else torch.float64
    plain = _logits_of(hidden, sample)
    with torch.autocast(hidden.device.type, enabled=False):
        exact = _logits_of(hidden.to(exactly), _cast(sample, exactly))
    stick = (_squares(plain.to(exactly), exact) / exact.shape[1]).sqrt().float()
    error, size = ((x / vocabulary).sqrt() for x in (error, size))
    return error, FACTOR * stick + rounding * size


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, 0.0, a - b).square().sum(-1)  # equal infinities are equal


def _rows(head: Head, rows: slice) -> Head:
    lora = None if head.lora is None else head.lora._replace(b=head.lora.b[rows])
    return head._replace(weight=head.weight[rows], bias=None if head.bias is None else head.bias[rows], lora=lora)


def _cast(head: Head, dtype: torch.dtype) -> Head:
    lora = head.lora and head.lora._replace(a=head.lora.a.to(dtype), b=head.lora.b.to(dtype))
    bias = None if head.bias is None else head.bias.to(dtype)
    return head._replace(weight=head.weight.to(dtype), bias=bias, lora=lora)


def _logits_of(hidden: Tensor, head: Head) -> Tensor:
    bias = None if head.bias is None else head.bias.to(head.weight.dtype)
    z = F.linear(hidden.to(head.weight.dtype), head.weight, bias)
    if head.lora is not None:
        low = F.linear(hidden.to(head.lora.a.dtype), head.lora.a)
        z = (z + F.linear(low, head.lora.b) * head.lora.scale).to(z.dtype)
    z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


__all__ = ["compare_logits"]
