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
# # Three dimensions, ITK and DICOM
#
# The bundle `hippocampus_unlearn` works on volumes. Here the same volume is read as NIfTI, as MetaImage and as a DICOM series,
# a patient is forgotten, and a mask is written in the geometry of its volume.

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

import itk
import matplotlib.pyplot as plt
import numpy as np
from monai.bundle import ConfigWorkflow
from monai.config import print_config
from monai.transforms import LoadImage

from monai_unlearn import hippocampus_datalist, make_hippocampus_phantom, read_volume

print_config()

# %% [markdown]
# ## Setup data directory
#
# Results go to the folder in the `MONAI_DATA_DIRECTORY` environment variable, else to a temporary one.

# %%
directory = os.environ.get("MONAI_DATA_DIRECTORY")
root_dir = Path(tempfile.mkdtemp() if directory is None else directory) / "three_dimensions"
root_dir.mkdir(exist_ok=True)
print(root_dir)

# %% [markdown]
# ## One volume, three formats
#
# Headers are read before any voxel: a volume that claims too much, lies nowhere or points into another folder is refused.

# %%
folder = make_hippocampus_phantom(root_dir / "phantom", number=15)
item = hippocampus_datalist(folder)["training"][0]
volume = itk.imread(item["image"], itk.F)
itk.imwrite(volume, str(root_dir / "volume.mha"), compression=True)

series = root_dir / "series"
series.mkdir(exist_ok=True)
low, high = float(np.min(itk.array_view_from_image(volume))), float(np.max(itk.array_view_from_image(volume)))
whole = itk.cast_image_filter(
    itk.rescale_intensity_image_filter(volume, output_minimum=0, output_maximum=4000),
    ttype=[type(volume), itk.Image[itk.SS, 3]],
)
depth = itk.size(whole)[2]
io, writer = itk.GDCMImageIO.New(), itk.ImageSeriesWriter[itk.Image[itk.SS, 3], itk.Image[itk.SS, 2]].New()
writer.SetInput(whole)
writer.SetImageIO(io)
for number in range(depth):
    writer.AddFileName(str(series / f"{number:04}.dcm"))
writer.Update()

load = LoadImage(image_only=True, ensure_channel_first=True)
for path in (item["image"], root_dir / "volume.mha", series):
    loaded = load(path)
    print(Path(path).name, tuple(loaded.shape), np.round(loaded.affine.diagonal().numpy(), 2))

# %% [markdown]
# ## Forget a patient

# %%
bundle = Path("..") / "bundles" / "hippocampus_unlearn"
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


max_epochs = 6
options = {"dataset_dir": str(folder), "forget_ids": [Path(item["image"]).name.split(".")[0]]}
report = run("run", **options, original_epochs=max_epochs, reference_epochs=max_epochs, judge_epochs=max_epochs)
print(report["verdict"], *report["reasons"], sep="\n  ")

# %% [markdown]
# ## A mask in the volume's own geometry
#
# `inference.json` reads every format above from a folder and writes `.nii.gz` that lies where the volume lies.

# %%
inputs = root_dir / "inputs"
inputs.mkdir(exist_ok=True)
shutil.copy(item["image"], inputs)
shutil.copytree(series, inputs / "series", dirs_exist_ok=True)
workflow = ConfigWorkflow(
    str(bundle / "configs" / "inference.json"),
    workflow_type="infer",
    logging_file=False,
    dataset_dir=str(inputs),
    output_dir=str(root_dir / "masks"),
    model_path=str(root_dir / "output" / "models" / "unlearned.pt"),
)
workflow.initialize()
workflow.run()
slices, marked = read_volume({"image": item["image"], "label": item["label"]}, number=3)
figure, axes = plt.subplots(1, 3, figsize=(9, 3))
axes[0].imshow(slices)
axes[0].set_title("volume, middle slice")
axes[1].imshow(marked[..., marked.shape[2] // 2])
axes[1].set_title("annotation")
mask = load(next((root_dir / "masks").rglob(f"{Path(item['image']).name.split('.')[0]}*.nii.gz")))[0]
axes[2].imshow(mask[..., mask.shape[2] // 2])
axes[2].set_title("the unlearned model")
for axis in axes:
    axis.axis("off")
plt.show()
print(sorted(path.name for path in (root_dir / "masks").rglob("*.nii.gz")))

# %% [markdown]
# ## Cleanup data directory
#
# Remove the directory if a temporary one was used.

# %%
if directory is None:
    shutil.rmtree(root_dir.parent)
