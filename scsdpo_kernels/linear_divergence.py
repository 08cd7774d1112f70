"""The public operator: from hidden states and the head to the weighted divergence of student and teacher.

    p = softmax(h_s W_sᵀ / τ)    q = softmax(h_t W_tᵀ / τ)    loss = Σ_n w_n D(p_n, q_n)

with D the forward KL(q‖p) at beta = 0, the reverse KL(p‖q) at beta = 1 and the generalised Jensen-Shannon divergence
(1-β) KL(p‖m) + β KL(q‖m), m = (1-β) p + β q, between (SDPO, arXiv 2601.20802; GKD, arXiv 2306.13649).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class LinearDivergence(NamedTuple):
    """What one pass over the logits gives, fp32 (float64 from the reference schedule in float64), in nats.

    Every field but `loss` is detached.
    Rows that were skipped because their weight is 0 hold 0.
    """

    loss: Tensor  # () fp32, Σ token_weight · importance_ratio · divergence, differentiable
    divergence: Tensor  # (...,)
    student_entropy: Tensor  # (...,) -Σ p log p
    teacher_entropy: Tensor  # (...,) -Σ q log q
    student_logp: Tensor | None  # (...,) log p at target_ids, None without them
    teacher_logp: Tensor | None  # (...,) log q at target_ids, None without them
    importance_ratio: Tensor | None  # (...,) what the row's weight was multiplied with, None without old_logp


def linear_divergence(
    student_hidden: Tensor,  # (..., D) bf16 | fp16 | fp32
    student_weight: Tensor,  # (V, D) same dtype
    teacher_hidden: Tensor,  # (..., D_t) bf16 | fp16 | fp32
    teacher_weight: Tensor | None = None,  # (V, D_t) the teacher's dtype; None: student_weight
    *,
    token_weight: Tensor | None = None,  # (...,) any finite numbers; None: ones
    beta: float = 0.5,
    temperature: float = 1.0,
    target_ids: Tensor | None = None,  # (...,) integers in [0, V)
    old_logp: Tensor | None = None,  # (...,) of target_ids, under the policy that sampled them
    importance_clip: float | None = None,  # above 0; None: 2 with old_logp
    schedule: str = "auto",
    rows: Tensor | None = None,  # (K,) int64 flat indices of the rows to compute; None: those of weight other than 0
) -> LinearDivergence:
    """Weighted divergence of student and teacher over the whole vocabulary; the logits never exist in full.

    Rows of weight 0 are never projected: they cost nothing, have zero gradient and are 0 in every output.
    The loss differentiates into `student_hidden` and `student_weight`, once: the gradients are made in the forward
    pass (the head is read there only), and a second backward or a double backward raises. Nothing differentiates into
    the teacher, even where `teacher_weight` is the student's or requires grad, nor into `token_weight`.
    Under autocast, hidden states and heads are cast as `torch.nn.functional.linear` casts them.

    Args:
        beta: the teacher's share. 0: forward KL(q‖p). 1: reverse KL(p‖q). Between: generalised Jensen-Shannon.
        temperature: divides both sides' logits; there is no τ² factor.
        target_ids: sampled tokens, asks for their log-probabilities. Ids of rows of weight 0 are not looked at.
        old_logp: log-probabilities of target_ids at the time they were sampled. Each row's weight is then multiplied
            with its importance ratio min(e^clamp(log p - old_logp, -20, 20), importance_clip), detached, log p being
            this pass's own (SDPO, arXiv 2601.20802). Those of rows of weight 0 are not looked at.
        schedule: "chunked" projects a chunk of rows at a time, into buffers. "tiled" (GPUs) has logits in registers
            only: slower, and with next to no memory but the gradients'. "reference" is plain PyTorch with full logits,
            in any dtype up to float64 and differentiable twice. "auto" is "chunked".
        rows: every row whose token_weight is not 0, once, and any others, for a caller who knows them. On a GPU the op
            waits for the device once, to learn how many rows there are and to check values; with `rows` it never
            does. What would have raised then gives NaN: an incomplete list NaN in the loss and both gradients, a
            target outside the vocabulary NaN in its log-probabilities.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    arguments = _arguments(
        student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, old_logp, rows, beta,
        temperature, importance_clip, schedule,
    )  # fmt: skip
    loss, *fields = ops.schedule(schedule, student_hidden.device)(*arguments)
    single = student_hidden.dim() == 1
    return LinearDivergence(loss, *(x.squeeze(0) if single and x is not None else x for x in fields))


def linear_divergence_per_token(
    student_hidden: Tensor,  # (..., D) bf16 | fp16 | fp32
    student_weight: Tensor,  # (V, D) same dtype
    teacher_hidden: Tensor,  # (..., D_t) bf16 | fp16 | fp32
    teacher_weight: Tensor | None = None,  # (V, D_t) the teacher's dtype; None: student_weight
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    target_ids: Tensor | None = None,  # (...,) integers in [0, V)
    old_logp: Tensor | None = None,  # (...,) of target_ids, under the policy that sampled them
    importance_clip: float | None = None,  # above 0; None: 2 with old_logp
    schedule: str = "auto",
    rows: Tensor | None = None,  # (K,) int64 flat indices of the rows to compute; None: all of them
) -> Tensor:  # (...,) fp32, nats
    """importance ratio · D(p_n, q_n) of every row, for a caller who makes the loss of them: any upstream gradient.

    `linear_divergence` with weights that are known beforehand is cheaper: it makes the gradients in the forward pass.
    Here backward computes the rows again, without those whose upstream gradient is 0. It can run more than once
    (retain_graph=True), but is not itself differentiable, but for schedule="reference". Arguments and errors are those
    of `linear_divergence`; rows that are not in `rows` are 0.
    """
    arguments = _arguments(
        student_hidden, student_weight, teacher_hidden, teacher_weight, None, target_ids, old_logp, rows, beta,
        temperature, importance_clip, schedule,
    )  # fmt: skip
    if rows is not None:
        everything = arguments[4].view(-1)
        inside = rows.clamp(0, max(0, len(everything) - 1))
        wanted = torch.zeros_like(everything).index_fill_(0, inside, 1.0).view(arguments[4].shape)
        arguments = (*arguments[:4], wanted, *arguments[5:])
    divergence = ops.per_token(schedule, student_hidden.device)(*arguments)
    return divergence.squeeze(0) if student_hidden.dim() == 1 else divergence


def _arguments(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, old_logp, rows,
               beta, temperature, importance_clip, schedule):  # fmt: skip
    """The arguments of a schedule, checked."""
    tensors = {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "token_weight": token_weight,
        "target_ids": target_ids,
        "old_logp": old_logp,
        "rows": rows,
    }
    check_types(tensors)
    _check_importance(target_ids, old_logp, importance_clip, student_hidden.shape[:-1])
    if token_weight is None:
        token_weight = torch.ones(student_hidden.shape[:-1], dtype=torch.float32, device=student_hidden.device)
    dtypes = (*_DTYPES, torch.float64) if schedule == "reference" else _DTYPES
    _check_tensors(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, dtypes)
    _check_numbers(beta, temperature)
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows: expected shape (K,) and dtype int64, got {tuple(rows.shape)} and {rows.dtype}")
    if rows is not None and rows.numel() > token_weight.numel():
        raise ValueError(f"rows: expected at most the {token_weight.numel()} rows that there are, got {rows.numel()}")

    hidden, weight, teacher = _autocast(student_hidden, student_weight, teacher_hidden.detach())
    shared = teacher_weight is None or teacher_weight is student_weight
    teacher_head = None if shared else _autocast(teacher_weight.detach())[0]
    old_logp = None if old_logp is None else old_logp.detach()
    per_row = (hidden, teacher, token_weight.detach(), target_ids, old_logp)
    if hidden.dim() == 1:  # no leading axis: a batch of one row
        per_row = tuple(x if x is None else x.unsqueeze(0) for x in per_row)
    hidden, teacher, token_weight, target_ids, old_logp = per_row
    rows = None if rows is None else rows.contiguous()
    numbers = float(beta), float(temperature), float(importance_clip or 2.0)
    return hidden, weight, teacher, teacher_head, token_weight, target_ids, old_logp, rows, *numbers


def _in_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not _in_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_tensors(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, target_ids, dtypes):
    autocast = _in_autocast(student_hidden.device.type)
    leading = student_hidden.shape[:-1]
    heads = {"student": (student_hidden, student_weight), "teacher": (teacher_hidden, teacher_weight)}
    for side, (hidden, weight) in heads.items():
        if hidden.dtype not in dtypes:
            raise TypeError(f"{side}_hidden: expected one of {_names(dtypes)}, got {hidden.dtype}")
        if hidden.dim() < 1 or hidden.shape[:-1] != leading:
            raise ValueError(
                f"{side}_hidden: expected shape (..., D) with the leading shape of student_hidden {tuple(leading)}, "
                f"got {tuple(hidden.shape)}"
            )
        name = f"{side}_weight" if weight is not None else "student_weight (which the teacher shares)"
        head = student_weight if weight is None else weight
        if head.dim() != 2 or head.shape[1] != hidden.shape[-1] or head.shape[0] != student_weight.shape[0]:
            raise ValueError(
                f"{name}: expected shape (V, {hidden.shape[-1]}) after {side}_hidden {tuple(hidden.shape)}"
                f"{f' and V = {student_weight.shape[0]} of student_weight' if side == 'teacher' else ''}, "
                f"got {tuple(head.shape)}"
            )
        if head.shape[0] == 0:
            raise ValueError(f"{name}: expected a vocabulary of at least one entry, got shape {tuple(head.shape)}")
        if head.dtype not in dtypes or (head.dtype != hidden.dtype and not autocast):
            raise TypeError(f"{name}: expected {side}_hidden's dtype {hidden.dtype}, got {head.dtype}")
    if token_weight.shape != leading:
        raise ValueError(f"token_weight: expected shape {tuple(leading)}, got {tuple(token_weight.shape)}")
    if token_weight.is_complex():
        raise TypeError(f"token_weight: expected real numbers, got {token_weight.dtype}")
    if target_ids is not None and target_ids.shape != leading:
        raise ValueError(f"target_ids: expected shape {tuple(leading)}, got {tuple(target_ids.shape)}")
    if target_ids is not None and target_ids.dtype not in _INTEGERS:
        raise TypeError(f"target_ids: expected integers, got {target_ids.dtype}")


def check_types(tensors: dict[str, Tensor | None]) -> None:
    """Each is a tensor, or None where that is allowed, on the device of `student_hidden`, which is among them."""
    optional = ("teacher_weight", "token_weight", "target_ids", "old_logp", "rows")
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device != tensors["student_hidden"].device:
            raise ValueError(
                f"{name}: expected student_hidden's device {tensors['student_hidden'].device}, got {tensor.device}"
            )


def _check_importance(target_ids, old_logp, importance_clip, leading) -> None:
    if old_logp is None:
        if importance_clip is not None:
            raise ValueError("importance_clip: expected old_logp with it, whose ratio it bounds")
        return
    if target_ids is None:
        raise ValueError("old_logp: expected target_ids with it, whose log-probabilities these were")
    if old_logp.shape != leading:
        raise ValueError(f"old_logp: expected shape {tuple(leading)}, got {tuple(old_logp.shape)}")
    if not old_logp.is_floating_point():
        raise TypeError(f"old_logp: expected floating-point numbers, got {old_logp.dtype}")
    if importance_clip is not None and not isinstance(importance_clip, int | float):
        raise TypeError(f"importance_clip: expected a number, got {type(importance_clip).__name__}")
    if importance_clip is not None and not importance_clip > 0.0:
        raise ValueError(f"importance_clip: expected a number above 0, got {importance_clip}")


def _check_numbers(beta: float, temperature: float) -> None:
    for name, number in (("beta", beta), ("temperature", temperature)):
        if not isinstance(number, int | float):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    if not 2.0**-126 <= temperature <= 2.0**126:
        raise ValueError(
            f"temperature: expected a number above 0, it and its inverse normal in fp32, got {temperature}"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
