# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed in every one of its phases ends with the weights of the undisturbed run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from monai_unlearn.checkpoint import file_digest

ROOT = Path(__file__).parents[2]
PHASES = ("original", "reference", "unlearned", "retrained", "judge")


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", "bundles/isic_unlearn/configs/train.json",
         "--output_dir", str(folder), "--seed", "3"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_in_every_phase_ends_with_the_undisturbed_weights(tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert start(calm).wait(900) == 0
    states = 0
    for phase in PHASES:
        process, state = start(killed), killed / "private" / "resume" / f"{phase}.pt"
        deadline = time.monotonic() + 300
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        states += state.exists()
        time.sleep(1.5)  # into the epochs that are not saved yet
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "models" / f"{phase}.pt").exists(), phase
    assert states == len(PHASES)  # every kill hit a phase under way
    process = start(killed)
    while not (killed / "models" / "judge.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)  # and once more in the audit
    process.wait()
    assert start(killed).wait(900) == 0
    for phase in PHASES:
        assert file_digest(killed / "models" / f"{phase}.pt") == file_digest(calm / "models" / f"{phase}.pt"), phase
    assert not list((killed / "private" / "resume").iterdir())
    assert (killed / "report.json").is_file()
