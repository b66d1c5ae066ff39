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

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.label
BUNDLE = Path(__file__).parents[2] / "bundles" / "isic_unlearn"
OPTIONS = {"device": "cpu", "multi_gpu": False, "val_split": 0.25, "pretrained": True, "model_filename": "model.pt"}
START, TASK, STEP = 180, 900, 3  # seconds: to come up, to finish a task, between looks


class Server:
    """One server in a process group of its own."""

    def __init__(self, python, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [python, "-m", "monai_unlearn.label_server", "--bundle", str(BUNDLE), "--folder", str(folder)]
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
        shown = self.get("/info/")["trainers"]["isic_unlearn"]["config"]
        keys = ("forget_ids", "forget_request", "job", "datalist", "learning_rate", "forget_limit", "utility_limit",
                "retain_limit", "membership_limit")  # fmt: skip
        body = {**{key: shown[key] for key in keys}, **OPTIONS, **options}
        task = json.loads(self.request("POST", "/train/isic_unlearn", json.dumps(body).encode()))["id"]

        def finished():
            now = self.get("/train/")
            return now if now["id"] == task and now["status"] in ("DONE", "ERROR") else None

        done = self.wait(finished, TASK)
        return done["status"], "\n".join(done["details"])

    def mask(self, image, model):
        params = json.dumps({"model_filename": model, "device": "cpu"})
        part = f'--b\r\nContent-Disposition: form-data; name="params"\r\n\r\n{params}\r\n--b--\r\n'
        answer = self.request(
            "POST", f"/infer/isic_unlearn?image={image}&output=image", part.encode(), "multipart/form-data; boundary=b"
        )
        return np.asarray(Image.open(io.BytesIO(answer)))

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

    def start():
        servers.append(Server(python, tmp_path))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


def test_cases_are_forgotten_over_rest(serve, tmp_path):
    server = serve()
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

    server = serve()  # a server offers the weights that were there when it came up
    assert server.get("/info/")["models"]["isic_unlearn"]["config"]["model_filename"] == ["model.pt", "unlearned.pt"]
    for image in (training[0], training[-1]):
        before, after = (server.mask(image, model) for model in ("model.pt", "unlearned.pt"))
        truth = np.asarray(Image.open(next(tmp_path.glob(f"studies/labels/final/{image}.png"))))
        assert before.shape == after.shape == truth.shape and set(np.unique(after)) <= {0, 1}
