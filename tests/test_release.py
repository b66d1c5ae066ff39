# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""A release that says what it is, on folders small enough to flip every kind of bit in them."""

import hashlib
import itertools
import json
import os
import random
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import small_unet

from monai_unlearn import inject_lora, merge_lora, release
from monai_unlearn.__main__ import main
from monai_unlearn.checkpoint import file_digest, read_weights, save_weights, weights_digest, write_json
from monai_unlearn.lora import save_adapter
from monai_unlearn.release import (
    REVERSIBLE,
    ReleaseError,
    entry_digest,
    extended_lineage,
    finalise,
    retrain_due,
    verify,
)
from monai_unlearn.request import merkle_root

LIMITS = {"forget": 0.02, "utility": 0.02, "retain": 0.04, "membership": 0.05}
needs_signing = pytest.mark.skipif(find_spec("model_signing") is None, reason="needs the extra release")


def row(score, n):
    return {"mean_iou": score, "ci": [score - 0.1, score + 0.1], "n": n, "loss": 0.5}


def audited_run(folder, original, unlearned, verdict="NOT REFUTED", holdout=(0.8, 0.79)):
    """What a run leaves behind, with numbers made up for the test."""
    (folder / "models").mkdir(parents=True)
    save_weights(original, folder / "models" / "original.pt")
    save_weights(unlearned, folder / "models" / "unlearned.pt")
    splits = {"forget": 2, "retain": 8, "holdout": 4}
    report = {
        "schema": "monai_unlearn.report/1", "tier": 1, "job": "deletion", "request": "request-1", "limits": LIMITS,
        "weights": {"original": weights_digest(original.state_dict()),
                    "unlearned": weights_digest(unlearned.state_dict())},
        "shows_forget": False, "data": "toy", "splits": splits, "subgroups": [], "stop": None, "cost": {},
        "scores": {"original": {"forget": row(0.9, 2), "holdout": row(holdout[0], 4)},
                   "unlearned": {"forget": row(0.7, 2), "holdout": row(holdout[1], 4)}},
        "expected_unseen": 0.7, "completeness": 1.0, "membership": {}, "verdict": verdict, "reasons": ["so it is"],
        "not_tested": ["much"], "environment": {"torch": torch.__version__},
    }  # fmt: skip
    manifest = {
        "request": "request-1", "request_hmac": "aa", "job": "deletion", "selector": "ids", "unit": "group",
        "limits": LIMITS, "counts": splits, "groups": splits, "forget": ["0123456789ab", "ba9876543210"],
        "roots": {name: merkle_root([name]) for name in ("training", "retain", "holdout")},
    }  # fmt: skip
    write_json(report, folder / "report.json")
    write_json(manifest, folder / "manifest.json")
    (folder / "report.html").write_text("<html></html>")
    return folder


@pytest.fixture
def run(tmp_path):
    return audited_run(tmp_path / "run", small_unet(seed=1), small_unet(seed=2))


def release_of(run, **options):
    return finalise(run, small_unet(), run / "models" / "original.pt", **{"sign": False, **options})


def test_a_release_holds_plain_weights_their_report_and_a_receipt_and_is_made_once(run):
    before = file_digest(run / "models" / "original.pt")
    folder = release_of(run)
    names = {"unlearned.pt", "report.json", "report.html", "manifest.json", "receipt.json", "release.json",
             "model_card.md"}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == names
    assert set(read_weights(folder / "unlearned.pt")) == set(small_unet().state_dict())
    found = verify(folder)
    assert found["signature"] == "none" and found["verdict"] == "NOT REFUTED" and not found["retrain_due"]
    digests = {path.name: file_digest(path) for path in folder.iterdir()}
    assert release_of(run) == folder
    assert digests == {path.name: file_digest(path) for path in folder.iterdir()}
    assert file_digest(run / "models" / "original.pt") == before
    assert not list(run.glob(".release.*"))


@needs_signing
def test_the_signature_holds_away_from_the_run_and_not_after_any_flipped_bit(run, tmp_path):
    folder, key = release_of(run, sign=True), run / "signing_public.pem"
    assert (run / "private" / "signing_key.pem").stat().st_mode & 0o777 == 0o600
    away = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    assert verify(away, key)["signature"] == "checked"
    assert verify(away)["signature"] == "not checked"
    assert main(["verify", str(away), "--public_key", str(key)]) == 0
    rng = random.Random(0)
    for path in sorted(away.iterdir()):
        content = path.read_bytes()
        for place in (0, len(content) - 1, rng.randrange(len(content))):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert main(["verify", str(away), "--public_key", str(key)]) == 3, (path.name, place)
        path.write_bytes(content)
    assert verify(away, key)["signature"] == "checked"


@needs_signing
def test_somebody_elses_key_and_somebody_elses_signature_are_refused(run, tmp_path):
    folder = release_of(run, sign=True)
    other = audited_run(tmp_path / "other", small_unet(seed=1), small_unet(seed=3))
    release_of(other, sign=True)
    with pytest.raises(ReleaseError, match="signature does not hold"):
        verify(folder, other / "signing_public.pem")
    shutil.copy(other / "release" / "model.sig", folder / "model.sig")
    with pytest.raises(ReleaseError, match="signature does not hold"):
        verify(folder, run / "signing_public.pem")


def test_every_flipped_bit_of_an_unsigned_release_but_those_of_its_own_list_is_found(run):
    folder, rng = release_of(run), random.Random(1)
    for name in ("unlearned.pt", "report.json", "report.html", "manifest.json", "receipt.json", "model_card.md"):
        content = (folder / name).read_bytes()
        for _ in range(20):
            place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
            (folder / name).write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(ReleaseError):
                verify(folder)
        (folder / name).write_bytes(content)
    verify(folder)


def relist(folder):
    """Make the list of files agree with what is there, as somebody would who hides a change."""
    release = json.loads((folder / "release.json").read_text())
    release["files"] = {name: file_digest(folder / name) for name in release["files"]}
    release["model"]["sha256"] = release["files"]["unlearned.pt"]
    write_json(release, folder / "release.json")


def other_weights(folder, run):
    save_weights(small_unet(seed=5), folder / "unlearned.pt")


def better_scores(folder, run):
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["measured"]["scores"]["unlearned"]["forget"]["mean_iou"] = 0.99
    write_json(receipt, folder / "receipt.json")


def better_verdict(folder, run):
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["measured"]["verdict"] = "RETRAIN-EQUIVALENT"
    write_json(receipt, folder / "receipt.json")


def fewer_cases(folder, run):
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["forgotten"]["pseudonyms"].pop()
    write_json(receipt, folder / "receipt.json")


@pytest.mark.parametrize("change", [other_weights, better_scores, better_verdict, fewer_cases])
def test_files_that_contradict_each_other_are_refused_even_when_the_list_agrees(change, run):
    folder = release_of(run)
    change(folder, run)
    relist(folder)
    with pytest.raises(ReleaseError):
        verify(folder)


def test_a_file_too_many_or_too_few_is_refused(run):
    folder = release_of(run)
    (folder / "original.pt").write_bytes(b"x")
    with pytest.raises(ReleaseError, match="not listed: original.pt"):
        verify(folder)
    (folder / "original.pt").unlink()
    (folder / "report.html").unlink()
    with pytest.raises(ReleaseError, match="missing: report.html"):
        verify(folder)


def test_a_link_in_a_release_is_refused(run, tmp_path):
    folder = release_of(run)
    (tmp_path / "other").mkdir()
    (folder / "more").symlink_to(tmp_path / "other")
    with pytest.raises(ReleaseError, match="changed since the release: more"):
        verify(folder)


def test_what_was_not_measured_on_these_weights_is_not_released(run):
    save_weights(small_unet(seed=7), run / "models" / "unlearned.pt")
    with pytest.raises(ReleaseError, match="other weights of the unlearned model"):
        release_of(run)
    assert not (run / "release").exists()


@pytest.mark.parametrize("missing", ["report.json", "manifest.json", "report.html"])
def test_there_is_no_release_without_its_papers(missing, run):
    (run / missing).unlink()
    with pytest.raises((ReleaseError, FileNotFoundError)):
        release_of(run)
    assert not (run / "release").exists() and not list(run.glob(".release.*"))


def test_the_original_is_not_released(tmp_path):
    run = audited_run(tmp_path / "run", small_unet(seed=1), small_unet(seed=1))
    with pytest.raises(ReleaseError, match="original's weights"):
        release_of(run)


def test_pictures_of_forgotten_cases_are_not_released(run):
    report = json.loads((run / "report.json").read_text())
    write_json({**report, "shows_forget": True}, run / "report.json")
    with pytest.raises(ReleaseError, match="show_forget"):
        release_of(run)


def test_no_file_of_a_release_may_hold_a_tensor_that_unlearning_changed(run):
    original = read_weights(run / "models" / "original.pt")
    name = next(name for name, value in original.items() if value.is_floating_point() and value.nbytes >= 64)
    original[name] = torch.full_like(original[name], float(np.frombuffer(b"1112", "<f4")[0]))
    network = small_unet()
    network.load_state_dict(original)
    save_weights(network, run / "models" / "original.pt")
    report = json.loads((run / "report.json").read_text())
    report["weights"]["original"] = weights_digest(original)
    write_json(report, run / "report.json")
    release_of(run)
    shutil.rmtree(run / "release")
    (run / "report.html").write_bytes(b"<!--" + original[name].numpy().tobytes() + b"-->")
    with pytest.raises(ReleaseError, match="report.html holds the original's"):
        release_of(run)


def test_an_adapter_ships_only_when_asked_for_and_is_called_reversible(tmp_path):
    original = small_unet(seed=1)
    student = inject_lora(small_unet(seed=1), rank=2)
    with torch.no_grad():
        for name, value in student.named_parameters():
            if "lora_B" in name:
                value.add_(0.1)
    run = audited_run(tmp_path / "run", original, merge_lora(student))
    save_adapter(student, run / "models" / "adapter")
    plain = release_of(run)
    assert not (plain / "adapter").exists()
    shutil.rmtree(plain)
    folder = release_of(run, with_adapter=True)
    assert (folder / "receipt.json").read_text().splitlines()[1].strip().startswith(f'"statement": "{REVERSIBLE[:10]}')
    assert verify(folder)["statement"] == REVERSIBLE
    receipt = json.loads((folder / "receipt.json").read_text())
    write_json({**receipt, "statement": "all is well"}, folder / "receipt.json")
    relist(folder)
    with pytest.raises(ReleaseError, match="reversible"):
        verify(folder)


def test_a_later_request_continues_the_line_of_descent(run, tmp_path):
    first = release_of(run)
    network = small_unet()
    network.load_state_dict(read_weights(first / "unlearned.pt"))
    second = audited_run(tmp_path / "second", network, small_unet(seed=9), holdout=(0.79, 0.77))
    folder = finalise(second, small_unet(), first / "unlearned.pt", sign=False)
    lineage = json.loads((folder / "release.json").read_text())["lineage"]
    assert lineage[0]["child"] == lineage[1]["parent"]
    assert lineage[1]["previous"] == entry_digest(lineage[0])
    assert verify(folder)["retrain_due"] == ["unseen cases lost 0.030 in 2 requests, more than 0.02"]
    (first / "report.html").write_text("changed")
    shutil.rmtree(folder)
    with pytest.raises(ReleaseError, match="changed since"):
        finalise(second, small_unet(), first / "unlearned.pt", sign=False)


def test_the_rule_that_a_retraining_is_due():
    report = {"request": "r", "job": "deletion", "splits": {"forget": 1}, "verdict": "NOT REFUTED",
              "scores": {name: {"holdout": {"mean_iou": 0.8}} for name in ("original", "unlearned")}}  # fmt: skip
    manifest, digests = {"roots": {"holdout": "a"}}, {"original": "o", "unlearned": "u"}
    lineage = []
    for _ in range(10):
        assert not lineage or not retrain_due(lineage, LIMITS)
        lineage = extended_lineage(lineage, report, manifest, digests)
    assert retrain_due(lineage, LIMITS) == ["10 requests were carried out since the model was trained"]
    assert "failed" in retrain_due(extended_lineage([], {**report, "verdict": "FAIL"}, manifest, digests), LIMITS)[0]


def test_the_root_depends_on_every_leaf_and_on_no_order():
    def by_hand(*leaves):
        a, b, c = (hashlib.sha256(b"\x00" + leaf.encode()).digest() for leaf in leaves)
        return hashlib.sha256(b"\x01" + hashlib.sha256(b"\x01" + a + b).digest() + c).hexdigest()

    assert merkle_root(["b", "c", "a"]) == by_hand("a", "b", "c")
    assert merkle_root(["a", "b"]) != merkle_root(["a", "b", "b"]) != merkle_root(["a", "b", "c"])
    assert merkle_root([]) == hashlib.sha256(b"").hexdigest()


def finalise_killed_at(run, at):
    """Finalise in a child process that dies, as by SIGKILL, at the ``at``-th step that writes; its exit code."""
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)

        def deadly(function):
            def wrapped(*args, **kwargs):
                if next(steps) == at:
                    os._exit(9)
                return function(*args, **kwargs)

            return wrapped

        for name in ("save_weights", "write_text", "write_json", "_refuse_original_inside"):
            setattr(release, name, deadly(getattr(release, name)))
        release.os.rename = deadly(os.rename)
        try:
            release_of(run)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_release_killed_anywhere_is_whole_or_not_there(run):
    codes = []
    for at in range(1, 12):
        codes.append(finalise_killed_at(run, at))
        if codes[-1] == 0:
            break
        assert codes[-1] == 9 and not (run / "release").exists()
    assert codes[-1] == 0 and len(codes) > 7
    verify(run / "release")
    assert not list(run.glob(".release.*"))
