# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's own caches, built, purged, and searched byte by byte."""

import json

import numpy as np
import pytest
import torch
from monai.data import CacheNTransDataset, LMDBDataset, PersistentDataset
from monai.data.utils import json_hashing
from monai.transforms import Compose, Lambdad, Transform
from PIL import Image

from monai_unlearn.purge import entry_names, purge, purge_cache
from monai_unlearn.request import RequestError

FORGOTTEN = (1, 12)
HASHED = {"persistent": {}, "json": {"hash_func": json_hashing}}


class Open(Transform):
    """A picture as a tensor of 8-bit values, so that its bytes can be searched for."""

    def __call__(self, item):
        return {**item, "image": torch.from_numpy(np.array(Image.open(item["image"])))}


@pytest.fixture
def items(tmp_path):
    rng = np.random.default_rng(0)
    made = []
    for number in range(15):
        path = tmp_path / "images" / f"case_{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
        made.append({"image": str(path), "label": str(path), "id": f"case_{number}"})
    return made


def blocks(items):
    return {item["id"]: np.array(Image.open(item["image"]))[3:6].tobytes() for item in items}


def fill(kind, items, folder):
    if kind == "lmdb":
        dataset = LMDBDataset(items, Open(), cache_dir=folder, db_name="cache", progress=False)
        [dataset[index] for index in range(len(items))]
        dataset._read_env.close()
        return dataset
    if kind == "ntrans":
        dataset = CacheNTransDataset(items, Compose([Open()]), cache_n_trans=1, cache_dir=folder)
    else:
        dataset = PersistentDataset(items, Open(), cache_dir=folder, **HASHED[kind])
    [dataset[index] for index in range(len(items))]
    return dataset


@pytest.mark.parametrize("kind", ["persistent", "json", "ntrans", "lmdb"])
def test_the_entries_of_forgotten_cases_go_and_the_others_stay_and_are_served(kind, items, tmp_path):
    if kind == "lmdb":
        pytest.importorskip("lmdb")
    cache, wanted = tmp_path / "cache", blocks(items)
    fill(kind, items, cache)

    def held():
        content = b"".join(path.read_bytes() for path in cache.rglob("*") if path.is_file())
        return {name for name, block in wanted.items() if block in content}

    assert held() == set(wanted)
    gone = [items[index] for index in FORGOTTEN]
    found = purge_cache(cache, [{**item, "group": "g", "forget": True} for item in gone])
    assert found == {"removed": 2, "kept": 13}
    assert held() == set(wanted) - {item["id"] for item in gone}
    if kind in HASHED:
        (tmp_path / "images" / "case_0.png").unlink()  # so that only the cache can serve it
        again = PersistentDataset([items[0]], Open(), cache_dir=cache, **HASHED[kind])
        assert again[0]["image"].numpy()[3:6].tobytes() == wanted["case_0"]
    assert purge_cache(cache, gone) == {"removed": 0, "kept": 13}


def test_a_name_within_a_longer_one_belongs_to_another_case(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"xx case_1.png yy")
    (tmp_path / "b.pt").write_bytes(b"xx case_11.png yy")
    (tmp_path / "c.pt").write_bytes(b"xx other_case_1.png yy")
    assert purge_cache(tmp_path, [{"image": "/data/case_1.png", "id": "case_1"}]) == {"removed": 1, "kept": 2}
    assert {path.name for path in tmp_path.iterdir()} == {"b.pt", "c.pt"}


def test_an_entry_that_names_nobody_is_found_by_its_hash(items, tmp_path):
    cache = tmp_path / "cache"
    item = {key: items[3][key] for key in ("image", "label")}
    PersistentDataset([item], Lambdad(("image", "label"), lambda path: torch.ones(3)), cache_dir=cache)[0]
    assert purge_cache(cache, [items[3]]) == {"removed": 1, "kept": 0}
    assert len(entry_names(items[3])) == 4


def test_nothing_is_removed_for_nobody(items, tmp_path):
    fill("persistent", items, tmp_path / "cache")
    assert purge_cache(tmp_path / "cache", []) == {"removed": 0, "kept": 15}


def a_run(folder):
    for name in ("private/resume/original.pt", "private/labels/labels.safetensors", "private/residual_memory/a.nii.gz",
                 "models/original.pt", "models/original.json", "models/adapter/adapter_model.safetensors",
                 "models/unlearned.pt", "models/strong.pt", "models/.unlearned.pt.x.tmp", "private/key",
                 "private/ids.json", "report.json"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("original", [False, True])
def test_a_run_keeps_what_it_needs_and_says_what_was_not_reached(original, tmp_path, items):
    run = a_run(tmp_path / "run")
    done = purge(run, [items[0]], original=original)
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    kept = {
        "private/lock",
        "private/key",
        "private/ids.json",
        "private/purged.json",
        "report.json",
        "models/unlearned.pt",
    }
    given_back = {"models/original.pt", "models/original.json", "models/adapter/adapter_model.safetensors"}
    assert left == kept | (set() if original else given_back)
    assert json.loads((run / "private" / "purged.json").read_text()) == done
    assert any("original" in text for text in done["not_reached"]) != original or original
    assert sum(done["files"].values()) == (8 if original else 5)
    assert "case_0" not in json.dumps(done)


def test_a_folder_without_a_finished_run_or_cache_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no finished run"):
        purge(tmp_path, [])
    with pytest.raises(RequestError, match="no folder"):
        purge_cache(tmp_path / "none", [])
