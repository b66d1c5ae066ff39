# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What MONAI Label's ``monaibundle`` app passes to a bundle, without MONAI Label."""

import json
import shutil
from pathlib import Path

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from monai_unlearn.checkpoint import file_digest, read_weights
from monai_unlearn.label_server import make_studies
from monai_unlearn.monai_label import items_of

BUNDLES = Path(__file__).parents[1] / "bundles"
NAMES = sorted(path.name for path in BUNDLES.iterdir() if path.is_dir())
SEGMENTATION = [name for name in NAMES if "classification" not in name]


@pytest.fixture
def app(tmp_path):
    """A bundle as it lies in the app's ``model`` folder."""

    def folder_of(name):
        return Path(shutil.copytree(BUNDLES / name, tmp_path / name, ignore=shutil.ignore_patterns("output")))

    return folder_of


def pairs_of(phantom):
    inputs = sorted((phantom / "ISIC2018_Task1-2_Training_Input").iterdir())
    truths = phantom / "ISIC2018_Task1_Training_GroundTruth"
    return [{"image": str(path), "label": str(truths / f"{path.stem}_segmentation.png")} for path in inputs]


def overrides(bundle, pairs, val_split=-1.0, max_epochs=1, pretrained=True, **options):
    """The overrides of ``BundleTrainTask.__call__``; every displayable option is sent."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "train.json")
    handlers = parser.get("train#handlers")
    model = bundle / "models" / "model.pt"
    if pretrained and model.exists():
        load = {"model": "$@network"}
        handlers.insert(
            0, {"_target_": "CheckpointLoader", "load_path": str(model), "load_dict": load, "strict": False}
        )
    number = round(len(pairs) * (1 - val_split)) if val_split > 0 else len(pairs)
    found = {
        "bundle_root": str(bundle), "train#trainer#max_epochs": max_epochs, "train#dataset#data": pairs[:number],
        "device": torch.device("cpu"), "train#handlers": handlers,
        "displayable_configs": {**parser.get("displayable_configs"), **options},
    }  # fmt: skip
    return found if val_split < 0 else {**found, "validate#dataset#data": pairs[number:] if val_split > 0 else []}


def press(bundle, run_id, **given):
    """What the app does with them."""
    monai.bundle.run(
        run_id=run_id, init_id=None, final_id=None, meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "train.json"), **given,
    )  # fmt: skip


@pytest.mark.parametrize("val_split", [-1.0, 0.25])
def test_the_train_button_trains_the_plain_model_and_nothing_else(app, phantom, val_split, capsys):
    bundle = app("isic_unlearn")
    press(bundle, "run", **overrides(bundle, pairs_of(phantom)[:8], val_split))
    model = bundle / "models" / "model.pt"
    assert f"trained: {model}" in capsys.readouterr().out
    assert {path.name for path in (bundle / "models").iterdir()} == {"model.pt"}
    assert not list(bundle.rglob("report.html")) and not list(bundle.rglob("unlearned*"))
    first = file_digest(model)
    press(bundle, "run", **overrides(bundle, pairs_of(phantom)[:8], val_split))
    assert file_digest(model) != first  # it went on from the model that was there, which stays
    assert file_digest(bundle / "models" / f"model_{first[:8]}.pt") == first


def test_cases_are_forgotten_from_the_viewer(app, phantom, capsys):
    bundle, pairs = app("isic_unlearn"), pairs_of(phantom)
    press(bundle, "run", **overrides(bundle, pairs, 0.4, max_epochs=2))
    original = file_digest(bundle / "models" / "model.pt")
    names = [Path(pair["image"]).stem for pair in pairs[:2]]
    request = {"val_split": 0.4, "forget_ids": ", ".join(names), "job": "deletion", "forget_limit": 0.05}
    press(bundle, "unlearn", **overrides(bundle, pairs, **request))
    said = capsys.readouterr().out
    report = json.loads((bundle / "output" / "report.json").read_text())
    assert f"unlearned: {bundle / 'models' / 'unlearned.pt'}" in said and f"report: {bundle / 'output'}" in said
    assert report["splits"] == {"forget": 2, "retain": 16, "holdout": 12} and report["limits"]["forget"] == 0.05
    assert file_digest(bundle / "models" / "model.pt") == original
    made = read_weights(bundle / "models" / "unlearned.pt")
    assert set(made) == set(read_weights(bundle / "models" / "model.pt"))
    public = [path for path in (bundle / "output").rglob("*") if path.is_file() and "private" not in path.parts]
    assert public and not any(name.encode() in path.read_bytes() for path in public for name in names)
    press(bundle, "unlearn", **overrides(bundle, pairs, **request))
    assert (bundle / "models" / "unlearned_2.pt").is_file()  # the first one stays


@pytest.mark.parametrize(
    ("options", "val_split", "message"),
    [
        ({}, 0.4, "exactly one"),
        ({"forget_ids": " , "}, 0.4, "exactly one"),
        ({"forget_ids": "PHANTOM_0000000", "forget_request": "r.yaml"}, 0.4, "exactly one"),
        ({"forget_ids": "PHANTOM_0000029"}, 0.4, "1 of the cases to forget would be used for validation"),
        ({"forget_ids": "PHANTOM_0000000"}, -1.0, "nothing says which cases the model never saw"),
        ({"forget_ids": "PHANTOM_0000000"}, 0.0, "nothing says which cases the model never saw"),
        ({"forget_ids": "PHANTOM_9"}, 0.4, "not in the data list"),
        ({"forget_ids": "PHANTOM_0000000", "job": "erasure"}, 0.4, "job must be one of"),
    ],
)
def test_a_request_that_would_go_wrong_ends_with_one_clear_message(app, phantom, options, val_split, message, capsys):
    bundle, pairs = app("isic_unlearn"), pairs_of(phantom)
    (bundle / "models").mkdir(exist_ok=True)
    torch.save({"weight": torch.zeros(1)}, bundle / "models" / "model.pt")
    with pytest.raises(SystemExit) as error:
        press(bundle, "unlearn", **overrides(bundle, pairs, val_split, **options))
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert {path.name for path in (bundle / "models").iterdir()} == {"model.pt"}


def test_without_a_model_there_is_nothing_to_forget(app, phantom, capsys):
    bundle = app("isic_unlearn")
    with pytest.raises(SystemExit):
        press(bundle, "unlearn", **overrides(bundle, pairs_of(phantom), 0.4, forget_ids="PHANTOM_0000000"))
    assert "there is no model to unlearn from" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_the_phantom_is_laid_out_as_the_server_wants_it(name, tmp_path):
    studies = make_studies(tmp_path, name, number=4)
    names = {path.name.split(".")[0] for path in studies.iterdir() if path.is_file() and path.suffix != ".csv"}
    if name in SEGMENTATION:
        labelled = {path.name.split(".")[0] for path in (studies / "labels" / "final").iterdir()}
    else:
        labelled = {line.split(",")[0] for line in (studies / "classes.csv").read_text().splitlines()[1:]}
    assert len(names) >= 4 and labelled == names


@pytest.mark.parametrize("name", NAMES)
def test_every_bundle_is_arranged_alike(app, name, tmp_path):
    bundle = app(name)
    pairs = [{"image": f"{i}.png", "label": f"{i}_mask.png"} for i in range(10)]
    given = overrides(bundle, pairs, 0.3, forget_ids="1,2")
    given["train#handlers"].insert(0, {"_target_": "CheckpointLoader", "load_path": "model.pt"})
    config = str(bundle / "configs" / "train.json")
    flow = ConfigWorkflow(config, logging_file=False, run_id="unlearn", **given)
    flow.initialize()
    assert flow.parser.get("original_model") == "model.pt" and flow.parser.get("train#dataset#data") == "@train_items"
    assert flow.parser.get("train#trainer#max_epochs") == "@original_epochs"
    assert all(one["_target_"] != "CheckpointLoader" for one in flow.parser.get("train#handlers"))
    assert flow.run_id == "label_unlearn"
    path = flow.parser.get("datalist")
    assert items_of(path, "training") == pairs[:7] and items_of(path, "validation") == pairs[7:]
    assert (Path(path).stat().st_mode & 0o777) == 0o600
    plain = ConfigWorkflow(config, logging_file=False, run_id="run", **overrides(bundle, pairs))
    plain.initialize()
    assert plain.run_id == "label_train"


def test_names_of_files_are_never_evaluated(app, tmp_path):
    bundle = app("isic_unlearn")
    evil = f"$__import__('pathlib').Path('{tmp_path}/canary').touch()"
    pairs = [{"image": evil, "label": "@device"}, {"image": "a.png", "label": "a_mask.png"}]
    flow = ConfigWorkflow(
        str(bundle / "configs" / "train.json"), logging_file=False, run_id="run", **overrides(bundle, pairs)
    )
    flow.initialize()
    assert flow.parser.get_parsed_content("train#dataset").data == pairs
    assert not (tmp_path / "canary").exists()
