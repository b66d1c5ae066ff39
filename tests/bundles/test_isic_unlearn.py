# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The real bundle on the quick phantom, in one process; the command line once."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out
from PIL import Image

from monai_unlearn import exact, merge_lora, tuning
from monai_unlearn.audit.scores import hard_masks, score_cases
from monai_unlearn.bundle import Stop, phase
from monai_unlearn.checkpoint import file_digest, load_weights, read_weights, save_weights, weights_digest
from monai_unlearn.data import MemoryDataset, store_key
from monai_unlearn.engines import run_phase
from monai_unlearn.lora import WeightLora
from monai_unlearn.relabel import to_out_of_fold, to_reference
from monai_unlearn.release import verify

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUNDLE = ROOT / "bundles" / "isic_unlearn"
CONFIGS = BUNDLE / "configs"
TRAIN = str(CONFIGS / "train.json")
FORGOTTEN = "PHANTOM_0000003,PHANTOM_0000017,PHANTOM_0000027"
RUN_IDS = ("run", "plan", "original", "retrain", "unlearn", "audit", "tune", "exact", "purge", "release")


def start(output_dir, *overlays, run_id="run", **arguments):
    """A bundle run up to its result, as the command line does it."""
    files = [TRAIN, *(str(CONFIGS / "methods" / f"{name}.json") for name in overlays)]
    flow = ConfigWorkflow(
        files,
        workflow_type="train",
        run_id=run_id,
        logging_file=False,
        quick=1,
        output_dir=str(output_dir),
        **arguments,
    )
    flow.initialize()
    flow.run()
    return flow


def report_of(folder):
    return json.loads((Path(folder) / "report.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a finished quick run."""
    folder = tmp_path_factory.mktemp("quick") / "output"
    trap = tmp_path_factory.mktemp("system") / "temporary"
    trap.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(trap))
        start(folder, forget_ids=FORGOTTEN)
    assert not [path for path in trap.rglob("*") if path.is_file()]  # caches would be residues that no purge finds
    return folder


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "output"))


def test_the_run_leaves_the_files_that_others_build_on(quick):
    files = {str(path.relative_to(quick)) for path in quick.rglob("*") if path.is_file() and "phantom" not in str(path)}
    models = {f"models/{name}.{end}" for name in ("original", "unlearned", "retrained", "reference", "judge")
              for end in ("pt", "json")}  # fmt: skip
    wanted = {"report.json", "report.html", "manifest.json", "private/key", "private/ids.json", *models}
    assert wanted <= files
    others = ("tensorboard/", "private/residual_memory/", "private/lock")
    assert all(name.startswith(others) for name in files - wanted)
    jsonschema.validate(report_of(quick), json.loads((HERE / "report_schema.json").read_text()))
    assert report_of(quick)["data"] == "phantom"


def test_a_search_starts_from_the_present_settings_and_goes_on_where_it_was_stopped(quick, tmp_path, monkeypatch):
    folder, apart = copy_of(quick, tmp_path), {"tuning_share": 0.4, "forget_ids": FORGOTTEN}
    trained = []
    monkeypatch.setattr(tuning, "run_phase", lambda *args: trained.append(1) or run_phase(*args))
    start(folder, run_id="tune", tuning_trials=2, **apart)
    first = json.loads((folder / "tuning.json").read_text())
    assert len(trained) == len(first["trials"]) == 2
    settings = [trial["settings"] for trial in first["trials"]]
    assert settings[0] == {"learning_rate": 0.001, "forget_weight": 1.0, "unlearn_epochs": 3} != settings[1]
    for trial in first["trials"]:
        assert 0.0001 <= trial["settings"]["learning_rate"] <= 0.01 and trial["settings"]["unlearn_epochs"] in range(
            1, 7
        )
        assert trial["objective"] == abs(trial["forget"] - first["expected"]) + trial["unseen_loss"]
    assert first["best"] == min(first["trials"], key=lambda trial: trial["objective"])
    assert not list((folder / "private" / "tuning" / "models").iterdir())  # half-forgotten models stay nowhere

    start(folder, run_id="tune", tuning_trials=3, **apart)
    second = json.loads((folder / "tuning.json").read_text())
    assert len(trained) == 3 and second["trials"][:2] == first["trials"]

    flow = start(folder, run_id="unlearn", **apart)  # a run with the same settings makes the same model
    resolution = flow.parser.get_parsed_content("resolution")
    assert not {item["image_id"] for item in resolution.tuning} & {item["image_id"] for item in resolution.holdout}
    network = flow.parser.get_parsed_content("unlearned_network")
    data = MemoryDataset(resolution.splits["forget"], flow.parser.get_parsed_content("train#preprocessing"))
    assert score_cases(network, data)["iou"].mean() == pytest.approx(first["trials"][0]["forget"], abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--tuning_share 0.3"),
        ({"tuning_share": 1}, r"in \[0, 1\)"),
        ({"tuning_share": 0.01}, "leaves one of both parts empty"),
        ({"tuning_share": 0.4, "tuning_trials": 0}, "at least 1"),
        ({"tuning_share": 0.4, "tuning_space": {"rank_": [1, 2]}}, "no number 'rank_'"),
        ({"tuning_share": 0.4, "tuning_space": {"learning_rate": [2, 10]}}, "learning_rate takes"),
    ],
)
def test_a_search_that_could_not_be_honest_is_refused(options, message, quick, tmp_path, capsys):
    with pytest.raises(Stop):
        start(copy_of(quick, tmp_path), run_id="tune", forget_ids=FORGOTTEN, **options)
    assert re.search(message, capsys.readouterr().err)


def test_fold_models_judge_each_case_that_they_never_saw(quick, tmp_path):
    models = quick / "models"
    names = ("reference", "judge", "retrained", "unlearned")  # any four will do here
    files = {fold: str(models / f"{name}.pt") for fold, name in enumerate(names)}
    weights = read_weights(models / "unlearned.pt")
    torch.save({key: 1.01 * value if value.is_floating_point() else value for key, value in weights.items()},
               tmp_path / "nearly.pt")  # fmt: skip
    start(
        tmp_path, run_id="audit", dataset_dir=str(quick / "phantom_quick"), holdout_fold=4, relearn_steps="false",
        original_model=str(models / "original.pt"), unlearned_model=str(tmp_path / "nearly.pt"), reference_models=files,
        forget_ids=FORGOTTEN, with_retrained=0,
    )  # fmt: skip
    report = report_of(tmp_path)
    assert report["tier"] == 1 and report["references"] == 4 and report["relearn"] is None
    assert report["scores"]["judge"]["retain"]["n"] == report["splits"]["retain"]
    assert "reference" not in report["scores"] and report["cost"]["unlearn_seconds"] is None
    jsonschema.validate(report, json.loads((HERE / "report_schema.json").read_text()))


def test_fold_models_can_teach_and_somebody_else_judges_then(quick, tmp_path, capsys):
    models = quick / "models"
    files = {fold: str(models / f"{name}.pt") for fold, name in
             enumerate(("retrained", "reference", "judge", "unlearned"))}  # fmt: skip
    options = {"dataset_dir": str(quick / "phantom_quick"), "holdout_fold": 4, "with_retrained": 0, "folds_teach": 1,
               "original_model": str(models / "original.pt"), "relearn_steps": 0,
               "forget_ids": FORGOTTEN}  # fmt: skip
    start(tmp_path, reference_models=files, **options)
    report = report_of(tmp_path)
    assert {path.name for path in (tmp_path / "models").glob("*.pt")} == {"judge.pt", "unlearned.pt"}
    assert report["cost"]["references_given"] and report["cost"]["reference_flops"] == 0
    assert report["stop"]["reference"] is not None and "reference" not in report["scores"]
    assert report["tier"] == 1 and report["references"] == 1
    with pytest.raises(Stop):
        start(tmp_path / "list", reference_models=[files[0], files[1]], **options)
    assert "by the fold each never saw" in capsys.readouterr().err


@pytest.mark.parametrize("trained_on", ["fold", "others"])
def test_of_an_ensemble_only_the_members_that_saw_the_forget_set_are_trained_anew(
    trained_on, quick, tmp_path, monkeypatch
):
    models, trained = quick / "models", {}
    files = {fold: str(models / f"{name}.pt") for fold, name in
             enumerate(("retrained", "reference", "judge", "unlearned"))}  # fmt: skip
    monkeypatch.setattr(
        exact, "phase", lambda *args, **kwargs: trained.update({kwargs["phase"]: kwargs}) or phase(*args, **kwargs)
    )
    options = {"dataset_dir": str(quick / "phantom_quick"), "holdout_fold": 4, "forget_ids": FORGOTTEN.split(",")[0]}
    for _ in range(2):  # the second time everything is there
        flow = start(tmp_path, run_id="exact", ensemble_models=files, ensemble_trained_on=trained_on, **options)
    training = flow.parser.get_parsed_content("resolution").training
    holding = {str(item["fold"]) for item in training if item["forget"]}
    assert len(holding) == 1
    content = json.loads((tmp_path / "ensemble.json").read_text())
    anew = holding if trained_on == "fold" else {str(fold) for fold in files} - holding
    assert {row["fold"] for row in content["members"] if row["retrained"]} == anew
    assert set(trained) == {f"ensemble_{fold}" for fold in anew} and content["retrained"] == len(anew)
    seeds = {kwargs["network_seed"] for kwargs in trained.values()}
    assert len(seeds) == len(anew)
    for row in content["members"]:
        mine = [item for item in training if (str(item["fold"]) == row["fold"]) == (trained_on == "fold")]
        kept = {item["image_id"] for item in mine if not item["forget"]}
        assert (row["cases"], row["forgotten"]) == (len(kept), len(mine) - len(kept))
        file = tmp_path / "models" / "ensemble" / f"fold{row['fold']}.pt"
        assert file_digest(file) == row["sha256"]
        if row["retrained"]:
            assert {item["image_id"] for item in trained[f"ensemble_{row['fold']}"]["train_items"]} == kept
            assert file_digest(file) != file_digest(files[int(row["fold"])]) and row["flops"] > 0
        else:
            assert file_digest(file) == file_digest(files[int(row["fold"])]) and row["flops"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble_models": None}, "an ensemble comes by fold"),
        ({"ensemble_trained_on": "all"}, "--ensemble_trained_on takes"),
        ({"ensemble_models": {0: "original"}}, "no member for fold 1, 2, 3"),
        ({"ensemble_models": {"../0": "original"}}, "named by letters and digits"),
    ],
)
def test_an_ensemble_that_does_not_fit_the_data_is_refused(options, message, quick, tmp_path, capsys):
    given = {"dataset_dir": str(quick / "phantom_quick"), "holdout_fold": 4, "forget_ids": FORGOTTEN,
             "ensemble_models": dict.fromkeys(range(4), "original"), **options}  # fmt: skip
    if given["ensemble_models"]:
        given["ensemble_models"] = {fold: str(quick / "models" / f"{name}.pt")
                                    for fold, name in given["ensemble_models"].items()}  # fmt: skip
    with pytest.raises(Stop):
        start(tmp_path, run_id="exact", **given)
    assert message in capsys.readouterr().err


def test_without_references_the_audit_is_a_screen(quick, tmp_path):
    models = quick / "models"
    start(
        tmp_path, run_id="audit", dataset_dir=str(quick / "phantom_quick"), holdout_fold=4, tier=0,
        original_model=str(models / "original.pt"), unlearned_model=str(models / "unlearned.pt"),
        forget_ids=FORGOTTEN, with_retrained=0,
    )  # fmt: skip
    report = report_of(tmp_path)
    assert report["tier"] == 0 and report["verdict"] in ("FAIL", "INCONCLUSIVE") and report["expected_unseen"] is None
    assert not list(tmp_path.glob("models/*.pt"))
    jsonschema.validate(report, json.loads((HERE / "report_schema.json").read_text()))


def test_no_name_of_a_patient_or_file_is_in_what_is_written(quick):
    for path in quick.rglob("*"):
        if path.is_file() and not {"private", "phantom_quick"} & set(path.relative_to(quick).parts):
            content = path.read_bytes()
            assert b"PHANTOM_00" not in content and b"P0000" not in content and b"phantom_quick/" not in content, path


def network_of():
    config = ConfigParser.load_config_file(str(CONFIGS / "inference.json"))
    return ConfigParser(config).get_parsed_content("network_def")


def test_a_purged_run_is_released_with_a_receipt_that_names_nobody(quick, tmp_path, capsys):
    folder = copy_of(quick, tmp_path)
    start(folder, run_id="purge", forget_ids=FORGOTTEN)
    start(folder, run_id="release", forget_ids=FORGOTTEN)
    assert "python -m monai_unlearn verify" in capsys.readouterr().out
    release = folder / "release"
    found = verify(release, folder / "signing_public.pem")
    assert found["signature"] == "checked" and found["verdict"] == report_of(folder)["verdict"]
    receipt = json.loads((release / "receipt.json").read_text())
    assert receipt["asked"]["counts"] == report_of(folder)["splits"]
    assert receipt["purged"]["files"] and receipt["done"]["settings"]["options"]["seed"] == 0
    assert not (folder / "private" / "residual_memory").exists()
    for path in release.rglob("*"):
        assert path.is_dir() or not re.search(rb"PHANTOM_00|P0000|phantom_quick/|ISIC2018_Task1", path.read_bytes()), (
            path.name
        )
    capsys.readouterr()
    save_weights(load_weights(network_of(), quick / "models" / "judge.pt"), folder / "models" / "unlearned.pt")
    shutil.rmtree(release)
    with pytest.raises(Stop) as stopped:
        start(folder, run_id="release", forget_ids=FORGOTTEN)
    assert stopped.value.code == 3 and "other weights" in capsys.readouterr().err


def test_the_unlearned_weights_are_plain_and_load_strictly(quick):
    network = network_of()
    network.load_state_dict(read_weights(quick / "models" / "unlearned.pt"), strict=True)
    record = json.loads((quick / "models" / "unlearned.json").read_text())
    assert record["sha256"] == file_digest(quick / "models" / "unlearned.pt")
    assert not any(isinstance(module, WeightLora) for module in merge_lora(network).modules())


def test_inference_gives_the_masks_that_the_audit_saw(quick, tmp_path):
    flow = ConfigWorkflow(
        str(CONFIGS / "inference.json"), workflow_type="infer", logging_file=False,
        output_dir=str(tmp_path / "predictions"),
        dataset_dir=str(quick / "phantom_quick" / "ISIC2018_Task1-2_Training_Input"),
        model_path=str(quick / "models" / "unlearned.pt"),
    )  # fmt: skip
    flow.initialize()
    assert flow.check_properties() == []
    network = flow.parser.get_parsed_content("network").eval()
    audit = ConfigWorkflow(TRAIN, logging_file=False, quick=1, output_dir=str(quick))
    audit.initialize()
    items = audit.parser.get_parsed_content("data").resolution.training[:6]
    seen = MemoryDataset(items, audit.parser.get_parsed_content("train#preprocessing"))
    preprocessing = flow.parser.get_parsed_content("preprocessing")
    with torch.no_grad():
        for index, item in enumerate(items):
            image = preprocessing({"image": item["image"]})["image"].as_tensor()
            torch.testing.assert_close(image, seen[index]["image"], rtol=0, atol=0)
            assert (hard_masks(network(image[None])) == hard_masks(network(seen[index]["image"][None]))).all()
    flow.run()
    written = sorted((tmp_path / "predictions").iterdir())
    assert len(written) == 60
    mask = np.asarray(Image.open(written[0]))
    assert mask.shape == (128, 128) and set(np.unique(mask)) <= {0, 255}


def test_masks_come_back_in_the_photographs_own_geometry(quick, tmp_path):
    (tmp_path / "images").mkdir()
    photo = np.zeros((90, 200, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "images" / "wide.png")
    flow = ConfigWorkflow(
        str(CONFIGS / "inference.json"), logging_file=False, output_dir=str(tmp_path / "out"),
        dataset_dir=str(tmp_path / "images"), model_path=str(quick / "models" / "unlearned.pt"),
    )  # fmt: skip
    flow.initialize()
    flow.run()
    (path,) = (tmp_path / "out").iterdir()
    assert np.asarray(Image.open(path)).shape == (90, 200)


def test_running_again_trains_nothing_and_changes_nothing(quick, tmp_path):
    folder = copy_of(quick, tmp_path)
    before = {path.name: path.read_bytes() for path in (folder / "models").glob("*.*")}
    start(folder, forget_ids=FORGOTTEN)
    assert {path.name: path.read_bytes() for path in (folder / "models").glob("*.*")} == before


NETWORKS = {"flexible_unet", "segformer"}  # have a test in test_every_bundle.py
# may keep the start: there is nothing to forget
STOPPED = {"erase_to_retain", "gradient_ascent", "neggrad_plus", "salun", "scrub"}
METHODS = {path.stem for path in (CONFIGS / "methods").glob("*.json")}


@pytest.mark.parametrize("name", sorted(METHODS - NETWORKS))
def test_every_method_runs(name, quick, tmp_path):
    folder = copy_of(quick, tmp_path)
    start(folder, name, forget_ids=FORGOTTEN)
    report = report_of(folder)
    same = weights_digest(read_weights(folder / "models/unlearned.pt")) == weights_digest(
        read_weights(folder / "models/original.pt")
    )
    if name not in STOPPED:
        assert same == (name in ("identity", "learning_rate_zero"))
    assert (report["cost"]["train_images"] == 0) == (name == "identity")
    adapters = {path.name for path in (folder / "models" / "adapter").glob("*")}
    scope = json.loads((CONFIGS / "methods" / f"{name}.json").read_text()).get("lora_scope", "full")
    assert adapters == ({"adapter_config.json", "adapter_model.safetensors"} if scope == "all" else set())


def test_lean_holds_the_first_levels_and_shows_each_epoch_other_retained_cases(quick, tmp_path):
    folder = copy_of(quick, tmp_path)
    start(folder, "lean", forget_ids=FORGOTTEN, relearn_steps=0)
    original, unlearned = (read_weights(folder / "models" / f"{one}.pt") for one in ("original", "unlearned"))
    held = {name for name in original if name.startswith(("model.0.", "model.1.submodule.0."))}
    assert any("running_mean" in name for name in held)
    assert all(torch.equal(original[name], unlearned[name]) for name in held)
    weights = [name for name in original.keys() - held if name.endswith("conv.weight")]
    assert len(weights) > 10 and not any(torch.equal(original[name], unlearned[name]) for name in weights)
    record = json.loads((folder / "models" / "unlearned.json").read_text())
    forget = report_of(folder)["splits"]["forget"]
    retain = report_of(folder)["splits"]["retain"]
    assert record["reports"]["trunk"]["samples"] == forget + min(retain, 3 * 3 * forget)  # three epochs, each others
    assert record["trainable_parameters"] < record["total_parameters"]


def test_the_originals_own_views_need_no_reference(quick, tmp_path):
    folder = copy_of(quick, tmp_path)
    for file in folder.glob("models/reference.*"):
        file.unlink()
    start(folder, "views", forget_ids=FORGOTTEN)
    cost = report_of(folder)["cost"]
    assert cost["reference_flops"] == 0 < cost["cache_flops"] and not list(folder.glob("models/reference.*"))
    assert report_of(folder)["relabelling"] == {"passes": 15 * report_of(folder)["splits"]["forget"]}


@pytest.mark.parametrize(
    ("others", "durability", "beyond"),
    [(None, "standard", 0.3), ("folds", "standard", 1), ("folds", "hardened", 0.7), ("reference", "standard", 0.5)],
)
def test_every_view_of_a_case_is_planned(quick, tmp_path, others, durability, beyond):
    """And where others teach with them, their answers are blended: logits, softened, the views taken beyond first."""
    models, folder = quick / "models", copy_of(quick, tmp_path)
    files = {fold: str(models / f"{name}.pt") for fold, name in
             enumerate(("retrained", "reference", "judge", "unlearned"))}  # fmt: skip
    folder.joinpath("models", "unlearned.pt").unlink()
    given = {None: {}, "folds": {"folds_teach": 1, "reference_models": files}, "reference": {"reference_teaches": 1}}
    flow = start(folder, "views", run_id="unlearn", forget_ids=FORGOTTEN, durability=durability, **given[others])
    get = flow.parser.get_parsed_content
    plan, cache, trained = get("planned").phases, get("phases#cache"), get("unlearned")
    assert plan["targets"].flops == pytest.approx(cache["flops"], rel=0.02)
    assert (get("shrink"), get("learning_rate")) == ((0.8, 1e-3) if durability == "hardened" else (0.9, 5e-4))
    assert plan["targets"].flops + plan["unlearn"].flops == pytest.approx(cache["flops"] + trained["flops"], rel=0.05)
    if others:
        item = get("resolution").splits["forget"][0]
        image = torch.as_tensor(get("train#preprocessing")(item)["image"])[None]
        turned = to_reference(get("original_network"), views=get("views"), pool="logits")
        other = to_out_of_fold(get("fold_networks")).of(item) if others == "folds" else get("reference_answers")
        of_views, of_other, of_case = (
            one.logit(1e-6) for one in (turned(image, image[:, :1]), other(image, image[:, :1]),
                                        get("original_network")(image).sigmoid())
        )  # fmt: skip
        weight, softened = (0.6, 1.5) if others == "folds" else (0.3, 1)  # the reference is softened
        of_views = (of_views + beyond * (of_views - of_case)) / 1.5
        expected = ((1 - weight) * of_views + weight * of_other / softened).sigmoid().detach()
        torch.testing.assert_close(cache["values"]["forget_label"][store_key(item)][None], expected, atol=1e-4, rtol=0)


def test_either_folds_or_a_reference_teach_with_the_views(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        start(tmp_path, "views", run_id="plan", folds_teach=1, reference_teaches=1)
    assert error.value.code == 2 and "leave one out" in capsys.readouterr().err


def test_a_learning_rate_of_zero_leaves_every_tensor_and_buffer_bit_identical(quick, tmp_path):
    folder = copy_of(quick, tmp_path)
    start(folder, run_id="unlearn", learning_rate=0.0, durability="standard")
    original, unlearned = (read_weights(folder / "models" / f"{name}.pt") for name in ("original", "unlearned"))
    assert any("running_mean" in name for name in original)
    torch.testing.assert_close(unlearned, original, rtol=0, atol=0)


def test_a_model_of_the_users_is_used_as_it_is(quick, tmp_path):
    given = tmp_path / "mine.pt"
    shutil.copy(quick / "models" / "original.pt", given)
    before = given.read_bytes()
    arguments = {"original_model": str(given), "forget_ids": "PHANTOM_0000003", "with_retrained": 0}
    folder = tmp_path / "new"
    with pytest.raises(Stop, match="nothing states which items"):
        start(folder, **arguments)
    start(
        folder,
        holdout_fold=4,
        reference_models=[str(quick / f"models/{n}.pt") for n in ("reference", "judge")],
        **arguments,
    )
    assert given.read_bytes() == before
    assert sorted(path.name for path in (folder / "models").glob("*.pt")) == ["unlearned.pt"]
    assert report_of(folder)["cost"]["references_given"]
    with pytest.raises(Stop, match="does not fit UNet"):
        torch.save({"w": torch.zeros(1)}, given)
        start(folder, holdout_fold=4, **arguments)


def test_a_model_that_taught_cannot_judge(quick, tmp_path):
    twice = [str(quick / "models" / "judge.pt")] * 2
    with pytest.raises(Stop, match="the same model cannot teach and judge"):
        start(tmp_path / "out", reference_models=twice)
    with pytest.raises(Stop, match="two files or more"):
        start(tmp_path / "out", reference_models=twice[:1])
    models = [str(quick / "models" / f"{name}.pt") for name in ("reference", "original")]
    with pytest.raises(Stop, match="a reference has never seen the forget set"):
        start(tmp_path / "out", reference_models=models, original_model=models[1])
    audited = {"original_model": models[1], "unlearned_model": models[0], "reference_models": models[:1] + twice[:1]}
    with pytest.raises(Stop, match="must not be the unlearned model"):
        start(tmp_path / "out", run_id="audit", dataset_dir=str(quick / "phantom_quick"), holdout_fold=4,
              forget_ids="PHANTOM_0000003", with_retrained=0, **{**audited, "unlearned_model": twice[0]})  # fmt: skip


def test_subgroups_are_checked_before_any_work(quick, tmp_path):
    data = {"dataset_dir": str(quick / "phantom_quick"), "forget_ids": "PHANTOM_0000003"}
    with pytest.raises(Stop, match="no column 'sec'; did you mean 'sex'"):
        start(tmp_path / "out", subgroups=["sec"], **data)
    assert not (tmp_path / "out" / "models").exists()


def test_the_plan_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(tmp_path / "out", run_id="plan")
    shown = capsys.readouterr().out
    assert "would be forgotten: PHANTOM_" in shown and "of a retrain" in shown and "nothing was written" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_scope": "nowhere"}, "frozen_scope 'nowhere' matches no weights of UNet"),
        ({"durability": "standard", "lora_scope": "nowhere"}, "scope 'nowhere' matches no layer of UNet"),
        ({"durability": "standard", "lora_scope": "all", "rank": 0}, "rank must be at least 1, got 0"),
        ({"shrink": 3}, "shrink must lie in .0, 1., got 3"),
    ],
)
def test_a_student_that_cannot_be_is_refused_by_the_plan(options, message, tmp_path):
    with pytest.raises(Stop, match=message):
        start(tmp_path / "out", run_id="plan", **options)


def test_the_properties_and_ids_are_monais_own():
    flow = ConfigWorkflow(TRAIN, workflow_type="train", logging_file=False, quick=1)
    flow.initialize()
    assert flow.check_properties() == []
    config = ConfigParser.load_config_file(TRAIN)
    assert set(RUN_IDS) <= set(config) and {"displayable_configs", "unlearn_phase"} <= set(config)
    assert all(isinstance(handler, dict) and "_target_" in handler for handler in config["train"]["handlers"])


def test_no_expression_holds_a_lambda_a_shell_a_file_or_the_network():
    forbidden = re.compile(r"lambda|__|subprocess|\bsystem|open\(|\beval\b|\bexec\b|\burl|socket|requests")
    for path in CONFIGS.rglob("*.json"):
        text = path.read_text()
        expressions = re.findall(r'"(\$[^"]*)"', text)
        assert not [one for one in expressions if forbidden.search(one)], path
        for target in re.findall(r'"_target_": "([^"]*)"', text):
            assert target.startswith(("monai.", "monai_unlearn.", "torch.nn.", "torch.optim.")) or "." not in target


def test_the_metadata_pass_the_verification(tmp_path):
    schema = os.environ.get("MONAI_META_SCHEMA", str(HERE / "metadata_schema.json"))
    for path in {schema, str(HERE / "metadata_schema.json")}:
        verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=path)
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]
    assert "background" in metadata["network_data_format"]["outputs"]["pred"]["channel_def"].values()
    verify_net_in_out(
        "network_def", meta_file=str(CONFIGS / "metadata.json"), config_file=str(CONFIGS / "inference.json"),
        bundle_root=str(BUNDLE),
    )  # fmt: skip
    broken = {key: value for key, value in metadata.items() if key != "task"}
    (tmp_path / "metadata.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="task"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=schema)


def test_the_bundle_is_complete():
    for name in ("LICENSE", "docs/README.md", "docs/data_license.txt", "configs/logging.conf", "configs/evaluate.json"):
        assert (BUNDLE / name).is_file(), name


def test_the_holdout_can_be_evaluated_alone(quick, capsys):
    flow = ConfigWorkflow(
        [TRAIN, str(CONFIGS / "evaluate.json")], logging_file=False, quick=1, output_dir=str(quick),
        model_path=str(quick / "models" / "original.pt"),
    )  # fmt: skip
    flow.initialize()
    flow.run()
    shown = re.search(r"mean IoU on the holdout: ([\d.]+)", capsys.readouterr().out)
    assert float(shown[1]) == pytest.approx(report_of(quick)["scores"]["original"]["holdout"]["mean_iou"], abs=1e-3)


def test_monai_labels_overrides_train_the_plain_model(phantom, tmp_path):
    """What MONAI Label passes when its Train button is pressed: images and labels without ids, its own handlers."""
    inputs = sorted((phantom / "ISIC2018_Task1-2_Training_Input").iterdir())
    truths = phantom / "ISIC2018_Task1_Training_GroundTruth"
    masks = [truths / f"{path.stem}_segmentation.png" for path in inputs]
    pairs = [{"image": str(image), "label": str(mask)} for image, mask in zip(inputs[:8], masks)]
    overrides = {
        "bundle_root": str(BUNDLE), "device": "cpu", "train#trainer#max_epochs": 1, "train#dataset#data": pairs,
        "train#handlers": [], "displayable_configs": {"forget_ids": "", "learning_rate": 0.001},
        "output_dir": str(tmp_path), "val_interval": 100,
    }  # fmt: skip
    flow = ConfigWorkflow(TRAIN, logging_file=False, run_id="train#trainer", **overrides)
    flow.initialize()
    trainer = flow.parser.get_parsed_content("train#trainer")
    trainer.run()
    assert trainer.state.epoch == 1 and trainer.state.iteration == 1


def command(*arguments, cwd=ROOT, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", *arguments], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs,
    )  # fmt: skip


def test_the_command_line_works_from_the_bundles_folder_and_writes_nothing_there(tmp_path):
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "isic_unlearn", ignore=shutil.ignore_patterns("output")))
    before = sorted(str(path) for path in bundle.rglob("*"))
    done = command("--config_file", "configs/train.json", "--quick", "true", "--output_dir", str(tmp_path / "out"),
                   "--forget_ids", "PHANTOM_0000003", "--unlearn_epochs", "0", "--with_retrained", "0",
                   "--fail_on_verdict", "1", cwd=bundle)  # fmt: skip
    assert done.returncode == 5, done.stderr[-2000:]
    assert "INCONCLUSIVE" in done.stdout
    assert sorted(str(path) for path in bundle.rglob("*")) == before


def test_tracking_with_mlflow_works(tmp_path):
    pytest.importorskip("mlflow", reason="needs the extra tracking")
    flow = ConfigWorkflow(
        TRAIN, logging_file=False, run_id="original", tracking="mlflow", quick=1, output_dir=str(tmp_path / "out"),
        forget_ids=FORGOTTEN,
    )  # fmt: skip
    flow.initialize()
    flow.run()
    assert (tmp_path / "out" / "mlruns.db").is_file() and (tmp_path / "out" / "models" / "original.pt").is_file()
    assert b"PHANTOM_00" not in (tmp_path / "out" / "mlruns.db").read_bytes()


def test_the_command_line_refuses_in_a_few_plain_lines(tmp_path):
    done = command("--config_file", TRAIN, "--forget_idz", "x", "--output_dir", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 2
    assert "monai_unlearn: there is no option --forget_idz; did you mean --forget_ids?" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_unlearn_and_audit_what_one_does(quick, tmp_path):
    """By torchrun over gloo, from the same original and references, with frozen normalisation."""
    given = {name: str(quick / "models" / f"{name}.pt") for name in ("original", "reference", "judge")}
    flow = ConfigWorkflow(
        TRAIN, workflow_type="train", logging_file=False, quick=1, output_dir=str(quick), forget_ids=FORGOTTEN
    )
    flow.initialize()
    resolution = flow.parser.get_parsed_content("resolution")
    halves = {"training": resolution.training, "validation": resolution.holdout}
    lists = {name: [{key: item[key] for key in ("image", "label", "group")} for item in items]
             for name, items in halves.items()}  # fmt: skip
    (tmp_path / "datalist.json").write_text(json.dumps(lists))
    options = {
        "datalist": str(tmp_path / "datalist.json"),
        "quick": 1, "output_dir": "", "forget_ids": FORGOTTEN, "durability": "standard", "with_retrained": 0,
        "original_model": given["original"], "reference_models": str([given["reference"], given["judge"]]),
    }  # fmt: skip
    folders = {1: tmp_path / "one", 2: tmp_path / "two"}
    for processes, folder in folders.items():
        overlay = [str(CONFIGS / "multi_gpu_train.json")] if processes > 1 else []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "monai.bundle", "run", "--config_file", str([TRAIN, *overlay])]
        for key, value in {**options, "output_dir": str(folder)}.items():
            command += [f"--{key}", str(value)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("report: ") == 1  # the first process speaks
    original = read_weights(quick / "models" / "original.pt")
    one, two = (read_weights(folder / "models" / "unlearned.pt") for folder in folders.values())
    moved, apart = (sum(float((a[key] - b[key]).double().square().sum()) for key in a)
                    for a, b in ((one, original), (two, one)))  # fmt: skip
    assert apart**0.5 < 0.01 * moved**0.5  # rounding, through 3 epochs of AdamW
    alone, together = (report_of(folder) for folder in folders.values())
    for split in ("forget", "retain", "holdout"):
        scores = [report["scores"]["unlearned"][split]["mean_iou"] for report in (alone, together)]
        assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert not list(folders[2].rglob("*.tmp"))
