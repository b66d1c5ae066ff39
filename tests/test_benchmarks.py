# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Every benchmark prints the table of the rows that were measured; nothing is timed here."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from monai_unlearn.audit import References

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if path.stem != "rows")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_table_shows_every_row_there_is(script):
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    with script.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    key = next(name for name in ("row", "method", "child") if name in rows[0])
    shown = {"retrain": "retrained, third seed (floor)"}
    assert rows and all(f"| {shown.get(row[key], row[key])} |" in done.stdout for row in rows)


@pytest.fixture
def medunlearn(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("medunlearn")


def patients(**losses):
    """A run of three patients with two pictures each, one forgotten, and what each network's loss on a picture is."""
    training = [{"image": f"{group}{eye}.png", "label": "", "group": group, "fold": fold, "forget": group == "a"}
                for group, fold in (("a", "0"), ("b", "1"), ("c", "1")) for eye in "12"]  # fmt: skip
    holdout = [{"image": "z.png", "label": "", "group": "z", "fold": "4"}]
    run = {"resolution": SimpleNamespace(training=training, holdout=holdout), "device": "cpu", "store": {}}
    run |= {"reference_items": [training[4:], training[2:4]], "validate#preprocessing": None, "validate#inferer": None}
    return run | {f"{name}_network": dict(zip("abcz", values)) for name, values in losses.items()}


def test_the_hardest_are_those_whose_loss_lies_furthest_below_that_of_a_model_that_never_saw_them(
    medunlearn, monkeypatch, tmp_path
):
    """c is what the judge never saw, b the teacher; the original's own level of loss on unseen cases does not count."""
    run = patients(original=(0.1, 0.3, 0.0, 1.0), reference=(0.5, 0.5, 9.0, 0.5), judge=(0.7, 9.0, 0.4, 0.5))
    monkeypatch.setattr(medunlearn, "content_of", lambda *_: run.get)
    monkeypatch.setattr(medunlearn, "MemoryDataset", lambda items, *_: [item["group"] for item in items])
    monkeypatch.setattr(
        medunlearn, "score_cases", lambda network, data, *_, **__: {"loss": np.array([network[one] for one in data])}
    )
    for share, ids in ((0.1, ["a1", "a2"]), (0.34, ["a1", "a2", "c1", "c2"])):  # a: 1.0, c: .9, b: .7
        medunlearn.hardest("isic_unlearn", {}, tmp_path, tmp_path / "made" / "request.yaml", share)
        request = yaml.safe_load((tmp_path / "made" / "request.yaml").read_text())
        assert request["selector"]["ids"] == ids and request["job"] == "deletion"


def test_each_model_of_a_cross_validation_sees_the_training_cases_outside_its_fold(medunlearn, monkeypatch, tmp_path):
    monkeypatch.setattr(medunlearn, "content_of", lambda *_: patients().get)
    called = []
    monkeypatch.setattr(medunlearn, "run", lambda *arguments, **options: called.append((arguments, options)))
    models = medunlearn.fold_models("isic_unlearn", {"dataset_dir": "data", "seed": 0}, tmp_path)
    assert list(models) == ["0", "1"] and len({options["seed"] for _, options in called}) == 2
    for (fold, model), (arguments, options), seen in zip(models.items(), called, ("bc", "a")):
        lists = json.loads(Path(options["datalist"]).read_text())
        assert {item["group"] for item in lists["training"]} == set(seen) and arguments[4] == "original"
        assert [item["group"] for item in lists["validation"]] == ["z"]
        assert Path(model) == tmp_path / "folds" / fold / "models" / "original.pt"


def test_the_third_retrained_model_sees_the_retained_cases_alone_and_is_handed_in_as_unlearned(
    medunlearn, monkeypatch, tmp_path
):
    resolution = patients()["resolution"]
    for item in [*resolution.training, *resolution.holdout]:  # nobody has folds where a folder states the holdout
        del item["fold"]
    resolution.splits = {"retain": [item for item in resolution.training if not item["forget"]]}
    monkeypatch.setattr(medunlearn, "content_of", lambda *_: {"resolution": resolution}.get)
    monkeypatch.setattr(medunlearn, "row_of", lambda report, *key: {"key": key})
    monkeypatch.setattr(medunlearn, "append", lambda *_: None)
    called = []
    monkeypatch.setattr(medunlearn, "run", lambda *arguments, **options: called.append(options))
    given = f"--data isic --dataset_dir d --output_dir {tmp_path} --methods retrain --seeds 7"
    monkeypatch.setattr(sys, "argv", ["medunlearn.py", *given.split()])
    medunlearn.main()
    trained, audited = called
    assert {item["group"] for item in json.loads(Path(trained["datalist"]).read_text())["training"]} == {"b", "c"}
    assert trained["seed"] != audited["seed"] == 7
    place = tmp_path / "isic" / "seed7" / "retrained_third" / "models" / "original.pt"
    assert audited["unlearned_model"] == str(place)


def test_a_row_names_the_strongest_attack_and_leaves_out_what_was_not_measured(medunlearn):
    scores = {split: {"mean_iou": 0.5} for split in medunlearn.SPLITS}
    units = [f"{part}_{unit}" for part in ("cache", "reference", "train", "retrain") for unit in
             ("seconds", "flops", "images")]  # fmt: skip
    report = {"verdict": "FAIL", "splits": {"forget": 2}, "expected_unseen": 0.4, "environment": {"threads": 1},
              "scores": dict.fromkeys(medunlearn.MODELS, scores), "agreement": {"unlearned": {"forget": 0.9}}, "js": {},
              "membership": {"unlearned": {"calibrated": {"auc": 0.6}}}, "cost": dict.fromkeys(units, 1.0),
              "strongest_attack": {"unlearned": {"attack": "rmia", "auc": 0.3}},
              "tug_of_war": {"unlearned": 0.8}}  # fmt: skip
    row = medunlearn.row_of(report, "isic", "random", "scrub", 0)
    assert (row["unlearned_strongest"], row["unlearned_strongest_attack"]) == (0.3, "rmia")
    assert (row["unlearned_auc"], row["unlearned_forget_agreement"]) == (0.6, 0.9)
    assert row["retrained_strongest"] is row["retrained_auc"] is row["unlearned_forget_js"] is None


def test_every_method_of_the_tables_is_drawn(medunlearn, tmp_path):
    with (BENCHMARKS / "medunlearn.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["data"], row["request"]) == ("isic", "random")]
    medunlearn.figure(rows, tmp_path / "images" / "methods.svg")
    drawn = (tmp_path / "images" / "methods.svg").read_text()
    seeds = {"retrained", "retrained, other seed", "retrained, third seed"}
    assert all(f">{name}<" in drawn for name in {row["method"] for row in rows} - {"retrain"} | seeds)


def test_the_frontier_holds_whom_no_other_beats_in_cost_unseen_score_and_agreement_at_once(medunlearn):
    found = {"identity": (1, 0.7, 0.8), "scrub": (2, 0.7, 0.8), "salun": (3, 0.8, 0.7), "default": (4, 0.8, 0.9),
             "views": (4, 0.8, 0.9), "fine_tune": (5, 0.79, 0.9), "retrain": (0, 1.0, 1.0)}  # fmt: skip
    rows = [{"method": name, "verdict": name.upper(), "cache_flops": 0, "reference_flops": cost / 2,
             "train_flops": cost / 2, "retrain_flops": 10, "unlearned_holdout": unseen + off,
             "unlearned_forget_agreement": agreement + off} for name, (cost, unseen, agreement) in found.items()
            for off in (-0.1, 0.1)]  # fmt: skip
    _, _, *lines = medunlearn.frontier(rows).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["identity", "salun", "default", "views"]
    assert lines[1] == "| salun | 0.300 | 0.800 | 0.700 | SALUN |"


def test_what_a_search_found_is_what_the_run_gets(medunlearn, monkeypatch, tmp_path):
    """Under the same share set apart, and in rows of its own, with the settings."""
    runs, rows = [], []

    def run(bundle, overlays, dataset_dir, folder, run_id="run", **options):
        runs.append((run_id, options))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tuning.json").write_text(json.dumps({"best": {"settings": {"learning_rate": 0.5}}}))

    monkeypatch.setattr(medunlearn, "run", run)
    monkeypatch.setattr(medunlearn, "row_of", lambda report, *key: {"key": key})
    monkeypatch.setattr(medunlearn, "append", lambda path, row: rows.append(row))
    given = f"--data isic --dataset_dir d --output_dir {tmp_path} --methods scrub --seeds 7 --tuned"
    monkeypatch.setattr(sys, "argv", ["medunlearn.py", *given.split()])
    medunlearn.main()
    (searched, of_search), (ran, of_run) = runs
    assert (searched, ran) == ("tune", "run") and of_search["tuning_share"] == 0.3
    assert of_run == of_search | {"learning_rate": 0.5}
    assert rows == [{"key": ("isic", "random, tuned", "scrub", 7), "settings": '{"learning_rate": 0.5}'}]


@pytest.fixture
def durability(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("durability")


def test_what_comes_back_is_held_against_how_far_retrained_models_lie_apart(durability):
    """Distances to each of three retrained models; the floor is that of their three pairs."""
    columns = ("benign_0", *durability.SHOWN)
    levels = {"original": 0.9, "default": 0.5, "standard": 0.6, "retrained": 0.4, "retrained_other": 0.5}
    levels |= {"retrained_third": 0.7, "views": 0.8, "reference_and_views": 0.5, "folds_and_views": 0.4}
    levels |= {"views_hardened": 0.9, "reference_and_views_hardened": 0.7, "folds_and_views_hardened": 0.3}
    rows = [{"seed": "0", "method": name, "order": "0", **dict.fromkeys(columns, level)}
            for name, level in levels.items()]  # fmt: skip
    unfinished = {"seed": "1", "method": "default", "order": "0", **dict.fromkeys(columns, 0.0)}
    assert durability.tables([unfinished]) == []
    scores, gaps = (table.splitlines() for table in durability.tables([*rows, unfinished]))
    assert len(scores) == 2 + len(levels) and scores[2] == "| original | " + " | ".join(["0.900"] * len(columns)) + " |"
    told = {line.split(" | ")[0]: {*line.strip(" |").split(" | ")[1:]} for line in gaps[2:]}
    assert told == {"| original": {"0.367"}, "| default": {"0.100"}, "| standard": {"0.133"},
                    "| views": {"0.267"}, "| reference_and_views": {"0.100"}, "| folds_and_views": {"0.133"},
                    "| views_hardened": {"0.367"}, "| reference_and_views_hardened": {"0.167"},
                    "| folds_and_views_hardened": {"0.233"},
                    "| retrained models among each other (floor)": {"0.200"}}  # fmt: skip


def test_what_comes_back_is_averaged_over_orders_of_batches(durability, tmp_path, monkeypatch):
    columns = ("benign_0", *durability.SHOWN)
    rows = [{"seed": "0", "method": name, "order": str(order), **dict.fromkeys(columns, place + order * (place == 1))}
            for order in range(durability.ORDERS) for place, name in enumerate(durability.OFTEN)]  # fmt: skip
    assert durability.tables(rows[:-1]) == []  # an order is not complete
    scores, gaps = (table.splitlines() for table in durability.tables(rows))
    assert len(scores) == 2 + len(durability.OFTEN) and scores[0].startswith("| forget score, 3 orders of batches |")
    told = {line.split(" | ")[0]: line.strip(" |").split(" | ")[1] for line in scores[2:]}
    assert told["| default"] == "0.000 [0.000, 0.000]" and told["| views_hardened"] == "2.000 [1.000, 3.000]"
    assert {line.split(" | ")[1] for line in gaps[2:] if line.startswith("| views_hardened")} == {
        "2.000 [1.000, 3.000]"
    }
    for row in rows[:-1]:
        durability.append(tmp_path / "rows.csv", row)
    names = ("original", *durability.OFTEN)
    assert durability.missing(tmp_path / "rows.csv", 0, names, durability.OFTEN) == {
        "original": [0], durability.OFTEN[-1]: [durability.ORDERS - 1]
    }  # fmt: skip


@pytest.mark.parametrize("there", [False, True])
def test_models_that_a_folder_lacks_are_made_by_a_process_of_their_own(durability, monkeypatch, tmp_path, there):
    """Made while their content is asked for, this process would keep the folder from the runs that follow."""
    folder, order = tmp_path / "isic" / "seed7", []
    folder.mkdir(parents=True)
    if there:
        (folder / "report.json").write_text("{}")
    monkeypatch.setattr(durability, "run", lambda *_, **given: order.append(("run", given["with_retrained"])))
    monkeypatch.setattr(durability, "content_of", lambda *_: lambda key: order.append(key))
    names = [name for name, _, _ in durability.networks(7, "d", tmp_path, ("retrained", "original"))]
    assert names == ["retrained", "original"]
    assert order == [("run", 2)] * (not there) + ["retrained_network", "original_network"]
    assert list(durability.networks(8, "d", tmp_path, ())) == [] and len(order) == 3 - there


@pytest.fixture
def distances(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("distances")


def test_outputs_are_held_against_how_far_retrained_models_lie_apart(distances):
    """The floor is the mean of three pairs, each in two rows; a model is not held against itself."""
    apart = {("retrained", "retrained_other"): 0.1, ("retrained", "retrained_third"): 0.2,
             ("retrained_other", "retrained_third"): 0.6}  # fmt: skip
    apart |= {(other, one): value for (one, other), value in apart.items()}
    apart |= {("views", "retrained"): 0.1, ("views", "retrained_other"): 0.3, ("views", "retrained_third"): 0.8}
    rows = []
    for number, name in enumerate(distances.MODELS):
        row = {"seed": "0", "method": name}
        for split in distances.SPLITS:
            row[f"{split}_score"] = str(number / 10)
            for key in distances.KEYS:
                row |= {f"{split}_{key}_{other}": "" if other == name else apart.get((name, other), 1.0)
                        for other in distances.RETRAINED}  # fmt: skip
        rows.append(row | attacks_of(calibrated=number / 100))
    assert distances.tables(rows[1:]) == []  # a model is missing
    *tables, attacks = distances.tables([*rows, {**rows[0], "seed": "1"}])  # another seed has only just begun
    assert attacks.splitlines()[2] == "| original | +0.000 | +0.000 [-0.100, +0.200] |"
    for split, table in zip(distances.SPLITS, tables, strict=True):
        lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in table.splitlines()}
        assert split in lines and lines["original"][1:] == ["1.0000", "1.0000"]
        assert lines["views"] == [f"{distances.MODELS.index('views') / 10:.3f}", "0.4000", "0.4000"]
        mean = sum(distances.MODELS.index(name) for name in distances.RETRAINED) / 30
        assert lines["retrained models, to each other (floor)"] == [f"{mean:.3f}", "0.3000", "0.3000"]


def attacks_of(**found):
    return {f"{kind}_{key}": value for kind, at in found.items()
            for key, value in (("difference", at), ("low", -0.1), ("high", 0.2))}  # fmt: skip


def test_the_strongest_attack_is_chosen_on_the_first_seed_alone_in_either_direction(distances):
    of_seed = {"0": attacks_of(calibrated=0.1, rmia=-0.3), "1": attacks_of(calibrated=0.9, rmia=0.0),
               "2": attacks_of(calibrated=0.9, rmia=0.1)}  # fmt: skip
    calibrated, strongest = distances.attack_tables({seed: dict.fromkeys(distances.MODELS, row)
                                                     for seed, row in of_seed.items()})  # fmt: skip
    assert calibrated.splitlines()[2].split(" | ")[:3] == ["| original", "+0.633", "+0.100 [-0.100, +0.200]"]
    _, _, line, *lines = strongest.splitlines()
    assert line.strip("| ").split(" | ") == ["original", "rmia", "-0.300 [-0.100, +0.200]", "+0.050",
                                             "+0.000 [-0.100, +0.200]", "+0.100 [-0.100, +0.200]"]  # fmt: skip
    assert len(lines) == len(distances.MODELS) - 2  # the retrained model is what the others are held against


def test_a_model_is_compared_with_every_retrained_one_but_itself(distances, toy_run):
    get, networks = toy_run
    row = distances.row_of("views", networks["views"], get, {name: networks[name] for name in distances.RETRAINED})
    alike, apart = (row[f"forget_js_{name}"] for name in ("retrained", "retrained_other"))
    assert alike == 0 < apart and row["forget_agreement_retrained"] == 1
    assert {row[column] for column in row if column.startswith(("calibrated", "rmia"))} == {0}
    own = distances.row_of("retrained", networks["retrained"], get, {n: networks[n] for n in distances.RETRAINED})
    assert own["retain_js_retrained"] == "" and own["forget_js_retrained_other"] == apart
    assert set(own) == set(row)


@pytest.fixture
def toy_run(distances):
    """Views and the retrained model hold the same weights, the others their own."""
    torch.manual_seed(0)
    items = [{"image": torch.randn(1, 8, 8), "label": torch.ones(1, 8, 8), "group": str(i)} for i in range(4)]
    resolution = type("Resolved", (), {"splits": {"forget": items[:2], "retain": items}, "holdout": items[2:]})
    get = {"resolution": resolution, "validate#preprocessing": dict, "store": {}, "device": "cpu",
           "validate#inferer": None, "judges": References([nn.Conv2d(1, 1, 1)]), "seed": 0}.get  # fmt: skip
    networks = {name: nn.Conv2d(1, 1, 1) for name in distances.RETRAINED}
    return get, networks | {"views": networks["retrained"]}


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("speed")


def test_a_gpu_is_asked_for_steps_and_whole_runs_and_what_does_not_fit_has_no_numbers(speed, monkeypatch):
    """On the processor in place of a GPU: the section has no other code of its own."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    one, kept = speed.gpu_rows(torch.device("cpu"), 64, 2)
    assert one["row"] == "64 2 all weights" and 0 < kept["flops"] < 0.5 * one["flops"] and kept["seconds"] > 0

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "one_pass", full)
    rows = list(speed.gpu_rows(torch.device("cpu"), 64, 2))
    assert rows == [{"row": "64 2 all weights"}, {"row": "64 2 decoder, kept"}]
    given = [{"section": "gpu", "setting": "64 x 64, batch 2", "seconds": "", **row} for row in rows]
    (table,) = speed.tables(given)
    assert table.count("does not fit") == 2
