"""The trust region's teacher: logits between a reference model's and the student's own (SDPO, arXiv 2601.20802).

    z_teacher = (1 - c) z_ref + c z_student = [(1 - c) h_ref, c h] [W_ref, W]ᵀ

One projection of concatenated hidden states on concatenated heads: `linear_divergence` takes it as any teacher with a
head of its own. c is in the hidden states alone, so it may be another at each token, and outside of [0, 1], where the
logits are extrapolated: past the student's own for c > 1, away from them for c < 0.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import as_head, check_number, check_tensor
from .problem import Head, LoRA, mapped


class TrustRegionTeacher:
    """Make one an optimiser step: it copies both heads once, side by side, and sees no later change of them.

        teacher = TrustRegionTeacher(reference_weight, student_weight, 0.1)
        linear_divergence(hidden, student_weight, teacher.hidden(reference_hidden, own_hidden), teacher.head)

    `own_hidden` are the student model's hidden states after the teacher's prompt. Nothing here carries a gradient.
    Where both heads have one weight and one adapter, as frozen heads have, these are not copied: `head` has them as
    they are, and the hidden states are mixed.

    Args:
        reference_head: (V, D_ref) bf16 | fp16 | fp32, or a `Head` without softcap.
        student_head: (V, D), same dtype, or a `Head` without softcap.
        share: c, any finite number, the student's share of the logits. `hidden` takes another for each token.

    Biases are mixed as the logits are, once, with `share`; they are finite unless both heads have the same one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """

    head: Head  # weight: (V, D_ref + D), or the (V, D) that both share

    def __init__(self, reference_head: Tensor | Head, student_head: Tensor | Head, share: float):
        reference, student = _checked("reference_head", reference_head), _checked("student_head", student_head)
        if len(reference.weight) != len(student.weight):
            expected, got = len(student.weight), tuple(reference.weight.shape)
            raise ValueError(f"reference_head: expected shape ({expected}, D) after student_head, got {got}")
        if reference.weight.dtype != student.weight.dtype:
            expected, got = student.weight.dtype, reference.weight.dtype
            raise TypeError(f"reference_head: expected student_head's dtype {expected}, got {got}")
        check_number("share", share)
        if not math.isfinite(share):
            raise ValueError(f"share: expected a finite number, got {share}")
        self.share = float(share)
        self._widths = reference.weight.shape[1], student.weight.shape[1]
        self._interpolates = (
            reference.weight is student.weight
            and _is_one(reference.lora, student.lora)
            and reference.logit_scale == student.logit_scale
        )
        # What each side's hidden states are multiplied with beside its share.
        self._scales = (1.0, 1.0) if self._interpolates else (reference.logit_scale, student.logit_scale)
        self._mixes_biases = reference.bias is not student.bias or (
            student.bias is not None and self._scales[0] != self._scales[1]
        )
        bias = self._bias(reference, student)
        if self._interpolates:
            self.head = mapped(lambda path, x: x.detach(), student)._replace(bias=bias, main_grad=None)
        else:
            weight = torch.cat([reference.weight.detach(), student.weight.detach()], dim=1)
            self.head = Head(weight, bias, _beside(reference, student))

    @property
    def weight(self) -> Tensor:
        """`head.weight`, where that is all of the head."""
        if self.head.bias is not None or self.head.lora is not None or self.head.logit_scale != 1.0:
            raise ValueError("weight: expected `head` in its place, which has more than a weight")
        return self.head.weight

    def hidden(self, reference_hidden: Tensor, own_hidden: Tensor, share: Tensor | None = None) -> Tensor:
        """The hidden states that belong to `head`: (..., D_ref + D), or (..., D) where the head is shared.

        Args:
            reference_hidden: (..., D_ref) of the reference model.
            own_hidden: (..., D) of the student model, same dtype; the result is rounded to it once, which costs the
                more digits the larger |c| is.
            share: (...,) finite numbers: c of each token. None: the number that the teacher was made with.
        """
        hidden = {"reference_hidden": reference_hidden, "own_hidden": own_hidden}
        for (name, tensor), width in zip(hidden.items(), self._widths, strict=True):
            expected = (*own_hidden.shape[:-1], width)
            if tensor.shape != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
            if tensor.dtype != own_hidden.dtype:
                raise TypeError(f"{name}: expected own_hidden's dtype {own_hidden.dtype}, got {tensor.dtype}")
        exact = torch.promote_types(own_hidden.dtype, torch.float32)
        c = self.share if share is None else self._per_token(share, own_hidden).to(exact).unsqueeze(-1)
        of_reference, of_student = self._scales
        reference = reference_hidden.detach().to(exact) * ((1.0 - c) * of_reference)
        own = own_hidden.detach().to(exact) * (c * of_student)
        both = reference + own if self._interpolates else torch.cat([reference, own], dim=-1)
        return both.to(own_hidden.dtype)

    def _per_token(self, share: Tensor, own_hidden: Tensor) -> Tensor:
        check_tensor("share", share)
        if share.shape != own_hidden.shape[:-1]:
            raise ValueError(f"share: expected shape {tuple(own_hidden.shape[:-1])}, got {tuple(share.shape)}")
        if not share.is_floating_point():
            raise TypeError(f"share: expected floating-point numbers, got {share.dtype}")
        if share.device.type == "cpu" and not share.isfinite().all():
            raise ValueError("share: expected finite numbers, got NaN or inf")
        if self._mixes_biases:
            raise ValueError(
                "share: expected None where the heads have biases that differ, which are mixed once, with the number "
                "that the teacher was made with, got a tensor"
            )
        return share.detach()

    def _bias(self, reference: Head, student: Head) -> Tensor | None:
        """(V,) of the mixed logits."""
        of_reference, of_student = self._scales
        if not self._mixes_biases:
            return None if student.bias is None else student.bias.detach() * of_student
        mixed = torch.zeros(len(student.weight), dtype=torch.float64, device=student.weight.device)
        for name, head, factor in (
            ("reference_head", reference, (1.0 - self.share) * of_reference),
            ("student_head", student, self.share * of_student),
        ):
            if head.bias is None:
                continue
            if not head.bias.isfinite().all():
                raise ValueError(f"{name}.bias: expected finite numbers where biases are mixed, got NaN or inf")
            mixed += head.bias.detach().double() * factor
        return mixed.to(torch.promote_types(student.weight.dtype, torch.float32))


def _checked(name: str, head: Tensor | Head) -> Head:
    """A head that may be mixed with another."""
    head = as_head(name, head)
    if head.weight.dim() != 2:
        raise ValueError(f"{name}: expected shape (V, D), got {tuple(head.weight.shape)}")
    if head.softcap is not None:
        raise ValueError(f"{name}.softcap: expected None, since capped logits do not mix with hidden states")
    rows, width = head.weight.shape
    if head.bias is not None and head.bias.shape != (rows,):
        raise ValueError(f"{name}.bias: expected shape ({rows},), got {tuple(head.bias.shape)}")
    if head.lora is not None:
        a, b = head.lora.a.shape, head.lora.b.shape
        if len(a) != 2 or a[1] != width or b != (rows, a[0]):
            raise ValueError(f"{name}.lora: expected A (r, {width}) and B ({rows}, r), got {tuple(a)} and {tuple(b)}")
    return head


def _is_one(first: LoRA | None, second: LoRA | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.a is second.a and first.b is second.b and first.scale == second.scale


def _beside(reference: Head, student: Head) -> LoRA | None:
    """One adapter of both sides' hidden states beside each other."""
    before, behind = reference.weight.shape[1], student.weight.shape[1]
    a, b = [], []
    for lora, padding in ((reference.lora, (0, behind)), (student.lora, (before, 0))):
        if lora is not None:
            a.append(F.pad(lora.a.detach(), padding))  # zeros at the other side's hidden states
            b.append(lora.b.detach().to(torch.promote_types(lora.b.dtype, torch.float32)) * lora.scale)
    return LoRA(torch.cat(a), torch.cat(b, dim=1)) if a else None
