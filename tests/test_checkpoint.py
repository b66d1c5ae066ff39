# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import ast
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_unet
from torch import nn

import monai_unlearn
from monai_unlearn.checkpoint import (
    CheckpointError,
    atomic_path,
    load_weights,
    read_safetensors,
    read_weights,
    save_weights,
    seeded,
    weights_digest,
    write_json,
    write_safetensors,
    write_text,
)
from monai_unlearn.lora import inject_lora


def test_weights_come_back_bit_for_bit(tmp_path):
    network = small_unet()
    save_weights(network, tmp_path / "m.pt")
    again = load_weights(small_unet(seed=1), tmp_path / "m.pt")
    torch.testing.assert_close(dict(again.state_dict()), dict(network.state_dict()), rtol=0, atol=0)
    assert weights_digest(again.state_dict()) == weights_digest(network.state_dict())
    torch.save({"model": network.state_dict()}, tmp_path / "nested.pt")
    load_weights(again, tmp_path / "nested.pt")


def test_weights_are_found_in_the_checkpoints_of_nnunet_and_auto3dseg(tmp_path):
    state = small_unet().state_dict()
    kept = {"logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(1)]}, "epoch": np.int64(8),
            "_best_ema": np.float32(0.2), "init_args": {"fold": 0, "device": torch.device("cpu")}}  # fmt: skip
    for key in ("network_weights", "state_dict"):
        torch.save({**kept, key: state}, tmp_path / "fold.pth")
        assert weights_digest(read_weights(tmp_path / "fold.pth")) == weights_digest(state)
    for other in (np.array([1.0]), np.array([Path()])):  # numbers are read, nothing that has to be unpickled
        torch.save({"network_weights": state, "logging": other}, tmp_path / "fold.pth")
        with pytest.raises(CheckpointError, match="more than a plain state dict"):
            read_weights(tmp_path / "fold.pth")


def test_the_digest_sees_values_names_and_types_and_nothing_else():
    state = {"a": torch.arange(4.0).view(2, 2), "b": torch.zeros(0)}
    digest = weights_digest(state)
    assert weights_digest({"b": state["b"], "a": state["a"].clone()}) == digest
    assert weights_digest({**state, "a": state["a"].t().contiguous().t()}) == digest  # another memory format
    flipped = state["a"].clone()
    flipped[0, 0] = -0.0
    for other in ({**state, "a": flipped}, {"c": state["a"], "b": state["b"]}, {**state, "a": state["a"].double()},
                  {**state, "a": state["a"].view(4)}):  # fmt: skip
        assert weights_digest(other) != digest


def test_every_key_is_accounted_for(tmp_path):
    network = small_unet()
    state = dict(network.state_dict())
    name = "model.0.conv.unit0.conv.weight"
    for change, message in (
        ({name: None, "extra": torch.zeros(1)}, r"1 missing \(model.0.*; 1 unknown \(extra\)"),
        ({name: torch.zeros(1)}, "1 of another shape"),
    ):
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, tmp_path / "m.pt")
        with pytest.raises(CheckpointError, match=message):
            load_weights(network, tmp_path / "m.pt")
    torch.save(inject_lora(small_unet(), rank=1).state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="merge adapters first"):
        load_weights(network, tmp_path / "m.pt")


class Payload:
    def __reduce__(self):
        return (os.system, ("touch canary",))


def test_damaged_foreign_and_evil_files_are_refused_in_plain_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights(small_unet(), "good.pt")
    good = Path("good.pt").read_bytes()
    cases = {
        "empty.pt": b"",
        "cut.pt": good[: len(good) // 2],
        "text.pt": b"not a checkpoint",
        "evil.pt": pickle.dumps({"model": Payload()}),
    }
    for name, content in cases.items():
        Path(name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} \({len(content)} bytes\) is damaged") as caught:
            read_weights(name)
        assert "weights_only" not in str(caught.value)
    torch.save({"model": Payload()}, "evil2.pt")
    torch.save(small_unet(), "module.pt")
    torch.save({"epoch": 3}, "other.pt")
    for name in ("evil2.pt", "module.pt", "other.pt"):
        with pytest.raises(CheckpointError, match=name):
            read_weights(name)
    with pytest.raises(CheckpointError, match="there is no file"):
        read_weights("missing.pt")
    Path("a.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="safetensors"):
        read_safetensors("a.safetensors")
    assert not Path("canary").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_written_nor_read(value, tmp_path):
    network = nn.Linear(2, 2)
    network.bias.data[0] = value
    with pytest.raises(CheckpointError, match="not finite, in bias"):
        save_weights(network, tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())
    torch.save(network.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="not finite"):
        read_weights(tmp_path / "m.pt")
    write_safetensors(network.state_dict(), tmp_path / "m.safetensors", {})
    with pytest.raises(CheckpointError, match="not finite"):
        read_safetensors(tmp_path / "m.safetensors")


def test_adapters_are_not_released_by_accident(tmp_path):
    with pytest.raises(CheckpointError, match="merge them before"):
        save_weights(inject_lora(small_unet(), rank=1), tmp_path / "m.pt")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text("old", path, mode=0o600)
    with pytest.raises(RuntimeError, match="power"), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("power")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / ".a.txt.xyz.tmp").write_text("stale")
    write_text("new", path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"x": float("nan")}, path)


def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path):
    code = (
        "import torch, sys\nfrom monai_unlearn.checkpoint import save_weights\n"
        "n = torch.nn.Linear(700, 700)\nprint('up', flush=True)\n"
        "while True: save_weights(n, sys.argv[1])"
    )
    path = tmp_path / "m.pt"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    for delay in range(5):
        time.sleep(0.05 + 0.013 * delay)
        if path.exists():
            read_weights(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    read_weights(path)
    save_weights(nn.Linear(2, 2), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_a_seeded_network_repeats_and_leaves_the_world_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two = seeded(lambda: nn.Linear(3, 3), 1), seeded(lambda: nn.Linear(3, 3), 1)
    assert torch.rand(1) == expected
    assert (one.weight == two.weight).all()
    assert (seeded(lambda: nn.Linear(3, 3), 2).weight != one.weight).any()


def test_nothing_in_the_package_unpickles_or_evaluates():
    for path in Path(monai_unlearn.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system", "yaml.load"), path
                if name == "torch.load":
                    assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} - {
                    "pickle_hashing",
                    "pickletools",
                }  # a hash, and a reader of opcodes
                assert not any("pickle" in name for name in (*names, getattr(node, "module", None) or "")), path
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None and ast.unparse(node.body) != "pass", path
