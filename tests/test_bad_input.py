# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Thousands of broken inputs: each is refused with an error of ours or read for what it is, and nothing else happens.

The numbers of tries stand in docs/reliability.md; ``test_the_documented_numbers`` holds them to ``TRIES``.
"""

import gzip
import io
import json
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import small_unet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_release import audited_run

from monai_unlearn import read_pair, read_volume, resolve
from monai_unlearn.checkpoint import CheckpointError, read_safetensors, read_weights, save_weights, write_safetensors
from monai_unlearn.datasets import DataError, load_splits
from monai_unlearn.lora import inject_lora, load_adapter, save_adapter
from monai_unlearn.preflight import prepare
from monai_unlearn.release import ReleaseError, finalise, verify
from monai_unlearn.request import RequestError, Rule, make_request
from monai_unlearn.scan import scan_config

ROOT = Path(__file__).parents[1]
TRIES = {
    "requests": 400,
    "rules": 400,
    "ids": 200,
    "data lists": 200,
    "metadata tables": 100,
    "configurations": 200,
    "weights": 200,
    "safetensors": 150,
    "adapters": 100,
    "photographs and masks": 250,
    "volumes": 250,
    "releases": 100,
}
EVIL = [
    "$__import__('os').system('touch canary')",
    "@network",
    "%canary",
    "../../canary",
    "a\nb",
    "",
    "\0",
    "-1",
    "nan",
]


def tries(name):
    return settings(
        max_examples=TRIES[name], deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder to work in; whatever appears in it, but for ``inputs``, is a defect."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inputs").mkdir()
    yield tmp_path / "inputs"
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


texts = st.one_of(st.sampled_from(EVIL), st.text(max_size=20))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
ITEMS = [
    {
        "image": f"i{n}.png",
        "label": f"i{n}_m.png",
        "patient_id": f"p{n // 2}",
        "age": str(40 + n),
        "group": f"p{n // 2}",
    }
    for n in range(12)
]
WORDS = [
    "age",
    "patient_id",
    "==",
    ">=",
    "<",
    "in",
    "and",
    "or",
    "not",
    "(",
    ")",
    "'p1'",
    "45",
    "[1,2]",
    "__import__('os')",
    "age.__class__",
    "lambda:1",
    "**",
    "None",
    "nothing",
]


def mutated(content, data):
    """Bytes with a few of them flipped, cut off, doubled or zeroed."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        if not content:
            break
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "double", "zero", "insert"]))
        if kind == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place:]
        elif kind == "double":
            content[place:place] = content[place : place + 40]
        elif kind == "zero":
            content[place : place + 40] = bytes(len(content[place : place + 40]))
        else:
            content[place:place] = data.draw(st.binary(max_size=20))
    return bytes(content)


def test_requests(alone):
    selectors = st.one_of(
        values,
        st.fixed_dictionaries({}, optional={"ids": values, "groups": values, "rule": values, "class": values,
                                            "fraction": scalars, "seed": scalars}),
    )  # fmt: skip
    keys = {"id": values, "job": st.one_of(st.sampled_from(["deletion", "suppression", "revision"]), values),
            "selector": selectors, "unit": values, "limits": values, "on_split_group": values, "missing": values,
            "reason": values, "other": values}  # fmt: skip

    @tries("requests")
    @given(st.one_of(st.fixed_dictionaries({}, optional=keys), st.fixed_dictionaries({"selector": selectors}), values))
    def run(content):
        path = alone / "request.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        try:
            resolution = resolve(make_request(path), ITEMS[:9], ITEMS[9:])
        except RequestError as error:
            assert len(str(error).splitlines()) <= 10
            return
        assert 0 < len(resolution.splits["forget"]) < 9

    run()


def test_rules():
    @tries("rules")
    @given(st.one_of(texts, st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)))
    def run(text):
        try:
            rule = Rule(text)
            found = [rule(item) for item in ITEMS]
        except RequestError as error:
            assert str(error)
            return
        assert all(one in (True, False, None) for one in found)
        assert "import" not in text and "lambda" not in text

    run()


def test_ids(alone):
    @tries("ids")
    @given(st.lists(texts, max_size=4))
    def run(ids):
        try:
            resolution = resolve(make_request(forget_ids=ids), ITEMS[:9], ITEMS[9:])
        except RequestError:
            return
        assert {str(one) for one in ids} <= {f"i{n}" for n in range(9)}
        assert resolution.splits["forget"]

    run()


def test_data_lists(alone):
    keys = {"image": texts, "label": values, "fold": scalars, "patient_id": scalars, "group": values}
    entries = st.one_of(values, st.fixed_dictionaries({}, optional=keys))
    names = st.sampled_from(["training", "validation", "test", "other"])
    sections = st.dictionaries(names, st.one_of(st.lists(entries, max_size=4), values), max_size=3)

    @tries("data lists")
    @given(st.one_of(sections, values), st.sampled_from([None, 0, "1"]))
    def run(content, fold):
        path = alone / "datalist.json"
        path.write_text(json.dumps(content))
        try:
            training, holdout = load_splits(None, path, fold)
        except (RequestError, DataError) as error:
            assert len(str(error).splitlines()) <= 10
            return
        assert training and holdout and all("image" in item for item in training)

    run()


def test_metadata_tables(alone, phantom):
    root = Path(shutil.copytree(phantom, alone / "data"))
    (table,) = root.rglob("*metadata*.csv")
    content = table.read_bytes()

    @tries("metadata tables")
    @given(st.data())
    def run(data):
        table.write_bytes(mutated(content, data))
        try:
            training, holdout = load_splits(root, None, 4)
        except (RequestError, DataError) as error:
            assert len(str(error).splitlines()) <= 10
            return
        assert training and holdout

    run()


def test_configurations():
    @tries("configurations")
    @given(st.recursive(st.one_of(scalars, texts.map(lambda text: "$" + text)),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                            st.one_of(st.just("_target_"), texts), inner, max_size=3), max_leaves=10))  # fmt: skip
    def run(content):
        assert all(isinstance(line, str) for line in scan_config(content))

    run()
    assert not Path("canary").exists()


def spoilt_files(name, alone, path, read, errors):
    content = path.read_bytes()

    @tries(name)
    @given(st.data())
    def run(data):
        path.write_bytes(mutated(content, data))
        try:
            read(path)
        except errors as error:
            assert "weights_only=False" not in str(error) and len(str(error).splitlines()) <= 10

    run()


def test_weights(alone):
    save_weights(small_unet(), alone / "m.pt")

    def read(path):
        assert all(value.isfinite().all() for value in read_weights(path).values() if value.is_floating_point())

    spoilt_files("weights", alone, alone / "m.pt", read, CheckpointError)


def test_safetensors(alone):
    write_safetensors({"a": torch.rand(20, 20), "b": torch.arange(5)}, alone / "m.safetensors", {"key": "value"})
    spoilt_files("safetensors", alone, alone / "m.safetensors", read_safetensors, CheckpointError)


def test_adapters(alone):
    save_adapter(inject_lora(small_unet(), rank=2), alone / "adapter")
    config = alone / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text())

    @tries("adapters")
    @given(st.dictionaries(st.one_of(st.sampled_from([*content, "auto_mapping", "custom"]), texts), values, min_size=1,
                           max_size=3))  # fmt: skip
    def run(changes):
        config.write_text(json.dumps({**content, **changes}))
        try:
            load_adapter(small_unet(), alone / "adapter")
        except CheckpointError:
            return

    run()


def test_photographs_and_masks(alone):
    rng = np.random.default_rng(0)
    item = {"image": str(alone / "a.jpg"), "label": str(alone / "a.png")}
    Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(item["image"])
    mask = np.zeros((24, 32), np.uint8)
    mask[8:16, 8:20] = 255
    Image.fromarray(mask).save(item["label"])
    files = {key: Path(item[key]).read_bytes() for key in ("image", "label")}

    @tries("photographs and masks")
    @given(st.data(), st.sampled_from(["image", "label"]))
    def run(data, key):
        Path(item[key]).write_bytes(mutated(files[key], data))
        try:
            image, found = read_pair(item)
            assert image.dtype == np.uint8 and image.shape[-1] == 3 and found.shape == image.shape[:2]
        except DataError as error:
            assert re.search(r"a\.(jpg|png)", str(error)) and len(str(error).splitlines()) <= 10
        finally:
            Path(item[key]).write_bytes(files[key])

    run()


def volume(folder, zipped=True):
    rng = np.random.default_rng(0)
    ending = ".nii.gz" if zipped else ".nii"
    item = {"image": str(folder / f"a{ending}"), "label": str(folder / f"b{ending}")}
    nib.save(nib.Nifti1Image(rng.random((8, 9, 10), dtype=np.float32), np.eye(4)), item["image"])
    nib.save(nib.Nifti1Image(rng.integers(0, 2, (8, 9, 10), dtype=np.uint8), np.eye(4)), item["label"])
    return item


def test_volumes(alone):
    item = volume(alone)
    files = {key: gzip.decompress(Path(item[key]).read_bytes()) for key in item}

    @tries("volumes")
    @given(st.data(), st.sampled_from(["image", "label"]), st.booleans())
    def run(data, key, before_zipping):
        whole = gzip.compress(files[key], mtime=0)
        content = (
            gzip.compress(mutated(files[key][:400], data) + files[key][400:])
            if before_zipping
            else mutated(whole, data)
        )
        Path(item[key]).write_bytes(content)
        try:
            slices, marked = read_volume(item)
            assert slices.dtype == np.uint8 and marked.dtype == bool
        except DataError as error:
            assert re.search(r"[ab]\.nii\.gz", str(error)) and len(str(error).splitlines()) <= 10
        finally:
            Path(item[key]).write_bytes(whole)

    run()


def test_releases(alone):
    run_folder = audited_run(alone / "run", small_unet(seed=1), small_unet(seed=2))
    folder = finalise(run_folder, small_unet(), run_folder / "models" / "original.pt", sign=False)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    @tries("releases")
    @given(st.data(), st.sampled_from(sorted(files)))
    def run(data, name):
        content = mutated(files[name], data)
        (folder / name).write_bytes(content)
        try:
            verify(folder)
            assert content == files[name] or name == "release.json"
        except (ReleaseError, CheckpointError) as error:
            assert str(error)
        finally:
            (folder / name).write_bytes(files[name])

    run()


def set_field(image, **fields):
    for name, value in fields.items():
        image.header[name] = value
    return image


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"srow_x": [float("nan"), 0, 0, 0], "sform_code": 1}, "affine is not finite"),
        ({"srow_x": [0, 0, 0, 0], "sform_code": 1}, "cannot be inverted"),
        ({"scl_slope": 1e30, "scl_inter": 0}, "absurd"),
        ({"dim": [3, 20000, 20000, 20, 1, 1, 1, 1]}, "claims 32,000,000,000 bytes"),
        ({"dim": [3, 3000, 300, 1, 1, 1, 1, 1]}, "claims 3,600,000 bytes"),
    ],
)
def test_volumes_whose_header_lies_are_refused_before_they_are_decoded(fields, message, tmp_path):
    item = volume(tmp_path)
    header = bytearray(gzip.decompress(Path(item["image"]).read_bytes()))
    changed = nib.Nifti1Header(bytes(header[:348]), check=False)
    for name, value in fields.items():
        changed[name] = value
    header[:348] = changed.binaryblock
    Path(item["image"]).write_bytes(gzip.compress(bytes(header)))
    with pytest.raises(DataError, match=message):
        read_volume(item)


def test_a_bomb_that_inflates_to_a_gigabyte_is_not_inflated(tmp_path, monkeypatch):
    item = volume(tmp_path)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape((1000, 1000, 300))
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        file.write(header.binaryblock + b"\0" * 4 + bytes(4_000_000))
    Path(item["image"]).write_bytes(buffer.getvalue())
    monkeypatch.setattr(np, "empty", None)  # nothing may be allocated for it
    with pytest.raises(DataError, match=r"claims 1,200,000,000 bytes"):
        read_volume(item)


@pytest.mark.parametrize(
    "name, line",
    [
        ("v.mhd", "ElementDataFile = ../secret.raw"),
        ("v.nhdr", "data file: /etc/passwd"),
        ("v.mhd", "ElementDataFile = LIST"),
    ],
)
def test_a_header_that_points_into_another_folder_is_refused(name, line, tmp_path):
    path = tmp_path / name
    path.write_text(f"NRRD0004\nNDims = 3\n{line}\n")
    with pytest.raises(DataError, match="outside of its folder"):
        read_volume({"image": str(path), "label": str(path)})


def test_every_bad_file_and_every_double_picture_stand_in_one_private_table(phantom, tmp_path, capsys):
    root = Path(shutil.copytree(phantom, tmp_path / "data"))
    (root / "phantom.json").unlink(missing_ok=True)
    images = sorted((root / "ISIC2018_Task1-2_Training_Input").iterdir())
    for path in images[:9]:
        path.write_bytes(path.read_bytes()[:200])
    shutil.copy(images[10], images[11])
    with pytest.raises(DataError, match="9 of 30 items cannot be used") as refused:
        prepare(dataset_dir=root, holdout_fold=4, forget_fraction=0.1, output_dir=tmp_path / "out")
    assert len(str(refused.value).splitlines()) <= 10 and "and 3 more" in str(refused.value)
    table = tmp_path / "out" / "private" / "problems.txt"
    assert table.stat().st_mode & 0o777 == 0o600
    lines = table.read_text().splitlines()
    assert [path.name for path in images[:9]] == sorted(line.split(":")[0] for line in lines[:9])
    assert lines[9:] == [f"{images[10].name}, {images[11].name}: the same picture"]


def test_the_documented_numbers():
    text = (ROOT / "docs" / "reliability.md").read_text()
    for name, number in TRIES.items():
        assert f"| {name} | {number} |" in text, name
    assert sum(TRIES.values()) >= 2000 and f"{sum(TRIES.values()):,}" in text
    assert os.environ.get("HYPOTHESIS_PROFILE") is None
