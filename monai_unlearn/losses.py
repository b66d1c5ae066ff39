# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""How strongly: one loss with a term for each group of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


class Target(NamedTuple):
    """What a batch is trained towards.

    Attributes:
        label: probabilities of the prediction's shape, ``(B, C, *spatial)`` or ``(B, C)``; the samples to forget carry
            their new labels.
        forget: which samples those are, boolean ``(B,)``.
        teacher: the frozen original's logits in the same shape; None where nothing is distilled. Rows of samples to
            forget are never read.
    """

    label: Tensor
    forget: Tensor
    teacher: Tensor | None = None


class DistillationLoss(nn.Module):
    """Stay close to a teacher: α·T²·KL(p_teacher‖p_student) + β·mean (z_S − z_T)².

    Both distributions are taken at temperature T, sigmoid for one channel and softmax over dimension 1 for several.
    The KL divergence is a mean over batch and voxels (so doubling the grid changes nothing) and 0 where student and
    teacher agree; its gradient is that of Erase to Retain's T²·BCE (arXiv 2511.16574), which is not 0 there. The second
    term is that paper's logit guard on raw logits.

    Args:
        temperature: T.
        weight: α.
        guard_weight: β.

    Raises:
        ValueError: when T is not positive or a weight is negative.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[0.5, -2.0]]])
        >>> DistillationLoss()(logits, logits).item()
        0.0
    """

    def __init__(self, temperature: float = 2.0, weight: float = 1.0, guard_weight: float = 0.05) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if weight < 0 or guard_weight < 0:
            raise ValueError(f"weight and guard_weight must not be negative, got {weight} and {guard_weight}.")
        self.temperature, self.weight, self.guard_weight = temperature, weight, guard_weight

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits of student and teacher, ``(B, C, *spatial)`` or ``(B, C)``."""
        if input.shape != target.shape:
            raise ValueError(f"student and teacher differ in shape: {tuple(input.shape)} and {tuple(target.shape)}.")
        student, teacher = input / self.temperature, target / self.temperature
        if input.shape[1] == 1:
            p = teacher.sigmoid()
            cross = F.binary_cross_entropy_with_logits(student, p, reduction="none")
            own = F.binary_cross_entropy_with_logits(teacher, p, reduction="none")
            divergence = (cross - own).mean()
        else:
            log_p = teacher.log_softmax(1)
            divergence = (log_p.exp() * (log_p - student.log_softmax(1))).sum(1).mean()
        loss = self.weight * self.temperature**2 * divergence
        if self.guard_weight > 0:
            loss = loss + self.guard_weight * F.mse_loss(input, target)
        return loss


class UnlearningLoss(nn.Module):
    """retain(kept) + distill(kept) + λ·forget(forgotten), each a mean over its own group.

    A group that the batch lacks adds no term, so weights do not depend on the mix in the batch. Every term may be left
    out.

    Args:
        retain: ``(logits, label) -> scalar`` on the samples to keep; None leaves the term out.
        forget: the same on the samples to forget with their new labels; None leaves the term out.
        distill: ``(logits, teacher's logits) -> scalar`` on the samples to keep; None leaves the term out.
        forget_weight: λ; negative ascends. May be set while training.

    Raises:
        ValueError: when all terms are left out; in use, when ``distill`` is there and the target has no teacher.

    Example:
        >>> import torch
        >>> loss = UnlearningLoss(nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(), forget_weight=3.0)
        >>> target = Target(torch.zeros(2, 1, 4, 4), torch.tensor([True, False]))
        >>> round(loss(torch.zeros(2, 1, 4, 4), target).item(), 4)  # 4 ln 2
        2.7726
    """

    def __init__(
        self,
        retain: Loss | None = None,
        forget: Loss | None = None,
        distill: Loss | None = None,
        forget_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if retain is None and forget is None and distill is None:
            raise ValueError("at least one of retain, forget and distill is needed.")
        self.retain, self.forget, self.distill, self.forget_weight = retain, forget, distill, forget_weight

    def forward(self, input: Tensor, target: Target) -> Tensor:
        """Logits ``(B, C, *spatial)`` or ``(B, C)``, and the :class:`Target` of the same batch."""
        forget = target.forget.bool()
        kept = ~forget
        loss = input.new_zeros(())
        if kept.any():
            if self.retain is not None:
                loss = loss + self.retain(input[kept], target.label[kept])
            if self.distill is not None:
                if target.teacher is None:
                    raise ValueError("the loss distils, but the target holds no teacher's logits; give one a teacher.")
                loss = loss + self.distill(input[kept], target.teacher[kept])
        if self.forget is not None and self.forget_weight != 0 and forget.any():
            loss = loss + self.forget_weight * self.forget(input[forget], target.label[forget])
        if not loss.requires_grad and input.requires_grad:
            loss = loss + 0.0 * input.sum()  # nothing to learn from this batch; backward still runs
        return loss
