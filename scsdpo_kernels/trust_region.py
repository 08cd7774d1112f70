"""The trust region's teacher: logits between a reference model's and the student's own (SDPO, arXiv 2601.20802).

    z_teacher = (1 - c) z_ref + c z_student = [(1 - c) h_ref, c h] [W_ref, W]ᵀ

One projection of concatenated hidden states on concatenated heads: `linear_divergence` takes it as any teacher with a
head of its own.
"""

import torch
from torch import Tensor


class TrustRegionTeacher:
    """Make one an optimiser step: it copies both heads once, side by side, and sees no later change of them.

        teacher = TrustRegionTeacher(reference_weight, student_weight, 0.1)
        linear_divergence(hidden, student_weight, teacher.hidden(reference_hidden, own_hidden), teacher.weight)

    `own_hidden` are the student model's hidden states after the teacher's prompt. Nothing here carries a gradient.
    Where both heads are one tensor, as of a frozen head, nothing is copied: `weight` is that tensor, and the hidden
    states are interpolated.

    Args:
        reference_weight: (V, D_ref) bf16 | fp16 | fp32.
        student_weight: (V, D), same dtype.
        share: c in [0, 1], the student's share of the logits.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """

    weight: Tensor  # (V, D_ref + D), or the (V, D) that both share

    def __init__(self, reference_weight: Tensor, student_weight: Tensor, share: float):
        for name, weight in (("reference_weight", reference_weight), ("student_weight", student_weight)):
            if weight.dim() != 2 or len(weight) != len(student_weight):
                raise ValueError(f"{name}: expected shape ({len(student_weight)}, D), got {tuple(weight.shape)}")
        if reference_weight.dtype != student_weight.dtype:
            expected, got = student_weight.dtype, reference_weight.dtype
            raise TypeError(f"reference_weight: expected student_weight's dtype {expected}, got {got}")
        if not isinstance(share, int | float):
            raise TypeError(f"share: expected a number, got {type(share).__name__}")
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share: expected a number in [0, 1], got {share}")
        self.share = float(share)
        self._widths = reference_weight.shape[1], student_weight.shape[1]
        self._shared = reference_weight is student_weight
        self.weight = student_weight.detach()
        if not self._shared:
            self.weight = torch.cat([reference_weight.detach(), student_weight.detach()], dim=1)

    def hidden(
        self,
        reference_hidden: Tensor,
        own_hidden: Tensor,
    ) -> Tensor:
        """The hidden states that belong to `weight`: (..., D_ref + D), or (..., D) where the head is shared.

        Args:
            reference_hidden: (..., D_ref) of the reference model.
            own_hidden: (..., D) of the student model, same dtype; the result is rounded to it once.
        """
        hidden = {"reference_hidden": reference_hidden, "own_hidden": own_hidden}
        for (name, tensor), width in zip(hidden.items(), self._widths, strict=True):
            expected = (*own_hidden.shape[:-1], width)
            if tensor.shape != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
            if tensor.dtype != own_hidden.dtype:
                raise TypeError(f"{name}: expected own_hidden's dtype {own_hidden.dtype}, got {tensor.dtype}")
        exact = torch.promote_types(own_hidden.dtype, torch.float32)
        reference = reference_hidden.detach().to(exact) * (1.0 - self.share)
        own = own_hidden.detach().to(exact) * self.share
        both = reference + own if self._shared else torch.cat([reference, own], dim=-1)
        return both.to(own_hidden.dtype)
