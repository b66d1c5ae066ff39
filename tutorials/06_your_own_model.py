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
# # Your own model
#
# A model of yours forgets a patient: any MONAI bundle, your images in a folder, your weights. Nothing of the bundle is changed
# or copied; an overlay of three lines takes over its network, its deterministic preprocessing and its loss. Here the bundle and
# the images are made on the spot, as a stranger would have them; put your own folders in their place.
#
# nnU-Net and Auto3DSeg train one model per fold. Such folds are references at no cost: each knows nothing of the cases that it
# was not trained on. The last section shows how they are given.

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
from monai.bundle import ConfigWorkflow
from monai.config import print_config
from PIL import Image

from monai_unlearn import from_bundle, load_weights
from monai_unlearn.scan import scan_bundle

print_config()

# %% [markdown]
# ## Setup data directory
#
# Results go to the folder in the `MONAI_DATA_DIRECTORY` environment variable, else to a temporary one.

# %%
directory = os.environ.get("MONAI_DATA_DIRECTORY")
root_dir = Path(tempfile.mkdtemp() if directory is None else directory) / "your_own_model"
root_dir.mkdir(exist_ok=True)
print(root_dir)

# %% [markdown]
# ## Images in a folder
#
# Grey pictures and masks, two of each patient. What the unlearning has to know stands in a MONAI data list: where image and
# label are, whose they are (`patient_id`: nobody is split between the sides), and what the model never saw (`validation`).

# %%
images = root_dir / "images"
images.mkdir(exist_ok=True)
rng, grid = np.random.default_rng(0), np.mgrid[:48, :48]
items = []
for number in range(32):
    row, column = rng.integers(14, 34, 2)
    mask = (grid[0] - row) ** 2 + (grid[1] - column) ** 2 < rng.integers(5, 11) ** 2
    picture = rng.normal(90, 20, mask.shape) + 70 * mask
    item = {"image": f"{number:03}.png", "label": f"{number:03}_mask.png", "patient_id": f"patient-{number // 2}"}
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(images / item["image"])
    Image.fromarray((255 * mask).astype(np.uint8)).save(images / item["label"])
    items.append(item)
datalist = images / "datalist.json"
datalist.write_text(json.dumps({"training": items[:24], "validation": items[24:]}))

# %% [markdown]
# ## Their bundle
#
# Any bundle with `network_def`, a deterministic `validate#preprocessing` that gives tensors `image` and `label`, and a
# `train#loss_function`, as model-zoo bundles have them. It is trained with its own `run`.

# %%
bundle = root_dir / "disc_bundle"
(bundle / "configs").mkdir(parents=True, exist_ok=True)
load = [
    {"_target_": "LoadImaged", "keys": ["image", "label"], "ensure_channel_first": True},
    {"_target_": "ScaleIntensityd", "keys": "image"},
    {"_target_": "AsDiscreted", "keys": "label", "threshold": 128},
    {"_target_": "EnsureTyped", "keys": ["image", "label"], "track_meta": False},
]
flip = {"_target_": "RandFlipd", "keys": ["image", "label"], "prob": 0.5}
max_epochs = 20
config = {
    "imports": ["$import os", "$import torch"],
    "bundle_root": ".",
    "files": [],
    "network_def": {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 1,
                    "features": [8, 8, 16, 16, 16, 8]},
    "train": {
        "preprocessing": {"_target_": "Compose", "transforms": [*load, flip]},
        "loss_function": {"_target_": "DiceLoss", "sigmoid": True},
        "dataset": {"_target_": "CacheDataset", "data": "@files", "transform": "@train#preprocessing"},
        "trainer": {"_target_": "SupervisedTrainer", "max_epochs": max_epochs, "device": "$torch.device('cpu')",
                    "train_data_loader": {"_target_": "DataLoader", "dataset": "@train#dataset", "batch_size": 4,
                                          "shuffle": True},
                    "network": "@network_def", "loss_function": "@train#loss_function",
                    "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network_def.parameters()", "lr": 0.01}},
    },
    "validate": {"preprocessing": {"_target_": "Compose", "transforms": load}},
    "run": ["$@train#trainer.run()", "$os.makedirs(@bundle_root + '/models', exist_ok=True)",
            "$torch.save(@network_def.state_dict(), @bundle_root + '/models/model.pt')"],
}  # fmt: skip
(bundle / "configs" / "train.json").write_text(json.dumps(config, indent=4))
files = [{**item, "image": str(images / item["image"]), "label": str(images / item["label"])} for item in items[:24]]
theirs = ConfigWorkflow(
    str(bundle / "configs" / "train.json"), logging_file=False, bundle_root=str(bundle), files=files
)
theirs.initialize()
theirs.run()

# %% [markdown]
# ## Read it before it runs
#
# A MONAI configuration is code. The scan lists what a person should look at; here it is their saving of the weights.

# %%
print("\n".join(scan_bundle(bundle)))

# %% [markdown]
# ## The overlay
#
# Of the bundles here, take the one whose task is yours: `isic_unlearn` for one structure with a sigmoid in two dimensions,
# `hippocampus_unlearn` for several structures or three dimensions with a softmax, `isic_classification_unlearn` for classes.

# %%
overlay = root_dir / "my_bundle.json"
overlay.write_text(json.dumps({
    "network_factory": "$monai_unlearn.from_bundle(@foreign_bundle, 'network_def')",
    "train#preprocessing": "$monai_unlearn.from_bundle(@foreign_bundle, 'validate#preprocessing')()",
    "train#loss_function": "$monai_unlearn.from_bundle(@foreign_bundle, 'train#loss_function')()",
}, indent=4))  # fmt: skip

# %% [markdown]
# ## Forget, and see
#
# The same on the command line:
#
# `python -m monai.bundle run --config_file "['bundles/isic_unlearn/configs/train.json', 'my_bundle.json']" --foreign_bundle
# disc_bundle --original_model disc_bundle/models/model.pt --datalist images/datalist.json --forget_ids 003 --output_dir output`

# %%
ours = Path("..") / "bundles" / "isic_unlearn" / "configs" / "train.json"
workflow = ConfigWorkflow(
    [str(ours), str(overlay)],
    workflow_type="train",
    logging_file=False,
    quick=1,
    foreign_bundle=str(bundle),
    original_model=str(bundle / "models" / "model.pt"),
    datalist=str(datalist),
    forget_ids=["003"],
    output_dir=str(root_dir / "output"),
)
workflow.initialize()
workflow.run()
report = json.loads((root_dir / "output" / "report.json").read_text())
print(report["verdict"], *report["reasons"], sep="\n  ")
load_weights(from_bundle(bundle, "network_def")(), root_dir / "output" / "models" / "unlearned.pt")
for model, splits in report["scores"].items():
    plt.plot(list(splits), [row["mean_iou"] for row in splits.values()], marker="o", label=model)
plt.ylabel("mean IoU")
plt.legend()
plt.show()

# %% [markdown]
# ## Folds as references
#
# A reference is a model that never saw the patient. Five folds of a cross-validation are five of them, each for the cases of
# its own fold (`fold` in the data list):
#
# `--reference_models "{0: 'fold0.pt', 1: 'fold1.pt', 2: 'fold2.pt', 3: 'fold3.pt', 4: 'fold4.pt'}"`
#
# They judge, and only the short reference that teaches is trained. With `--folds_teach 1` they teach, which is the cheapest way
# to unlearn; a judge is trained for the audit then. Of an ensemble, `run exact` trains only the members anew that saw the
# patient: `--ensemble_models` takes the same mapping. Checkpoints of nnU-Net (`checkpoint_final.pth`) and Auto3DSeg (`model.pt`)
# are read as they are; `docs/howto.md` has the overlay for nnU-Net's network and preprocessing.

# %% [markdown]
# ## Cleanup data directory
#
# Remove the directory if a temporary one was used.

# %%
if directory is None:
    shutil.rmtree(root_dir.parent)
