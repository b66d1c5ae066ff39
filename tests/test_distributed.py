# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from monai_unlearn import read_weights
from monai_unlearn.distributed import all_shares, num_processes, own_share, process_rank

WATCHDOG = 240  # seconds; a run takes some ten


def run(folder, processes):
    """One run with so many processes; a dead-lock ends it and the test."""
    folder.mkdir()
    program = Path(__file__).with_name("gloo.py")
    command = [[sys.executable, str(program), str(rank), str(processes), str(folder)] for rank in range(processes)]
    running = [subprocess.Popen(one, stderr=subprocess.PIPE, text=True) for one in command]
    try:
        for one in running:
            _, errors = one.communicate(timeout=WATCHDOG)
            assert one.returncode == 0, errors[-2000:]
    finally:
        for one in running:
            one.kill()
            one.wait()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    return folder, run(folder / "one", 1)[0], run(folder / "two", 2)


@pytest.mark.parametrize("number", [1, 2, 3, 7, "decoder"])
def test_two_processes_make_the_model_of_one(both, number):
    folder, one, two = both
    file = Path(str(number), "models", "unlearned.pt")
    alone, together = (read_weights(folder / name / file) for name in ("one", "two"))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    for rank in two:
        assert rank[str(number)]["iou"] == pytest.approx(one[str(number)]["iou"], abs=1e-5)
        for mine, theirs in zip(rank[str(number)]["history"], one[str(number)]["history"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)


def test_all_processes_return_the_same(both):
    alike = [{name: {**found, "looked": 0, "trunk": 0} if name != "refused" else found
              for name, found in rank.items()} for rank in both[2]]  # fmt: skip
    assert alike[0] == alike[1]
    assert both[2][0]["7"]["images"] >= both[1]["7"]["images"]  # stand-ins are computed, and counted


def test_what_is_kept_is_computed_once_by_one_of_the_processes(both):
    _, one, two = both
    assert one["decoder"]["looked"] == 13 and one["decoder"]["trunk"] == 13
    assert sorted(rank["decoder"]["looked"] for rank in two) == [6, 7]
    assert two[0]["7"]["looked"] > 0  # where nothing is kept the teacher is asked for every batch


def test_different_weights_are_refused(both):
    assert "start from different weights" in both[2][0]["refused"]


def test_alone_nothing_is_shared_out():
    assert (num_processes(), process_rank()) == (1, 0)
    assert all_shares(own_share([3, 1, 2])) == [3, 1, 2]
