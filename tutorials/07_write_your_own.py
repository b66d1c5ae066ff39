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
# # Write your own relabel, loss and overlay
#
# What is special about a method fits into a function. A relabel is a callable `(image, label) -> label` with probabilities of
# the prediction's shape; a forget loss is a callable `(logits, label) -> scalar`; an overlay names them by their dotted path.

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
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from monai.bundle import ConfigWorkflow
from monai.config import print_config

print_config()

# %% [markdown]
# ## Setup data directory
#
# Results go to the folder in the `MONAI_DATA_DIRECTORY` environment variable, else to a temporary one.

# %%
directory = os.environ.get("MONAI_DATA_DIRECTORY")
root_dir = Path(tempfile.mkdtemp() if directory is None else directory) / "write_your_own"
root_dir.mkdir(exist_ok=True)
print(root_dir)

# %% [markdown]
# ## A relabel
#
# Forget samples keep the rough place of their lesion and lose the outline.

# %%
code = '''
import torch
from torch.nn import functional as F


def to_blurred(image, label, width=9):
    """The label blurred: where it was stays, what it looked like goes."""
    return F.avg_pool2d(label, width, stride=1, padding=width // 2, count_include_pad=False)


def focal(logits, label, gamma=2.0):
    """Binary cross-entropy that counts confident mistakes most."""
    loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
    return ((1 - torch.exp(-loss)) ** gamma * loss).mean()
'''
(root_dir / "my_method.py").write_text(code)
sys.path.insert(0, str(root_dir))

import my_method

label = torch.zeros(1, 1, 48, 64)
label[..., 16:32, 20:44] = 1
figure, axes = plt.subplots(1, 2, figsize=(7, 3))
axes[0].imshow(label[0, 0])
axes[1].imshow(my_method.to_blurred(None, label)[0, 0])
plt.show()

# %% [markdown]
# ## Its two laws, as tests
#
# A label has the prediction's shape and holds probabilities; the loss is 0 where the prediction is right and sure.

# %%
blurred = my_method.to_blurred(None, label)
assert blurred.shape == label.shape and blurred.min() >= 0 and blurred.max() <= 1
assert my_method.focal(torch.tensor([40.0, -40.0]), torch.tensor([1.0, 0.0])) < 1e-6

# %% [markdown]
# ## The overlay
#
# It imports the module and replaces two entries of `train.json`; everything else (sampler, stop rule, audit) stays.

# %%
overlay = root_dir / "blurred.json"
overlay.write_text(json.dumps({
    "+imports": ["$import my_method"],
    "relabel": "$my_method.to_blurred",
    "unlearn_phase#forget_loss": "$my_method.focal",
    "durability": "standard",
}, indent=4))  # fmt: skip
max_epochs = 4
workflow = ConfigWorkflow(
    [str(Path("..") / "bundles" / "isic_unlearn" / "configs" / "train.json"), str(overlay)],
    workflow_type="train",
    logging_file=False,
    quick=1,
    output_dir=str(root_dir / "output"),
    forget_ids=["PHANTOM_0000003", "PHANTOM_0000017"],
    unlearn_epochs=max_epochs,
)
workflow.initialize()
workflow.run()
report = json.loads((root_dir / "output" / "report.json").read_text())
print(report["verdict"], *report["reasons"], sep="\n  ")

# %% [markdown]
# Compare with the bundle's own methods by running each on the same `original_model` and `reference_models`; the file
# `benchmarks/medunlearn.py` does it for all of them.

# %% [markdown]
# ## Cleanup data directory
#
# Remove the directory if a temporary one was used.

# %%
if directory is None:
    shutil.rmtree(root_dir.parent)
