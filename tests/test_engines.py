# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import copy
import json

import pytest
import torch
from conftest import small_unet
from torch import nn
from toy import ITEMS, dataset, plain_trainer, unlearning_trainer

from monai_unlearn.audit.scores import score_cases
from monai_unlearn.checkpoint import CheckpointError, read_weights, weights_digest
from monai_unlearn.data import MemoryDataset
from monai_unlearn.engines import PrepareUnlearning, forward_flops, load_phase, run_phase, training_flops
from monai_unlearn.handlers import TeacherGuard
from monai_unlearn.lora import make_student, merge_lora
from monai_unlearn.relabel import to_background


def batch(**extra):
    return {
        "image": torch.rand(4, 1, 8, 8),
        "label": torch.ones(4, 1, 8, 8),
        "forget": torch.tensor([0, 1, 0, 1]),
        **extra,
    }


def test_only_the_samples_to_forget_get_new_labels():
    given = batch()
    image, target, _, _ = PrepareUnlearning(to_background)(given)
    torch.testing.assert_close(image, given["image"])
    assert target.label.amax((1, 2, 3)).tolist() == [1, 0, 1, 0]
    assert target.forget.tolist() == [False, True, False, True]
    assert given["label"].min() == 1  # the batch itself is left as it was


def test_a_label_computed_beforehand_wins_over_the_relabel():
    stored = torch.full((4, 1, 8, 8), 0.3)
    _, target, _, _ = PrepareUnlearning(to_background)(batch(forget_label=stored))
    assert target.label.amax((1, 2, 3)).tolist() == pytest.approx([1, 0.3, 1, 0.3])


def test_the_teacher_runs_in_eval_mode_without_gradients_or_comes_with_the_batch():
    teacher = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train()
    before = weights_digest(teacher.state_dict())
    given = batch()
    _, target, _, _ = PrepareUnlearning(teacher=teacher)(given)
    torch.testing.assert_close(target.teacher, teacher(given["image"]))
    assert not target.teacher.requires_grad and weights_digest(teacher.state_dict()) == before
    _, target, _, _ = PrepareUnlearning(teacher=teacher)(batch(teacher=torch.full((4, 1, 8, 8), 7.0)))
    assert (target.teacher == 7).all()
    assert PrepareUnlearning()(batch())[1].teacher is None


@pytest.mark.parametrize("key", ["label", "forget"])
def test_a_batch_that_lacks_something_is_refused_by_name(key):
    given = batch()
    del given[key]
    with pytest.raises(ValueError, match=f"no item '{key}'"):
        PrepareUnlearning()(given)


def test_floating_point_operations_are_counted_right():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 64, 2, bias=False))
    forward = 2 * (64 * 3 * 4 * 9 + 4 * 64 * 2)
    image = torch.rand(3, 8, 8)
    assert forward_flops(network, image) == forward
    assert training_flops(network, image) == 3 * forward - 2 * 64 * 3 * 4 * 9  # no gradient of the input
    network.requires_grad_(False)
    assert training_flops(network, image) == forward


def test_a_learning_rate_of_zero_changes_no_tensor_and_no_buffer():
    original = small_unet()
    for scope in ("all", "full"):
        student = make_student(original, scope, rank=2, alpha=8)
        unlearning_trainer(student, lr=0.0, teacher=original).run()
        torch.testing.assert_close(dict(merge_lora(student).state_dict()), dict(original.state_dict()), rtol=0, atol=0)


def test_unlearning_forgets_the_marked_keeps_the_rest_and_leaves_the_teacher_bit_identical():
    original = small_unet()
    plain_trainer(30, original).run()
    original.eval()
    before = copy.deepcopy(dict(original.state_dict()))
    student = make_student(original, "all", rank=4, alpha=16)
    unlearning_trainer(student, epochs=25, teacher=original, handlers=[TeacherGuard(original)]).run()
    torch.testing.assert_close(dict(original.state_dict()), before, rtol=0, atol=0)
    merged = merge_lora(student)
    assert list(merged.state_dict()) == list(original.state_dict())
    sides = {
        flag: MemoryDataset([i for i in ITEMS if i["forget"] == flag], dataset().transform) for flag in (True, False)
    }
    scores = {(name, flag): score_cases(net, data)["iou"].mean() for flag, data in sides.items()
              for name, net in (("original", original), ("student", merged))}  # fmt: skip
    assert scores["original", True] > 0.8 and scores["original", False] > 0.8
    assert scores["student", True] < scores["original", True] - 0.3
    assert scores["student", False] > scores["student", True] + 0.3


def test_a_phase_writes_plain_weights_with_their_record_and_is_not_run_twice(tmp_path):
    path = tmp_path / "models" / "m.pt"
    first = run_phase(plain_trainer(), path, "config")
    assert first["images"] == 24 and first["flops"] > 0 and first["seconds"] > 0 and not first["reused"]
    assert list(read_weights(path)) == list(small_unet().state_dict())
    assert json.loads(path.with_suffix(".json").read_text())["sha256"] == first["sha256"]
    again = run_phase(plain_trainer(), path, "config")
    assert again["reused"] and again["sha256"] == first["sha256"]
    assert not list((tmp_path / "private").rglob("*.pt"))  # no state is left behind
    assert weights_digest(load_phase(small_unet(seed=1), path, again).state_dict()) == weights_digest(
        read_weights(path)
    )


@pytest.mark.parametrize("change", ["config", "weights", "data", "file"])
def test_a_phase_is_run_again_when_anything_about_it_changed(change, tmp_path, caplog):
    path = tmp_path / "models" / "m.pt"
    run_phase(plain_trainer(), path, "config")
    trainer = plain_trainer(network=small_unet(seed=int(change == "weights")))
    if change == "data":
        trainer.data_loader.dataset.data = [{**ITEMS[0], "sha256": "new"}, *ITEMS[1:]]
    if change == "file":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    record = run_phase(trainer, path, "other" if change == "config" else "config")
    assert not record["reused"]
    assert (change == "file") == ("fails its digest" in caplog.text)


def test_no_epochs_mean_no_change(tmp_path):
    network = small_unet()
    record = run_phase(plain_trainer(0, network), tmp_path / "models" / "m.pt", "config")
    assert weights_digest(read_weights(tmp_path / "models" / "m.pt")) == weights_digest(network.state_dict())
    assert (record["images"], record["flops"]) == (0, 0)


def test_weights_that_changed_since_they_were_written_are_not_loaded(tmp_path):
    path = tmp_path / "models" / "m.pt"
    record = run_phase(plain_trainer(1), path, "config")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="changed since it was written"):
        load_phase(small_unet(), path, record)


def test_a_broken_record_is_said_and_the_phase_run_again(tmp_path, caplog):
    path = tmp_path / "models" / "m.pt"
    run_phase(plain_trainer(1), path, "config")
    path.with_suffix(".json").write_text("{")
    assert not run_phase(plain_trainer(1), path, "config")["reused"]
    assert "cannot be read" in caplog.text
