# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on real machines: kills, signals, full disks, flipped bits, dead workers, too little memory."""

import os
import random
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from test_handlers import Killed, killer
from toy import ITEMS, draw, plain_trainer

from monai_unlearn import checkpoint
from monai_unlearn.bundle import EXIT_CODES
from monai_unlearn.checkpoint import (
    CheckpointError,
    file_digest,
    hold_folder,
    read_weights,
    require_space,
    save_weights,
)
from monai_unlearn.data import MemoryDataset
from monai_unlearn.engines import MemoryShortError, load_phase, memory_explained, run_phase
from monai_unlearn.handlers import NotFiniteError, ResumeEachEpoch, StopWhenNotFinite, Terminated


@pytest.fixture(autouse=True)
def save_every_epoch(monkeypatch):
    monkeypatch.setattr(ResumeEachEpoch.__init__, "__defaults__", (0.0, None))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """sha256 of the weights of eight epochs that nothing disturbed."""
    return run_phase(plain_trainer(8), tmp_path_factory.mktemp("calm") / "models" / "m.pt", "c")["sha256"]


def at(event, act):
    """A handler that acts once."""
    done = []

    def once(engine):
        if not done:
            done.append(True)
            act(engine)

    return SimpleNamespace(attach=lambda engine: engine.add_event_handler(event, once))


def test_five_kills_and_two_spoilt_states_end_with_the_undisturbed_weights(tmp_path, undisturbed, caplog):
    path, state = tmp_path / "models" / "m.pt", tmp_path / "private" / "resume" / "m.pt"
    for turn, epoch in enumerate((2, 4, 3, 5, 7)):
        with pytest.raises(Killed):
            run_phase(plain_trainer(8, handlers=[killer(epoch)]), path, "c")
        if turn in (1, 3):
            content = state.read_bytes()
            state.write_bytes(content[:-100] if turn == 1 else content[:-100] + b"\0" * 100)
    record = run_phase(plain_trainer(8), path, "c")
    assert record["sha256"] == undisturbed
    assert caplog.text.count("is damaged") == 2


@pytest.mark.parametrize("number, error", [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("first", [True, False])
def test_a_signal_ends_training_after_the_iteration_and_it_goes_on_to_the_same_weights(
    number, error, first, tmp_path, undisturbed
):
    path, reached = tmp_path / "models" / "m.pt", []
    before = signal.getsignal(number)
    send = at(Events.ITERATION_STARTED(once=14), lambda engine: os.kill(os.getpid(), number))
    count = at(Events.ITERATION_COMPLETED(once=14), lambda engine: reached.append(engine.state.iteration))
    with pytest.raises(error) as ended:
        run_phase(plain_trainer(8, handlers=[send, count] if first else [count, send]), path, "c")
    assert reached == [14] and not path.exists()
    assert error is KeyboardInterrupt or ended.value.code == 143
    assert signal.getsignal(number) == before
    record = run_phase(plain_trainer(8), path, "c")
    assert record["sha256"] == undisturbed and record["images"] < 8 * 12 + 12


def test_every_flipped_bit_of_finished_weights_is_found(tmp_path):
    path, rng = tmp_path / "models" / "m.pt", random.Random(0)
    trainer = plain_trainer(1)
    record = run_phase(trainer, path, "c")
    content = path.read_bytes()
    for _ in range(50):
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="changed since it was written"):
            load_phase(trainer.network, path, record)


def in_child(act):
    """The exit code of ``act`` in a child process: 0, or 7 for a CheckpointError that says what to do."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except CheckpointError as error:
            os._exit(7 if "make room" in str(error) and "bytes" in str(error) else 8)
        except BaseException:
            os._exit(9)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path):
    path = tmp_path / "m.pt"
    save_weights(torch.nn.Linear(3, 3), path)
    before = file_digest(path)

    def write_more():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        save_weights(torch.nn.Linear(100, 100), path)

    assert in_child(write_more) == 7
    assert file_digest(path) == before and list(tmp_path.iterdir()) == [path]
    assert read_weights(path)["weight"].shape == (3, 3)


def test_a_full_disk_is_found_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="1,000 bytes free"):
        run_phase(plain_trainer(1, handlers=[killer(1)]), tmp_path / "new" / "models" / "m.pt", "c")
    assert not (tmp_path / "new").exists()
    require_space(tmp_path / "not" / "there", 999)


def test_a_dead_data_worker_ends_the_phase_and_keeps_what_was_reached(tmp_path, undisturbed):
    path = tmp_path / "models" / "m.pt"
    trainer, parent = plain_trainer(8), os.getpid()

    class Deadly(MemoryDataset):
        def __getitem__(self, index):
            if os.getpid() != parent and trainer.state.epoch >= 3:
                os._exit(1)
            return super().__getitem__(index)

    data = Deadly(ITEMS, draw, extra=["forget"])
    trainer.data_loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=1)
    with pytest.raises(RuntimeError, match="worker"):
        run_phase(trainer, path, "c")
    assert not path.exists() and (tmp_path / "private" / "resume" / "m.pt").exists()
    assert run_phase(plain_trainer(8), path, "c")["sha256"] == undisturbed


@pytest.mark.parametrize("cause", ["image", "weight"])
def test_numbers_that_are_not_finite_stop_at_once_and_say_where_they_come_from(cause, tmp_path):
    trainer = plain_trainer(3, handlers=[StopWhenNotFinite()])

    def spoil(engine):
        if cause == "image":
            engine.state.batch["image"][1, 0, 0, 0] = float("nan")
        else:
            next(trainer.network.parameters()).data.mul_(1e38)

    at(Events.ITERATION_STARTED(once=5), spoil).attach(trainer)
    message = "1 of its 4 images hold such values" if cause == "image" else "lower learning_rate"
    with pytest.raises(NotFiniteError, match=message):
        run_phase(trainer, tmp_path / "models" / "m.pt", "c")
    assert not (tmp_path / "models" / "m.pt").exists()


def test_too_little_memory_is_said_with_a_remedy():
    with pytest.raises(MemoryShortError, match="smaller --batch_size"), memory_explained():
        torch.empty(2**55)
    with pytest.raises(RuntimeError, match="something else"), memory_explained():
        raise RuntimeError("something else")


HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1], timeout=0)
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_in_the_same_folder_is_refused_until_the_first_has_ended(tmp_path):
    (tmp_path / "private").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "private" / "lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process works in"):
            hold_folder(tmp_path)
        with pytest.raises(CheckpointError, match="another process works in"):
            run_phase(plain_trainer(1), tmp_path / "models" / "m.pt", "c")
    finally:
        other.kill()
        other.wait()
    hold_folder(tmp_path)
    hold_folder(tmp_path)  # it is this process's already
    assert run_phase(plain_trainer(1), tmp_path / "models" / "m.pt", "c")["images"]


def test_every_kind_of_error_has_its_exit_code():
    assert {kind.__name__: code for kind, code in EXIT_CODES} == {
        "RequestError": 2, "StudentError": 2, "DataError": 3, "CheckpointError": 3, "ReleaseError": 3,
        "MemoryShortError": 3, "NotFiniteError": 4,
    }  # fmt: skip
