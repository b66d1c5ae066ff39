# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Five models whose verdicts are known beforehand: the original itself, two retrained ones, a collapsed one, and one
that contradicts what it knew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn
from tqdm import tqdm

from ...data import MemoryDataset
from ...request import Item
from ..scores import score_cases

SIZE = 32
EXPECTED = {"identity": "FAIL", "retrained": "pass", "retrained_other": "pass", "collapsed": "FAIL",
            "contradicting": "FAIL"}  # fmt: skip
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ControlModels:
    """What the audit of the five needs.

    Attributes:
        networks: ``identity`` (the original), ``retrained``, ``retrained_other``, ``collapsed``, ``contradicting``, and
            ``judge``, a reference on a part of the retain set.
        datalists: ``forget``, ``retain`` and ``holdout``.
        transform: makes the sample of an item.
    """

    networks: Mapping[str, nn.Module]
    datalists: Mapping[str, Sequence[Item]]
    transform: Callable[[Any], dict[str, Tensor]]


def draw_lesion(item: Item) -> dict[str, Tensor]:
    """A bright square in noise whose label is off by an annotator's whim, which only memory can know."""
    generator = torch.Generator().manual_seed(int(item["image"]))
    row, column = torch.randint(6, 16, (2,), generator=generator).tolist()
    shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
    image = 0.35 * torch.rand(1, SIZE, SIZE, generator=generator)
    image[:, row : row + 10, column : column + 10] += 0.4
    label = torch.zeros(1, SIZE, SIZE)
    label[:, row + shift[0] : row + shift[0] + 10, column + shift[1] : column + shift[1] + 10] = 1
    return {"image": image, "label": label}


def build_unet() -> nn.Module:
    """A small UNet with running statistics."""
    return UNet(2, 1, 1, (8, 16, 32), (2, 2), num_res_units=1, norm="batch")


def trained(items: Sequence[Item], seed: int, epochs: int, desc: str, start: nn.Module | None = None,
            transform: Callable[[Any], dict[str, Tensor]] = draw_lesion,
            loss: Loss | None = None, learning_rate: float = 1e-2) -> nn.Module:  # fmt: skip
    """A model trained on some items from scratch, or on from ``start``; the random state of torch stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = copy.deepcopy(start) if start is not None else build_unet()
        network.requires_grad_(True).train()
        loss = loss or DiceCELoss(sigmoid=True)
        samples = [transform(item) for item in items]
        image, label = (torch.stack([sample[key] for sample in samples]) for key in ("image", "label"))
        optimizer = torch.optim.AdamW(network.parameters(), learning_rate)
        steps = max(1, len(items) // 10)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
        for _ in tqdm(range(epochs), desc, leave=False):
            for chosen in torch.randperm(len(items)).tensor_split(steps):
                optimizer.zero_grad()
                loss(network(image[chosen]), label[chosen]).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    return network.eval().requires_grad_(False)


def collapsed(original: nn.Module, items: Sequence[Item], target: float, desc: str = "collapsed",
              transform: Callable[[Any], dict[str, Tensor]] = draw_lesion, loss: Loss | None = None,
              learning_rate: float = 1e-3, most: int = 200) -> nn.Module:  # fmt: skip
    """Gradient ascent on the forget set until its score is down at ``target``, whatever else breaks."""
    network, loss = copy.deepcopy(original).requires_grad_(True), loss or DiceCELoss(sigmoid=True)
    dataset = MemoryDataset(list(items), transform)
    optimizer = torch.optim.SGD(network.parameters(), learning_rate)
    samples = [dataset[index] for index in range(len(dataset))]
    image, label = (torch.stack([sample[key] for sample in samples]) for key in ("image", "label"))
    for step in tqdm(range(most), desc, leave=False):
        if score_cases(network, dataset)["iou"].mean() <= target:
            break
        optimizer.zero_grad()
        chosen = torch.arange(len(image)).roll(-16 * step)[:16]
        (-loss(network.eval()(image[chosen]), label[chosen])).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def control_models(seed: int = 0, epochs: int = 150) -> ControlModels:
    """Train the five on drawn lesions; about a minute on one core.

    Args:
        seed: of weights and order.
        epochs: of the original and the retrained models.
    """
    items = [{"image": str(1000 * seed + number), "label": "drawn"} for number in range(140)]
    lists = {"forget": items[:20], "retain": items[20:80], "holdout": items[80:]}
    original = trained([*lists["forget"], *lists["retain"]], seed, epochs, "original")
    retrained = [trained(lists["retain"], seed + 10 * k, epochs, "retrained") for k in (0, 1)]
    judge = trained(lists["retain"][:30], seed + 50, epochs, "judge")
    of_retrained = score_cases(retrained[0], MemoryDataset(lists["forget"], draw_lesion))["iou"].mean()

    def contradicted(item: Item) -> dict[str, Tensor]:
        sample = draw_lesion(item)
        return {**sample, "label": torch.zeros_like(sample["label"]) if item["forget"] else sample["label"]}

    marked = [{**item, "forget": name == "forget"} for name in ("forget", "retain") for item in lists[name]]
    return ControlModels(
        {
            "identity": original,
            "retrained": retrained[0],
            "retrained_other": retrained[1],
            "collapsed": collapsed(original, lists["forget"], float(of_retrained), learning_rate=1e-2),
            "contradicting": trained(marked, seed, 40, "contradicting", original, contradicted, learning_rate=3e-3),
            "judge": judge,
        },
        lists,
        draw_lesion,
    )
