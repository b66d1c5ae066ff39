# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# Copyright (c) The monai_unlearn authors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
# &nbsp;&nbsp;&nbsp;&nbsp;http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
#
# # Erase to Retain, step by step
#
# *Erase to Retain* (arXiv 2511.16574) unlearns with low-rank adapters and a frozen teacher in a strong phase, then restores
# the head gently. Here its parts are put together by hand around MONAI's own `SupervisedTrainer`, so that each can be seen.
#
# What it does is suppression: forgotten images are relabelled as background. Whether that is right depends on what a model
# that never saw them says; the last section compares.

# %% [markdown]
# ## Setup environment

# %%
# !python -c "import monai_unlearn" || pip install -q -c ../constraints.txt ..

# %% [markdown]
# ## Setup imports

# %%
import os
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from monai.config import print_config
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.utils import set_determinism

from monai_unlearn import (
    DistillationLoss,
    ForgetRetainSampler,
    MemoryDataset,
    PrepareUnlearning,
    UnlearningLoss,
    from_bundle,
    isic_datalist,
    make_isic_phantom,
    make_request,
    make_restorable,
    make_student,
    merge_lora,
    resolve,
    seeded,
    to_background,
)

print_config()

# %% [markdown]
# ## Setup data directory
#
# Results go to the folder in the `MONAI_DATA_DIRECTORY` environment variable, else to a temporary one.

# %%
directory = os.environ.get("MONAI_DATA_DIRECTORY")
root_dir = Path(tempfile.mkdtemp() if directory is None else directory) / "erase_to_retain"
root_dir.mkdir(exist_ok=True)
print(root_dir)

# %% [markdown]
# ## Data
#
# A phantom in the layout of ISIC 2018 Task 1. A tenth of the training images, in whole patients, is to be forgotten. Every
# item carries the flag `forget`.

# %%
set_determinism(0)
folder = make_isic_phantom(root_dir / "phantom", number=60, size=64)
items = isic_datalist(folder)["training"]
training = [item for item in items if item["fold"] != "4"]
holdout = [item for item in items if item["fold"] == "4"]
resolution = resolve(make_request(forget_fraction=0.15), training, holdout)
print({name: len(part) for name, part in resolution.splits.items()})

bundle = Path("..") / "bundles" / "isic_unlearn"
transform = from_bundle(bundle, "train#preprocessing", spatial_size=[48, 64])()
datasets = {name: MemoryDataset(part, transform) for name, part in resolution.splits.items()}

# %% [markdown]
# ## The original model
#
# Ordinary training with MONAI. It stays frozen from here on: it is the teacher.


# %%
def build():
    return UNet(2, 3, 1, (8, 16, 32, 64), (2, 2, 2), num_res_units=1, norm="batch")


def train(items, epochs, seed):
    network = seeded(build, seed)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(MemoryDataset(items, transform), batch_size=8, shuffle=True),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), 5e-3),
        loss_function=DiceCELoss(sigmoid=True, batch=True),
        decollate=False,
    )
    trainer.run()
    return network.eval().requires_grad_(False)


def dice(network):
    """Mean Dice of each part of the data."""
    network.eval()
    scores = {}
    for name, dataset in datasets.items():
        metric = DiceMetric()
        for index in range(len(dataset)):
            sample = dataset[index]
            with torch.no_grad():
                metric((network(sample["image"][None]) > 0).float(), sample["label"][None])
        scores[name] = metric.aggregate().item()
    return scores


max_epochs = 25
original = train(resolution.training, max_epochs, seed=0)
print(dice(original))

# %% [markdown]
# ## Strong phase
#
# The student is a copy with adapters `W + s·B·A` of rank 8; normalisation is frozen, so nothing drifts by itself. Forget
# samples are relabelled as background, retained ones keep their label and are held to the teacher's softened output. The
# sampler puts both kinds into each batch; each term of the loss is a mean over its own group, so the mix does not weigh them.

# %%
student = make_student(original, scope="all", rank=8, alpha=32, seed=0)
shown = MemoryDataset(resolution.training, transform, extra=["forget"])
sampler = ForgetRetainSampler(shown.forget, num_forget=2, num_retain=8)
trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
print(f"{sum(p.numel() for p in trainable)} of {sum(p.numel() for p in original.parameters())} weights train")

curve = [dice(original)]
trainer = SupervisedTrainer(
    device=torch.device("cpu"),
    max_epochs=6,
    train_data_loader=DataLoader(shown, batch_sampler=sampler),
    network=student,
    optimizer=torch.optim.AdamW(trainable, 1e-3),
    loss_function=UnlearningLoss(
        retain=DiceCELoss(sigmoid=True, batch=True),
        forget=torch.nn.BCEWithLogitsLoss(),
        distill=DistillationLoss(temperature=2.0, guard_weight=0.05),
        forget_weight=0.3,
    ),
    prepare_batch=PrepareUnlearning(to_background, teacher=original),
    decollate=False,
)
trainer.add_event_handler("EPOCH_COMPLETED", lambda: curve.append(dice(student)))
trainer.run()

# %% [markdown]
# ## Restoration of the head
#
# Adapters are merged and everything but the last layer is frozen; a few gentle epochs on retained samples.

# %%
restored = make_restorable(merge_lora(student), scope="head")
trainer = SupervisedTrainer(
    device=torch.device("cpu"),
    max_epochs=2,
    train_data_loader=DataLoader(datasets["retain"], batch_size=8, shuffle=True),
    network=restored,
    optimizer=torch.optim.AdamW([p for p in restored.parameters() if p.requires_grad], 3e-4),
    loss_function=DiceCELoss(sigmoid=True, batch=True),
    decollate=False,
)
trainer.add_event_handler("EPOCH_COMPLETED", lambda: curve.append(dice(restored)))
trainer.run()

# %% [markdown]
# ## Is that what a model would say that never saw them?
#
# The dotted line is a model trained on the retained images only. Where forgetting goes below it, it went too far: such a
# model does not answer unseen lesions with background. The bundle therefore stops at what is expected of unseen cases, and
# its default distils towards a model that never saw them instead.

# %%
retrained = dice(train(resolution.splits["retain"], max_epochs, seed=1))
for name, colour in zip(("forget", "retain", "holdout"), ("tab:red", "tab:blue", "tab:green")):
    plt.plot([step[name] for step in curve], color=colour, marker="o", label=name)
    plt.axhline(retrained[name], color=colour, linestyle=":")
plt.axvline(6.5, color="grey", linewidth=0.5)
plt.xlabel("epoch (restoration right of the line)")
plt.ylabel("mean Dice")
plt.legend()
plt.show()
print("retrained", retrained)
print("unlearned", curve[-1])

# %% [markdown]
# ## Cleanup data directory
#
# Remove the directory if a temporary one was used.

# %%
if directory is None:
    shutil.rmtree(root_dir.parent)
