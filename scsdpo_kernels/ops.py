"""The torch.library operator behind `linear_divergence`: its schedules, its fake, its autograd.

Gradients are made in the forward pass and wait in the autograd node: dD/d(hidden) and dD/d(weight) of Σ w_n D_n, which
backward multiplies by the loss's own gradient and hands over, once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# loss, divergence, student_entropy, teacher_entropy, student_logp, teacher_logp, grad_hidden, grad_weight: the operator
# returns all of them, empty where they were not asked for.
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("scsdpo_kernels::linear_divergence", mutates_args=())
def _operator(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    token_weight: Tensor,
    target_ids: Tensor | None,
    beta: float,
    temperature: float,
    want_grad_hidden: bool,
    want_grad_weight: bool,
) -> _Outputs:
    from . import chunked

    _check_values(token_weight, target_ids, vocabulary=student_weight.shape[0])
    with torch.autocast(student_hidden.device.type, enabled=False):
        return chunked.linear_divergence(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            token_weight,
            target_ids,
            beta=beta,
            temperature=temperature,
            grad_hidden_dtype=_gradient_dtype(student_hidden) if want_grad_hidden else None,
            grad_weight_dtype=_gradient_dtype(student_weight) if want_grad_weight else None,
        )


def _gradient_dtype(tensor: Tensor) -> torch.dtype:
    """dtype in which a gradient waits for backward: fp16 would underflow before the loss scale reaches it."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


@_operator.register_fake
def _(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, beta, temperature,
      want_grad_hidden, want_grad_weight):  # fmt: skip
    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return student_hidden.new_empty(shape, dtype=dtype)

    leading = student_hidden.shape[:-1]
    logp = leading if target_ids is not None else (0,)
    return (
        empty(()),
        *(empty(leading) for _ in range(3)),
        *(empty(logp) for _ in range(2)),
        empty(student_hidden.shape, _gradient_dtype(student_hidden)) if want_grad_hidden else empty((0,)),
        empty(student_weight.shape, _gradient_dtype(student_weight)) if want_grad_weight else empty((0,)),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no (V, D) of zeros for outputs that nothing differentiates
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = tuple(x.dtype for x in inputs[:2])
    ctx.gradients = output[6:]
    ctx.sole_holder = False


def _backward(ctx, grad_loss: Tensor | None, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_divergence: double backward (create_graph=True) is not supported; schedule='reference' has it"
        )
    if ctx.gradients is None:
        raise RuntimeError(
            "linear_divergence: this loss was differentiated before, and its gradients were handed over then; "
            "call linear_divergence again, or add the losses and differentiate their sum once"
        )
    gradients, ctx.gradients = ctx.gradients, None
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    hidden, weight = (
        _scaled(gradient, grad_loss, ctx.sole_holder).to(dtype) if needed else None
        for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=False)
    )
    return (hidden, weight) + (None,) * (len(ctx.needs_input_grad) - 2)


def _scaled(gradient: Tensor, by: Tensor, in_place: bool) -> Tensor:
    if not in_place:
        return gradient * by
    if by.device.type == "cpu" and by.item() == 1.0:  # plain loss.backward(): not another pass over (V, D)
        return gradient
    return gradient.mul_(by)


_operator.register_autograd(_backward, setup_context=_setup_context)


def _check_values(token_weight: Tensor, target_ids: Tensor | None, vocabulary: int) -> None:
    if not torch.isfinite(token_weight.float()).all():
        raise ValueError("token_weight: expected numbers that are finite in fp32, got NaN, inf or larger ones")
    if target_ids is None:
        return
    ids = target_ids[token_weight != 0]
    if ids.numel() > 0 and not (ids.amin() >= 0 and ids.amax() < vocabulary):
        raise ValueError(f"target_ids: expected ids in [0, {vocabulary}), got {ids.min().item()} to {ids.max().item()}")


def _fused(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, beta, temperature):
    differentiable = torch.is_grad_enabled()
    loss, *outputs = _operator(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        token_weight,
        target_ids,
        beta,
        temperature,
        differentiable and student_hidden.requires_grad,
        differentiable and student_weight.requires_grad,
    )
    if loss.requires_grad and not torch.compiler.is_compiling():
        loss.grad_fn.sole_holder = True  # the gradients are dropped here, so backward may scale them in place
    logps = outputs[3:5] if target_ids is not None else (None, None)
    return loss, *outputs[:3], *logps


def _reference(*args):
    from . import reference

    _check_values(args[4], args[5], vocabulary=args[1].shape[0])
    with torch.autocast(args[0].device.type, enabled=False):
        return reference.linear_divergence(*args)


def schedules(device: str) -> dict[str, Callable]:
    """The schedules that run on a device type, by name."""
    chunked = {"auto": _fused, "chunked": _fused} if device == "cpu" else {}
    return {"reference": _reference, **chunked}


def why_not(schedule: str, device: str) -> str:
    """Why a schedule is not among `schedules(device)`."""
    if schedule == "tiled":
        return "schedule='tiled': this version has no tiled kernels"
    if schedule in schedules("cpu"):
        return f"schedule={schedule!r}: this version has no row kernel for device {device!r}, only for 'cpu'"
    return f"schedule: expected one of {', '.join(schedules(device))}, got {schedule!r}"
