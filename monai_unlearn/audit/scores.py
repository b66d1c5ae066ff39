# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""One row of scores per case, from one forward pass on the deterministic view."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import DataLoader
from monai.metrics import DiceMetric, MeanIoU
from torch import Tensor, nn
from tqdm import tqdm

from ..data import MemoryDataset
from ..relabel import probabilities

SCORES = ("iou", "dice", "loss")


def hard_masks(logits: Tensor) -> Tensor:
    """Masks from logits, ``(B, C, *spatial)``: above 0 for one channel, one-hot of the largest for several."""
    if logits.shape[1] == 1:
        return (logits > 0).float()
    return F.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1).float()


def case_scores(logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Scores of each case of a batch.

    Args:
        logits: ``(B, C, *spatial)``.
        label: probabilities of the same shape.

    Returns:
        ``iou`` and ``dice`` of the hard masks in [0, 1] (mean over foreground channels; 1 where prediction and label
        are both empty) and ``loss``, the mean cross-entropy over voxels in nats; each ``(B,)``.
    """
    masks = hard_masks(logits)
    background = logits.shape[1] == 1
    truth = (label > 0.5).float()
    scores = {}
    for name, metric in (
        ("iou", MeanIoU(include_background=background, ignore_empty=False)),
        ("dice", DiceMetric(include_background=background, ignore_empty=False)),
    ):
        scores[name] = torch.as_tensor(metric(masks, truth)).mean(1)
    if logits.shape[1] == 1:
        loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none").flatten(1).mean(1)
    else:
        loss = -(label * logits.log_softmax(1)).sum(1).flatten(1).mean(1)
    return {**scores, "loss": loss}


@torch.no_grad()
def score_cases(
    network: nn.Module,
    dataset: MemoryDataset,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    inferer: Callable[[Tensor, nn.Module], Tensor] | None = None,
    desc: str = "scores",
) -> dict[str, np.ndarray]:
    """Scores of every case, in the data list's order; the network's modes, weights and buffers stay as they are.

    Returns:
        For each of :data:`SCORES` an array ``(N,)``; also ``entropy``, the mean binary or categorical entropy of the
        prediction in nats, and ``area``, the foreground's share of the label.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    rows: dict[str, list[Tensor]] = {}
    try:
        for batch in tqdm(DataLoader(dataset, batch_size=batch_size, num_workers=0), desc, leave=False):
            image, label = batch["image"].to(device), batch["label"].to(device)
            logits = network(image) if inferer is None else inferer(image, network)
            p = probabilities(logits)
            entropy = torch.special.entr(p)
            if p.shape[1] == 1:
                entropy = entropy + torch.special.entr(1 - p)
            foreground = label if label.shape[1] == 1 else label[:, 1:]
            found = {
                **case_scores(logits, label),
                "entropy": entropy.sum(1).flatten(1).mean(1),
                "area": foreground.sum(1).flatten(1).mean(1),
            }
            for name, value in found.items():
                rows.setdefault(name, []).append(value.double().cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not rows:
        return {name: np.zeros(0) for name in (*SCORES, "entropy", "area")}
    return {name: torch.cat(values).numpy() for name, values in rows.items()}


class SplitEvaluator:
    """The mean IoU of a network on named data sets, for :class:`monai_unlearn.handlers.StopAtReference`.

    Args:
        network: scored in eval mode, left as it was.
        datasets: by the name of the metric.
        device: where to compute.
        batch_size: cases at a time.
        limit: at most so many cases of each data set, a fixed sample drawn by ``seed``; None scores all.
        seed: of the sample.

    Attributes:
        state: ``state.metrics`` holds the scores after :meth:`run`.
        cases: that one :meth:`run` scores.
    """

    def __init__(
        self,
        network: nn.Module,
        datasets: Mapping[str, MemoryDataset],
        device: str | torch.device = "cpu",
        batch_size: int = 32,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.network, self.device, self.batch_size = network, device, batch_size
        self.datasets = {}
        for name, dataset in datasets.items():
            items = list(dataset.data)
            if limit is not None and len(items) > limit:
                items = random.Random(seed).sample(items, limit)
            self.datasets[name] = MemoryDataset(items, dataset.transform, dataset.store)
        self.cases = sum(len(dataset) for dataset in self.datasets.values())
        self.state = SimpleNamespace(metrics={})

    def run(self) -> None:
        """Score; the random state of torch stays as it was."""
        self.state.metrics = {
            name: float(score_cases(self.network, dataset, self.device, self.batch_size)["iou"].mean())
            for name, dataset in self.datasets.items()
        }
