# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What holds the configuration helpers to MONAI's behaviour, on configurations of a few lines."""

import json
import stat
import sys

import monai.bundle
import pytest
import torch
from conftest import small_unet
from monai.bundle import ConfigWorkflow
from torch import nn
from toy import ITEMS, draw

import monai_unlearn
from monai_unlearn import BoundaryRelabel, LabelStore, PerturbedSignGradient
from monai_unlearn.audit import References
from monai_unlearn.bundle import Stop, bundle_root, fingerprint, plain_errors, running_parser, unlearning_targets
from monai_unlearn.checkpoint import CheckpointError
from monai_unlearn.datasets import DataError
from monai_unlearn.handlers import NotFiniteError
from monai_unlearn.preflight import _typed, finish, prepare, record_request, site_key
from monai_unlearn.relabel import to_out_of_fold, to_reference
from monai_unlearn.request import DeletionRequest, RequestError, Resolution

IMPORTS = ["$from monai_unlearn.preflight import arguments_checked", "$import monai_unlearn", "$import torch"]
BASE = {
    "imports": IMPORTS,
    "bundle_root": "$monai_unlearn.bundle_root()",
    "output_dir": "$@bundle_root + '/output'",
    "forget_ids": None,
    "rank": 8,
    "learning_rate": 0.1,
    "quick": False,
    "initialize": ["$monai_unlearn.normalise_arguments()"],
    "run": ["$monai_unlearn.bundle_root()"],
}


@pytest.fixture
def configs(tmp_path):
    folder = tmp_path / "toy" / "configs"
    (folder / "methods").mkdir(parents=True)

    def write(content=(), name="train.json"):
        path = folder / name
        path.write_text(json.dumps({**BASE, **dict(content)} if name == "train.json" else dict(content)))
        return str(path)

    return write


def run(path, **arguments):
    monai.bundle.run(config_file=path, logging_file=False, meta_file=None, **arguments)


def workflow(path, **arguments):
    flow = ConfigWorkflow(path, logging_file=False, **arguments)
    flow.initialize()
    return flow


def test_the_bundles_root_is_where_its_configuration_lies(configs, tmp_path, monkeypatch):
    path = configs()
    monkeypatch.chdir(tmp_path)
    assert workflow(path).run() == [str(tmp_path / "toy")]
    assert workflow("toy/configs/train.json").run() == ["toy"]
    with pytest.raises(RuntimeError, match="give bundle_root"):
        bundle_root()
    with pytest.raises(RuntimeError, match="expression of a MONAI bundle"):
        running_parser()
    with pytest.raises(RuntimeError, match="initialize only"):
        monai_unlearn.normalise_arguments()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forget_idz": "a"}, "no option --forget_idz; did you mean --forget_ids"),
        ({"xyz": 1}, "no option --xyz"),
        ({"quick": "maybe"}, "--quick takes 0, 1, true or false"),
        ({"rank": "eight"}, "--rank takes a number, got 'eight'"),
        ({"rank": 2.5}, "--rank takes a whole number"),
    ],
)
def test_arguments_that_monai_takes_silently_are_refused(arguments, message, configs, capsys):
    with pytest.raises(Stop, match=message) as caught:
        run(configs(), **arguments)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) < 14  # MONAI's own two lines, and ours
    with pytest.raises(Stop, match=message):
        workflow(configs(), **arguments)


EVIL = [
    "$__import__('pathlib').Path('canary').touch()",
    "$open('canary', 'w')",
    "$import canary_module",
    "$from canary_module import x",
    "@output_dir",
    "%FILE",
    ["a", "$open('canary', 'w')"],
]


@pytest.mark.parametrize("value", EVIL)
@pytest.mark.parametrize("key", ["forget_ids", "output_dir"])
def test_an_argument_that_would_be_evaluated_runs_nothing(key, value, configs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "canary_module.py").write_text("open('canary', 'w')")
    path = configs({"save_execute_config": False, "run": ["$print(@forget_ids, @output_dir)"]})
    if value == "%FILE":  # a macro reads a file: what stands in it must not run either
        value = "%" + configs({"evil": "$import canary_module"}, "evil.json")
    for extra in ({}, {"tracking": "mlflow"}):
        with pytest.raises(Stop, match=f"--{key} begins with|a value of --{key} begins with"):
            run(path, **{key: value}, **extra)
    if "%" not in value:
        with pytest.raises(Stop, match="begins with"):
            workflow(path, **{key: value})
    assert "canary_module" not in sys.modules
    assert not (tmp_path / "canary").exists()


def test_a_bundles_own_expressions_and_its_overlays_may_stand(configs, tmp_path):
    path = configs({"forget_ids": "$@displayable_configs#forget_ids or None", "displayable_configs": {"forget_ids": ""},
                    "relabel": {"_target_": "dict"}, "epochs": "$2 if @quick else 4",
                    "run": ["$(@epochs, @relabel)"]})  # fmt: skip
    overlay = configs({"relabel": "$monai_unlearn.to_background", "epochs": "$1 + 1"}, "methods/x.json")
    assert workflow(path).run() == [(4, {})]
    assert workflow([path, overlay]).run() == [(2, monai_unlearn.to_background)]
    with pytest.raises(Stop, match="--displayable_configs: forget_ids begins with"):
        workflow(path, displayable_configs={"forget_ids": "$open('canary', 'w')"})


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", True), ("True", True), (1, True), ("1", True), ("FALSE", False), (0, False), (True, True)],
)
def test_booleans_come_in_every_spelling(word, value, configs):
    assert workflow(configs({"run": ["$@quick"]}), quick=word).run() == [value]


def test_numbers_may_come_as_text(configs):
    flow = workflow(configs({"run": ["$(@rank, @learning_rate)"]}), rank="4", learning_rate="1e-3")
    assert flow.run() == [(4, 0.001)]
    assert (_typed("k", 2, float), type(_typed("k", 2, float))) == (2.0, float)


NETWORK = {"_target_": "torch.nn.Linear", "in_features": "@rank", "out_features": 1}


def test_a_fingerprint_follows_references_and_ignores_paths(configs):
    base = {"network": NETWORK, "other": 3, "run": ["$monai_unlearn.fingerprint('network')"]}
    digest = workflow(configs(base)).run()
    assert workflow(configs(base)).run() == digest
    assert workflow(configs(base), output_dir="/tmp/x", bundle_root="/tmp/y", other=4).run() == digest
    assert workflow(configs(base), rank=9).run() != digest
    assert workflow(configs({**base, "network": {**NETWORK, "out_features": 2}})).run() != digest
    seeded = {**base, "run": ["$monai_unlearn.fingerprint('network', seed=1)"]}
    assert workflow(configs(seeded)).run() != digest
    with pytest.raises(RuntimeError):
        fingerprint("network")


def test_a_variant_is_the_same_recipe_with_other_values(configs):
    content = {
        "network": NETWORK,
        "items": None,
        "section": {"a": "$@items", "b": "@network"},
        "run": ["$(monai_unlearn.variant('section', items=[chr(36) + 'x', chr(64) + 'y'], rank=3), @section)"],
    }
    ((other, own),) = workflow(configs(content)).run()
    assert other["a"] == ["$x", "@y"]  # objects are never parsed
    assert (other["b"].in_features, own["b"].in_features) == (3, 8)
    with pytest.raises(RuntimeError) as caught:
        workflow(configs({**content, "run": ["$monai_unlearn.variant('section', rnk=3)"]})).run()
    assert "no key 'rnk'" in str(caught.value.__cause__)


def test_a_variant_takes_what_was_computed_deep_inside_a_section_and_asks_for_it_no_more(configs):
    content = {
        "part": {"costly": "$[][0]", "cheap": "$1"},
        "network": {"a": "@part#costly", "b": "@part#cheap"},
        "run": [
            "$monai_unlearn.variant('network', **{'part#costly': [2]})",
            "$monai_unlearn.fingerprint('network', **{'part#costly': [2]})",
        ],
    }
    found, digest = workflow(configs(content)).run()
    assert found == {"a": [2], "b": 1}
    changed = {**content, "part": {**content["part"], "costly": "$[][1]"}}
    assert workflow(configs(changed)).run()[1] == digest  # what stood in its place does not count
    changed = {**content, "part": {**content["part"], "cheap": "$3"}}
    assert workflow(configs(changed)).run()[1] != digest


def test_an_item_behind_an_if_is_resolved_only_when_needed(configs):
    content = {"part": {"costly": "$[][0]", "cheap": "$1", "other": "$2"}, "use": False,
               "run": ["$monai_unlearn.content('part#costly') if @use else @part#cheap",
                       "$monai_unlearn.resolved('part')"]}  # fmt: skip
    assert workflow(configs(content)).run() == [1, {"cheap": 1}]


@pytest.mark.parametrize(
    ("error", "code"), [(RequestError, 2), (DataError, 3), (CheckpointError, 3), (NotFiniteError, 4)]
)
def test_errors_a_person_can_mend_end_a_run_with_their_message_and_code(error, code, configs, monkeypatch, capsys):
    @plain_errors
    def fail():
        raise error("say what to do")

    with pytest.raises(error):
        fail()  # outside of a bundle an error stays an exception
    monkeypatch.setattr(monai_unlearn, "fail", fail, raising=False)
    with pytest.raises(Stop) as caught:
        run(configs({"run": ["$monai_unlearn.fail()"]}))
    assert caught.value.code == code
    assert "monai_unlearn: say what to do" in capsys.readouterr().err


def test_a_given_model_is_loaded_and_never_written(tmp_path):
    network = nn.Linear(2, 1)
    monai_unlearn.save_weights(network, tmp_path / "given.pt")
    before = (tmp_path / "given.pt").stat()
    record = monai_unlearn.phase("unused", tmp_path / "new.pt", given=tmp_path / "given.pt")
    again = monai_unlearn.frozen(nn.Linear(2, 1), record)
    torch.testing.assert_close(again.weight, network.weight.detach())
    assert not any(p.requires_grad for p in again.parameters())
    assert (tmp_path / "given.pt").stat().st_mtime_ns == before.st_mtime_ns and not (tmp_path / "new.pt").exists()


def test_what_the_unlearning_needs_is_computed_once_and_costs_what_it_says():
    items = [{**item, "group": item["image"]} for item in ITEMS]
    holdout = [{"image": str(i), "label": "m", "group": str(i)} for i in range(50, 75)]
    resolution = Resolution(DeletionRequest({"ids": ["a"]}), items, holdout, [], {})
    original, reference = small_unet(), small_unet(seed=1)
    forget = [item for item in items if item["forget"]]
    found = unlearning_targets(original, to_reference(reference), resolution, draw, reference=reference)
    assert set(found["values"]["teacher"]) == {(i["image"], "m") for i in items if not i["forget"]}
    for item in forget:
        expected = reference(draw(item)["image"][None])[0].sigmoid()
        torch.testing.assert_close(found["values"]["forget_label"][item["image"], "m"], expected)
    assert 0 <= found["stop_value"] <= 1
    assert found["images"] == pytest.approx((9 + 3 + 3 + 2 * 25) / 3)
    plain = unlearning_targets(original, None, resolution, draw)
    assert set(plain["values"]) == {"teacher"} and plain["stop_value"] is None and plain["images"] == 3
    donors = {item["image"]: items[1] for item in forget}
    drawn = unlearning_targets(original, donors, resolution, draw)["values"]["forget_label"]
    assert all((label == draw(items[1])["label"]).all() for label in drawn.values())


def test_each_sample_is_taught_by_its_own_out_of_fold_model_and_stops_where_these_say():
    items = [{**item, "group": item["image"], "fold": index % 2} for index, item in enumerate(ITEMS)]
    for item in items:
        item["forget"] = True
    holdout = [{"image": str(i), "label": "m", "group": str(i)} for i in range(50, 75)]
    keep = {"image": "99", "label": "m", "group": "k", "fold": 0, "forget": False}
    resolution = Resolution(DeletionRequest({"ids": ["a"]}), [*items, keep], holdout, [], {})
    original, networks = small_unet(), {"0": small_unet(seed=1), "1": small_unet(seed=2)}
    folds = References.of_folds(networks, resolution.training, holdout)
    found = unlearning_targets(original, to_out_of_fold(networks), resolution, draw, reference=folds)
    for item in items:
        expected = networks[str(item["fold"])](draw(item)["image"][None])[0].sigmoid()
        torch.testing.assert_close(found["values"]["forget_label"][item["image"], "m"], expected)
    assert 0 <= found["stop_value"] <= 1
    assert found["images"] == pytest.approx((1 + len(items) + len(items) + 2 * 25) / 3)
    with pytest.raises(RequestError, match="never saw fold 1"):
        unlearning_targets(original, to_out_of_fold({"0": networks["0"]}), resolution, draw)
    with pytest.raises(RequestError, match="by the fold each never saw"):
        monai_unlearn.fold_networks(small_unet, ["a.pt", "b.pt"])


def test_what_matters_to_the_training_data_is_stored_and_read_in_their_place(tmp_path):
    items = [{**item, "forget": index < 2} for index, item in enumerate(ITEMS[:5])]
    parts = {"forget": items[:2], "data": items}
    network, file = small_unet().eval(), tmp_path / "salience.safetensors"
    loss = nn.BCEWithLogitsLoss()
    first = monai_unlearn.weight_gradients(network, parts, draw, loss, squared=True, stored=file)
    assert first["images"] == 7 and stat.S_IMODE(file.stat().st_mode) == 0o600
    again = monai_unlearn.weight_gradients(network, {**parts, "data": []}, draw, loss, squared=True, stored=file)
    assert again["images"] == 2 and again["flops"] == pytest.approx(first["flops"] * 2 / 7)  # retained cases not needed
    torch.testing.assert_close(again["data"], first["data"], rtol=0, atol=0)
    torch.testing.assert_close(again["forget"], first["forget"], rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="another network"):
        monai_unlearn.weight_gradients(small_unet(seed=9), parts, draw, loss, stored=file)


def test_a_search_is_made_once_for_a_network_and_its_data_and_counts_its_passes(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = small_unet()

        def forward(self, image):
            z = self.network(image)
            return torch.cat([-z, z], 1).mean((2, 3))

    def two_classes(item):
        return {**draw(item), "label": torch.eye(2)[int(item["image"]) % 2]}

    items = [{**item, "group": item["image"]} for item in ITEMS]
    resolution = Resolution(DeletionRequest({"ids": ["a"]}), items, [{**items[1], "image": "60"}], [], {})
    original, store, found = Two(), LabelStore(tmp_path, b"k" * 32), []
    for _ in range(2):
        relabel = BoundaryRelabel(PerturbedSignGradient(original))
        found.append((unlearning_targets(original, relabel, resolution, two_classes, label_store=store), relabel))
    (first, searched), (again, idle) = found
    for item in items:
        if item["forget"]:
            key = (item["image"], "m")
            assert first["values"]["forget_label"][key].tolist() == [0, 1][:: 1 if int(item["image"]) % 2 == 0 else -1]
            torch.testing.assert_close(first["values"]["forget_label"][key], again["values"]["forget_label"][key])
    assert idle.search.forwards == 0 and again["flops"] == first["flops"]
    assert again["relabelling"] == first["relabelling"] == searched.report()
    assert first["images"] == pytest.approx((9 + searched.search.forwards + searched.search.backwards) / 3)
    assert [path.stat().st_mode & 0o077 for path in tmp_path.glob("*.safetensors")] == [0]


# preparing ------------------------------------------------------------------------------------------------------------


def test_the_phantom_brings_its_own_split_and_forget_set(tmp_path):
    prepared = prepare(output_dir=tmp_path, quick=True)
    assert prepared.phantom and prepared.name == "phantom"
    assert {item["fold"] for item in prepared.resolution.holdout} == {"4"}
    assert all("sha256" in item for item in prepared.resolution.training)


def test_real_data_need_a_request_and_a_given_model_needs_its_split(phantom, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in phantom.iterdir():
        if path.name != "phantom.json":
            (folder / path.name).symlink_to(path)
    with pytest.raises(RequestError, match="nothing says who"):
        prepare(dataset_dir=folder)
    with pytest.raises(RequestError, match="nothing states which items"):
        prepare(dataset_dir=folder, forget_fraction=0.2, original_model="m.pt")
    assert prepare(dataset_dir=folder, forget_fraction=0.2).name == "mine"
    with pytest.raises(RequestError, match="not in the data list"):
        prepare(dataset_dir=folder, forget_ids="nobody")


def test_records_name_nobody_and_private_things_stay_private(phantom, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MONAI_UNLEARN_KEY_FILE", raising=False)
    prepared = prepare(dataset_dir=phantom, forget_ids="PHANTOM_0000000", output_dir=tmp_path)
    prepared.resolution.warnings.append("PHANTOM_0000000 looks like another")
    record_request(prepared, tmp_path)
    text = (tmp_path / "manifest.json").read_text() + capsys.readouterr().out
    assert "PHANTOM_" not in text and "P0000" not in text
    assert "PHANTOM_0000000" in (tmp_path / "private" / "ids.json").read_text()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "private").rglob("*")}
    assert modes == {"key": 0o600, "ids.json": 0o600}
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700
    first = (tmp_path / "manifest.json").read_bytes()
    record_request(prepared, tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == first  # the same key is used again


def test_the_sites_key_can_lie_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_UNLEARN_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(RequestError, match="there is no such file"):
        site_key(tmp_path)
    (tmp_path / "key").write_text("short")
    with pytest.raises(RequestError, match="5 bytes"):
        site_key(tmp_path)
    (tmp_path / "key").write_text("k" * 32 + "\n")
    assert site_key(tmp_path) == b"k" * 32
    assert not (tmp_path / "private").exists()


def test_a_verdict_is_a_result_unless_asked_otherwise():
    finish({"verdict": "FAIL"}, False)
    finish({"verdict": "NOT REFUTED"}, True)
    with pytest.raises(Stop) as caught:
        finish({"verdict": "INCONCLUSIVE"}, True)
    assert caught.value.code == 5
