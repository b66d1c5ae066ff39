# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""How far a model lies from the one that never saw the data: case by case, and in one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from monai.data import DataLoader
from torch import Tensor, nn
from tqdm import tqdm

from ..data import MemoryDataset
from ..relabel import probabilities
from .scores import Inferer, Rows, hard_masks, mean_dice, surface_band


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen–Shannon divergence ½ KL(p‖m) + ½ KL(q‖m), m = (p + q) / 2, over ln 2; in [0, 1] and finite on one-hot.

    Args:
        p: probabilities ``(B, C, *rest)``; one channel is a foreground against the rest.
        q: the same.

    Returns:
        ``(B, *rest)``.

    Example:
        >>> round(js_divergence(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])).item(), 4)
        0.3113
    """
    if p.shape[1] == 1:
        p, q = (torch.cat([one, 1 - one], 1) for one in (p, q))
    entropies = [torch.special.entr(one).sum(1) for one in ((p + q) / 2, p, q)]
    return ((entropies[0] - 0.5 * (entropies[1] + entropies[2])) / math.log(2)).clamp(0, 1)


def tug_of_war(gaps: Sequence[float]) -> float:
    """Π (1 − |gap|) over forget, retain and unseen cases (Zhao et al., arXiv 2406.01257); 1 is the retrained model.

    Example:
        >>> round(tug_of_war([0.1, 0.2, 0.0]), 2)
        0.72
    """
    return math.prod(1 - abs(gap) for gap in gaps)


@torch.no_grad()
def compare_cases(
    networks: Mapping[str, nn.Module],
    against: str,
    dataset: MemoryDataset,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    inferer: Inferer | None = None,
) -> dict[str, Rows]:
    """What each network says against what one of them says, on the same cases in one pass.

    Args:
        networks: frozen, in eval mode.
        against: the name of the one that the others are compared with.
        dataset: of cases.
        device: where to compute.
        batch_size: cases at a time.
        inferer: see :func:`monai_unlearn.audit.score_cases`.

    Returns:
        name -> for each case ``agreement``, for masks the Dice of the two (mean over foreground channels, both empty:
        1) and for classes whether they name the same; ``js``, the mean Jensen–Shannon divergence; and for masks
        ``js_band``, that within 3 voxels of the label's surface.
    """
    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name in networks if name != against}
    for batch in tqdm(DataLoader(dataset, batch_size=batch_size, num_workers=0), "comparing", leave=False):
        image, label = batch["image"].to(device), batch["label"].to(device)
        inside = batch["region"].to(label) if "region" in batch else torch.ones_like(label[:, :1])
        logits = {name: one(image) if inferer is None else inferer(image, one) for name, one in networks.items()}
        p = {name: probabilities(value) for name, value in logits.items()}
        for name, kept in found.items():
            js = js_divergence(p[name], p[against])
            if label.ndim == 2:
                row = {"agreement": logits[name].argmax(1).eq(logits[against].argmax(1)).double(), "js": js}
            else:
                where, band = inside[:, 0], surface_band((label > 0.5).to(js))[:, 0] * inside[:, 0]
                said = (hard_masks(logits[one]) * inside for one in (name, against))
                row = {"agreement": mean_dice(*said)}
                for key, counted in (("js", where), ("js_band", band)):
                    row[key] = (js * counted).flatten(1).sum(1) / counted.flatten(1).sum(1)
            for key, value in row.items():
                kept.setdefault(key, []).append(value.double().cpu())
    return {name: {key: torch.cat(rows).numpy() for key, rows in kept.items()} for name, kept in found.items()}
