# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""A live MONAI Label server: train, forget from the viewer, and look at both models' masks.

Needs an environment with MONAI Label, whose interpreter ``MONAI_UNLEARN_LABEL_PYTHON`` names; see docs/monai_label.md.
"""

import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.label
BUNDLES = Path(__file__).parents[2] / "bundles"
OPTIONS = {"device": "cpu", "multi_gpu": False, "val_split": 0.25, "pretrained": True, "model_filename": "model.pt"}
START, TASK, STEP = 180, 900, 3  # seconds: to come up, to finish a task, between looks


class Server:
    """One server in a process group of its own."""

    def __init__(self, python, folder, bundle, app):
        self.bundle = bundle
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [python, "-m", "monai_unlearn.label_server", "--bundle", str(BUNDLES / bundle), "--folder", folder,
                   "--app", app]  # fmt: skip
        self.log = (folder / f"server_{self.port}.log").open("w")
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=folder,
        )  # fmt: skip
        self.wait(lambda: self.get("/info/"), START)

    def wait(self, look, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, Path(self.log.name).read_text()[-2000:]
            try:
                found = look()
            except (urllib.error.URLError, ConnectionError):
                found = None
            if found:
                return found
            time.sleep(STEP)
        raise TimeoutError(f"nothing after {seconds} seconds; see {self.log.name}")

    def request(self, method, path, body=None, kind="application/json"):
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", method=method, data=body, headers={"Content-Type": kind}
        )
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return answer.read()

    def get(self, path):
        return json.loads(self.request("GET", path))

    def train(self, **options):
        """Start a training task, wait for its end, and give its status and log."""
        shown = self.get("/info/")["trainers"][self.bundle]["config"]
        keys = ("forget_ids", "forget_request", "job", "datalist", "learning_rate", "forget_limit", "utility_limit",
                "retain_limit", "membership_limit")  # fmt: skip
        body = {**{key: shown[key] for key in keys if key in shown}, **OPTIONS, **options}
        task = json.loads(self.request("POST", f"/train/{self.bundle}", json.dumps(body).encode()))["id"]

        def finished():
            now = self.get("/train/")
            return now if now["id"] == task and now["status"] in ("DONE", "ERROR") else None

        done = self.wait(finished, TASK)
        return done["status"], "\n".join(done["details"])

    def infer(self, image, model, output="image", extension=".nii.gz"):
        params = json.dumps({"model_filename": model, "device": "cpu", "result_extension": extension,
                             "result_dtype": "uint8"})  # fmt: skip
        part = f'--b\r\nContent-Disposition: form-data; name="params"\r\n\r\n{params}\r\n--b--\r\n'
        path = f"/infer/{self.bundle}?image={image}&output={output}"
        return self.request("POST", path, part.encode(), "multipart/form-data; boundary=b")

    def infer_all(self, model, extension):
        options = {"model_filename": model, "device": "cpu", "multi_gpu": False, "result_extension": extension,
                   "result_dtype": "uint8"}  # fmt: skip
        self.request("POST", f"/batch/infer/{self.bundle}?images=all", json.dumps(options).encode())

    def mask(self, image, model):
        return np.asarray(Image.open(io.BytesIO(self.infer(image, model, extension=".png"))))

    def stop(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)
        self.log.close()


@pytest.fixture
def serve(tmp_path):
    python = os.environ.get("MONAI_UNLEARN_LABEL_PYTHON")
    if not python:
        pytest.skip("needs MONAI Label: set MONAI_UNLEARN_LABEL_PYTHON to the interpreter of its environment")
    servers = []

    def start(bundle="isic_unlearn", app="monai_unlearn"):
        servers.append(Server(python, tmp_path, bundle, app))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


def test_cases_are_forgotten_over_rest(serve, tmp_path):
    server = serve(app="monaibundle")
    status, log = server.train(max_epochs=5)
    bundle = tmp_path / "apps" / "monaibundle" / "model" / "isic_unlearn"
    assert status == "DONE" and f"trained: {bundle / 'models' / 'model.pt'}" in log
    assert not list(bundle.rglob("unlearned*"))
    original = (bundle / "models" / "model.pt").read_bytes()

    status, log = server.train(run_id="unlearn")
    assert status == "ERROR" and "monai_unlearn: give forget_ids" in log

    lists = json.loads((bundle / "output" / "private" / "label_datalist.json").read_text())
    training, unseen = ([Path(item["image"]).stem for item in lists[name]] for name in ("training", "validation"))
    status, log = server.train(run_id="unlearn", forget_ids=unseen[0])
    assert status == "ERROR" and "would be used for validation" in log

    status, log = server.train(run_id="unlearn", forget_ids=",".join(training[:5]))
    assert status == "DONE" and f"report: {bundle / 'output' / 'report.html'}" in log
    report = json.loads((bundle / "output" / "report.json").read_text())
    assert report["splits"]["forget"] == 5 and report["splits"]["holdout"] == len(unseen)
    assert (bundle / "models" / "model.pt").read_bytes() == original
    server.stop()

    server = serve(app="monaibundle")  # a server offers the weights that were there when it came up
    assert server.get("/info/")["models"]["isic_unlearn"]["config"]["model_filename"] == ["model.pt", "unlearned.pt"]
    for image in (training[0], training[-1]):
        before, after = (server.mask(image, model) for model in ("model.pt", "unlearned.pt"))
        truth = np.asarray(Image.open(next(tmp_path.glob(f"studies/labels/final/{image}.png"))))
        assert before.shape == after.shape == truth.shape and set(np.unique(after)) <= {0, 1}


def trained_lists(bundle):
    lists = json.loads((bundle / "output" / "private" / "label_datalist.json").read_text())
    return ([Path(item["image"]).name.split(".")[0] for item in lists[name]] for name in ("training", "validation"))


def test_our_app_gives_a_result_and_keeps_the_maps_as_a_label_version(serve, tmp_path):
    server = serve()
    assert server.train(max_epochs=5)[0] == "DONE"
    bundle = tmp_path / "apps" / "monai_unlearn" / "model" / "isic_unlearn"
    forgotten = next(trained_lists(bundle))[:5]
    status, log = server.train(run_id="unlearn", forget_ids=",".join(forgotten))
    assert status == "DONE"
    result = json.loads(log[log.index("result: ") + 8 :].splitlines()[0])
    assert server.get("/info/")["train_stats"]["isic_unlearn"] == result
    assert result["verdict"] in ("FAIL", "INCONCLUSIVE", "NOT REFUTED") and Path(result["report"]).is_file()
    assert result["residual_maps"] == 5
    maps = {path.name.split(".")[0] for path in (tmp_path / "studies" / "labels" / "residual_memory").iterdir()}
    assert maps == set(forgotten)


def test_classes_are_trained_forgotten_and_scored(serve, tmp_path):
    server = serve("isic_classification_unlearn")
    assert server.train(max_epochs=3)[0] == "DONE"
    bundle = tmp_path / "apps" / "monai_unlearn" / "model" / "isic_classification_unlearn"
    forgotten = next(trained_lists(bundle))[:4]
    status, log = server.train(run_id="unlearn", forget_ids=",".join(forgotten))
    assert status == "DONE" and '"verdict"' in log
    server.stop()
    server = serve("isic_classification_unlearn")
    for model in ("model.pt", "unlearned.pt"):
        scores = json.loads(server.infer(forgotten[0], model, "json"))["prediction"]
        assert len(scores) == 9 and abs(sum(one["score"] for one in scores) - 1) < 1e-4


@pytest.mark.parametrize("app", ["monai_unlearn", "monaibundle"])
def test_volumes_are_forgotten_and_answered_one_by_one_and_all_at_once(serve, tmp_path, app):
    server = serve("hippocampus_unlearn", app)
    assert server.train(max_epochs=2)[0] == "DONE"
    forgotten = next(trained_lists(tmp_path / "apps" / app / "model" / "hippocampus_unlearn"))[:3]
    assert server.train(run_id="unlearn", forget_ids=",".join(forgotten))[0] == "DONE"
    server.stop()
    server = serve("hippocampus_unlearn", app)
    volume = nib.load(next((tmp_path / "studies").glob(f"{forgotten[0]}.nii.gz")))
    for model in ("model.pt", "unlearned.pt"):
        path = tmp_path / f"{model}.nii.gz"
        path.write_bytes(server.infer(forgotten[0], model))
        mask = nib.load(path)
        assert mask.shape == volume.shape and np.allclose(mask.affine, volume.affine, atol=1e-3)
    server.infer_all("unlearned.pt", ".nii.gz")
    answered = tmp_path / "studies" / "labels" / "original"
    server.wait(lambda: answered.is_dir() and len(list(answered.glob("*.nii.gz"))) == 60, TASK)


def test_vessels_are_forgotten_and_answered_one_by_one_and_all_at_once(serve, tmp_path):
    server = serve("chase_unlearn", "monaibundle")
    assert server.train(max_epochs=2)[0] == "DONE"
    forgotten = next(trained_lists(tmp_path / "apps" / "monaibundle" / "model" / "chase_unlearn"))[:2]
    assert server.train(run_id="unlearn", forget_ids=",".join(forgotten))[0] == "DONE"
    server.stop()
    server = serve("chase_unlearn", "monaibundle")
    picture = Image.open(tmp_path / "studies" / f"{forgotten[0]}.jpg")
    for model in ("model.pt", "unlearned.pt"):
        mask = server.mask(forgotten[0], model)
        assert mask.shape == (picture.height, picture.width) and set(np.unique(mask)) <= {0, 1}
    server.infer_all("unlearned.pt", ".png")
    answered = tmp_path / "studies" / "labels" / "original"
    server.wait(lambda: answered.is_dir() and len(list(answered.glob("*.png"))) == 28, TASK)
