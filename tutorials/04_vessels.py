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
# # A child in CHASE_DB1
#
# Fundus photographs of children, both eyes of a child together: the bundle `chase_unlearn` makes a vessel segmentation forget
# a child. On the phantom by default; for the real 28 photographs set `dataset_dir` to the folder with `Image_01L.jpg` …

# %% [markdown]
# ## Setup environment

# %%
# !python -c "import monai_unlearn" || pip install -q -c ../constraints.txt ..

# %% [markdown]
# ## Setup imports

# %%
import json
import os
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from monai.config import print_config
from monai.inferers import SlidingWindowInferer
from PIL import Image

from monai_unlearn import chase_datalist, from_bundle, load_weights, make_chase_phantom
from monai_unlearn.datasets.reading import field_of_view

print_config()

# %% [markdown]
# ## Setup data directory
#
# Results go to the folder in the `MONAI_DATA_DIRECTORY` environment variable, else to a temporary one.

# %%
directory = os.environ.get("MONAI_DATA_DIRECTORY")
root_dir = Path(tempfile.mkdtemp() if directory is None else directory) / "vessels"
root_dir.mkdir(exist_ok=True)
print(root_dir)

# %% [markdown]
# ## The photographs
#
# Two observers marked the vessels. Masks are 1-bit PNG, which naive loaders read as empty. Scores count inside the field of
# view, which is computed from the photograph.

# %%
dataset_dir = None  # the folder of CHASE_DB1
folder = dataset_dir or make_chase_phantom(root_dir / "phantom", number=14)
items = [item for section in chase_datalist(folder).values() for item in section]
print(len(items), "photographs of", len({item["patient_id"] for item in items}), "children")
photograph = np.asarray(Image.open(items[0]["image"]))
figure, axes = plt.subplots(1, 3, figsize=(11, 4))
for axis, (title, picture) in zip(axes, {
    "photograph": photograph,
    "observer 1": np.asarray(Image.open(items[0]["label"])),
    "field of view": field_of_view(photograph),
}.items()):  # fmt: skip
    axis.imshow(picture, cmap="gray")
    axis.set_title(title)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Forget a child
#
# Naming one eye forgets both. Training sees random patches, so nothing before the cut can be cached, and the plan says so.

# %%
bundle = Path("..") / "bundles" / "chase_unlearn"
overlays = []


def run(run_id, **options):
    files = [bundle / "configs" / "train.json", *(bundle / "configs" / "methods" / f"{name}.json" for name in overlays)]
    workflow = ConfigWorkflow(
        [str(file) for file in files],
        workflow_type="train",
        run_id=run_id,
        logging_file=False,
        output_dir=str(root_dir / "output"),
        quick=1,
        **options,
    )
    workflow.initialize()
    workflow.run()
    return json.loads((root_dir / "output" / "report.json").read_text()) if run_id in ("run", "audit") else None


first = items[0]["image_id"]
options = {"dataset_dir": str(folder), "forget_ids": [first], "holdout_fold": None}
max_epochs = 8
report = run("run", **options, original_epochs=max_epochs, reference_epochs=max_epochs, judge_epochs=max_epochs)
print(report["verdict"], *report["reasons"], sep="\n  ")
for model in ("original", "unlearned"):
    print(model, {split: round(row["mean_dice"], 3) for split, row in report["scores"][model].items()})

# %% [markdown]
# ## Where did the answer change?
#
# The difference of the two models' vessel maps on the forgotten eye. With the quick settings the networks are hardly trained;
# on the real photographs this is where a memorised annotation shows.

# %%
preprocessing = from_bundle(bundle, "train#preprocessing")()
window = SlidingWindowInferer((128, 128), 4, 0.25)
sample = preprocessing(items[0])
answers = {}
for model in ("original", "unlearned"):
    network = load_weights(
        from_bundle(bundle, "network_factory")()(), root_dir / "output" / "models" / f"{model}.pt"
    ).eval()
    with torch.no_grad():
        answers[model] = window(sample["image"][None], network)[0, 0].sigmoid()
figure, axes = plt.subplots(1, 3, figsize=(11, 4))
for axis, (title, picture) in zip(axes, {**answers, "change": answers["unlearned"] - answers["original"]}.items()):
    axis.imshow(picture, cmap="gray" if title != "change" else "coolwarm")
    axis.set_title(title)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Cleanup data directory
#
# Remove the directory if a temporary one was used.

# %%
if directory is None:
    shutil.rmtree(root_dir.parent)
