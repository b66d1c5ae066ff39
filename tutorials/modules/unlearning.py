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
# Copyright (c) MONAI Consortium
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
# # Unlearning: a segmentation model forgets patients
#
# Patients whose images trained a model may withdraw their consent. Training anew without them is the right answer and takes
# days. This notebook shows the other way with MONAI's own `SupervisedTrainer` and the parts of
# `monai_unlearn`:
#
# 1. a request names patients, and every image of theirs is flagged;
# 2. a small **reference** that never saw them is trained; it says about their images what a model says that never saw them;
# 3. a **student**, a copy of the original with low-rank adapters, learns that for the flagged images while labels hold the others;
# 4. an **audit** compares original, unlearned and retrained model: scores and attacks.
#
# Everything runs on two CPU cores in about a minute, on pictures that are drawn here.

# %% [markdown]
# ## Setup environment

# %%
# !python -c "import monai" || pip install -q "monai-weekly[pillow, matplotlib, tqdm, ignite]"
# !python -c "import monai_unlearn" || pip install -q monai-unlearn
# !python -c "import matplotlib" || pip install -q matplotlib
# %matplotlib inline

# %% [markdown]
# ## Setup imports

# %%
import os
import shutil
import tempfile

import matplotlib.pyplot as plt
import torch
from monai.config import print_config
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import AsDiscreted, Compose, EnsureTyped, LoadImaged, Resized, ScaleIntensityRanged
from monai.utils import set_determinism

from monai_unlearn import (
    ForgetRetainSampler,
    MemoryDataset,
    PrepareUnlearning,
    UnlearningLoss,
    isic_datalist,
    make_isic_phantom,
    make_request,
    make_student,
    merge_lora,
    resolve,
    seeded,
    to_reference,
)
from monai_unlearn.audit import audit_weights

print_config()

# %% [markdown]
# ## Setup data directory
#
# You can specify a directory with the `MONAI_DATA_DIRECTORY` environment variable.
# This allows you to save results and reuse downloads.
# If not specified a temporary directory will be used.

# %%
directory = os.environ.get("MONAI_DATA_DIRECTORY")
if directory is not None:
    os.makedirs(directory, exist_ok=True)
root_dir = tempfile.mkdtemp() if directory is None else directory
print(root_dir)

# %% [markdown]
# ## Set deterministic training for reproducibility

# %%
set_determinism(seed=0)

# %% [markdown]
# ## Data, and who is to be forgotten
#
# Eighty pictures in the layout of ISIC 2018 Task 1, some patients with several. Fold 4 is held out: no model sees it, and the
# audit goes by it. The request takes a share of the others in whole patients.

# %%
folder = make_isic_phantom(os.path.join(root_dir, "unlearning_phantom"), number=80, size=64)
items = isic_datalist(folder)["training"]
training = [item for item in items if item["fold"] != "4"]
holdout = [item for item in items if item["fold"] == "4"]
resolution = resolve(make_request(forget_fraction=0.15), training, holdout)
print({name: len(part) for name, part in resolution.splits.items()})

transform = Compose(
    [
        LoadImaged(keys=["image", "label"], ensure_channel_first=True),
        ScaleIntensityRanged(keys=["image", "label"], a_min=0, a_max=255, b_min=0, b_max=1),
        Resized(keys=["image", "label"], spatial_size=(48, 64), mode=["area", "nearest"]),
        AsDiscreted(keys="label", threshold=0.5),
        EnsureTyped(keys=["image", "label"], dtype=torch.float32, track_meta=False),
    ]
)

# %% [markdown]
# ## The original, the retrained model and two references
#
# Ordinary training with MONAI. The retrained model is what unlearning is measured by; in practice nobody has it. The references
# see parts of the retained images: one teaches, the other judges.

# %%
max_epochs = 30


def build():
    return UNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=1,
        channels=(8, 16, 32, 64),
        strides=(2, 2, 2),
        num_res_units=1,
        norm="batch",
    )


def train(items, seed):
    network = seeded(build, seed)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=max_epochs,
        train_data_loader=DataLoader(MemoryDataset(items, transform), batch_size=8, shuffle=True),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), 5e-3),
        loss_function=DiceCELoss(sigmoid=True, batch=True),
        decollate=False,
    )
    trainer.run()
    return network.eval().requires_grad_(False)


retain = resolution.splits["retain"]
original = train(resolution.training, seed=0)
retrained = train(retain, seed=1)
reference = train(retain[::2], seed=2)
judge = train(retain[1::2], seed=3)

# %% [markdown]
# ## Unlearn
#
# The sampler puts flagged and retained images into each batch. `PrepareUnlearning` relabels the flagged ones with what the
# reference says, calibrated on unseen cases; the others keep their label. Each term of the loss is a mean over its own group.
# Normalisation is frozen, and the adapters are merged at the end: the result is a plain network.

# %%
student = make_student(original, scope="all", rank=8, alpha=32)
dataset = MemoryDataset(resolution.training, transform, extra=["forget"])
unseen = MemoryDataset(holdout, transform)
trainer = SupervisedTrainer(
    device=torch.device("cpu"),
    max_epochs=12,
    train_data_loader=DataLoader(
        dataset, batch_sampler=ForgetRetainSampler(dataset.forget, num_forget=2, num_retain=8)
    ),
    network=student,
    optimizer=torch.optim.AdamW([parameter for parameter in student.parameters() if parameter.requires_grad], 2e-3),
    loss_function=UnlearningLoss(
        retain=DiceCELoss(sigmoid=True, batch=True), forget=torch.nn.BCEWithLogitsLoss(), forget_weight=1.5
    ),
    prepare_batch=PrepareUnlearning(to_reference(reference, original=original, unseen=unseen)),
    decollate=False,
)
trainer.run()
unlearned = merge_lora(student)

# %% [markdown]
# ## Audit
#
# Lower is not better: the goal is the score of the model that never saw the patients. The attack asks whether flagged images can
# be told from unseen ones by the model's loss, corrected by what the judge finds difficult; .5 is guessing.

# %%
networks = {"original": original, "unlearned": unlearned, "retrained": retrained}
report = audit_weights(
    build,
    {name: network.state_dict() for name, network in networks.items()},
    resolution.splits,
    transform,
    references=[judge.state_dict()],
)
print(report["verdict"], *report["reasons"], sep="\n  ")
splits = ["forget", "retain", "holdout"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
for place, name in enumerate(networks):
    scores = [report["scores"][name][split]["mean_iou"] for split in splits]
    left.bar([index + 0.25 * place for index in range(3)], scores, 0.22, label=name)
left.set_xticks([0.25, 1.25, 2.25], splits)
left.set_ylabel("mean IoU")
left.legend()
attacks = [report["membership"][name]["calibrated"]["auc"] for name in networks]
right.bar(list(networks), attacks)
right.axhline(0.5, color="black", linestyle=":")
right.set_ylabel("AUC of the calibrated attack")
plt.show()

# %% [markdown]
# ## Cleanup data directory
#
# Remove directory if a temporary was used.

# %%
if directory is None:
    shutil.rmtree(root_dir)
