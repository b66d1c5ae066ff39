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
# # Across the decision boundary
#
# *Targeted unlearning with perturbed sign gradients* (arXiv 2505.21872) relabels each sample to forget to the class across
# the decision boundary, found by an FGSM-like walk, and fine-tunes on that. First on points in the plane, where the regions
# can be seen; then on pictures, for a class and for a device.

# %% [markdown]
# ## Setup environment

# %%
# !python -c "import monai_unlearn" || pip install -q -c ../constraints.txt ..

# %% [markdown]
# ## Setup imports

# %%
import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from monai.bundle import ConfigWorkflow
from monai.config import print_config
from monai.utils import set_determinism

from monai_unlearn import BoundaryRelabel, InputDomain, PerturbedSignGradient

print_config()

# %% [markdown]
# ## Setup data directory
#
# Results go to the folder in the `MONAI_DATA_DIRECTORY` environment variable, else to a temporary one.

# %%
directory = os.environ.get("MONAI_DATA_DIRECTORY")
root_dir = Path(tempfile.mkdtemp() if directory is None else directory) / "cross_the_boundary"
root_dir.mkdir(exist_ok=True)
print(root_dir)

# %% [markdown]
# ## Points in the plane
#
# Three classes; the model is a small perceptron. A point is an image of one pixel with two channels.

# %%
set_determinism(0)
centres = torch.tensor([[0.3, 0.3], [0.7, 0.35], [0.5, 0.75]])
number = 60
points = torch.cat([centre + 0.1 * torch.randn(number, 2) for centre in centres]).clamp(0, 1)
labels = torch.arange(3).repeat_interleave(number)


def train(network, points, labels, steps, lr):
    optimizer = torch.optim.Adam(network.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(points[..., None, None]), labels).backward()
        optimizer.step()
    return network.eval()


network = torch.nn.Sequential(
    torch.nn.Flatten(), torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
    torch.nn.Linear(64, 3),
)  # fmt: skip
original = train(network, points, labels, 300, 1e-2)

# %% [markdown]
# ## The walk
#
# Each point of class 2 walks along the sign of the gradient, within a box of half-width ε around its start, until the model
# names another class. It stops there; that class is its new label.

# %%
search = PerturbedSignGradient(original, InputDomain.unit(), epsilon=0.25, seed=0)
relabel = BoundaryRelabel(search)
forget = labels == 2
one_hot = torch.nn.functional.one_hot(labels, 3).float()
new = relabel(points[forget][..., None, None], one_hot[forget])
print("new labels:", new.argmax(1).bincount(minlength=3).tolist(), relabel.report()["routes"])

# %% [markdown]
# ## The regions before and after
#
# The fine-tune learns the new labels beside the retained samples; class 2 loses its region to its neighbours, where the walk
# led, and not to anything else.

# %%
unlearned = copy.deepcopy(original)
mixed = labels.clone()
mixed[forget] = new.argmax(1)
unlearned = train(unlearned, points, mixed, 150, 3e-3)
grid = torch.cartesian_prod(torch.linspace(0, 1, 150), torch.linspace(0, 1, 150))
figure, axes = plt.subplots(1, 2, figsize=(9, 4))
for axis, (title, model) in zip(axes, {"before": original, "after": unlearned}.items()):
    with torch.no_grad():
        regions = model(grid[..., None, None]).argmax(1).reshape(150, 150)
    axis.imshow(regions.T, origin="lower", extent=(0, 1, 0, 1), alpha=0.3, cmap="brg", vmin=0, vmax=2)
    axis.scatter(*points.T, c=labels, cmap="brg", s=8)
    axis.set_title(title)
plt.show()

# %% [markdown]
# ## A class of pictures
#
# The same with the bundle: nine kinds of drawn lesions, one class (`vascular lesion`) leaves the label policy. That is the
# job `suppression`: right is that the class is gone also on unseen members, and that nothing else changed. The bundle's
# default masks the class out of the original's own answer; the overlay `boundary` uses the walk.

# %%
bundle = Path("..") / "bundles" / "isic_classification_unlearn"
(root_dir / "class.yaml").write_text("{id: policy-7, job: suppression, selector: {class: vascular lesion}}")


def run(overlay, request, name):
    files = [
        bundle / "configs" / "train.json",
        *([bundle / "configs" / "methods" / f"{overlay}.json"] if overlay else []),
    ]
    workflow = ConfigWorkflow(
        [str(file) for file in files],
        workflow_type="train",
        logging_file=False,
        output_dir=str(root_dir / name),
        quick=1,
        forget_request=str(request),
        with_retrained=0,
        original_epochs=4,
        spatial_size=[32, 32],
        relearn_steps=0,
    )
    workflow.initialize()
    workflow.run()
    return json.loads((root_dir / name / "report.json").read_text())


max_epochs = 2  # of unlearning, with quick=1
report = run("boundary", root_dir / "class.yaml", "class")
print(report["verdict"], *report["reasons"], sep="\n  ")
print("where they went:", report["relabelling"]["destinations"])

# %% [markdown]
# ## A criterion, or a device
#
# Pictures that meet a rule on the metadata (*70 years or older*, `device == "handheld"`) are the job `revision`: afterwards
# they should be treated as by a model that never saw such pictures, not be called another disease. Hard boundary labels do
# just that, so the default distils towards a model that never saw them. `on_split_group` settles patients on both sides.

# %%
request = root_dir / "criterion.yaml"
request.write_text("{id: elderly, job: revision, selector: {rule: 'age_approx >= 70'}, on_split_group: include}")
report = run(None, request, "criterion")
print(report["verdict"], *report["reasons"], sep="\n  ")
print("forgotten, unseen alike, unseen others:", report["splits"])

# %% [markdown]
# ## Cleanup data directory
#
# Remove the directory if a temporary one was used.

# %%
if directory is None:
    shutil.rmtree(root_dir.parent)
