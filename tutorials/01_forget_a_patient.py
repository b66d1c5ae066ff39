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
# # Forget a patient
#
# A patient whose photographs trained a lesion segmentation model withdraws consent. This notebook makes the model forget
# them with the bundle `isic_unlearn`, on a phantom data set that it draws itself, compares it with the model that is trained
# anew without them, and reads the report.
#
# The small settings used here show the way, not the quality: with `quick=0` (about four minutes on two cores) the original
# really memorises its patients, and the report has more to find. For your own data give `dataset_dir`, `holdout_fold`
# and `original_model` to `run`.

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
import torch
from monai.bundle import ConfigWorkflow
from monai.config import print_config
from PIL import Image

from monai_unlearn import from_bundle, load_weights

print_config()

# %% [markdown]
# ## Setup data directory
#
# Results go to the folder in the `MONAI_DATA_DIRECTORY` environment variable, else to a temporary one.

# %%
directory = os.environ.get("MONAI_DATA_DIRECTORY")
root_dir = Path(tempfile.mkdtemp() if directory is None else directory) / "forget_a_patient"
root_dir.mkdir(exist_ok=True)
print(root_dir)

# %% [markdown]
# ## Who would be forgotten?
#
# `plan` resolves the request and prints it with its cost. It writes nothing. One image is named; its whole patient goes.

# %%
bundle = Path("..") / "bundles" / "isic_unlearn"
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


run("plan", forget_ids=["PHANTOM_0000003"])

# %% [markdown]
# ## Forget
#
# The whole way: the original model, a reference that teaches, unlearning, a reference that judges, the retrained model for
# comparison, the audit and the report.

# %%
max_epochs = 60
epochs = {"original_epochs": max_epochs, "reference_epochs": max_epochs, "judge_epochs": max_epochs}
report = run("run", forget_ids=["PHANTOM_0000003"], unlearn_epochs=8, spatial_size=[48, 64], **epochs)

# %% [markdown]
# ## Read the report
#
# Lower is not better: the number to compare with is the retrained model's, or what is expected of an unseen case.

# %%
print(report["verdict"], *report["reasons"], sep="\n  ")
models = ["original", "unlearned", "retrained"]
splits = ["forget", "retain", "holdout"]
figure, axes = plt.subplots(figsize=(7, 3))
for place, model in enumerate(models):
    rows = [report["scores"][model][split] for split in splits]
    heights = [row["mean_iou"] for row in rows]
    axes.bar([index + 0.25 * place for index in range(3)], heights, 0.22, label=model)
axes.axhline(report["expected_unseen"], color="black", linestyle=":", label="expected of an unseen case")
axes.set_xticks([0.25, 1.25, 2.25], splits)
axes.set_ylabel("mean IoU")
axes.legend()
plt.show()

# %% [markdown]
# ## Before, after, and without ever having seen the patient
#
# The outlines that the three models give one of the forgotten photographs.

# %%
network = from_bundle(bundle, "network_factory")
preprocessing = from_bundle(bundle, "train#preprocessing", spatial_size=[48, 64])()
photograph = next((root_dir / "output" / "phantom_quick").rglob("PHANTOM_0000003.jpg"))
mask = next((root_dir / "output" / "phantom_quick").rglob("PHANTOM_0000003_segmentation.png"))
sample = preprocessing({"image": str(photograph), "label": str(mask)})
figure, axes = plt.subplots(1, 4, figsize=(12, 3))
axes[0].imshow(Image.open(photograph))
axes[0].set_title("forgotten photograph")
for axis, model in zip(axes[1:], models):
    plain = load_weights(network()(), root_dir / "output" / "models" / f"{model}.pt").eval()
    with torch.no_grad():
        answer = plain(sample["image"][None])[0, 0].sigmoid()
    axis.imshow(sample["image"].permute(1, 2, 0))
    axis.contour(answer, [0.5], colors="yellow")
    axis.set_title(model)
for axis in axes:
    axis.axis("off")
plt.show()

# %% [markdown]
# `report.html` in the same folder holds the whole evidence. The manifest says what was done without naming anybody:

# %%
print((root_dir / "output" / "manifest.json").read_text())

# %% [markdown]
# ## Release
#
# Traces are removed and the model is packed with its report and receipt. `verify` checks such a folder anywhere, offline.

# %%
run("purge", forget_ids=["PHANTOM_0000003"])
run("release", forget_ids=["PHANTOM_0000003"], sign=0)
print((root_dir / "output" / "release" / "model_card.md").read_text())

# %% [markdown]
# ## Cleanup data directory
#
# Remove the directory if a temporary one was used.

# %%
if directory is None:
    shutil.rmtree(root_dir.parent)
