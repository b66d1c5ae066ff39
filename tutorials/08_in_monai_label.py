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
# # Unlearning in MONAI Label
#
# The people who know which cases must go sit in front of a viewer. Here a MONAI Label server is started on this machine with
# the bundle `isic_unlearn` and a phantom, the plain model is trained with the Train button's request, and five cases are
# forgotten by one more request.
#
# MONAI Label lives in an environment of its own; `docs/monai_label.md` has the one command that makes it. Name its interpreter in
# `MONAI_UNLEARN_LABEL_PYTHON` before you start this notebook.

# %% [markdown]
# ## Setup environment

# %%
# !python -c "import monai_unlearn" || pip install -q -c ../constraints.txt ..

# %% [markdown]
# ## Setup imports

# %%
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from monai.config import print_config
from PIL import Image

print_config()

# %% [markdown]
# ## Setup data directory
#
# Results go to the folder in the `MONAI_DATA_DIRECTORY` environment variable, else to a temporary one.

# %%
directory = os.environ.get("MONAI_DATA_DIRECTORY")
root_dir = Path(tempfile.mkdtemp() if directory is None else directory) / "in_monai_label"
root_dir.mkdir(exist_ok=True)
print(root_dir)

# %% [markdown]
# ## The server
#
# On 127.0.0.1 only. Its app, the bundle's copy and the phantom's studies lie in one folder.

# %%
python = os.environ.get("MONAI_UNLEARN_LABEL_PYTHON", "python")
bundle = (Path("..") / "bundles" / "isic_unlearn").resolve()
address = "http://127.0.0.1:8123"
command = [python, "-m", "monai_unlearn.label_server", "--bundle", str(bundle), "--folder", str(root_dir)]


def start():
    log = (root_dir / "server.log").open("a")
    process = subprocess.Popen(
        command,
        cwd=root_dir,
        env={**os.environ, "MPLBACKEND": "agg"},  # a notebook's own is not known there
        start_new_session=True,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    for _ in range(90):
        time.sleep(2)
        try:
            ask("GET", "/info/")
            return process
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None:
                break
    raise RuntimeError((root_dir / "server.log").read_text()[-2000:])


def ask(method, path, body=None, kind="application/json"):
    asked = urllib.request.Request(address + path, method=method, data=body, headers={"Content-Type": kind})
    with urllib.request.urlopen(asked, timeout=120) as answer:
        return answer.read()


server = start()

# %% [markdown]
# ## Train the plain model
#
# What the Train button sends. It never unlearns. Every option that the panel shows has to be in a request over REST.


# %%
def train(**options):
    shown = json.loads(ask("GET", "/info/"))["trainers"]["isic_unlearn"]["config"]
    keys = ["forget_ids", "forget_request", "job", "datalist", "learning_rate", "forget_limit", "utility_limit",
            "retain_limit", "membership_limit"]  # fmt: skip
    fixed = {"device": "cpu", "multi_gpu": False, "val_split": 0.25, "pretrained": True, "model_filename": "model.pt"}
    body = {**{key: shown[key] for key in keys}, **fixed, **options}
    task = json.loads(ask("POST", "/train/isic_unlearn", json.dumps(body).encode()))["id"]
    while True:
        time.sleep(3)
        now = json.loads(ask("GET", "/train/"))
        if now["id"] == task and now["status"] in ("DONE", "ERROR"):
            print(
                now["status"], *[line for line in now["details"] if "monai_unlearn:" in line or ": /" in line], sep="\n"
            )
            return now["status"]


max_epochs = 6
assert train(max_epochs=max_epochs) == "DONE"

# %% [markdown]
# ## Forget five cases
#
# The cases that `val_split` set apart are the ones the model never saw; one of them cannot be forgotten, and would be refused,
# as an empty request would.

# %%
copied = root_dir / "apps" / "monai_unlearn" / "model" / "isic_unlearn"
lists = json.loads((copied / "output" / "private" / "label_datalist.json").read_text())
names = [Path(item["image"]).stem for item in lists["training"]][:5]
assert train(run_id="unlearn", forget_ids=",".join(names)) == "DONE"
print(json.loads((copied / "output" / "report.json").read_text())["verdict"])

# %% [markdown]
# ## Both models, side by side
#
# A server offers the weights that were there when it came up, so it is started again.

# %%
os.killpg(server.pid, signal.SIGTERM)
server.wait(30)
server = start()


def mask(image, model):
    params = json.dumps({"model_filename": model, "device": "cpu"})
    part = f'--b\r\nContent-Disposition: form-data; name="params"\r\n\r\n{params}\r\n--b--\r\n'
    path = f"/infer/isic_unlearn?image={image}&output=image"
    return np.asarray(Image.open(io.BytesIO(ask("POST", path, part.encode(), "multipart/form-data; boundary=b"))))


figure, axes = plt.subplots(1, 3, figsize=(9, 3))
axes[0].imshow(Image.open(next(root_dir.glob(f"studies/{names[0]}.jpg"))))
axes[1].imshow(mask(names[0], "model.pt"))
axes[2].imshow(mask(names[0], "unlearned.pt"))
for axis, title in zip(axes, ("forgotten case", "model.pt", "unlearned.pt")):
    axis.set_title(title)
    axis.axis("off")
plt.show()
os.killpg(server.pid, signal.SIGTERM)
server.wait(30)

# %% [markdown]
# ## Cleanup data directory
#
# Remove the directory if a temporary one was used.

# %%
if directory is None:
    shutil.rmtree(root_dir.parent)
