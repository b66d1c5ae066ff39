# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""A bundle of somebody who never heard of this package: its model forgets by an overlay of a few lines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from monai_unlearn import from_bundle
from monai_unlearn.checkpoint import file_digest, load_weights
from monai_unlearn.request import RequestError
from monai_unlearn.scan import scan_bundle

ROOT = Path(__file__).parents[2]
LOAD = {
    "_target_": "Compose",
    "transforms": [
        {"_target_": "LoadImaged", "keys": ["image", "label"], "ensure_channel_first": True},
        {"_target_": "ScaleIntensityd", "keys": "image"},
        {"_target_": "AsDiscreted", "keys": "label", "threshold": 0.5},
        {"_target_": "EnsureTyped", "keys": ["image", "label"], "track_meta": False},
    ],
}
STRANGER = {
    "imports": ["$import json", "$from pathlib import Path"],
    "bundle_root": ".",
    "dataset_dir": "data",
    "ckpt_dir": "$@bundle_root + '/models'",
    "device": "$torch.device('cpu')",
    "files": "$json.loads(Path(@dataset_dir + '/datalist.json').read_text())",
    "network_def": {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 1,
                    "features": [8, 8, 16, 16, 16, 8]},
    "network": "$@network_def.to(@device)",
    "train": {
        "preprocessing": {"_target_": "Compose", "transforms": [
            *LOAD["transforms"], {"_target_": "RandFlipd", "keys": ["image", "label"], "prob": 0.5}]},
        "loss_function": {"_target_": "DiceLoss", "sigmoid": True},
        "dataset": {"_target_": "CacheDataset", "data": "$@files['training']", "transform": "@train#preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@train#dataset", "batch_size": 4, "shuffle": True},
        "trainer": {"_target_": "SupervisedTrainer", "max_epochs": 3, "device": "@device",
                    "train_data_loader": "@train#dataloader", "network": "@network",
                    "loss_function": "@train#loss_function",
                    "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": 0.01},
                    "inferer": {"_target_": "SimpleInferer"}},
    },
    "validate": {"preprocessing": LOAD},
    "run": ["$@train#trainer.run()", "$Path(@ckpt_dir).mkdir(exist_ok=True)",
            "$torch.save(@network.state_dict(), @ckpt_dir + '/model.pt')"],
}  # fmt: skip
OVERLAY = {
    "their_network": "network_def",  # an entry of the overlay's own
    "network_factory": "$monai_unlearn.from_bundle(@foreign_bundle, @their_network)",
    "train#preprocessing": "$monai_unlearn.from_bundle(@foreign_bundle, 'validate#preprocessing')()",
    "train#loss_function": "$monai_unlearn.from_bundle(@foreign_bundle, 'train#loss_function')()",
}


def draw(folder, number=32):
    """Grey pictures of one bright disc each, two a patient, and a data list that names a validation section."""
    rng, grid = np.random.default_rng(0), np.mgrid[:48, :48]
    items = []
    for index in range(number):
        row, column, radius = (*rng.integers(14, 34, 2).tolist(), rng.integers(5, 11))
        mask = (grid[0] - row) ** 2 + (grid[1] - column) ** 2 < radius**2
        picture = rng.normal(90, 20, mask.shape) + 70 * mask
        item = {"image": f"{index:03}.png", "label": f"{index:03}_mask.png", "patient_id": f"patient-{index // 2}"}
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / item["image"])
        Image.fromarray((255 * mask).astype(np.uint8)).save(folder / item["label"])
        items.append(item)
    (folder / "datalist.json").write_text(json.dumps({"training": items[:24], "validation": items[24:]}))
    absolute = [{**item, **{key: str(folder / item[key]) for key in ("image", "label")}} for item in items]
    return {"training": absolute[:24], "validation": absolute[24:]}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Their bundle with their data, trained as they train it."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "configs").mkdir()
    (folder / "data").mkdir()
    lists = draw(folder / "data")
    (folder / "configs" / "train.json").write_text(json.dumps(STRANGER, indent=4))
    (folder / "data" / "absolute.json").write_text(json.dumps(lists))
    flow = ConfigWorkflow(str(folder / "configs" / "train.json"), logging_file=False, bundle_root=str(folder),
                          files=lists)  # fmt: skip
    flow.initialize()
    flow.run()
    flow.finalize()
    (folder / "overlay.json").write_text(json.dumps(OVERLAY))
    return folder


def test_a_strangers_model_forgets_a_patient_by_overlay_alone(stranger, tmp_path):
    model = stranger / "models" / "model.pt"
    before = file_digest(model)
    flow = ConfigWorkflow(
        [str(ROOT / "bundles" / "isic_unlearn" / "configs" / "train.json"), str(stranger / "overlay.json")],
        workflow_type="train", logging_file=False, output_dir=str(tmp_path), quick=1,
        datalist=str(stranger / "data" / "datalist.json"), original_model=str(model), forget_ids="003",
        foreign_bundle=str(stranger),
    )  # fmt: skip
    flow.initialize()
    flow.run()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["splits"] == {"forget": 2, "retain": 22, "holdout": 8}
    assert report["verdict"] in ("FAIL", "INCONCLUSIVE", "NOT REFUTED")
    load_weights(from_bundle(stranger, "network_def")(), tmp_path / "models" / "unlearned.pt")
    assert file_digest(model) == before
    assert not any(path.name.startswith("report") for path in stranger.rglob("*"))


def test_each_call_makes_a_new_component(stranger):
    build = from_bundle(stranger, "network_def")
    first, second = build(), build()
    assert first is not second and type(first).__name__ == "BasicUNet"
    assert (
        from_bundle(stranger, "network_def", **{"network_def#out_channels": 3})()(torch.rand(1, 1, 48, 48)).shape[1]
        == 3
    )
    assert len(from_bundle(stranger, "validate#preprocessing")().transforms) == 4


def test_what_is_not_there_is_refused_by_name(stranger, tmp_path):
    with pytest.raises(RequestError, match="there is no"):
        from_bundle(tmp_path, "network_def")
    with pytest.raises(RequestError, match="has no netwrok_def"):
        from_bundle(stranger, "netwrok_def")


def test_the_scan_names_what_their_bundle_does_beyond_building_components(stranger):
    found = scan_bundle(stranger / "configs")
    assert {line.split(":")[1].strip() for line in found} >= {"files", "run#2"}
