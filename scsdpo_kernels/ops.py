"""The torch.library operator behind `linear_divergence`: its schedules, its fake, its autograd.

Gradients are made in the forward pass and wait in the autograd node: dD/d(hidden) and dD/d(weight) of Σ w_n D_n, which
backward multiplies by the loss's own gradient and hands over, once.
"""

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from .rows import Rows, as_matrix, complete, kept_rows

# loss, divergence, student_entropy, teacher_entropy, student_logp, teacher_logp, importance_ratio, grad_hidden,
# grad_weight: the operator returns all of them, empty where they were not asked for.
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("scsdpo_kernels::linear_divergence", mutates_args=())
def _operator(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    token_weight: Tensor,
    target_ids: Tensor | None,
    old_logp: Tensor | None,
    rows: Tensor | None,
    beta: float,
    temperature: float,
    importance_clip: float,
    schedule: str,
    want_grad_hidden: bool,
    want_grad_weight: bool,
) -> _Outputs:
    if schedule == "tiled":
        from .tiled import divergence_rows
    else:
        from .chunked import divergence_rows

    with torch.autocast(student_hidden.device.type, enabled=False), _current(student_hidden.device):
        shared = teacher_weight is None or _same_storage(teacher_weight, student_weight)
        silent = rows is not None and token_weight.device.type != "cpu"  # nothing waits, nothing is checked
        may_subtract = shared and student_weight.dtype == teacher_hidden.dtype == torch.float32
        kept, head_is_finite = kept_rows(
            token_weight,
            target_ids,
            rows,
            vocabulary=student_weight.shape[0],
            # an infinite entry, which forbids a token, would meet a difference of 0: 0 · inf is no logit
            summed_head=student_weight.sum() if may_subtract and not silent else None,
        )
        student, student_rows = as_matrix(student_hidden, kept)
        teacher, teacher_rows = as_matrix(teacher_hidden, kept)
        weight = token_weight.reshape(-1)[kept].float()
        if silent:  # a wrong list may not give a loss or a gradient that looks right
            right = complete(rows, token_weight.reshape(-1))
            weight = torch.where(right, weight, torch.nan)
        target = None if target_ids is None else target_ids.reshape(-1)[kept].long()
        old = None  # of rows of weight 0, which a list may have, it may be anything
        if old_logp is not None:
            old = torch.where(weight == 0, 0.0, old_logp.reshape(-1)[kept].float())
        grad_hidden = _zeros(student_hidden, _gradient_dtype(student_hidden) if want_grad_hidden else None)
        scalars, grad_weight = divergence_rows(
            student,
            student_weight,
            teacher,
            student_weight if shared else teacher_weight,
            Rows(
                kept,
                student_rows,
                teacher_rows,
                weight,
                target,
                old,
                rows is None and len(kept) == token_weight.numel(),
            ),
            beta=beta,
            temperature=temperature,
            importance_clip=importance_clip,
            teacher_is_difference=may_subtract and head_is_finite,
            score_dtype=torch.bfloat16 if student_weight.dtype == torch.bfloat16 else torch.float32,
            grad_hidden=grad_hidden.view(-1, student.shape[1]) if want_grad_hidden else None,
            grad_weight_dtype=_gradient_dtype(student_weight) if want_grad_weight else None,
        )

        factor = weight.double() if old is None else weight.double() * scalars[5].double()
        loss = torch.where(weight == 0, 0.0, factor * scalars[0].double()).sum().float()
        if silent and len(kept) == 0:  # nothing above has become NaN
            for result in (loss, grad_hidden, grad_weight):
                _ = result is None or result.masked_fill_(~right, torch.nan)
        per_token = torch.zeros(len(scalars), token_weight.numel(), dtype=torch.float32, device=token_weight.device)
        per_token[:, kept] = scalars
        fields = [field.clone() for field in per_token.view(len(scalars), *token_weight.shape)]
        fields += [_zeros(token_weight, None) for _ in range(6 - len(fields))]
        grad_weight = _zeros(student_weight, None) if grad_weight is None else grad_weight
        return loss, *fields, grad_hidden, grad_weight


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _zeros(like: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Zeros for a gradient of `like`, or where none is wanted an empty tensor."""
    if dtype is None:
        return like.new_empty(0, dtype=torch.float32)
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def _gradient_dtype(tensor: Tensor) -> torch.dtype:
    """dtype in which a gradient waits for backward: fp16 would underflow before the loss scale reaches it."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


@_operator.register_fake
def _(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, old_logp, rows, beta,
      temperature, importance_clip, schedule, want_grad_hidden, want_grad_weight):  # fmt: skip
    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return student_hidden.new_empty(shape, dtype=dtype)

    leading = student_hidden.shape[:-1]
    logp = leading if target_ids is not None else (0,)
    return (
        empty(()),
        *(empty(leading) for _ in range(3)),
        *(empty(logp) for _ in range(2)),
        empty(leading if old_logp is not None else (0,)),
        empty(student_hidden.shape, _gradient_dtype(student_hidden)) if want_grad_hidden else empty((0,)),
        empty(student_weight.shape, _gradient_dtype(student_weight)) if want_grad_weight else empty((0,)),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no (V, D) of zeros for outputs that nothing differentiates
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = tuple(x.dtype for x in inputs[:2])
    ctx.gradients = output[-2:]
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


@torch.library.custom_op("scsdpo_kernels::linear_divergence_per_token", mutates_args=())
def _per_token_operator(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    token_weight: Tensor,  # 1 at the rows that are wanted, else 0
    target_ids: Tensor | None,
    old_logp: Tensor | None,
    rows: Tensor | None,
    beta: float,
    temperature: float,
    importance_clip: float,
    schedule: str,
) -> Tensor:
    """Importance ratio · divergence of each row. Nothing waits for backward but the inputs."""
    _, divergence, *_, ratio, _, _ = _operator(
        student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, old_logp, rows, beta,
        temperature, importance_clip, schedule, False, False,
    )  # fmt: skip
    return divergence if old_logp is None else divergence * ratio


@_per_token_operator.register_fake
def _(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, old_logp, rows, beta,
      temperature, importance_clip, schedule):  # fmt: skip
    return student_hidden.new_empty(student_hidden.shape[:-1], dtype=torch.float32)


def _setup_per_token(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _backward_per_token(ctx, upstream: Tensor):
    """The same rows once more, weighted by the upstream gradient: those where it is 0 are not computed."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_divergence_per_token: double backward (create_graph=True) is not supported; schedule='reference' "
            "has it"
        )
    student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, *per_row = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    finite = upstream.isfinite()
    weight = torch.where(finite, upstream, 0.0) * token_weight
    outputs = _operator(
        student_hidden, student_weight, teacher_hidden, teacher_weight, weight, *per_row, *ctx.options, *wanted
    )
    poison = torch.where(finite.all(), 1.0, torch.nan)  # of an overflown loss scale: gradients are not finite either
    hidden, weight = (
        (gradient * poison).to(tensor.dtype) if needed else None
        for gradient, tensor, needed in zip(outputs[-2:], (student_hidden, student_weight), wanted, strict=True)
    )
    return (hidden, weight) + (None,) * 10


_per_token_operator.register_autograd(_backward_per_token, setup_context=_setup_per_token)


def _fused(schedule, student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, old_logp,
           rows, beta, temperature, importance_clip):  # fmt: skip
    differentiable = torch.is_grad_enabled()
    loss, *outputs = _operator(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        token_weight,
        target_ids,
        old_logp,
        rows,
        beta,
        temperature,
        importance_clip,
        schedule,
        differentiable and student_hidden.requires_grad,
        differentiable and student_weight.requires_grad,
    )
    if loss.requires_grad and not torch.compiler.is_compiling():
        loss.grad_fn.sole_holder = True  # the gradients are dropped here, so backward may scale them in place
    logps = outputs[3:5] if target_ids is not None else (None, None)
    return loss, *outputs[:3], *logps, outputs[5] if old_logp is not None else None


def per_token(name: str, device: torch.device) -> Callable:
    """(..., ) of importance ratio · divergence by the schedule of a name, with the arguments of schedules."""
    run = schedule(name, device)
    if run is _reference:
        return lambda *arguments: _full_logits(*arguments)[1]
    return lambda *arguments: _per_token_operator(*arguments, run.args[0])


def _reference(*arguments):
    loss, _, *fields = _full_logits(*arguments)
    return loss, *(x if x is None else x.detach() for x in fields)


def _full_logits(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, old_logp,
                 rows, beta, temperature, importance_clip):  # fmt: skip
    from . import reference

    kept, _ = kept_rows(token_weight, target_ids, rows, vocabulary=student_weight.shape[0], summed_head=None)
    with torch.autocast(student_hidden.device.type, enabled=False):
        return reference.linear_divergence(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            token_weight,
            target_ids,
            old_logp,
            kept,
            beta,
            temperature,
            importance_clip,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Schedules. Every one of them takes (student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight,
# target_ids, old_logp, rows, beta, temperature, importance_clip) and returns the fields of LinearDivergence.

SCHEDULES = {
    "auto": partial(_fused, "chunked"),  # no measurement prefers another one yet
    "chunked": partial(_fused, "chunked"),
    "tiled": partial(_fused, "tiled"),
    "reference": _reference,
}


def schedule(name: str, device: torch.device) -> Callable:
    """The schedule of a name. ValueError, with the reason, if there is none or it does not run on the device."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    reason = why_not(name, device)
    if reason:
        raise ValueError(f"schedule={name!r}: {reason}")
    return SCHEDULES[name]


def why_not(name: str, device: torch.device) -> str | None:
    """Why a schedule does not run on a device; None: it does."""
    if name == "reference" or (name in ("auto", "chunked") and device.type == "cpu"):
        return None
    if importlib.util.find_spec("triton") is None:
        return f"its kernels for device {device.type!r} need Triton, which is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "it runs on GPUs, and on a CPU in Triton's interpreter only (TRITON_INTERPRET=1)"
    if device.type not in ("cuda", "xpu"):
        return f"it has no kernels for device {device.type!r}, only for 'cuda', 'xpu' and 'cpu'"
    if name == "tiled" and device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"its products need compute capability 8.0 or newer, this device has {major}.{minor}"
    return None
