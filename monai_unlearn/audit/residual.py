# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Where memory is left: the unlearned model's loss minus that of models that never saw the case, voxel by voxel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import DataLoader
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import atomic_path, write_volume
from ..data import MemoryDataset
from ..request import item_id, pseudonym
from .reference import References
from .scores import Inferer

REACH = 12  # voxels on each side of the label's surface that a profile shows
SCALE = 2.0  # nats at which a map's colour is full


@torch.no_grad()
def residual_memory(
    unlearned: nn.Module,
    references: References,
    dataset: MemoryDataset,
    device: str | torch.device = "cpu",
    inferer: Inferer | None = None,
) -> Iterator[np.ndarray]:
    """Cross-entropy of the unlearned model minus the mean of the references', in nats.

    Args:
        unlearned: frozen, in eval mode.
        references: likewise; of them those that never saw the case.
        dataset: the cases, with masks.
        device: where to compute.
        inferer: see :func:`monai_unlearn.audit.score_cases`.

    Yields:
        For each case ``(*spatial)``: below 0 the model fits the case better than one that never saw it, above 0 worse;
        0 outside of the item's ``region``.
    """

    def loss(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        logits = network(image) if inferer is None else inferer(image, network)
        if logits.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(logits, label, reduction="none")[:, 0]
        return -(label * logits.log_softmax(1)).sum(1)

    for item, batch in zip(dataset.data, DataLoader(dataset, batch_size=1, num_workers=0)):
        image, label = batch["image"].to(device), batch["label"].to(device)
        expected = torch.stack([loss(network, image, label) for network in references.never_saw(item)]).mean(0)
        residual = (loss(unlearned, image, label) - expected)[0]
        if "region" in batch:
            residual = residual * batch["region"][0, 0].to(residual)
        yield residual.cpu().numpy()


def residual_profiles(
    unlearned: nn.Module,
    references: References,
    datasets: Mapping[str, MemoryDataset],
    device: str | torch.device = "cpu",
    inferer: Inferer | None = None,
    folder: str | Path | None = None,
    key: bytes | None = None,
) -> dict[str, dict[str, Any]]:
    """The residual by distance from the label's surface, of the forget set beside as many unseen cases.

    Args:
        unlearned: see :func:`residual_memory`.
        references: likewise.
        datasets: ``forget`` and ``holdout``.
        device: where to compute.
        inferer: see :func:`monai_unlearn.audit.score_cases`.
        folder: where each forget case's map is written for viewers, as a picture or with its affine as NIfTI; they show
            the outline of a forgotten structure and are readable for their owner alone. None writes none.
        key: of the pseudonyms that name the files; without it they are numbered.

    Returns:
        split -> ``distance`` (voxels, below 0 inside the label), ``profile`` (mean residual there, NaN where no voxel
        lies), and ``means``: the residual ``over_all`` voxels and ``near_surface`` (3 voxels), means over cases.
    """
    distance = np.arange(-REACH, REACH + 1)
    found = {}
    for split, dataset in datasets.items():
        if split not in ("forget", "holdout"):
            continue
        items = list(dataset.data)[: len(datasets["forget"])]
        part = MemoryDataset(items, dataset.transform, dataset.store)
        profiles, over_all, near = [], [], []
        maps = residual_memory(unlearned, references, part, device, inferer)
        for index, residual in enumerate(tqdm(maps, "residual memory", len(part), leave=False)):
            sample = part[index]
            signed = _signed_distance(sample["label"].numpy())
            profiles.append(_profile(residual, signed, distance))
            over_all.append(residual.mean())
            near.append(residual[np.abs(signed) <= 3].mean() if (np.abs(signed) <= 3).any() else np.nan)
            if split == "forget" and folder is not None:
                name = pseudonym(key, item_id(items[index])) if key else f"{index:04d}"
                _write(residual, sample.get("affine"), Path(folder) / "residual_memory", name)
        counted = (~np.isnan(profiles)).sum(0)
        total = np.nansum(profiles, 0)
        found[split] = {
            "distance": distance,
            "profile": np.where(counted > 0, total / np.maximum(counted, 1), np.nan),
            "means": {"over_all": float(np.mean(over_all)), "near_surface": _mean(near)},
        }
    return found


def _mean(values: list[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


def _signed_distance(label: np.ndarray) -> np.ndarray:
    """Distance to the surface of the foreground, below 0 inside; infinite where there is no surface."""
    inside = label[0] > 0.5 if len(label) == 1 else label[1:].max(0) > 0.5
    if inside.all() or not inside.any():
        return np.full(inside.shape, np.inf)
    return np.where(inside, 0.5 - distance_transform_edt(inside), distance_transform_edt(~inside) - 0.5)


def _profile(residual: np.ndarray, signed: np.ndarray, distance: np.ndarray) -> np.ndarray:
    near = np.abs(signed) <= distance[-1] + 0.5
    place = np.floor(signed[near] + 0.5).astype(int) - distance[0]
    place = place.clip(0, len(distance) - 1)
    counts = np.bincount(place, minlength=len(distance)).astype(float)
    sums = np.bincount(place, residual[near], len(distance))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def coloured(residual: np.ndarray) -> np.ndarray:
    """A map as RGBA in [0, 1]: red where the model remembers (below 0), blue where it knows less."""
    share = np.clip(residual / SCALE, -1, 1)
    red, blue = (share < 0).astype(float), (share > 0).astype(float)
    return np.stack([red, np.zeros_like(share), blue, np.abs(share)], -1)


def _write(residual: np.ndarray, affine: Any, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if residual.ndim == 3:
        matrix = torch.as_tensor(np.eye(4) if affine is None else np.asarray(affine))
        write_volume(torch.as_tensor(residual), matrix, folder / f"{name}.nii.gz", mode=0o600)
        return
    from PIL import Image

    with atomic_path(folder / f"{name}.png", mode=0o600) as temporary:
        Image.fromarray((255 * coloured(residual)).round().astype(np.uint8), "RGBA").save(temporary, "PNG")
