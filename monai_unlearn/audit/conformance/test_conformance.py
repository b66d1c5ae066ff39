# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""``pytest --pyargs monai_unlearn.audit.conformance``: our metrics, yours, known mistakes and the control models."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, MeanIoU
from torch import nn

import monai_unlearn
from monai_unlearn.audit import (
    attack,
    auc,
    audit_weights,
    clopper_pearson,
    epsilon,
    js_divergence,
    likelihood_ratio,
    lira,
    rank_test,
    tug_of_war,
)
from monai_unlearn.audit.conformance import CHECKS, control_models, violations
from monai_unlearn.audit.conformance.controls import EXPECTED, build_unet
from monai_unlearn.audit.conformance.known_wrong import KNOWN_WRONG
from monai_unlearn.audit.report import plain
from monai_unlearn.audit.scores import case_scores, detailed_scores
from monai_unlearn.checkpoint import weights_digest
from monai_unlearn.losses import DistillationLoss


def _overlap(metric: Any) -> Callable[..., float]:
    return lambda mask, truth: float(metric(*(torch.tensor(x)[None, None].float() for x in (mask, truth))))


def _rows(logits: np.ndarray, y: np.ndarray) -> dict[str, torch.Tensor]:
    logit = torch.tensor(logits, dtype=torch.double)
    label = torch.eye(logit.shape[1], dtype=torch.double)[torch.tensor(y)]
    return {**case_scores(logit, label), **detailed_scores(logit, label)}


def _dense_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    label = nn.functional.one_hot(labels, logits.shape[1]).movedim(-1, 1).float()
    bins = detailed_scores(logits, label)["calibration"]
    return float(bins[:, 2].sum() / bins[:, 0].sum())


def _distillation(student: torch.Tensor, teacher: torch.Tensor) -> float:
    return float(DistillationLoss(temperature=2.0)(student, teacher))


def _select(candidates: list[dict[str, float]], target: float) -> int:
    """Nearest to the expected score, then what is retained."""
    return min(range(len(candidates)), key=lambda k: (round(abs(candidates[k]["forget"] - target), 2),
                                                      -candidates[k]["retain"]))  # fmt: skip


OURS: dict[str, Callable[..., Any]] = {
    "dice": _overlap(DiceMetric(ignore_empty=False)),
    "iou": _overlap(MeanIoU(ignore_empty=False)),
    "dense_accuracy": _dense_accuracy,
    "distillation": _distillation,
    "auc": auc,
    "membership": lambda forget, retain, unseen: attack(forget, unseen)["auc"],
    "direction": attack,
    "js": lambda p, q: float(js_divergence(torch.tensor(p), torch.tensor(q)).mean()),
    "modified_entropy": lambda p, y: _rows(np.log(p), y)["modified_entropy"].numpy(),
    "lira": lira,
    "rmia_ratio": likelihood_ratio,
    "epsilon": epsilon,
    "confidence_margin": lambda logits, y: _rows(logits, y)["margin"].numpy(),
    "clopper_pearson": clopper_pearson,
    "tug_of_war": tug_of_war,
    "rank": lambda patient, unseen: rank_test(patient, unseen)["p_up"],
}
# Habits that are no metric: an implementation that each check has to let pass.
SOUND: dict[str, Callable[..., Any]] = {
    "removal": lambda one, other: weights_digest(one.state_dict()) == weights_digest(other.state_dict()),
    "optimiser": lambda student, teacher: torch.optim.SGD(student.parameters(), 0.1),
    "selection": _select,
    "missing": lambda measure: measure(),
}


@pytest.mark.parametrize("name", OURS)
def test_our_metrics_compute_what_they_say(name: str) -> None:
    assert violations(name, OURS[name]) == []


def test_no_check_rejects_what_is_sound() -> None:
    assert set(OURS) | set(SOUND) == set(CHECKS)
    assert {name: violations(name, sound) for name, sound in SOUND.items()} == {key: [] for key in SOUND}


def _given() -> list[tuple[str, str]]:
    text = os.environ.get("MONAI_UNLEARN_METRICS", "")
    return [(name, path) for name, _, path in (one.strip().partition("=") for one in text.split(",") if one.strip())]


@pytest.mark.skipif(not _given(), reason="name your own in MONAI_UNLEARN_METRICS, such as auc=my_package.metrics:auc")
@pytest.mark.parametrize(("name", "path"), _given() or [("", "")])
def test_your_metrics_compute_what_they_say(name: str, path: str) -> None:
    module, _, attribute = path.partition(":")
    assert violations(name, getattr(importlib.import_module(module), attribute)) == []


@pytest.mark.parametrize("mistake", KNOWN_WRONG)
def test_known_mistakes_are_rejected(mistake: str) -> None:
    check, wrong = KNOWN_WRONG[mistake]
    assert violations(check, wrong)


def test_the_fixtures_show_the_symptoms_they_were_found_by() -> None:
    wrong = {mistake: implementation for mistake, (_, implementation) in KNOWN_WRONG.items()}
    p, y = np.array([[0.7, 0.2, 0.1]]), np.array([0])
    assert wrong["modified entropy with log p for log(1 - p)"](p, y)[0] == pytest.approx(0.6591, abs=5e-5)
    rng = np.random.default_rng(0)
    apart = [
        1
        - wrong["JS with KL the wrong way round and a mean over elements"](
            *(torch.tensor(rng.normal(size=(2000, number))).softmax(1).numpy() for _ in range(2))
        )
        for number in (10, 100)
    ]
    assert apart[0] > 0.97 and apart[1] > apart[0]  # "forgotten", the more classes the better  # fmt: skip
    one_hot = np.eye(2)[[0]], np.eye(2)[[1]]
    assert not np.isfinite(wrong["JS with KL the wrong way round and a mean over elements"](*one_hot))
    logits, labels = torch.zeros(2, 2, 96, 128), torch.zeros(2, 96, 128, dtype=torch.long)
    assert wrong["accuracy divided by the batch size on dense output"](logits, labels) == 96 * 128


def test_a_number_that_was_not_measured_is_not_printed() -> None:
    assert plain({"never": float("nan"), "nor": float("inf")}) == {"never": None, "nor": None}


def test_every_part_of_the_package_can_be_imported() -> None:
    names = [module.name for module in pkgutil.walk_packages(monai_unlearn.__path__, "monai_unlearn.")]
    assert {"monai_unlearn.audit.report", "monai_unlearn.datasets.lists"} <= set(names)
    if importlib.util.find_spec("monailabel") is None:  # what only MONAI Label's environment can import
        names.remove("monai_unlearn.label_app")
    for name in names:
        importlib.import_module(name)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, dict[str, Any]]:
    found = control_models()
    weights = {name: network.state_dict() for name, network in found.networks.items()}
    return {
        name: audit_weights(
            build_unet,
            {"original": weights["identity"], "unlearned": weights[name],
             "retrained": weights["retrained_other" if name == "retrained" else "retrained"]},
            found.datalists,
            found.transform,
            references=[weights["judge"]],
        )
        for name in EXPECTED
    }  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_control_models_get_their_verdicts(verdicts: dict[str, dict[str, Any]], name: str) -> None:
    report = verdicts[name]
    assert (report["verdict"] == "FAIL") == (EXPECTED[name] == "FAIL"), (report["verdict"], report["reasons"])
    said = " ".join(report["reasons"])
    wanted = {"identity": "still scores", "collapsed": "cases lost", "contradicting": "over-forgotten"}
    assert wanted.get(name, "") in said


def test_the_collapsed_model_looks_right_on_the_forget_set(verdicts: dict[str, dict[str, Any]]) -> None:
    scores = {name: report["scores"]["unlearned"] for name, report in verdicts.items()}
    assert scores["collapsed"]["forget"]["mean_iou"] <= scores["retrained"]["forget"]["mean_iou"]
    assert scores["collapsed"]["retain"]["mean_iou"] < scores["retrained"]["retain"]["mean_iou"] - 0.04
    membership = {name: report["membership"]["unlearned"]["calibrated"] for name, report in verdicts.items()}
    assert membership["identity"]["auc"] > 0.9 and membership["contradicting"]["auc"] < 0.2
