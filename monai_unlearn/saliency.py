# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Which weights matter to which samples, and the published methods that act on those: SalUn, MSG, SSD."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from monai.data import DataLoader
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from .lora import freeze_norm

Weights = dict[str, Tensor]


def mean_gradient(
    network: nn.Module,
    dataset: Dataset,
    loss: Callable[[Tensor, Tensor], Tensor],
    squared: bool = False,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
) -> Weights:
    """∇ of the mean loss over a data set; squared, the mean over its samples of ∇², the diagonal of Fisher's matrix.

    Normalisation uses its running statistics, so the result depends neither on order nor on batches.

    Args:
        network: plain; a copy is differentiated.
        dataset: its items hold ``image`` and ``label``.
        loss: of logits and label, a mean over samples.
        squared: square each sample's gradient before the mean.
        batch_size: samples at a time; squares need one at a time and do not read it.
        device: where to compute.

    Returns:
        Tensors by the name of the parameter, on the CPU.

    Raises:
        ValueError: when the data set is empty.
    """
    number = len(dataset)  # type: ignore[arg-type]
    if not number:
        raise ValueError("gradients need at least one sample.")
    probe = freeze_norm(copy.deepcopy(network)).requires_grad_(True).train().to(device)
    total = {name: torch.zeros_like(value) for name, value in probe.named_parameters()}
    for batch in tqdm(DataLoader(dataset, batch_size=1 if squared else batch_size), "importance", leave=False):
        image, label = batch["image"].to(device), batch["label"].to(device)
        probe.zero_grad(set_to_none=True)
        loss(probe(image), label).backward()
        for name, value in probe.named_parameters():
            if value.grad is not None:
                total[name] += value.grad.square() if squared else value.grad * len(image)
    return {name: (value / number).detach().cpu().contiguous() for name, value in total.items()}


def saliency_mask(gradient: Mapping[str, Tensor], share: float = 0.5) -> Weights:
    """The weights with the largest gradient on the forget set: where |∇ℓ(F)| is among the top share of all weights.

    SalUn (Fan et al., arXiv 2310.12508, equation 3); share .5 is its threshold at the median.

    Args:
        gradient: of :func:`mean_gradient`.
        share: of all weights together, in (0, 1].

    Returns:
        Booleans by the name of the parameter; ties at the threshold are all in.

    Raises:
        ValueError: when the share lies outside.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of salient weights must lie in (0, 1], got {share}.")
    flat = torch.cat([value.abs().flatten() for value in gradient.values()])
    threshold = flat.kthvalue(flat.numel() - max(1, round(share * flat.numel())) + 1).values
    return {name: value.abs() >= threshold for name, value in gradient.items()}


def reset_least_different(
    network: nn.Module, fresh: nn.Module, retain: Mapping[str, Tensor], forget: Mapping[str, Tensor], share: float = 0.3
) -> tuple[nn.Module, Weights]:
    """Re-initialise the convolution weights on which retain and forget set pull alike: |∇ℓ(R) − ∇ℓ(F)| smallest.

    The start of masked small gradients (MSG, of the NeurIPS 2023 challenge on unlearning), followed by fine-tuning on
    the retain set in which the other weights move a tenth as far.

    Args:
        network: the original; a copy is changed.
        fresh: the same network as it is initialised.
        retain: :func:`mean_gradient` on the retain set.
        forget: the same on the forget set.
        share: of all convolution weights together, in (0, 1].

    Returns:
        The student, all of whose weights train, and where it was re-initialised (booleans by parameter).

    Raises:
        ValueError: when the share lies outside, or the network has no convolution.
    """
    convolutions = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
    }  # fmt: skip
    if not convolutions:
        raise ValueError(f"{type(network).__name__} has no convolution to re-initialise.")
    alike = {name: -(retain[name] - forget[name]).abs() for name in convolutions}
    lowest = min(float(value.min()) for value in alike.values())
    chosen = saliency_mask({name: value - lowest for name, value in alike.items()}, share)
    student, new = copy.deepcopy(network).requires_grad_(True), dict(fresh.named_parameters())
    mask = {name: chosen.get(name, torch.zeros_like(value, dtype=torch.bool, device="cpu"))
            for name, value in student.named_parameters()}  # fmt: skip
    with torch.no_grad():
        for name, value in student.named_parameters():
            value.copy_(torch.where(mask[name].to(value.device), new[name].to(value), value))
    return student, mask


def dampen(
    network: nn.Module,
    forget: Mapping[str, Tensor],
    data: Mapping[str, Tensor],
    alpha: float = 10.0,
    strength: float = 1.0,
) -> nn.Module:
    """Selective synaptic dampening: where I_F > α·I_D, θ ← θ·min(λ·I_D / I_F, 1); no training follows.

    Foster et al., arXiv 2308.07707, equations 4 to 6. I_D may have been stored when the model was trained; the retained
    data are not needed then. As D holds F, I_F is at most |D| / |F| times I_D: an α beyond that changes nothing.

    Args:
        network: the original; a copy is changed.
        forget: I_F, :func:`mean_gradient` with ``squared`` on the forget set.
        data: I_D, the same on the whole training set.
        alpha: α, above 0.
        strength: λ, above 0.

    Raises:
        ValueError: when α or λ is not positive.
    """
    if alpha <= 0 or strength <= 0:
        raise ValueError(f"alpha and strength must be positive, got {alpha} and {strength}.")
    student = copy.deepcopy(network).requires_grad_(True)
    with torch.no_grad():
        for name, value in student.named_parameters():
            mine, all_of_it = forget[name].to(value), data[name].to(value)
            factor = (strength * all_of_it / mine.clamp_min(torch.finfo(mine.dtype).tiny)).clamp_max(1)
            value.mul_(torch.where(mine > alpha * all_of_it, factor, torch.ones_like(factor)))
    return student
