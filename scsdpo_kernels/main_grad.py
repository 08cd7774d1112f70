"""A head's gradient that goes into the caller's fp32 buffer in place of `weight.grad`, as in Megatron-LM's own layers.

Megatron-LM and Transformer Engine add a weight's gradient to `weight.main_grad` inside the layer's backward pass. The
hooks of the weight's AccumulateGrad node then start the reduction over processes. `weight.grad_added_to_main_grad`, if
it is True, tells them that there is nothing to add; but they refuse a weight without a gradient, if reductions overlap.
"""

import torch
from torch import Tensor

from .schedules import products
from .schedules.products import Factors


def add(
    main_grad: Tensor,  # (V, D) fp32, changed; or fewer rows, where the others do not count
    gradient: Tensor | Factors,  # (V, D) fp32, of at least these rows
    by: Tensor,  # () fp32 on the same device
) -> None:
    """main_grad += by · gradient, with one rounding to fp32 of each sum. Nobody waits for a device."""
    if isinstance(gradient, Factors):
        products.add_product(main_grad, gradient, by)
    else:
        main_grad.addcmul_(gradient[: len(main_grad)], by)


def announced(weight: Tensor) -> Tensor:
    """The same weight, whose gradient has gone elsewhere when backward comes here: its owner is told so."""
    return _Announced.apply(weight) if torch.is_grad_enabled() else weight


class _Announced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.detach()

    @staticmethod
    def backward(ctx, _: None) -> Tensor | None:
        """None, or for Megatron's hooks a gradient of zeros, to which others of a tied weight may be added."""
        if not hasattr(ctx.weight, "grad_added_to_main_grad"):
            return None
        ctx.weight.grad_added_to_main_grad = True
        return ctx.weight.new_zeros(()).expand_as(ctx.weight)
