# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The evidence in one dict, judged by limits that were fixed beforehand."""

from __future__ import annotations

import math
import platform
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checkpoint import write_json, write_text
from ..data import MemoryDataset
from ..engines import forward_flops
from ..request import Resolution
from .membership import membership_table, negative_control, rank_test
from .page import render
from .reference import completeness, expected_unseen
from .scores import score_cases
from .statistics import bootstrap_mean, group_means

SCHEMA = "monai_unlearn.report/1"
REPORTED = ("original", "unlearned", "retrained", "reference")
NOT_TESTED = [
    "relearning curves and benign fine-tuning",
    "rounding of the weights (bf16, int8, int4)",
    "attacks with shadow models (LiRA, RULI)",
    "copies of the data outside this run: backups, archives, other models trained on it",
]
Scores = dict[str, dict[str, dict[str, np.ndarray]]]


def audit(
    resolution: Resolution,
    networks: Mapping[str, nn.Module | None],
    judge: nn.Module,
    transform: Callable[[Any], Any],
    store: dict[Any, Any] | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    data: str = "unnamed",
    phases: Mapping[str, Mapping[str, Any]] | None = None,
    show_forget: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Score every model on every split, attack the models, run both controls and reach a verdict.

    Args:
        resolution: who was forgotten.
        networks: ``original``, ``unlearned``, and where made ``reference`` (the teacher) and ``retrained``; None is
            left out.
        judge: a reference that never saw forget set or holdout and taught nobody.
        transform: deterministic preprocessing.
        store: of decoded items, shared with the run.
        device: where to compute.
        batch_size: cases at a time.
        data: a name of the data without a path.
        phases: the records of the run's phases by name (``original``, ``reference``, ``judge``, ``unlearn``,
            ``retrain``, ``cache``), for the cost and the stop rule.
        show_forget: draw forget cases too.
        seed: of intervals and control.

    Returns:
        The report; ``_figures`` holds what the page draws and is left out of the JSON.

    Raises:
        ValueError: when judge and reference are the same network, or a model is missing.
    """
    models = {name: network for name, network in networks.items() if network is not None}
    if judge is networks.get("reference"):
        raise ValueError("the judge must not be the reference that taught; give two different models.")
    for name in ("original", "unlearned"):
        if name not in models:
            raise ValueError(f"the audit needs the {name} model.")
    start, phases = time.perf_counter(), phases or {}
    splits = resolution.splits
    datasets = {name: MemoryDataset(items, transform, store) for name, items in splits.items()}
    scores: Scores = {
        name: {
            split: score_cases(network, dataset, device, batch_size, desc=f"scoring {name}")
            for split, dataset in datasets.items()
        }
        for name, network in {**models, "judge": judge}.items()
    }
    groups = {name: [item["group"] for item in items] for name, items in splits.items()}
    target = expected_unseen(
        scores["judge"]["forget"]["iou"], scores["original"]["holdout"]["iou"], scores["judge"]["holdout"]["iou"]
    )
    attacked: Scores = {name: scores[name] for name in ("original", "unlearned", "retrained") if name in scores}
    membership = membership_table(attacked, scores["judge"], groups, seed)
    controls = _controls(scores, membership, groups, seed)
    verdict, reasons = judge_verdict(resolution, scores, groups, target, membership, controls, seed)
    images = sum(len(items) for name, items in splits.items() if "_" not in name) * len(scores)
    flops = images * forward_flops(models["original"], datasets["forget"][0]["image"].to(device))
    spent = {"seconds": time.perf_counter() - start, "images": images / 3, "flops": flops}
    report = {
        "schema": SCHEMA,
        "job": resolution.request.job,
        "request": resolution.request.id,
        "limits": resolution.request.limits_in_force,
        "data": data,
        "splits": {name: len(items) for name, items in splits.items()},
        "groups": {name: len(set(names)) for name, names in groups.items()},
        "scores": {
            name: {split: _summary(rows, groups[split]) for split, rows in scores[name].items()}
            for name in (*REPORTED, "judge")
            if name in scores
        },
        "expected_unseen": target,
        "completeness": completeness(
            scores["original"]["forget"]["iou"].mean(), scores["unlearned"]["forget"]["iou"].mean(), target
        ),
        "membership": membership,
        "controls": controls,
        "relearn": None,
        "stop": phases.get("unlearn", {}).get("reports", {}).get("stop_at_reference"),
        "cost": cost_table(phases, spent),
        "verdict": verdict,
        "reasons": reasons,
        "not_tested": NOT_TESTED,
        "environment": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("monai_unlearn", "monai", "torch", "peft", "numpy")},
            "threads": torch.get_num_threads(),
            "device": str(device),
            "seed": seed,
        },
    }
    report = plain(report)
    report["_figures"] = {
        "scores": scores,
        "cases": _example_cases(models, datasets, scores, device, show_forget),
    }
    return report


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def plain(value: Any) -> Any:
    """The same content in JSON's own types; a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(entry) for entry in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def _summary(rows: Mapping[str, np.ndarray], groups: list[str]) -> dict[str, Any]:
    number = len(groups)
    if number == 0:
        return {"mean_iou": None, "mean_dice": None, "loss": None, "n": 0, "ci": None}
    return {
        "mean_iou": rows["iou"].mean(),
        "mean_dice": rows["dice"].mean(),
        "loss": rows["loss"].mean(),
        "n": number,
        "n_empty": int((rows["area"] == 0).sum()),
        "ci": bootstrap_mean(rows["iou"], groups),
    }


def _controls(
    scores: Scores, membership: Mapping[str, Mapping[str, Any]], groups: Mapping[str, list[str]], seed: int
) -> dict[str, Any]:
    unseen = scores["unlearned"]["holdout"]["iou"] - scores["judge"]["holdout"]["iou"]
    positive = dict(membership["original"]["calibrated"])
    if positive["auc"] is None and len(groups["forget"]) > 0:  # one patient: the rank test stands in for the AUC
        positive["rank_test"] = _one_patient(scores, "original", groups)
        positive["ok"] = positive["rank_test"]["p_up"] <= 0.05
    else:
        positive["ok"] = bool(positive["ci"] and positive["ci"][0] > 0.5)
    return {"positive": positive, "negative": negative_control(unseen, groups["holdout"], seed=seed)}


def _one_patient(scores: Scores, model: str, groups: Mapping[str, list[str]]) -> dict[str, float]:
    sides = [scores[model][split]["iou"] - scores["judge"][split]["iou"] for split in ("forget", "holdout")]
    return rank_test(float(sides[0].mean()), group_means(sides[1], groups["holdout"]))


def judge_verdict(
    resolution: Resolution,
    scores: Scores,
    groups: Mapping[str, list[str]],
    target: float,
    membership: Mapping[str, Mapping[str, Any]],
    controls: Mapping[str, Any],
    seed: int = 0,
) -> tuple[str, list[str]]:
    """FAIL, INCONCLUSIVE or NOT REFUTED, with the reasons in plain words.

    FAIL needs evidence: an interval that lies wholly beyond a limit of the request, on the forget score (too high and
    too low alike), on the membership attack (in either direction) or on the utility. INCONCLUSIVE means that a control
    did not behave or that there was nothing measurable to forget.
    """
    limits, failed, unclear = resolution.request.limits_in_force, [], []
    u, o, j = scores["unlearned"], scores["original"], scores["judge"]
    reference = scores.get("retrained", o)
    against = "the retrained model" if "retrained" in scores else "the original"

    loss = u["holdout"]["iou"] - reference["holdout"]["iou"]
    high = bootstrap_mean(loss, groups["holdout"], level=0.9)[1]
    if high < -limits["utility"]:
        failed.append(f"unseen cases lost {-loss.mean():.3f} IoU against {against}, more than {limits['utility']}.")
    if "retrained" in scores:
        loss = u["retain"]["iou"] - reference["retain"]["iou"]
        if bootstrap_mean(loss, groups["retain"], level=0.9)[1] < -limits["retain"]:
            failed.append(
                f"retained cases lost {-loss.mean():.3f} IoU against {against}, more than {limits['retain']}."
            )

    if resolution.request.job == "suppression":
        unclear.append("suppression is judged by probes for the class, which this audit does not run.")
    else:
        score, memorised = u["forget"]["iou"].mean(), o["forget"]["iou"].mean()
        offset = o["holdout"]["iou"] - j["holdout"]["iou"]
        low, high = _difference(
            u["forget"]["iou"] - j["forget"]["iou"], groups["forget"], offset, groups["holdout"], seed
        )
        if low > limits["forget"]:
            failed.append(f"the forget set still scores {score:.3f} IoU where an unseen case would score {target:.3f}.")
        if high < -limits["forget"]:
            failed.append(
                f"the forget set scores {score:.3f} IoU, below the {target:.3f} of an unseen case: over-forgotten, "
                "which marks the cases as clearly as remembering them."
            )
        row = membership["unlearned"]["calibrated"]
        if row["auc"] is None:
            test = _one_patient(scores, "unlearned", groups)
            if test["p"] <= 0.05:
                failed.append(f"the patient stands out among unseen patients (rank test p = {test['p']:.3f}).")
        elif row["ci"][0] > 0.5 + limits["membership"] or row["ci"][1] < 0.5 - limits["membership"]:
            failed.append(
                f"an attack tells the forgotten from unseen patients: calibrated AUC {row['auc']:.3f} "
                f"[{row['ci'][0]:.3f}, {row['ci'][1]:.3f}], direction {row['direction']}."
            )
        if abs(memorised - target) < 2 * limits["forget"]:
            unclear.append(
                f"the original scores {memorised:.3f} on the forget set and an unseen case would score {target:.3f}: "
                "nothing measurable to forget."
            )
        if not controls["positive"]["ok"]:
            unclear.append("the attack does not find the forget set in the original model, so it proves nothing here.")
    if not controls["negative"]["ok"]:
        unclear.append("the attack finds differences between unseen patients too, so it cannot be relied on here.")
    if failed:
        return "FAIL", failed + unclear
    if unclear:
        return "INCONCLUSIVE", unclear
    return "NOT REFUTED", [
        f"forget score {u['forget']['iou'].mean():.3f} against {target:.3f} expected of unseen cases; no test failed "
        "and both controls behave. This is measured behaviour, no proof of erasure."
    ]


def _difference(
    one: np.ndarray, one_groups: list[str], other: np.ndarray, other_groups: list[str], seed: int
) -> tuple[float, float]:
    """95 % interval of mean(one) − mean(other) from independent cluster bootstraps."""
    rng, means = np.random.default_rng(seed), []
    for values, names in ((one, one_groups), (other, other_groups)):
        _, index = np.unique(names, return_inverse=True)
        sums, counts = np.bincount(index, values), np.bincount(index).astype(float)
        draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=10_000)
        means.append((draws @ sums) / (draws @ counts))
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    return float(low), float(high)


def cost_table(phases: Mapping[str, Mapping[str, Any]], audit_cost: Mapping[str, float]) -> dict[str, Any]:
    """Seconds, floating-point operations and image passes by purpose; None where a step was not part of this run.

    ``unlearn`` is the sum of ``cache`` (teacher outputs), ``reference`` (training the teaching reference) and
    ``train``. ``audit`` holds the scoring and the training of the judge. An image that only goes forward counts a
    third.
    """
    units = ("seconds", "flops", "images")

    def of(name: str) -> Mapping[str, Any] | None:
        return phases[name] if "seconds" in phases.get(name, {}) else None  # weights that were given cost nothing here

    given = of("reference") is None

    parts: dict[str, Mapping[str, Any] | None] = {
        "cache": of("cache"),
        "reference": of("reference") or (dict.fromkeys(units, 0) if given else None),
        "train": of("unlearn"),
        "retrain": of("retrain"),
    }
    judge = of("judge") or dict.fromkeys(units, 0)
    parts["audit"] = {unit: audit_cost[unit] + judge[unit] for unit in units}
    table: dict[str, Any] = {}
    for name in ("cache", "reference", "train", "unlearn", "audit", "retrain"):
        for unit in units:
            if name == "unlearn":
                summands = [parts[part] for part in ("cache", "reference", "train")]
                table[f"unlearn_{unit}"] = (
                    None if None in summands else sum(one[unit] for one in summands if one is not None)
                )
            else:
                part = parts[name]
                table[f"{name}_{unit}"] = None if part is None else part[unit]
    trained = phases.get("unlearn", {})
    return {
        **table,
        "references_given": given,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trainable_parameters": trained.get("trainable_parameters"),
        "total_parameters": trained.get("total_parameters"),
    }


@torch.no_grad()
def _example_cases(
    networks: Mapping[str, nn.Module],
    datasets: Mapping[str, MemoryDataset],
    scores: Scores,
    device: str | torch.device,
    show_forget: bool,
    number: int = 4,
) -> list[dict[str, Any]]:
    """Cases to draw: retained ones spread over the unlearned model's scores, forget ones only when asked for."""
    cases = []
    for split in ("retain", *(["forget"] if show_forget else [])):
        order = np.argsort(scores["unlearned"][split]["iou"])
        picked = order[np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int)]
        for index in picked:
            sample = datasets[split][int(index)]
            image = sample["image"][None].to(device)
            cases.append({
                "split": split,
                "image": sample["image"].cpu().numpy(),
                "label": sample["label"].cpu().numpy(),
                **{name: networks[name](image)[0].sigmoid().cpu().numpy() for name in ("original", "unlearned")},
                "iou": {name: float(scores[name][split]["iou"][index]) for name in ("original", "unlearned")},
            })  # fmt: skip
    return cases


def write_report(report: dict[str, Any], output_dir: str | Path) -> str:
    """Write ``report.json`` and the page ``report.html``; print the verdict.

    Returns:
        The path of the page.
    """
    folder = Path(output_dir)
    page = folder / "report.html"
    write_text(render(report), page)
    write_json({key: value for key, value in report.items() if not key.startswith("_")}, folder / "report.json")
    print(f"{report['verdict']}: {report['reasons'][0]}\nreport: {page}")
    return str(page)
