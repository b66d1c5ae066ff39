# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What every bundle has to do, on the quick phantom of its own."""

import json
import os
import re
import shutil
from pathlib import Path

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from monai.transforms import LoadImage

from monai_unlearn.bundle import Stop
from monai_unlearn.checkpoint import read_weights, weights_digest

HERE = Path(__file__).parent
BUNDLES = HERE.parents[1] / "bundles"
NAMES = sorted(path.name for path in BUNDLES.iterdir() if path.is_dir())
OTHERS = [name for name in NAMES if name != "isic_unlearn"]  # which has a file of tests of its own
UNCHANGED = ("identity", "learning_rate_zero")
BOUNDARY = ("boundary", "boundary_shrink", "boundary_soft", "runner_up")  # two steps, which the stop rule may take back
# may keep the start: there is nothing to forget
STOPPED = ("erase_to_retain", "gradient_ascent", "neggrad_plus", "salun", "scrub")
SUPPRESSION = ("delete", "logit_mask")
OWN_TEST = ("compose", "restore_buffers")
OTHER_NETWORK_OR_SIZE = ("flexible_unet", "segformer", "densenet121", "resnet18", "native", "paper_256", "size_180")
FORGET = {
    "chase_unlearn": "02L",
    "hippocampus_unlearn": "PHANTOM_0000003",
    "isic_unlearn": "PHANTOM_0000003",
    "isic_classification_unlearn": "PHANTOM_0000003,PHANTOM_0000004,PHANTOM_0000005",
}


def start(bundle, output_dir, *overlays, run_id="run", **arguments):
    """A bundle run up to its result, as the command line does it."""
    configs = BUNDLES / bundle / "configs"
    files = [str(configs / "train.json"), *(str(configs / "methods" / f"{name}.json") for name in overlays)]
    options = {"quick": 1, "output_dir": str(output_dir), **arguments}
    flow = ConfigWorkflow(files, workflow_type="train", run_id=run_id, logging_file=False, **options)
    flow.initialize()
    flow.run()
    return flow


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a finished quick run, by bundle."""
    folders = {}

    def folder_of(bundle):
        if bundle not in folders:
            folders[bundle] = tmp_path_factory.mktemp(bundle) / "output"
            start(bundle, folders[bundle], forget_ids=FORGET[bundle])
        return folders[bundle]

    return folder_of


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("bundle", OTHERS)
def test_the_run_leaves_its_report_and_plain_weights_and_names_nobody(bundle, quick):
    folder = quick(bundle)
    report = report_of(folder)
    jsonschema.validate(report, json.loads((HERE / "report_schema.json").read_text()))
    network = ConfigParser(ConfigParser.load_config_file(str(BUNDLES / bundle / "configs" / "inference.json")))
    network = network.get_parsed_content("network_def")
    network.load_state_dict(read_weights(folder / "models" / "unlearned.pt"), strict=True)
    for path in folder.rglob("*"):
        if path.is_file() and not {"private", "phantom_quick"} & set(path.relative_to(folder).parts):
            content = path.read_bytes()
            assert b"PHANTOM_00" not in content and b"Image_0" not in content and b"phantom_quick/" not in content, path
    if bundle == "chase_unlearn":
        assert report["splits"] == {"forget": 2, "retain": 8, "holdout": 4}  # both eyes
        assert 0 <= report["scores"]["original"]["holdout"]["mean_cldice"] <= 1
    elif bundle == "hippocampus_unlearn":
        assert report["splits"] == {"forget": 1, "retain": 11, "holdout": 3}
    else:
        assert len(report["scores"]["original"]["holdout"]["f1_per_class"]) == 9


METHODS = [(b, path.stem) for b in OTHERS for path in sorted((BUNDLES / b / "configs" / "methods").glob("*.json"))]


@pytest.mark.parametrize(
    ("bundle", "name"), [pair for pair in METHODS if pair[1] not in OTHER_NETWORK_OR_SIZE + OWN_TEST]
)
def test_every_method_runs(bundle, name, quick, tmp_path):
    folder = Path(shutil.copytree(quick(bundle), tmp_path / "output"))
    request = {"forget_ids": FORGET[bundle]}
    if name in SUPPRESSION:
        (tmp_path / "request.yaml").write_text("{job: suppression, selector: {class: vascular lesion}}")
        request = {"forget_request": str(tmp_path / "request.yaml"), "with_retrained": 0}
    if name in BOUNDARY:
        start(bundle, folder, name, run_id="unlearn", **request)
        request["stop_at_reference"] = 0
    start(bundle, folder, name, run_id="unlearn", **request)
    original, unlearned = (read_weights(folder / "models" / f"{one}.pt") for one in ("original", "unlearned"))
    if name not in STOPPED:
        assert (weights_digest(original) == weights_digest(unlearned)) == (name in UNCHANGED)
    if name == "logit_mask":
        assert {key for key in original if not torch.equal(original[key], unlearned[key])} == {"fc.bias"}
    if name == "erase_to_retain":  # the strong phase and the restoration
        strong = read_weights(folder / "models" / "strong.pt")
        head = "fc." if "fc.bias" in strong else "model.2.1.conv.unit0.conv."
        moved = {key for key in strong if not torch.equal(strong[key], unlearned[key])}
        assert all(key.startswith(head) for key in moved)
        for phase in ("strong", "unlearned"):
            assert json.loads((folder / "models" / f"{phase}.json").read_text())["images"] > 0


@pytest.mark.parametrize("bundle", [bundle for bundle, name in METHODS if name == "views"])
def test_a_reference_that_nobody_asks_is_neither_trained_nor_reported(bundle, quick, tmp_path):
    folder = Path(shutil.copytree(quick(bundle), tmp_path / "output"))
    for file in folder.glob("models/reference.*"):
        file.unlink()
    start(bundle, folder, "views", forget_ids=FORGET[bundle], with_retrained=0, relearn_steps=0)
    report = report_of(folder)
    assert "reference" not in report["scores"] and not list(folder.glob("models/reference.*"))
    assert report["cost"]["reference_flops"] == 0 < report["cost"]["cache_flops"]


@pytest.mark.parametrize(
    ("bundle", "name", "options", "wanted"),
    [
        *((bundle, name, {}, False) for bundle, name in METHODS if name == "views"),
        ("isic_unlearn", "neggrad_plus", {}, True),  # its stop rule asks
        ("isic_unlearn", "learning_rate_zero", {}, True),  # its new labels do
        ("isic_unlearn", "views", {"stop_at_reference": 1}, True),
        ("isic_unlearn", "views", {"reference_teaches": 1}, True),
        ("isic_unlearn", "neggrad_plus", {"stop_at_reference": 0}, False),
        ("isic_unlearn", "views", {"own_views": "$monai_unlearn.content('reference_network')"}, True),  # through it
    ],
)
def test_a_reference_is_planned_where_one_is_trained(bundle, name, options, wanted, tmp_path):
    configs = BUNDLES / bundle / "configs"
    flow = ConfigWorkflow([str(configs / "train.json"), str(configs / "methods" / f"{name}.json")],
                          workflow_type="train", logging_file=False, quick=1, output_dir=str(tmp_path),
                          forget_ids=FORGET[bundle], **options)  # fmt: skip
    flow.initialize()
    assert (flow.parser.get_parsed_content("planned").phases["reference"].flops > 0) == wanted


@pytest.mark.parametrize("bundle", NAMES)
def test_nothing_that_chooses_the_unlearned_model_sees_the_holdout(bundle):
    for file in sorted((BUNDLES / bundle / "configs").glob("**/*.json")):
        config = json.loads(file.read_text())
        chosen = {
            key: value for key, value in config.items() if key.split("#")[0] in ("unlearn_phase", "restore_phase")
        }
        assert "holdout" not in json.dumps(chosen) and "validate#" not in json.dumps(chosen).replace(
            "@validate#inferer", ""
        )


@pytest.mark.parametrize("given", ["false", "0", 0])
def test_no_retrained_model_is_made_where_none_is_wanted(given, tmp_path):
    configs = BUNDLES / "isic_classification_unlearn" / "configs"
    flow = ConfigWorkflow(str(configs / "train.json"), workflow_type="train", logging_file=False, quick=1,
                          output_dir=str(tmp_path), with_retrained=given)  # fmt: skip
    flow.initialize()
    assert flow.parser.get_parsed_content("with_retrained") == 0


def test_a_second_retrained_model_says_how_far_two_of_them_lie_apart(quick, tmp_path):
    folder = Path(shutil.copytree(quick("isic_classification_unlearn"), tmp_path / "output"))
    start("isic_classification_unlearn", folder, forget_ids=FORGET["isic_classification_unlearn"], with_retrained="2")
    report = report_of(folder)
    one, other = (report["scores"][name] for name in ("retrained", "retrained_other"))
    assert (folder / "models" / "retrained.pt").read_bytes() != (folder / "models" / "retrained_other.pt").read_bytes()
    for split, gap in report["floor"].items():
        assert gap == pytest.approx(abs(one[split]["accuracy"] - other[split]["accuracy"]), abs=1e-5)
    assert set(report["agreement"]) == {"original", "unlearned", "retrained_other"}
    assert all(0 <= share <= 1 for rows in report["agreement"].values() for share in rows.values())


@pytest.mark.parametrize("name", ["boundary", "boundary_soft"])
def test_boundary_labels_at_a_learning_rate_of_zero_change_no_bit(name, quick, tmp_path):
    bundle = "isic_classification_unlearn"
    folder = Path(shutil.copytree(quick(bundle), tmp_path / "output"))
    start(bundle, folder, name, run_id="unlearn", forget_ids=FORGET[bundle], learning_rate=0.0)
    original, unlearned = (read_weights(folder / "models" / f"{one}.pt") for one in ("original", "unlearned"))
    torch.testing.assert_close(unlearned, original, rtol=0, atol=0)
    assert json.loads((folder / "models" / "unlearned.json").read_text())["images"] > 0


def test_the_buffer_probe_puts_the_originals_statistics_back(quick, tmp_path):
    folder = Path(shutil.copytree(quick("isic_classification_unlearn"), tmp_path / "output"))
    flow = start("isic_classification_unlearn", folder, "boundary_legacy", "restore_buffers", run_id="unlearn",
                 forget_ids=FORGET["isic_classification_unlearn"])  # fmt: skip
    original, drifted = (read_weights(folder / "models" / f"{name}.pt") for name in ("original", "unlearned"))
    restored = flow.parser.get_parsed_content("unlearned_network").state_dict()
    statistics = [name for name in original if "running" in name]
    assert any(not torch.equal(original[name], drifted[name]) for name in statistics)
    for name, value in restored.items():
        assert torch.equal(value.cpu(), (original if "running" in name or "num_batches" in name else drifted)[name])


def test_a_criterion_goes_by_unseen_cases_of_its_own_kind_and_is_taught_with_the_originals_certainty(quick, tmp_path):
    bundle = "isic_classification_unlearn"
    folder, request = Path(shutil.copytree(quick(bundle), tmp_path / "output")), tmp_path / "request.yaml"
    request.write_text("{id: old, job: revision, selector: {rule: age_approx >= 55}, on_split_group: include}")
    flow = start(bundle, folder, forget_request=str(request), with_retrained=0, relearn_steps=0)
    report, get = report_of(folder), flow.parser.get_parsed_content
    assert report["compared_with"] == {"attacks": "holdout_alike", "expected_unseen": "holdout_other"}
    assert report["splits"]["holdout_alike"] + report["splits"]["holdout_other"] == report["splits"]["holdout"]
    (calibration,) = report["relabelling"]["calibration"]
    assert not any(calibration["bias"])
    entropy = {}
    with torch.no_grad():
        images = torch.stack([sample["image"] for sample in get("calibration_cases")])
        for name in ("original", "reference"):
            logits = get(f"{name}_network")(images) * (calibration["scale"] if name == "reference" else 1)
            entropy[name] = float(torch.special.entr(logits.softmax(1)).sum(1).mean())
    assert len(images) == report["splits"]["holdout_other"] <= 64
    assert entropy["reference"] == pytest.approx(entropy["original"], rel=1e-3)


def test_models_are_composed_and_audited_like_any_other(quick, tmp_path, capsys):
    bundle = "isic_classification_unlearn"
    folder = Path(shutil.copytree(quick(bundle), tmp_path / "output"))
    request = {"forget_ids": FORGET[bundle], "with_retrained": 0}
    for name in ("original", "judge", "retrained"):
        shutil.copy(folder / "models" / f"{name}.pt", tmp_path / f"{name}.pt")
    sources = {"a": str(tmp_path / "judge.pt"), "b": str(tmp_path / "retrained.pt")}
    rules = [{"keys": "fc.*", "take": "b"}, {"keys": "*", "add": {"a": 0.5}}]
    start(bundle, folder, "compose", compose_sources=sources, compose_rules=rules, **request)
    made, base, a, b = (read_weights(path) for path in (folder / "models" / "unlearned.pt",
                        *(tmp_path / f"{name}.pt" for name in ("original", "judge", "retrained"))))  # fmt: skip
    for name, value in made.items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(value, base[name])
        else:
            assert not torch.equal(a[name], base[name]) and not torch.equal(b[name], base[name])
            expected = b[name] if name.startswith("fc.") else base[name] + 0.5 * (a[name] - base[name])
            torch.testing.assert_close(value, expected)
    report = report_of(folder)
    assert (
        report["cost"]["train_seconds"] is None
        and report["scores"]["unlearned"]["forget"]["n"] == report["splits"]["forget"]
    )
    for bad, message in (
        ({}, "composing needs --compose_sources"),
        ({"compose_sources": sources, "compose_rules": [{"keys": "head", "take": "a"}]}, "no weight is called head"),
        ({"compose_sources": {"a": "$1 + 1"}, "compose_rules": rules}, "MONAI would evaluate it"),
    ):
        with pytest.raises(Stop) as caught:
            start(bundle, folder, "compose", run_id="unlearn", **bad, **request)
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_other_networks_are_trained_and_unlearned_by_the_same_recipe(tmp_path):
    for name, scope in (("flexible_unet", "all"), ("segformer", "decoder")):
        start("isic_unlearn", tmp_path / name, name, run_id="unlearn", original_epochs=1, reference_epochs=1,
              unlearn_epochs=1, spatial_size=[64, 64], durability="standard", lora_scope=scope)  # fmt: skip
        record = json.loads((tmp_path / name / "models" / "unlearned.json").read_text())
        assert 0 < record["trainable_parameters"] < 0.2 * record["total_parameters"]
        assert record["drift"] and all(value >= 0 for value in record["drift"].values())


@pytest.mark.parametrize(
    ("bundle", "name", "shape"),
    [("chase_unlearn", "native", (20, 3, 256, 256)), ("chase_unlearn", "paper_256", (5, 3, 256, 256)),
     ("isic_classification_unlearn", "densenet121", (16, 3, 64, 64)),
     ("isic_classification_unlearn", "resnet18", (16, 3, 64, 64)),
     ("isic_classification_unlearn", "size_180", (16, 3, 180, 180))],
)  # fmt: skip
def test_other_sizes_and_networks_train(bundle, name, shape, tmp_path):
    options = {"original_epochs": 1, "batch_size": 5 if bundle == "chase_unlearn" else 16}
    flow = start(bundle, tmp_path / "out", name, run_id="original", **options)
    batch = next(iter(flow.parser.get_parsed_content("train#dataloader")))
    assert batch["image"].shape == shape and (tmp_path / "out" / "models" / "original.pt").is_file()


def test_a_class_is_suppressed_and_judged_on_its_unseen_members(quick, tmp_path):
    folder = Path(shutil.copytree(quick("isic_classification_unlearn"), tmp_path / "output"))
    (tmp_path / "request.yaml").write_text("{job: suppression, selector: {class: vascular lesion}}")
    start("isic_classification_unlearn", folder, forget_request=str(tmp_path / "request.yaml"), with_retrained=0)
    report = report_of(folder)
    assert report["job"] == "suppression" and report["suppression"]["class"] == "vascular lesion"
    assert report["cost"]["reference_seconds"] == 0 and report["membership"] == {}
    assert [row["steps"] for row in report["relearn"]["few_shot"]["unlearned"]] == [0, 1, 2, 5, 10, 20, 40]
    assert report["verdict"] in ("FAIL", "INCONCLUSIVE")


def test_a_part_of_every_volume_is_suppressed_and_judged_on_unseen_ones(tmp_path):
    (tmp_path / "request.yaml").write_text("{job: suppression, selector: {class: posterior}}")
    out = tmp_path / "out"
    flow = start("hippocampus_unlearn", out, forget_request=str(tmp_path / "request.yaml"), unlearn_epochs=1)
    report = report_of(out)
    jsonschema.validate(report, json.loads((HERE / "report_schema.json").read_text()))
    assert report["splits"]["forget"] == 12 and report["splits"]["retain"] == 0
    found = report["suppression"]
    assert found["class"] == "posterior" and set(found["dice_merged"]) == {"original", "unlearned", "retrained"}
    assert report["membership"] == {} and report["cost"]["reference_seconds"] == 0 and report["relearn"] is None
    assert report["relabelling"]["mean_crossed"] > 0
    label = flow.parser.get_parsed_content("train#dataset")[0]["label"]
    assert label[2].sum() > 0
    assert set(report["relabelling"]["destinations"]) == {"1"}  # parts of one organ: it becomes the rest of it
    # boundary labels as NIfTI, in the place of the padded image, under pseudonyms
    affines = [
        sample["affine"].numpy()
        for sample in map(flow.parser.get_parsed_content("train#dataset").__getitem__, range(12))
    ]
    kept = sorted((out / "private" / "labels").glob("*/*.nii.gz"))
    assert len(kept) == 12 and not any("PHANTOM" in path.name for path in kept)
    for path in kept:
        volume = nib.load(path)
        assert any(np.allclose(volume.affine, affine) for affine in affines)
        assert volume.shape == tuple(label.shape[1:]) and 2 not in np.unique(volume.dataobj)


@pytest.mark.parametrize(("organ", "there"), [(1, 1), (0, 0)])
def test_the_retrained_model_is_never_taught_a_suppressed_part(organ, there, tmp_path):
    configs = BUNDLES / "hippocampus_unlearn" / "configs" / "train.json"
    (tmp_path / "request.yaml").write_text("{job: suppression, selector: {class: posterior}}")
    labels = []
    for left_out in ([], [2]):  # as the phase retrain sets it
        flow = ConfigWorkflow(str(configs), workflow_type="train", logging_file=False, quick=1, organ=organ,
                              output_dir=str(tmp_path / "out"), left_out=left_out, left_out_as=there,
                              forget_request=str(tmp_path / "request.yaml"))  # fmt: skip
        flow.initialize()
        assert flow.parser.get_parsed_content("taught_as") == there
        labels.append(flow.parser.get_parsed_content("train#dataset")[0]["label"].argmax(0))
    part = labels[0] == 2
    assert part.any() and (labels[1][part] == there).all() and torch.equal(labels[1][~part], labels[0][~part])


@pytest.mark.parametrize(("selector", "job", "message"), [
    ("{class: amygdala}", "suppression", "marks no 'amygdala'; it marks anterior, posterior"),
    ("{class: anterior}", "deletion", "suppressed and not deleted"),
])  # fmt: skip
def test_a_part_that_is_not_there_or_is_to_be_deleted_is_refused(selector, job, message, tmp_path, capsys):
    (tmp_path / "request.yaml").write_text(f"{{job: {job}, selector: {selector}}}")
    with pytest.raises(Stop) as caught:
        start("hippocampus_unlearn", tmp_path / "out", run_id="plan", forget_request=str(tmp_path / "request.yaml"))
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_masks_of_both_observers_become_one_soft_label(tmp_path):
    flow = start("chase_unlearn", tmp_path / "out", run_id="original", observer="both", original_epochs=1)
    label = flow.parser.get_parsed_content("validate#dataset")[0]["label"]
    assert label.shape[0] == 1 and label.unique().tolist() == [0.0, 0.5, 1.0]


def test_too_few_children_for_two_references_are_refused_beforehand(tmp_path):
    with pytest.raises(Stop, match="2 groups stay, too few to teach two references"):
        start("chase_unlearn", tmp_path / "out", run_id="plan", forget_ids="01L,02L,03L")


@pytest.mark.parametrize("bundle", OTHERS)
def test_inference_runs_on_a_folder_of_pictures(bundle, quick, tmp_path):
    folder = quick(bundle)
    inside = {"hippocampus_unlearn": "imagesTr", "isic_classification_unlearn": "Test/nevus"}.get(bundle, "")
    pictures = folder / "phantom_quick" / inside
    flow = ConfigWorkflow(
        str(BUNDLES / bundle / "configs" / "inference.json"), workflow_type="infer", logging_file=False,
        output_dir=str(tmp_path), dataset_dir=str(pictures), model_path=str(folder / "models" / "unlearned.pt"),
    )  # fmt: skip
    flow.initialize()
    assert flow.check_properties() == []
    flow.run()
    number = len(list(pictures.glob("*.jpg")))
    if bundle == "chase_unlearn":
        assert len(list(tmp_path.glob("*.png"))) == number
    elif bundle == "hippocampus_unlearn":
        for path in pictures.iterdir():
            volume, mask = nib.load(path), nib.load(tmp_path / path.name.replace(".nii", "_segmentation.nii"))
            assert mask.shape == volume.shape and set(np.unique(mask.dataobj)) <= {0, 1, 2}
            np.testing.assert_allclose(mask.affine, volume.affine)
    else:
        rows = (tmp_path / "predictions.csv").read_text().splitlines()
        assert len(rows) == number
        assert sum(map(float, rows[0].split(",")[1:])) == pytest.approx(1, abs=1e-4)


def test_a_study_in_dicom_is_answered_as_nifti_where_it_lies(quick, real_data, tmp_path):
    studies = real_data / "volumes" / "dicom"
    flow = ConfigWorkflow(
        str(BUNDLES / "hippocampus_unlearn" / "configs" / "inference.json"), workflow_type="infer", logging_file=False,
        output_dir=str(tmp_path), dataset_dir=str(studies),
        model_path=str(quick("hippocampus_unlearn") / "models" / "unlearned.pt"),
    )  # fmt: skip
    flow.initialize()
    flow.run()
    found = [path for path in studies.iterdir() if path.is_dir()]
    assert found and len(list(tmp_path.glob("*.nii.gz"))) == len(found)
    for study in found:
        volume = LoadImage(image_only=True, ensure_channel_first=True)(study)
        mask = nib.load(tmp_path / f"{study.name}_segmentation.nii.gz")
        assert mask.shape == tuple(volume.shape[1:])
        np.testing.assert_allclose(mask.affine, volume.affine, atol=1e-3)


@pytest.mark.parametrize("bundle", OTHERS)
def test_the_holdout_can_be_evaluated_alone(bundle, quick, capsys):
    configs = BUNDLES / bundle / "configs"
    flow = ConfigWorkflow(
        [str(configs / "train.json"), str(configs / "evaluate.json")], logging_file=False, quick=1,
        output_dir=str(quick(bundle)), model_path=str(quick(bundle) / "models" / "original.pt"),
    )  # fmt: skip
    flow.initialize()
    flow.run()
    shown = re.search(r"on the holdout: ([\d.]+)", capsys.readouterr().out)
    scores = report_of(quick(bundle))["scores"]["original"]["holdout"]
    assert float(shown[1]) == pytest.approx(scores.get("accuracy", scores.get("mean_iou")), abs=2e-3)


@pytest.mark.parametrize("bundle", NAMES)
def test_the_bundle_is_complete_and_its_ids_are_monais_own(bundle):
    configs = BUNDLES / bundle / "configs"
    for name in ("LICENSE", "docs/README.md", "docs/data_license.txt", "configs/logging.conf", "configs/evaluate.json"):
        assert (BUNDLES / bundle / name).is_file(), name
    flow = ConfigWorkflow(str(configs / "train.json"), workflow_type="train", logging_file=False, quick=1)
    flow.initialize()
    assert flow.check_properties() == []
    config = ConfigParser.load_config_file(str(configs / "train.json"))
    ids = {"run", "plan", "original", "retrain", "unlearn", "audit"}
    assert ids | {"displayable_configs", "unlearn_phase", "restore_phase"} <= set(config)


@pytest.mark.parametrize("bundle", NAMES)
def test_no_expression_holds_a_lambda_a_shell_a_file_or_the_network(bundle):
    forbidden = re.compile(r"lambda|__|subprocess|\bsystem|open\(|\beval\b|\bexec\b|\burl|socket|requests")
    known = ("monai.", "monai_unlearn.", "torch.nn.", "torch.optim.", "ignite.metrics.")
    for path in (BUNDLES / bundle / "configs").rglob("*.json"):
        text = path.read_text()
        assert not [one for one in re.findall(r'"(\$[^"]*)"', text) if forbidden.search(one)], path
        for target in re.findall(r'"_target_": "([^"]*)"', text):
            assert target.startswith(known) or "." not in target or target == "torch.mean", target


@pytest.mark.parametrize("bundle", NAMES)
def test_the_metadata_pass_the_verification(bundle):
    configs = BUNDLES / bundle / "configs"
    schema = os.environ.get("MONAI_META_SCHEMA", str(HERE / "metadata_schema.json"))
    verify_metadata(meta_file=str(configs / "metadata.json"), filepath=schema)
    metadata = json.loads((configs / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]
    verify_net_in_out(
        "network_def", meta_file=str(configs / "metadata.json"), config_file=str(configs / "inference.json"),
        bundle_root=str(BUNDLES / bundle),
    )  # fmt: skip
    train, inference = (ConfigParser.load_config_file(str(configs / f"{n}.json")) for n in ("train", "inference"))
    factory = {key: value for key, value in train["network_factory"].items() if key != "_mode_"}
    assert inference["network_def"] == factory


@pytest.mark.parametrize("bundle", NAMES)
def test_the_unlearned_network_can_be_exported_both_ways(bundle, quick, tmp_path):
    configs, weights = BUNDLES / bundle / "configs", quick(bundle) / "models" / "unlearned.pt"
    wanted = json.loads((configs / "metadata.json").read_text())["network_data_format"]["inputs"]["image"]
    shape = [1, wanted["num_channels"], *(size if isinstance(size, int) else 64 for size in wanted["spatial_shape"])]
    image = torch.rand(shape)
    parser = ConfigParser(ConfigParser.load_config_file(str(configs / "inference.json")))
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(read_weights(weights))
    with torch.no_grad():
        answer = network.eval()(image)
    ckpt_export(
        "network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=str(weights), key_in_ckpt="",
        meta_file=str(configs / "metadata.json"), config_file=str(configs / "inference.json"), input_shape=shape,
        bundle_root=str(BUNDLES / bundle),
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.ts"))(image), answer, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(network, (image,)).module()
        torch.testing.assert_close(exported(image), answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bundle", NAMES)
def test_the_plan_writes_nothing(bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(bundle, tmp_path / "out", run_id="plan")
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bundle", NAMES)
def test_what_unlearning_costs_is_known_before_it_starts(bundle, quick, tmp_path):
    configs = [str(BUNDLES / bundle / "configs" / "train.json")]
    given = {"quick": 1, "output_dir": str(tmp_path), "forget_ids": FORGET[bundle]}
    flow = ConfigWorkflow(configs, workflow_type="train", logging_file=False, **given)
    flow.initialize()
    plan = flow.parser.get_parsed_content("planned")
    cost = report_of(quick(bundle))["cost"]
    for names, key in ((("targets", "reference", "unlearn"), "unlearn"), (("retrain",), "retrain")):
        planned = sum(plan.phases[name].flops for name in names)
        assert planned == pytest.approx(cost[f"{key}_flops"], rel=0.25)


@pytest.mark.parametrize("bundle", NAMES)
def test_folds_save_the_judge_or_where_they_teach_the_reference(bundle, quick, tmp_path):
    models = quick(bundle) / "models"
    folds = {str(fold): str(models / f"{name}.pt") for fold, name in enumerate(["reference", "judge"])}
    for teach, (trained, spared) in enumerate((("reference", "judge"), ("judge", "reference"))):
        flow = ConfigWorkflow(
            str(BUNDLES / bundle / "configs" / "train.json"), workflow_type="train", logging_file=False, quick=1,
            output_dir=str(tmp_path), forget_ids=FORGET[bundle], reference_models=folds, folds_teach=teach,
        )  # fmt: skip
        flow.initialize()
        phases = flow.parser.get_parsed_content("planned").phases
        assert phases[trained].flops > 0 == phases[spared].flops
        audited = flow.parser.get("audited_networks")["reference"]
        assert "not @folds_teach else None" in audited  # or the audit would train one after all


@pytest.mark.parametrize("method", ["identity", "views"])
@pytest.mark.parametrize("bundle", NAMES)
def test_folds_are_refused_by_methods_that_ask_none(bundle, method, tmp_path, capsys):
    if (bundle, method) == ("isic_unlearn", "views"):  # where they teach together
        method = "background"
    with pytest.raises(SystemExit) as error:
        start(bundle, tmp_path, method, run_id="plan", quick=1, folds_teach=1)
    assert error.value.code == 2 and "learns nothing from cross-validation models" in capsys.readouterr().err


@pytest.mark.parametrize("bundle", NAMES)
def test_several_processes_are_one_overlay_away(bundle, tmp_path, capsys, monkeypatch):
    overlay = json.loads((BUNDLES / bundle / "configs" / "multi_gpu_train.json").read_text())
    assert overlay["device"] == "$monai_unlearn.start_processes()" and "finalize" in overlay
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as error:
        start(bundle, tmp_path, "../multi_gpu_train")
    assert error.value.code == 2 and "torchrun --nproc_per_node" in capsys.readouterr().err
