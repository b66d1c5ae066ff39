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
# # Is it really gone?
#
# A low score on the forgotten cases proves nothing: neither that they are forgotten, nor that the model is as it should be. Five
# models, whose verdicts are known beforehand, go through the same audit: the original and one that answers nothing are to FAIL,
# the retrained one is not.

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

from monai_unlearn import from_bundle, load_weights, save_weights

print_config()

# %% [markdown]
# ## Setup data directory
#
# Results go to the folder in the `MONAI_DATA_DIRECTORY` environment variable, else to a temporary one.

# %%
directory = os.environ.get("MONAI_DATA_DIRECTORY")
root_dir = Path(tempfile.mkdtemp() if directory is None else directory) / "is_it_really_gone"
root_dir.mkdir(exist_ok=True)
print(root_dir)

# %% [markdown]
# ## A run to take the models from
#
# The original, one reference that teaches, one that judges, the unlearned and the retrained model.

# %%
bundle = Path("..") / "bundles" / "isic_unlearn"
max_epochs = 60
forget_ids = ["PHANTOM_0000003", "PHANTOM_0000017", "PHANTOM_0000027"]


def run(name, run_id="run", **options):
    workflow = ConfigWorkflow(
        str(bundle / "configs" / "train.json"),
        workflow_type="train",
        run_id=run_id,
        logging_file=False,
        quick=1,
        forget_ids=forget_ids,
        output_dir=str(root_dir / name),
        relearn_steps=10,
        spatial_size=[48, 64],
        **options,
    )
    workflow.initialize()
    workflow.run()
    return json.loads((root_dir / name / "report.json").read_text())


epochs = {
    "original_epochs": max_epochs,
    "reference_epochs": max_epochs,
    "judge_epochs": max_epochs,
    "unlearn_epochs": 16,
}
reports = {"unlearned": run("first", **epochs)}
models = root_dir / "first" / "models"

# %% [markdown]
# ## The same audit for models of known verdict
#
# Only `audit` runs: it takes weights from anywhere. One of them is the original with its last bias lowered until it answers
# background everywhere, the easiest way to a forget score of 0.

# %%
network = load_weights(from_bundle(bundle, "network_factory")()(), models / "original.pt")
last = [parameter for name, parameter in network.named_parameters() if name.endswith("bias")][-1]
with torch.no_grad():
    last -= 100
save_weights(network, root_dir / "silent.pt")

given = {
    "dataset_dir": str(root_dir / "first" / "phantom_quick"),
    "holdout_fold": 4,
    "original_model": str(models / "original.pt"),
    "retrained_model": str(models / "retrained.pt"),
    "reference_models": [str(models / "reference.pt"), str(models / "judge.pt")],
}
for name, file in {"original": "original.pt", "retrained": "retrained.pt"}.items():
    copied = root_dir / f"{name}.pt"
    shutil.copy(models / file, copied)
    reports[name] = run(f"audit_{name}", "audit", unlearned_model=str(copied), **given)
reports["silent"] = run("audit_silent", "audit", unlearned_model=str(root_dir / "silent.pt"), **given)
for name, report in reports.items():
    print(f"{name:<10} {report['verdict']:<13} {report['reasons'][0]}")

# %% [markdown]
# ## Over-forgetting
#
# The forget score of each against what is expected of unseen cases (dotted). Above it is memory, below it is a hole that
# betrays the cases just as well.

# %%
names = list(reports)
scores = [reports[name]["scores"]["unlearned"]["forget"]["mean_iou"] for name in names]
plt.bar(names, scores)
plt.axhline(reports["unlearned"]["expected_unseen"], color="black", linestyle=":")
plt.ylabel("mean IoU on the forgotten cases")
plt.show()

# %% [markdown]
# ## Attacks
#
# Can somebody who holds the model tell forgotten cases from unseen ones? Calibrated attacks correct each case's difficulty by
# what the judging reference says of it; .5 is guessing, and far below .5 is as telling as far above.

# %%
for name, report in reports.items():
    rows = report["membership"]["unlearned"]
    print(f"{name:<10}", {attack: round(row["auc"], 2) for attack, row in rows.items()})

# %% [markdown]
# ## Does it spring back?
#
# A few steps of training on forgotten cases, beside the retrained model: knowledge that was only hidden comes back faster.

# %%
for name, report in reports.items():
    curve = report["relearn"]["forget"]["unlearned"]
    plt.plot([point["steps"] for point in curve], [point["score"] for point in curve], marker="o", label=name)
plt.xlabel("steps on forgotten cases")
plt.ylabel("score on forgotten cases")
plt.legend()
plt.show()

# %% [markdown]
# ## Cleanup data directory
#
# Remove the directory if a temporary one was used.

# %%
if directory is None:
    shutil.rmtree(root_dir.parent)
