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

from .arguments import DIFFERENTIABLE, Numbers, Tensors, features, student_head, teacher_head
from .rows import Rows, as_matrix, complete, kept_rows, valid_support
from .shards import Shard

FIELDS = 6  # of LinearDivergence beside the loss


def _schema(*types: type) -> str:
    """The fields of named tuples as torch.library declares arguments."""
    names = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool", str: "str"}
    return ", ".join(f"{names[kind]} {name}" for of in types for name, kind in of.__annotations__.items())


def _outputs(count: int) -> str:
    return "(" + ", ".join(["Tensor"] * count) + ")"


# Returns the loss, the other fields of LinearDivergence, and the gradients of the first DIFFERENTIABLE arguments: empty
# where they were not asked for.
@torch.library.custom_op(
    "scsdpo_kernels::linear_divergence",
    mutates_args=(),
    schema=f"({_schema(Tensors, Numbers)}, str schedule, bool[] wanted) -> {_outputs(1 + FIELDS + DIFFERENTIABLE)}",
)
def _operator(*arguments):
    tensors, numbers, schedule, wanted = _named(arguments)
    if schedule == "tiled":
        from .tiled import divergence_rows
    else:
        from .chunked import divergence_rows

    student, teacher = student_head(tensors, numbers), teacher_head(tensors, numbers)
    hidden, token_weight, rows = tensors.student_hidden, tensors.token_weight, tensors.rows
    shard = Shard(numbers, student.weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False), _current(hidden.device):
        if _same_storage(student.weight, teacher.weight):
            teacher = teacher._replace(weight=student.weight)
        silent = rows is not None and token_weight.device.type != "cpu"  # nothing waits, nothing is checked
        may_subtract = (
            tensors.teacher_hidden is not None
            and student.weight.dtype == tensors.teacher_hidden.dtype == torch.float32
            and not student.softcap
            and _is_same(student, teacher)
        )
        kept, head_is_finite = kept_rows(
            token_weight,
            tensors.target_ids,
            rows,
            tensors.support_ids,
            vocabulary=shard.vocabulary,
            # an infinite entry, which forbids a token, would meet a difference of 0: 0 · inf is no logit
            summed_head=student.weight.sum() if may_subtract and not silent else None,
        )
        states, student_rows = as_matrix(hidden, kept)
        teacher_states, teacher_rows = None, None
        if tensors.teacher_hidden is not None:
            teacher_states, teacher_rows = as_matrix(tensors.teacher_hidden, kept)
        weight = token_weight.reshape(-1)[kept].float()
        if silent:  # a wrong list may not give a loss or a gradient that looks right
            right = complete(rows, token_weight.reshape(-1))
            weight = torch.where(right, weight, torch.nan)
        target = None if tensors.target_ids is None else tensors.target_ids.reshape(-1)[kept].long()
        old = None  # of rows of weight 0, which a list may have, it may be anything
        if tensors.old_logp is not None:
            old = torch.where(weight == 0, 0.0, tensors.old_logp.reshape(-1)[kept].float())
        of_rows = Rows(
            kept,
            student_rows,
            teacher_rows,
            weight,
            target,
            old,
            *_support(tensors, kept, shard.vocabulary),
            rows is None and len(kept) == token_weight.numel(),
        )
        counts = None
        if numbers.sequence_parallel:
            states, teacher_states, of_rows, counts = _everyones(states, teacher_states, of_rows, shard)
        grads = [
            None if tensor is None or not want else _gradient_dtype(tensor)
            for tensor, want in zip(tensors, wanted, strict=False)
        ]
        grad_hidden = None if grads[0] is None else torch.zeros(hidden.shape, dtype=grads[0], device=hidden.device)
        to_hidden, of_hidden = None if grad_hidden is None else grad_hidden.view(-1, states.shape[1]), of_rows
        if shard.group is not None and to_hidden is not None:  # of the computed rows, in fp32: what crosses
            to_hidden = torch.zeros(len(of_rows.weight), states.shape[1], device=hidden.device)
            of_hidden = of_rows._replace(kept=torch.arange(len(to_hidden), device=hidden.device))
        scalars, grad_head = divergence_rows(
            states,
            student,
            teacher_states,
            teacher,
            of_hidden,
            numbers,
            shard=shard,
            teacher_is_difference=may_subtract and head_is_finite,
            grad_hidden=to_hidden,
            grad_head=tuple(grads[1:]),
        )
        if shard.group is not None:
            _across(shard, counts, to_hidden, grad_hidden, kept, grad_head)

        weight, old = of_rows.weight, of_rows.old_logp
        factor = weight.double() if old is None else weight.double() * scalars[5].double()
        loss = torch.where(weight == 0, 0.0, factor * scalars[0].double()).sum().float()
        if counts is not None:
            scalars = scalars.split(counts, dim=1)[shard.rank]
        if silent and len(kept) == 0:  # nothing above has become NaN
            for result in (loss, grad_hidden, *grad_head):
                _ = result is None or result.masked_fill_(~right, torch.nan)
        per_token = torch.zeros(len(scalars), token_weight.numel(), dtype=torch.float32, device=token_weight.device)
        per_token[:, kept] = scalars
        fields = [field.clone() for field in per_token.view(len(scalars), *token_weight.shape)]
        fields += [_empty(hidden) for _ in range(FIELDS - len(fields))]
        return loss, *fields, *(_empty(hidden) if x is None else x for x in (grad_hidden, *grad_head))


def _everyones(states: Tensor, teacher_states: Tensor | None, rows: Rows, shard: Shard) -> tuple:
    """Hidden states and rows of all processes, where each has its own; and how many rows each has."""
    own = states[rows.student], None if teacher_states is None else teacher_states[rows.teacher]
    carried = rows.weight, rows.target, rows.old_logp, rows.support_ids, rows.support_logp
    (states, teacher_states, *carried), counts = shard.gather_rows((*own, *carried))
    index = torch.arange(len(states), device=states.device)
    rows = Rows(index, index, None if teacher_states is None else index, *carried, True)
    return states, teacher_states, rows, counts


def _across(shard: Shard, counts, partial: Tensor | None, grad_hidden: Tensor | None, kept: Tensor, grad_head) -> None:
    """The gradients that every process has a part of: of hidden states and of LoRA's A."""
    if partial is not None:
        whole = shard.add_up(partial) if counts is None else shard.scatter_rows(partial, counts)
        grad_hidden.view(-1, partial.shape[1])[kept] = whole.to(grad_hidden.dtype)
    if grad_head[2] is not None:
        summed = shard.add_up(grad_head[2].float())
        grad_head[2] = summed.to(grad_head[2].dtype)


def _named(arguments: tuple) -> tuple:
    """Tensors, Numbers, and what follows them."""
    count = len(Tensors._fields), len(Tensors._fields) + len(Numbers._fields)
    return Tensors(*arguments[: count[0]]), Numbers(*arguments[count[0] : count[1]]), *arguments[count[1] :]


def _is_same(student, teacher) -> bool:
    """Whether two heads are one: the same storage and numbers."""
    return student[4:] == teacher[4:] and all(
        (a is None and b is None) or (a is not None and b is not None and _same_storage(a, b))
        for a, b in zip(student[:4], teacher[:4], strict=True)
    )


def _support(tensors: Tensors, kept: Tensor, vocabulary: int) -> tuple[Tensor | None, Tensor | None]:
    """Ids and log-probabilities of the kept rows' supports. A row of wrong ids, if nothing was checked, becomes NaN."""
    if tensors.support_ids is None:
        return None, None
    ids, logp = (x.flatten(0, -2)[kept] for x in (tensors.support_ids.long(), tensors.support_logp.float()))
    valid = valid_support(ids, vocabulary)[:, None]
    ids, logp = torch.where(valid, ids, 0), torch.where(valid, logp, torch.nan)
    computed = tensors.token_weight.reshape(-1)[kept, None] != 0  # a list may have others, which may hold anything
    return torch.where(computed, ids, -1), torch.where(computed, logp, -torch.inf)


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _empty(like: Tensor) -> Tensor:
    """In place of a result that was not asked for."""
    return like.new_empty(0, dtype=torch.float32)


def _gradient_dtype(tensor: Tensor) -> torch.dtype:
    """dtype in which a gradient waits for backward: fp16 would underflow before the loss scale reaches it."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


@_operator.register_fake
def _(*arguments):
    tensors, _, _, wanted = _named(arguments)
    hidden = tensors.student_hidden

    def empty(is_there: bool, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden.new_empty(shape if is_there else (0,), dtype=dtype)

    leading = hidden.shape[:-1]
    has_target = tensors.target_ids is not None
    return (
        empty(True, ()),
        *(empty(True, leading) for _ in range(3)),
        *(empty(has_target, leading) for _ in range(2)),
        empty(tensors.old_logp is not None, leading),
        *(
            empty(False, ()) if tensor is None or not want else empty(True, tensor.shape, _gradient_dtype(tensor))
            for tensor, want in zip(tensors, wanted, strict=False)
        ),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no (V, D) of zeros for outputs that nothing differentiates
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = tuple(None if x is None else x.dtype for x in inputs[:DIFFERENTIABLE])
    ctx.gradients = output[-DIFFERENTIABLE:]
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
    given = [
        _scaled(gradient, grad_loss, ctx.sole_holder).to(dtype) if needed else None
        for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return *given, *[None] * (len(ctx.needs_input_grad) - DIFFERENTIABLE)


def _scaled(gradient: Tensor, by: Tensor, in_place: bool) -> Tensor:
    if not in_place:
        return gradient * by
    if by.device.type == "cpu" and by.item() == 1.0:  # plain loss.backward(): not another pass over (V, D)
        return gradient
    return gradient.mul_(by)


_operator.register_autograd(_backward, setup_context=_setup_context)


# token_weight is 1 at the rows that are wanted, else 0. Nothing waits for backward but the inputs.
@torch.library.custom_op(
    "scsdpo_kernels::linear_divergence_per_token",
    mutates_args=(),
    schema=f"({_schema(Tensors, Numbers)}, str schedule) -> Tensor",
)
def _per_token_operator(*arguments):
    """Importance ratio · divergence of each row."""
    tensors, *_ = _named(arguments)
    outputs = _operator(*arguments, [False] * DIFFERENTIABLE)
    return outputs[1] if tensors.old_logp is None else outputs[1] * outputs[FIELDS]


@_per_token_operator.register_fake
def _(*arguments):
    return arguments[0].new_empty(arguments[0].shape[:-1], dtype=torch.float32)


def _setup_per_token(ctx, inputs, output) -> None:
    count = len(Tensors._fields)
    ctx.save_for_backward(*inputs[:count])
    ctx.options = inputs[count:]


def _backward_per_token(ctx, upstream: Tensor):
    """The same rows once more, weighted by the upstream gradient: those where it is 0 are not computed."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_divergence_per_token: double backward (create_graph=True) is not supported; schedule='reference' "
            "has it"
        )
    tensors = Tensors(*ctx.saved_tensors)
    wanted = list(ctx.needs_input_grad[:DIFFERENTIABLE])
    finite = upstream.isfinite()
    all_finite = finite.all()
    if ctx.options[Numbers._fields.index("sequence_parallel")]:
        shard = Shard(Numbers(*ctx.options[: len(Numbers._fields)]), tensors.student_weight.shape[0])
        all_finite = shard.gather(all_finite.long().unsqueeze(0)).bool().all()
    weight = torch.where(finite, upstream, 0.0) * tensors.token_weight
    outputs = _operator(*tensors._replace(token_weight=weight), *ctx.options, wanted)
    poison = torch.where(all_finite, 1.0, torch.nan)  # of an overflown loss scale: gradients are not finite either
    given = [
        (gradient * poison).to(tensor.dtype) if needed else None
        for gradient, tensor, needed in zip(outputs[-DIFFERENTIABLE:], tensors, wanted, strict=False)
    ]
    return *given, *[None] * (len(ctx.needs_input_grad) - DIFFERENTIABLE)


_per_token_operator.register_autograd(_backward_per_token, setup_context=_setup_per_token)


def _fused(schedule: str, tensors: Tensors, numbers: Numbers):
    differentiable = torch.is_grad_enabled()
    wanted = [differentiable and x is not None and x.requires_grad for x in tensors[:DIFFERENTIABLE]]
    loss, *outputs = _operator(*tensors, *numbers, schedule, wanted)
    if loss.requires_grad and not torch.compiler.is_compiling():
        loss.grad_fn.sole_holder = True  # the gradients are dropped here, so backward may scale them in place
    return loss, *outputs[:FIELDS]


def per_token(name: str, tensors: Tensors, numbers: Numbers) -> Tensor:
    """(...,) of importance ratio · divergence by the schedule of a name."""
    run = schedule(name, tensors, numbers)
    if run is _reference:
        return _full_logits(tensors, numbers)[1]
    return _per_token_operator(*tensors, *numbers, run.args[0])


def _reference(tensors: Tensors, numbers: Numbers):
    loss, _, *fields = _full_logits(tensors, numbers)
    return loss, *(x if x is None else x.detach() for x in fields)


def _full_logits(tensors: Tensors, numbers: Numbers):
    from . import reference

    vocabulary = tensors.student_weight.shape[0]
    kept, _ = kept_rows(
        tensors.token_weight, tensors.target_ids, tensors.rows, tensors.support_ids, vocabulary, summed_head=None
    )
    with torch.autocast(tensors.student_hidden.device.type, enabled=False):
        return reference.linear_divergence(tensors, numbers, kept)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules. Every one of them takes Tensors and Numbers and returns the fields of LinearDivergence; those that were not
# asked for may hold anything.

SCHEDULES = {
    "auto": partial(_fused, "chunked"),  # no measurement prefers another one yet
    "chunked": partial(_fused, "chunked"),
    "tiled": partial(_fused, "tiled"),
    "reference": _reference,
}
# What a schedule has, where that is not everything.
TILED = ()
REFERENCE_LACKS = ("shard",)


def schedule(name: str, tensors: Tensors, numbers: Numbers) -> Callable:
    """The schedule of a name. ValueError, with the reason, if there is none, or it cannot do what is asked for."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    reason = why_not(name, tensors.student_hidden.device)
    if reason:
        raise ValueError(f"schedule={name!r}: {reason}")
    lacking = [
        x
        for x in features(tensors, numbers)
        if (name == "tiled" and x not in TILED) or (name == "reference" and x in REFERENCE_LACKS)
    ]
    if lacking:
        raise ValueError(f"schedule={name!r}: it does not have {', '.join(lacking)}; schedule='chunked' does")
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
