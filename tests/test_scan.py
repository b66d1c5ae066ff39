# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Bundles from somebody else: what a person should read before they run."""

import json
import os
import shutil
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import nn

from monai_unlearn.__main__ import main
from monai_unlearn.scan import scan_bundle, scan_config, scan_expression

BUNDLES = Path(__file__).parents[1] / "bundles"
EVIL = {
    "a target that runs a shell": {"x": {"_target_": "os.system", "command": "touch canary"}},
    "a target of Python's own": {"x": {"_target_": "builtins.eval", "source": "1"}},
    "a process": {"x": {"_target_": "subprocess.Popen", "args": ["touch", "canary"]}},
    "an import in an expression": {"x": "$__import__('os').system('touch canary')"},
    "an import of a module": {"imports": ["$import subprocess"]},
    "an import from a module": {"imports": ["$from os import system"]},
    "a file": {"x": "$open('/etc/passwd').read()"},
    "weights unpickled": {"x": "$torch.load('weights.pt', weights_only=False)"},
    "a way around attributes": {"x": "$().__class__.__mro__[1].__subclasses__()"},
    "a name put together": {"x": "$getattr(torch, 'lo' + 'ad')('weights.pt')"},
    "a written-out dangerous name": {"x": "$getattr(torch, 'load')('weights.pt')"},
    "the network": {"x": "$torch.hub.load('somebody/something', 'model')"},
    "a download of MONAI's": {"x": {"_target_": "monai.apps.utils.download_url", "url": "http://example.org"}},
    "a bundle that runs another": {"x": {"_target_": "monai.bundle.run", "config_file": "other.json"}},
    "the environment": {"x": "$os.environ.update({})"},
    "a hidden list entry": {"x": [1, [2, {"y": "$eval('1')"}]]},
    "a target that is an expression": {"x": {"_target_": "$eval('os.system')"}},
    "an expression that only MONAI can read": {"x": "$1 +"},
    "a foreign file": {"x": "%/etc/hosts"},
    "a lambda": {"x": "$(lambda: 1)()"},
}


@pytest.mark.parametrize("name", EVIL)
def test_evil_configurations_are_found_and_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.json").write_text(json.dumps({"network": {"_target_": "UNet"}, **EVIL[name]}))
    assert scan_bundle(tmp_path)
    assert main(["scan", str(tmp_path)]) == 3
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("bundle", sorted(path.name for path in BUNDLES.iterdir()))
def test_our_own_bundles_hold_nothing_of_the_kind(bundle, tmp_path):
    copy = shutil.copytree(BUNDLES / bundle, tmp_path / bundle, ignore=shutil.ignore_patterns("output", "models"))
    assert scan_bundle(copy) == []
    assert main(["scan", str(copy)]) == 0


def test_ordinary_expressions_pass():
    texts = (
        "torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "@network#x + %train::y",
        "'a-b'.replace('-', '_')",
        "[i for i in range(3)]",
        "import glob",
        "monai.handlers.from_engine(['loss'])",
    )
    for text in texts:
        assert scan_expression(text) == [], text
    assert (
        scan_config({"x": {"_target_": "monai.networks.nets.UNet", "norm": "batch"}, "y": {"_target_": "DiceLoss"}})
        == []
    )


class Evil:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_weights_are_looked_into_and_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "good.pt")
    assert scan_bundle(tmp_path) == []
    torch.save({"w": torch.ones(2), "x": Evil()}, tmp_path / "evil.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.ts"))
    (tmp_path / "old.pt").write_bytes(b"\x80\x02cos\nsystem\n.")
    found = "\n".join(scan_bundle(tmp_path))
    for name, what in {"evil.pt": "call posix.system", "module.pt": "torch.nn.modules.linear.Linear",
                       "script.ts": "own code", "old.pt": "unpickled whole"}.items():  # fmt: skip
        assert any(name in line and what in line for line in found.splitlines()), (name, found)
    assert "good.pt" not in found and not (tmp_path / "canary").exists()


def test_dependencies_start_above_the_last_known_advisories():
    floors = {"monai": "1.6.1", "torch": "2.10", "peft": "0.21", "pillow": "12.3", "safetensors": "0.4"}
    config = ConfigParser()
    config.read(BUNDLES.parent / "setup.cfg")
    declared = dict(line.split(">=") for line in config["options"]["install_requires"].split() if ">=" in line)
    for name, floor in floors.items():
        assert Version(declared[name]) >= Version(floor), name
        assert Version(version(name)) >= Version(floor), name


def test_scripts_links_and_logging_that_evaluates_are_named(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "net.py").write_text("import os")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "logging.conf").write_text("[handler_a]\nclass=StreamHandler\nargs=(__import__('os').system('x'),)\n")
    (tmp_path / "broken.json").write_text("{")
    found = scan_bundle(tmp_path)
    assert len(found) == 4
    assert main(["scan", str(tmp_path / "nothing")]) == 2
