# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The evidence in one dict, judged by limits that were fixed beforehand."""

from __future__ import annotations

import math
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checkpoint import write_json, write_text
from ..data import MemoryDataset
from ..engines import forward_flops
from ..relabel import probabilities
from ..request import Resolution
from .membership import SIGNS, attacked_score, membership_table, negative_control, rank_test
from .page import render
from .probes import embed
from .reference import completeness, expected_unseen
from .scores import Inferer, MaskMetrics, main_score, score_cases, summary
from .statistics import bootstrap_mean, group_means
from .suppression import class_evidence, judge_suppression, structure_evidence, suppressed_class, suppressed_structure

SCHEMA = "monai_unlearn.report/1"
REPORTED = ("original", "unlearned", "retrained", "retrained_other", "reference")
NAMES = {"iou": "IoU", "accuracy": "accuracy"}
NOT_TESTED = [
    "rounding of the weights (bf16, int8, int4)",
    "attacks with shadow models (LiRA, RULI)",
    "copies of the data outside this run: backups, archives, other models trained on it",
]
Scores = dict[str, dict[str, dict[str, np.ndarray]]]


def audit(
    resolution: Resolution,
    networks: Mapping[str, nn.Module | None],
    judge: nn.Module | None,
    transform: Callable[[Any], Any],
    store: dict[Any, Any] | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    data: str = "unnamed",
    phases: Mapping[str, Mapping[str, Any]] | None = None,
    show_forget: bool = False,
    seed: int = 0,
    inferer: Inferer | None = None,
    metrics: MaskMetrics | None = None,
    classes: Sequence[str] = (),
    structures: Sequence[str] = (),
    probe_layer: str = "",
) -> dict[str, Any]:
    """Score every model on every split, attack the models, run both controls and reach a verdict.

    Args:
        resolution: who was forgotten.
        networks: ``original``, ``unlearned``, and where made ``reference`` (the teacher), ``retrained`` and
            ``retrained_other``, a second one of another seed; None is left out.
        judge: a reference that never saw forget set or holdout and taught nobody; None for a suppressed class, which
            is not judged by membership.
        transform: deterministic preprocessing.
        store: of decoded items, shared with the run.
        device: where to compute.
        batch_size: cases at a time.
        data: a name of the data without a path.
        phases: the records of the run's phases by name (``original``, ``reference``, ``judge``, ``unlearn``,
            ``retrain``, ``cache``), for the cost and the stop rule.
        show_forget: draw forget cases too.
        seed: of intervals and control.
        inferer: see :func:`monai_unlearn.audit.score_cases`.
        metrics: further scores of masks, see :func:`monai_unlearn.audit.scores.case_scores`.
        classes: their names in the order of the logits, for classification.
        structures: the names of the foreground channels, for the segmentation of several structures.
        probe_layer: the module whose input the probe for a suppressed structure reads.

    Returns:
        The report; ``_figures`` holds what the page draws and is left out of the JSON.

    Raises:
        ValueError: when judge and reference are the same network, or a model is missing.
    """
    models = {name: network for name, network in networks.items() if network is not None}
    if judge is not None and judge is networks.get("reference"):
        raise ValueError("the judge must not be the reference that taught; give two different models.")
    for name in ("original", "unlearned"):
        if name not in models:
            raise ValueError(f"the audit needs the {name} model.")
    start, phases = time.perf_counter(), phases or {}
    splits = resolution.splits
    datasets = {name: MemoryDataset(items, transform, store) for name, items in splits.items() if items}
    if "holdout" not in datasets:
        raise ValueError("the audit needs cases that no model was trained on; the holdout is empty.")
    suppressed = suppressed_class(resolution, classes) if classes else suppressed_structure(resolution, structures)
    if judge is None and suppressed is None:
        raise ValueError("the audit needs a judge: a reference that taught nobody.")
    scores: Scores = {
        name: {
            split: score_cases(network, dataset, device, batch_size, inferer, metrics, f"scoring {name}")
            for split, dataset in datasets.items()
        }
        for name, network in {**models, "judge": judge}.items()
        if network is not None
    }
    groups = {name: [item["group"] for item in items] for name, items in splits.items()}
    main = main_score(scores["original"]["holdout"])
    suppression, membership, controls = None, {}, {}
    if suppressed is not None:
        target = 0.0  # what was never taught is never named
        suppression = (
            class_evidence(models, scores, datasets, groups, suppressed, classes, device, seed)
            if classes
            else structure_evidence(models, datasets["holdout"], groups["holdout"], suppressed, structures,
                                    probe_layer, device, inferer, seed)
        )  # fmt: skip
        verdict, reasons = judge_suppression(suppression, resolution.request.limits_in_force["utility"])
    else:
        of_judge, unseen = scores["judge"], scores["original"]["holdout"][main]
        target = expected_unseen(of_judge["forget"][main], unseen, of_judge["holdout"][main])
        attacked: Scores = {name: scores[name] for name in ("original", "unlearned", "retrained") if name in scores}
        membership = membership_table(attacked, of_judge, groups, seed)
        controls = _controls(scores, membership, groups, seed)
        verdict, reasons = judge_verdict(resolution, scores, groups, target, membership, controls, seed)
    images = sum(len(items) for name, items in splits.items() if "_" not in name) * len(scores)
    flops = images * forward_flops(models["original"], datasets["forget"][0]["image"].to(device), inferer)
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
            name: {
                split: {**summary(rows, classes), "ci": bootstrap_mean(rows[main], groups[split])}
                for split, rows in scores[name].items()
            }
            for name in (*REPORTED, "judge")
            if name in scores
        },
        "floor": _floor(scores, main),
        "agreement": _agreement(scores),
        "expected_unseen": target,
        "completeness": completeness(
            scores["original"]["forget"][main].mean(), scores["unlearned"]["forget"][main].mean(), target
        ),
        "membership": membership,
        "controls": controls,
        "suppression": suppression,
        "relearn": suppression and suppression.pop("relearn", None),
        "stop": phases.get("unlearn", {}).get("reports", {}).get("stop_at_reference"),
        "restoration": phases.get("restore", {}).get("reports", {}).get("stop_at_reference"),
        "drift": phases.get("unlearn", {}).get("drift"),
        "relabelling": phases.get("cache", {}).get("relabelling"),
        "cost": cost_table(phases, spent),
        "verdict": verdict,
        "reasons": reasons,
        "not_tested": [
            *([] if suppressed is not None and classes else ["relearning curves and benign fine-tuning"]),
            *NOT_TESTED,
        ],
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
        "embedded": {}
        if not classes
        else {
            name: embed(models[name], datasets, scores[name], device, seed=seed)
            for name in ("original", "retrained", "unlearned")
            if name in models
        },
        "cases": _example_cases(models, datasets, scores, device, show_forget, inferer),
        "classes": list(classes),
    }
    return report


def _floor(scores: Scores, main: str) -> dict[str, float] | None:
    """How far two retrained models of different seeds lie apart, by split: no method can be asked to come closer."""
    if "retrained_other" not in scores:
        return None
    one, other = scores["retrained"], scores["retrained_other"]
    return {split: abs(float(one[split][main].mean() - other[split][main].mean())) for split in one}


def _agreement(scores: Scores) -> dict[str, dict[str, float]] | None:
    """The share of cases of which a model says what the retrained one says, by model and split."""
    if "retrained" not in scores or "predicted" not in scores["retrained"]["holdout"]:
        return None
    said = {split: rows["predicted"] for split, rows in scores["retrained"].items()}
    return {
        name: {split: float((rows["predicted"] == said[split]).mean()) for split, rows in scores[name].items()}
        for name in ("original", "unlearned", "retrained_other")
        if name in scores
    }


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


def _controls(
    scores: Scores, membership: Mapping[str, Mapping[str, Any]], groups: Mapping[str, list[str]], seed: int
) -> dict[str, Any]:
    score = attacked_score(scores["unlearned"]["holdout"])
    unseen = scores["unlearned"]["holdout"][score] - scores["judge"]["holdout"][score]
    positive = dict(membership["original"]["calibrated"])
    if positive["auc"] is None and len(groups["forget"]) > 0:  # one patient: the rank test stands in for the AUC
        positive["rank_test"] = _one_patient(scores, "original", groups)
        positive["ok"] = positive["rank_test"]["p_up"] <= 0.05
    else:
        positive["ok"] = bool(positive["ci"] and positive["ci"][0] > 0.5)
    return {"positive": positive, "negative": negative_control(unseen, groups["holdout"], seed=seed)}


def _one_patient(scores: Scores, model: str, groups: Mapping[str, list[str]]) -> dict[str, float]:
    score = attacked_score(scores["judge"]["holdout"])
    sides = [scores[model][split][score] - scores["judge"][split][score] for split in ("forget", "holdout")]
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
    main = main_score(o["holdout"])
    name = NAMES[main]
    reference = scores.get("retrained", o)
    against = "the retrained model" if "retrained" in scores else "the original"

    loss = u["holdout"][main] - reference["holdout"][main]
    high = bootstrap_mean(loss, groups["holdout"], level=0.9)[1]
    if high < -limits["utility"]:
        failed.append(f"unseen cases lost {-loss.mean():.3f} {name} against {against}, more than {limits['utility']}.")
    if "retrained" in scores:
        loss = u["retain"][main] - reference["retain"][main]
        if bootstrap_mean(loss, groups["retain"], level=0.9)[1] < -limits["retain"]:
            failed.append(
                f"retained cases lost {-loss.mean():.3f} {name} against {against}, more than {limits['retain']}."
            )

    if resolution.request.job == "suppression":
        unclear.append("suppression is judged for a class of a classification; this audit has no probe for the rest.")
    else:
        score, memorised = u["forget"][main].mean(), o["forget"][main].mean()
        offset = o["holdout"][main] - j["holdout"][main]
        low, high = _difference(
            u["forget"][main] - j["forget"][main], groups["forget"], offset, groups["holdout"], seed
        )
        if low > limits["forget"]:
            failed.append(
                f"the forget set still scores {score:.3f} {name} where an unseen case would score {target:.3f}."
            )
        if high < -limits["forget"]:
            failed.append(
                f"the forget set scores {score:.3f} {name}, below the {target:.3f} of an unseen case: over-forgotten, "
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
        f"forget score {u['forget'][main].mean():.3f} against {target:.3f} expected of unseen cases; no test failed "
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


def _sum(parts: Sequence[Mapping[str, Any] | None], units: Sequence[str]) -> dict[str, Any] | None:
    """Unit by unit; None where a part is not known."""
    known = [part for part in parts if part is not None]
    return {unit: sum(part[unit] for part in known) for unit in units} if len(known) == len(parts) else None


def cost_table(phases: Mapping[str, Mapping[str, Any]], audit_cost: Mapping[str, float]) -> dict[str, Any]:
    """Seconds, floating-point operations and image passes by purpose; None where a step was not part of this run.

    ``unlearn`` is the sum of ``cache`` (teacher outputs), ``reference`` (training the teaching reference) and
    ``train`` (strong phase and restoration). ``audit`` holds the scoring and the training of the judge. An image that
    only goes forward counts a third. Of the probes for a suppressed class the seconds are counted and nothing else.
    """
    units = ("seconds", "flops", "images")

    def of(name: str) -> Mapping[str, Any] | None:
        return phases[name] if "seconds" in phases.get(name, {}) else None  # weights that were given cost nothing here

    given = of("reference") is None

    parts: dict[str, Mapping[str, Any] | None] = {
        "cache": of("cache"),
        "reference": of("reference") or (dict.fromkeys(units, 0) if given else None),
        "train": _sum([of("unlearn"), *([of("restore")] if "restore" in phases else [])], units),
        "retrain": of("retrain"),
    }
    judge = of("judge") or dict.fromkeys(units, 0)
    parts["unlearn"] = _sum([parts[name] for name in ("cache", "reference", "train")], units)
    parts["audit"] = {unit: audit_cost[unit] + judge[unit] for unit in units}
    table: dict[str, Any] = {}
    for name in ("cache", "reference", "train", "unlearn", "audit", "retrain"):
        for unit in units:
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
    inferer: Inferer | None,
    number: int = 3,
) -> list[dict[str, Any]]:
    """Cases to draw, spread over the unlearned model's scores: retained ones (unseen ones, where a structure of all is
    suppressed), and forget ones only when asked for."""
    cases = []
    shown_split = "retain" if "retain" in datasets else "holdout"
    judged = next(iter(SIGNS[main_score(scores["unlearned"][shown_split])]))
    for split in (shown_split, *(["forget"] if show_forget else [])):
        order = np.argsort(scores["unlearned"][split][judged])
        picked = order[np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int)]
        for index in picked:
            sample = datasets[split][int(index)]
            image = sample["image"][None].to(device)
            outputs = {}
            for name in ("original", "unlearned"):
                logits = networks[name](image) if inferer is None else inferer(image, networks[name])
                outputs[name] = probabilities(logits)[0].cpu().numpy()
            shown = {"image": sample["image"].cpu().numpy(), "label": sample["label"].cpu().numpy(), **outputs}
            cases.append({
                "split": split,
                **(_flat(shown) if sample["label"].ndim > 1 else shown),
                "scores": {
                    name: {key: float(values[index]) for key, values in scores[name][split].items()}
                    for name in ("original", "unlearned")
                },
            })  # fmt: skip
    return cases


def _flat(shown: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Image and foreground channels as pictures ``(C, H, W)``: of a volume the slice that shows most of the label."""
    flat = {key: value[1:] if key != "image" and len(value) > 1 else value for key, value in shown.items()}
    if flat["label"].ndim == 4:
        at = int(flat["label"].sum((0, 1, 2)).argmax())
        flat = {key: value[..., at] for key, value in flat.items()}
    return flat


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
