# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""A training in miniature for the tests of engines and handlers."""

import torch
from conftest import small_unet
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.losses import DiceCELoss
from torch import nn

from monai_unlearn import (
    DistillationLoss,
    ForgetRetainSampler,
    MemoryDataset,
    PrepareUnlearning,
    ReseedEachEpoch,
    StopWhenNotFinite,
    UnlearningLoss,
    to_background,
)

ITEMS = [{"image": str(i), "label": "m", "forget": i % 4 == 0, "sha256": f"s{i}"} for i in range(12)]


def draw(item):
    generator = torch.Generator().manual_seed(int(item["image"]))
    label = torch.zeros(1, 16, 16)
    row, column = torch.randint(1, 8, (2,), generator=generator).tolist()
    label[:, row : row + 7, column : column + 7] = 1
    return {"image": (0.6 * label + 0.3 * torch.rand(3, 16, 16, generator=generator)), "label": label}


def dataset(**kwargs):
    return MemoryDataset(ITEMS, draw, extra=["forget"], **kwargs)


def plain_trainer(epochs=2, network=None, handlers=(), lr=1e-2, dropout=0.0):
    network = network or small_unet(dropout=dropout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    loader = DataLoader(dataset(), batch_size=4, shuffle=True, num_workers=0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(1, epochs * len(loader)))
    return SupervisedTrainer(
        device="cpu", max_epochs=epochs, train_data_loader=loader, network=network, optimizer=optimizer,
        loss_function=DiceCELoss(sigmoid=True, batch=True), decollate=False,
        train_handlers=[ReseedEachEpoch(0), LrScheduleHandler(scheduler, print_lr=False, epoch_level=False),
                        StopWhenNotFinite(), *handlers],
    )  # fmt: skip


def unlearning_trainer(student, epochs=2, lr=1e-2, handlers=(), teacher=None, relabel=to_background, loss=None):
    data = dataset()
    sampler = ForgetRetainSampler(data.forget, 1, 3)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=lr)
    loss = loss or UnlearningLoss(
        DiceCELoss(sigmoid=True, batch=True), nn.BCEWithLogitsLoss(), DistillationLoss() if teacher else None, 3.0
    )
    return SupervisedTrainer(
        device="cpu", max_epochs=epochs, train_data_loader=DataLoader(data, batch_sampler=sampler, num_workers=0),
        network=student, optimizer=optimizer, loss_function=loss, prepare_batch=PrepareUnlearning(relabel, teacher),
        decollate=False, train_handlers=[ReseedEachEpoch(0), StopWhenNotFinite(), *handlers],
    )  # fmt: skip
