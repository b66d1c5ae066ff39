# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""How strongly: one loss with a term for each group of samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[..., Tensor]


class Target(NamedTuple):
    """What a batch is trained towards.

    Attributes:
        label: probabilities of the prediction's shape, ``(B, C, *spatial)`` or ``(B, C)``; the samples to forget carry
            their new labels; one whose label is −1 throughout has none and adds to no term.
        forget: which samples those are, boolean ``(B,)``.
        teacher: the frozen original's logits in the same shape; None where nothing needs them. Rows of samples to
            forget are read only by a forget loss with ``uses_teacher``.
        weight: how much each voxel counts, not negative, for a forget loss with ``uses_weight``; None elsewhere. Rows
            of samples to keep are not read.
    """

    label: Tensor
    forget: Tensor
    teacher: Tensor | None = None
    weight: Tensor | None = None


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


class DivergenceLoss(nn.Module):
    """KL(label‖p), the mean over batch and voxels in nats: 0 where the prediction is the label.

    With :func:`monai_unlearn.to_uniform` it is KL(u‖p) = −log C − (1/C)·Σ log p_c, the forget term of Erase to Retain's
    classification experiment (arXiv 2511.16574): 0 at uniform and unbounded. One channel counts as two classes. At a
    temperature T it is T²·KL(label‖p at T), for labels that were softened with T.

    Args:
        temperature: T.
        weighted: take a weight for each voxel, ``(B, 1, *spatial)`` or ``(B, 1)``, and the mean over all weights.

    Raises:
        ValueError: when T is not positive.

    Example:
        >>> round(DivergenceLoss()(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item(), 4)  # log 2
        0.6931
    """

    def __init__(self, temperature: float = 1.0, weighted: bool = False) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature, self.uses_weight = temperature, weighted

    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits and probabilities, ``(B, C, *spatial)`` or ``(B, C)``, and the weight where it is used."""
        input = input / self.temperature
        if input.shape[1] == 1:
            cross = F.binary_cross_entropy_with_logits(input, target, reduction="none")
            divergence = cross - torch.special.entr(target) - torch.special.entr(1 - target)
        else:
            divergence = -(target * input.log_softmax(1) + torch.special.entr(target)).sum(1, keepdim=True)
        if weight is None:
            return self.temperature**2 * divergence.mean()
        return self.temperature**2 * (weight * divergence).sum() / weight.sum().clamp_min(1e-12)


class MaximumEntropyLoss(nn.Module):
    """KL(p‖u) = log C − H(p), the mean over batch and voxels in nats; the label is not read.

    0 at uniform and at most log C, so unlike :class:`DivergenceLoss` its pull ends. One channel counts as two classes.

    Example:
        >>> import torch
        >>> round(MaximumEntropyLoss()(torch.tensor([[50.0, 0.0]]), None).item(), 4)  # log 2
        0.6931
    """

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        """Logits ``(B, C, *spatial)`` or ``(B, C)``."""
        if input.shape[1] == 1:
            input = torch.cat([input, torch.zeros_like(input)], 1)  # sigmoid(z) = softmax of (z, 0)
        log_p = input.log_softmax(1)
        return (math.log(input.shape[1]) + (log_p.exp() * log_p).sum(1)).mean()


class TeacherWeightedBackgroundLoss(nn.Module):
    """mean[(1 + b·1{p_T > τ})·(−log p_background)]: to background, harder where the teacher is confident.

    The forget term of Erase to Retain's SegFormer experiment (arXiv 2511.16574); weights are not normalised. For one
    channel p_T is the teacher's sigmoid and −log p_background is softplus(z); for several p_T is the teacher's
    probability of anything but channel 0. With b = 0 it is binary cross-entropy to zeros. The label is not read.

    Args:
        boost: b.
        threshold: τ.

    Raises:
        ValueError: when b is negative or τ is not in [0, 1).
    """

    uses_teacher = True

    def __init__(self, boost: float = 4.0, threshold: float = 0.3) -> None:
        super().__init__()
        if boost < 0 or not 0 <= threshold < 1:
            raise ValueError(f"boost must not be negative and threshold lie in [0, 1), got {boost} and {threshold}.")
        self.boost, self.threshold = boost, threshold

    def forward(self, input: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        """Logits, label (not read) and the teacher's logits, ``(B, C, *spatial)``."""
        if input.shape[1] == 1:
            confident, background = teacher.sigmoid() > self.threshold, F.softplus(input)
        else:
            confident = 1 - teacher.softmax(1)[:, :1] > self.threshold
            background = -input.log_softmax(1)[:, :1]
        return ((1 + self.boost * confident) * background).mean()


class ContradictLoss(nn.Module):
    """Say the opposite of the teacher wherever it is confident: BCE(z_S, 1 − 1{σ(z_T) > ½}), a mean over those voxels.

    Adversarial to the teacher's confident predictions, as Erase to Retain describes its strong phase (arXiv
    2511.16574). Voxels on which the teacher is not confident add nothing; where there is none the loss is 0. The label
    is not read. For several channels each is taken by itself.

    Args:
        confidence: a voxel counts where max(σ(z_T), 1 − σ(z_T)) is above it.

    Raises:
        ValueError: when it does not lie in [0.5, 1).
    """

    uses_teacher = True

    def __init__(self, confidence: float = 0.9) -> None:
        super().__init__()
        if not 0.5 <= confidence < 1:
            raise ValueError(f"confidence must lie in [0.5, 1), got {confidence}.")
        self.confidence = confidence

    def forward(self, input: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        """Logits, label (not read) and the teacher's logits, ``(B, C, *spatial)``."""
        p = teacher.sigmoid()
        counts = torch.maximum(p, 1 - p) > self.confidence
        loss = F.binary_cross_entropy_with_logits(input, (p <= 0.5).to(input), reduction="none")
        return (loss * counts).sum() / counts.sum().clamp_min(1)


class UnlearningLoss(nn.Module):
    """retain(kept) + distill(kept) + λ·forget(forgotten), each a mean over its own group.

    A group that the batch lacks adds no term, so weights do not depend on the mix in the batch. Every term may be left
    out.

    Args:
        retain: ``(logits, label) -> scalar`` on the samples to keep; None leaves the term out.
        forget: the same on the samples to forget with their new labels; None leaves the term out. A loss whose
            attribute ``uses_teacher`` is true gets the teacher's logits as third argument, one with ``uses_weight``
            the weights.
        distill: ``(logits, teacher's logits) -> scalar`` on the samples to keep; None leaves the term out.
        forget_weight: λ; negative ascends. May be set while training.

    Raises:
        ValueError: when all terms are left out; in use, when a term needs the teacher and the target has none.

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
        forget = forget & (target.label != -1).flatten(1).any(1)
        loss = input.new_zeros(())
        if kept.any():
            if self.retain is not None:
                loss = loss + self.retain(input[kept], target.label[kept])
            if self.distill is not None:
                loss = loss + self.distill(input[kept], _teacher(target)[kept])
        if self.forget is not None and self.forget_weight != 0 and forget.any():
            logits, label = input[forget], target.label[forget]
            if getattr(self.forget, "uses_teacher", False):
                term = self.forget(logits, label, _teacher(target)[forget])
            elif getattr(self.forget, "uses_weight", False):
                if target.weight is None:
                    raise ValueError(
                        "the forget loss is weighted, but the target holds no weights (forget_weight_map)."
                    )
                term = self.forget(logits, label, target.weight[forget])
            else:
                term = self.forget(logits, label)
            loss = loss + self.forget_weight * term
        if not loss.requires_grad and input.requires_grad:
            loss = loss + 0.0 * input.sum()  # nothing to learn from this batch; backward still runs
        return loss


def _teacher(target: Target) -> Tensor:
    if target.teacher is None:
        raise ValueError("the loss needs the teacher's logits, but the target holds none; give PrepareUnlearning one.")
    return target.teacher
