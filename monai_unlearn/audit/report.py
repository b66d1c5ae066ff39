# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The evidence in one dict."""

from __future__ import annotations

import itertools
import math
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint import load_weights, weights_digest, write_json, write_text
from ..data import MemoryDataset
from ..engines import forward_flops
from ..relabel import probabilities
from ..request import DeletionRequest, Item, RequestError, Resolution, groups_of, item_id, pseudonym
from .cost import Meter, cost_table
from .distance import compare_cases, tug_of_war
from .durability import Loss, durability_warnings, relearn_curves, relearn_index, removable, weight_probes
from .membership import (
    Groups,
    attack_difference,
    attacked_score,
    attacked_scores,
    membership_table,
    rank_test,
    retained_leak,
    strongest_attack,
    two_version_leak,
    unseen_from,
)
from .page import render
from .probes import embed
from .reference import References, completeness, expected_unseen
from .residual import coloured, residual_memory, residual_profiles
from .scores import Inferer, MaskMetrics, Rows, main_score, rows_of, score_cases, summary
from .statistics import bootstrap_mean, group_means
from .suppression import class_evidence, judge_suppression, structure_evidence, suppressed_class, suppressed_structure
from .verdict import controls, equivalence_to_retrained, judge_verdict

SCHEMA = "monai_unlearn.report/1"
REPORTED = ("original", "unlearned", "retrained", "retrained_other", "reference")
NOT_TESTED = [
    "attacks with many shadow models (LiRA, RULI) and many pairs of models",
    "copies of the data outside this run: backups, archives, other models trained on it",
]
# name -> unit, direction, target
METRICS = {
    "mean_iou": ("share", "higher", "forget: expected_unseen or the retrained model; else not lower than before"),
    "mean_dice": ("share", "higher", "as mean_iou"),
    "accuracy": ("share", "higher", "as mean_iou"),
    "balanced_accuracy": ("share", "higher", "as mean_iou"),
    "loss": ("nats", "lower", "as the retrained model"),
    "ece": ("probability", "lower", "as the retrained model or the original"),
    "ece_band": ("probability", "lower", "as ece"),
    "brier": ("squared probability", "lower", "as ece"),
    "mean_hd95": ("voxels", "lower", "not higher than before"),
    "mean_nsd": ("share", "higher", "not lower than before"),
    "mean_volume_error": ("share of the picture", "to 0", "0"),
    "completeness": ("ratio", "to 1", "1"),
    "auc of a raw attack": ("probability", "to its null", "null"),
    "auc of any other attack": ("probability", "to .5", "0.5"),
    "tpr_at_5pct_fpr": ("share", "to .05", "0.05"),
    "leaks.two_versions": ("probability", "printed", "none: even retraining leaks"),
    "leaks.retained": ("probability", "no rise", "that of the original"),
    "agreement": ("Dice or share", "higher", "that of two retrained models"),
    "js": ("bits", "lower", "that of two retrained models"),
    "tug_of_war": ("product", "higher", "1"),
    "relearn": ("score by steps", "as compared", "the curve of the retrained model or a reference"),
    "residual": ("nats", "to that of unseen cases", "that of the holdout"),
}
Scores = dict[str, dict[str, Rows]]


def audit(
    resolution: Resolution,
    networks: Mapping[str, nn.Module | None],
    judge: nn.Module | References | None,
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
    loss: Loss | None = None,
    relearn_steps: int = 40,
    patch_size: Sequence[int] | None = None,
    subgroups: Sequence[str] = (),
    key: bytes | None = None,
    private: str | Path | None = None,
    adapter: str | Path | None = None,
    retain_cases: int | None = None,
) -> dict[str, Any]:
    """Score every model on every split, attack the models, run both controls and reach a verdict.

    The tier follows from what is given: 0 without references, 1 with them, 2 with a retrained model as well.

    Args:
        resolution: who was forgotten.
        networks: ``original``, ``unlearned``, and where made ``reference`` (the teacher), ``retrained`` and
            ``retrained_other``, a second one of another seed; None is left out.
        judge: what never saw forget set or holdout and taught nobody: one network, or several with what each saw; None
            for a suppressed class, which is not judged by membership, and for tier 0.
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
        loss: of logits and labels, to relearn with; None leaves relearning and benign fine-tuning out.
        relearn_steps: of each relearning curve; 0 leaves them out.
        patch_size: of the random patches that relearning trains on, for networks that work on patches.
        subgroups: metadata columns whose groups of unseen cases are looked at one by one.
        key: of the pseudonyms in the table of cases; without it they are numbered.
        private: where residual-memory maps of the forget cases are written for viewers; None writes none.
        adapter: the folder of the run's adapter, to say what it would give back.
        retain_cases: score about so many of the retained cases, a sample of whole patients fixed by ``seed``, so that
            the audit's cost does not grow with the training set; None scores all.

    Returns:
        The report; ``_figures`` holds what the page draws and is left out of the JSON.

    Raises:
        ValueError: when a model is missing; RequestError when a judge holds the weights of the teacher or of an audited
            model, saw every case it should judge, or there are no unseen cases or no such subgroups.
    """
    models = {name: network for name, network in networks.items() if network is not None}
    for name in ("original", "unlearned"):
        if name not in models:
            raise ValueError(f"the audit needs the {name} model.")
    judges = References([judge]) if isinstance(judge, nn.Module) else judge
    if judges is not None:
        judges.refuse({name: models[name] for name in ("reference", "original", "unlearned") if name in models})
    start, phases = time.perf_counter(), phases or {}
    splits = {**resolution.splits, "retain": _patients(resolution.splits["retain"], retain_cases, seed)}
    datasets = {name: MemoryDataset(items, transform, store) for name, items in splits.items() if items}
    if "holdout" not in datasets:
        raise RequestError("the audit needs cases that no model was trained on; the holdout is empty.")
    suppressed = suppressed_class(resolution, classes) if classes else suppressed_structure(resolution, structures)
    groups = {name: [str(item["group"]) for item in items] for name, items in splits.items()}
    options: dict[str, Any] = {
        "device": device, "batch_size": batch_size, "inferer": inferer, "metrics": metrics
    }  # fmt: skip
    meter = Meter(forward_flops(models["original"], datasets["forget"][0]["image"].to(device), inferer))
    scores = _score_all(models, judges, datasets, splits, options, seed, meter)
    main = main_score(scores["original"]["holdout"])
    level, level_groups = unseen_from(scores, groups, resolution.unseen_other)
    alike, alike_groups = unseen_from(scores, groups, resolution.unseen_alike)
    target: float | None = None
    attacked: Scores = {}
    suppression, membership, control, strongest, leaks, equivalent, beside = None, {}, {}, {}, None, None, None
    compared = _compare(models, datasets, splits, options, meter)
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
        out = alike.get("judge")
        if out is not None:
            target = expected_unseen(
                out["forget"][main], level["original"]["holdout"][main], level["judge"]["holdout"][main],
                alike["original"]["forget"][main],
            )  # fmt: skip
        attacked = {name: alike[name] for name in ("original", "unlearned", "retrained") if name in scores}
        membership = membership_table(attacked, out, alike_groups, seed)
        if out is not None:
            strongest = {name: strongest_attack(rows, out, alike_groups, seed) for name, rows in attacked.items()}
            if "retrained" in attacked:
                beside = attack_difference(attacked["unlearned"], attacked["retrained"], out, alike_groups, seed)
        leaks = _leaks(level, level_groups, seed)
        control = controls(alike, membership, alike_groups, seed)
        equivalent = equivalence_to_retrained(scores, compared, groups, resolution.request.limits_in_force, seed)
        verdict, reasons = judge_verdict(
            resolution, scores, groups, target, membership, control, strongest.get("unlearned"), equivalent, compared,
            bool(removable(models["unlearned"].state_dict())), seed,
        )  # fmt: skip
    relearn = suppression.pop("relearn", None) if suppression else None
    if relearn is not None:
        relearn = {"few_shot": relearn}
    elif loss is not None and relearn_steps > 0 and suppressed is None:
        relearn = relearn_curves(models, judges, datasets, loss, relearn_steps, patch_size, options, seed, meter)
    reasons = [*reasons, *durability_warnings(relearn or {})]
    profiles = None
    if main == "iou" and judges is not None and suppressed is None:
        profiles = residual_profiles(models["unlearned"], judges, datasets, device, inferer, private, key)
        cases = len(datasets["forget"]) + min(len(datasets["forget"]), len(datasets["holdout"]))
        meter.count(cases * (1 + len(judges.networks)))
    table = _cases(alike, alike_groups, splits, key) if "judge" in scores and suppressed is None else []
    probes = weight_probes(models, datasets, options, adapter, meter) if suppressed is None else None
    report = {
        "schema": SCHEMA,
        "tier": 0 if judges is None and suppressed is None else 2 if "retrained" in models else 1,
        "job": resolution.request.job,
        "request": resolution.request.id,
        "limits": resolution.request.limits_in_force,
        "weights": {name: weights_digest(network.state_dict()) for name, network in models.items()},
        "shows_forget": show_forget,
        "data": data,
        "metrics": {name: dict(zip(("unit", "direction", "target"), row)) for name, row in METRICS.items()},
        "splits": {name: len(items) for name, items in resolution.splits.items()},
        "groups": {name: len(set(names)) for name, names in groups.items()},
        "scores": {
            name: {split: _summary(rows, groups[split], main, classes) for split, rows in scores[name].items()}
            for name in (*REPORTED, "judge")
            if name in scores
        },
        "references": 0 if judges is None else len(judges.networks),
        "floor": _floor(scores, main),
        "agreement": _means(compared, "agreement"),
        "js": _means(compared, "js"),
        "js_band": _means(compared, "js_band"),
        "tug_of_war": _tug_of_war(scores, main),
        "equivalence": equivalent,
        "compared_with": None
        if suppressed is not None
        else {"attacks": resolution.unseen_alike, "expected_unseen": resolution.unseen_other},
        "expected_unseen": target,
        "completeness": None
        if target is None
        else completeness(
            scores["original"]["forget"][main].mean(), scores["unlearned"]["forget"][main].mean(), target
        ),
        "membership": membership,
        "strongest_attack": strongest or None,
        "attack_beside_retrained": beside,
        "controls": control,
        "leaks": leaks,
        "cases": table,
        "subgroups": _subgroups(scores, splits["holdout"], groups["holdout"], subgroups, main),
        "suppression": suppression,
        "relearn": relearn,
        "relearn_index": relearn_index(relearn, float(scores["original"]["forget"][main].mean())),
        "probes": probes,
        "residual": profiles and {split: profile["means"] for split, profile in profiles.items()},
        "stop": phases.get("unlearn", {}).get("reports", {}).get("stop_at_reference"),
        "restoration": phases.get("restore", {}).get("reports", {}).get("stop_at_reference"),
        "drift": phases.get("unlearn", {}).get("drift"),
        "relabelling": phases.get("cache", {}).get("relabelling"),
        "cost": cost_table(phases, {"seconds": time.perf_counter() - start, **meter.spent()}),
        "verdict": verdict,
        "reasons": reasons,
        "not_tested": [
            *([] if relearn else ["relearning curves and benign fine-tuning"]),
            *([] if probes else ["rounding of the weights (bf16, int8, int4)"]),
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
        "cases": _example_cases(models, judges, datasets, scores, device, show_forget, inferer),
        "classes": list(classes),
        "residual": profiles,
        "attacked": {name: attacked_scores(rows, alike.get("judge"), alike_groups) for name, rows in attacked.items()},
    }
    return report


def audit_weights(
    network: Callable[[], nn.Module],
    weights: Mapping[str, str | Path | Mapping[str, Tensor]],
    datalists: Mapping[str, Sequence[Item]],
    transform: Callable[[Any], Any],
    references: Sequence[str | Path | Mapping[str, Tensor]] = (),
    request: DeletionRequest | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """:func:`audit` of a model that was unlearned by whatever means, from its weights and data lists.

    Args:
        network: makes the plain network.
        weights: ``original`` and ``unlearned``, and where made ``retrained`` and ``retrained_other``: files or state
            dicts.
        datalists: items with ``image`` and ``label`` under ``forget``, ``retain`` and ``holdout``. Groups are closed
            over ``patient_id``, ``group`` and ``lesion_id``.
        transform: deterministic preprocessing that gives tensors ``image`` and ``label``.
        references: weights that never saw forget set or holdout and taught nobody; none makes this tier 0.
        request: job, id and limits; a deletion named "audit" by default.
        device: where to compute.
        options: further ones of :func:`audit`.

    Returns:
        The report, ready for :func:`write_report`.

    Raises:
        CheckpointError: when weights do not fit the network.
        ValueError: when a list is missing, or one case lies in two of them.

    Example:
        >>> report = audit_weights(build, {"original": "o.pt", "unlearned": "u.pt"},
        ...                        {"forget": forget, "retain": retain, "holdout": holdout}, transform,
        ...                        references=["never_saw_them.pt"])  # doctest: +SKIP
    """
    if missing := [name for name in ("forget", "holdout") if not datalists.get(name)]:
        raise ValueError(f"the audit needs a data list of {' and '.join(missing)} cases.")
    named: dict[str, str] = {}
    for split, items in datalists.items():
        for item in items:
            other = named.setdefault(item_id(item), split)
            if other != split:
                raise ValueError(f"{item_id(item)} stands under {other} and under {split}; a case has one side.")
    items = [
        {**item, "forget": split == "forget", "_holdout": split == "holdout"}
        for split in ("forget", "retain", "holdout")
        for item in datalists.get(split, ())
    ]
    for item, group in zip(items, groups_of(items)):
        item["group"] = group
    request = request or DeletionRequest({"ids": [item_id(item) for item in datalists["forget"]]}, id="audit")
    sides = [[item for item in items if item["_holdout"] == unseen] for unseen in (False, True)]
    resolution = Resolution(request, sides[0], sides[1], [], {})

    def loaded(source: str | Path | Mapping[str, Tensor]) -> nn.Module:
        built = network()
        if isinstance(source, Mapping):
            built.load_state_dict(dict(source), strict=True)
        else:
            load_weights(built, source)
        return built.eval().requires_grad_(False).to(device)

    models = {name: loaded(source) for name, source in weights.items()}
    judges = References([loaded(source) for source in references]) if references else None
    return audit(resolution, models, judges, transform, device=device, **options)


def _score_all(
    models: Mapping[str, nn.Module],
    judges: References | None,
    datasets: Mapping[str, MemoryDataset],
    splits: Mapping[str, Sequence[Item]],
    options: Mapping[str, Any],
    seed: int,
    meter: Meter,
) -> Scores:
    """Rows of every model on every split; ``judge`` holds those of the references."""
    apart = {name: dataset for name, dataset in datasets.items() if not name.startswith("holdout_")}
    passes = 2 if "label" in datasets["holdout"][0] and datasets["holdout"][0]["label"].ndim > 1 else 1
    scores: Scores = {}
    for name, network in models.items():
        scores[name] = {}
        for split, dataset in apart.items():
            scores[name][split] = score_cases(
                network, dataset, **options, desc=f"scoring {name}", detailed=split != "retain"
            )
            meter.count(len(dataset), passes if split != "retain" else 1)
    if judges is not None:
        scores["judge"] = judges.score(apart, seed, **options, desc="scoring references", detailed=True)
        meter.count(sum(map(len, apart.values())) * len(judges.networks), passes)
    for rows in scores.values():
        for split, inside in _parts_of_holdout(splits).items():
            rows[split] = rows_of(rows["holdout"], inside)
    return scores


def _patients(items: Sequence[Item], number: int | None, seed: int) -> Sequence[Item]:
    """About ``number`` of the items: whole groups in a drawn order until there are enough; in the items' order."""
    if number is None or number >= len(items):
        return items
    groups = sorted({str(item["group"]) for item in items})
    random.Random(seed).shuffle(groups)
    sizes = Counter(str(item["group"]) for item in items)
    before = itertools.accumulate((sizes[group] for group in groups), initial=0)
    chosen = {group for group, count in zip(groups, before) if count < number}
    return [item for item in items if str(item["group"]) in chosen]


def _parts_of_holdout(splits: Mapping[str, Sequence[Item]]) -> dict[str, list[bool]]:
    """For each part of the holdout that has cases, which of the holdout's they are."""
    found = {}
    for split in ("holdout_alike", "holdout_other"):
        wanted = {item_id(item) for item in splits.get(split, ())}
        if wanted:
            found[split] = [item_id(item) in wanted for item in splits["holdout"]]
    return found


def _summary(rows: Rows, groups: Sequence[str], main: str, classes: Sequence[str]) -> dict[str, Any]:
    judged = ~np.isnan(rows[main])  # a reference may have seen some of the retained cases, or all
    if not judged.any():
        return {"n": 0}
    kept = rows_of(rows, judged)
    names = [name for name, own in zip(groups, judged) if own]
    return {**summary(kept, classes), "ci": bootstrap_mean(kept[main], names)}


def _compare(
    models: Mapping[str, nn.Module],
    datasets: Mapping[str, MemoryDataset],
    splits: Mapping[str, Sequence[Item]],
    options: Mapping[str, Any],
    meter: Meter,
) -> dict[str, dict[str, Rows]]:
    """split -> model -> how each case's output differs from the retrained model's; empty without one."""
    chosen = {
        name: models[name] for name in ("original", "unlearned", "retrained_other", "retrained") if name in models
    }
    if "retrained" not in chosen:
        return {}
    options = {name: value for name, value in options.items() if name != "metrics"}
    found = {}
    for split in (name for name in ("forget", "retain", "holdout") if name in datasets):
        found[split] = compare_cases(chosen, "retrained", datasets[split], **options)
        meter.count(len(datasets[split]) * len(chosen))
    for split, inside in _parts_of_holdout(splits).items():
        found[split] = {name: rows_of(rows, inside) for name, rows in found["holdout"].items()}
    return found


def _means(compared: Mapping[str, Mapping[str, Rows]], key: str) -> dict[str, dict[str, float]] | None:
    """model -> split -> mean; None where it was not compared."""
    found: dict[str, dict[str, float]] = {}
    for split, rows in compared.items():
        for name, row in rows.items():
            if key in row:
                found.setdefault(name, {})[split] = float(np.nanmean(row[key])) if len(row[key]) else math.nan
    return found or None


def _floor(scores: Scores, main: str) -> dict[str, float] | None:
    """How far two retrained models of different seeds lie apart, by split: no method can be asked to come closer."""
    if "retrained_other" not in scores:
        return None
    one, other = scores["retrained"], scores["retrained_other"]
    return {split: abs(float(one[split][main].mean() - other[split][main].mean())) for split in one}


def _tug_of_war(scores: Scores, main: str) -> dict[str, float] | None:
    if "retrained" not in scores or "retain" not in scores["retrained"]:
        return None
    names = [name for name in ("original", "unlearned", "retrained_other") if name in scores]
    return {
        name: tug_of_war([
            float(scores[name][split][main].mean() - scores["retrained"][split][main].mean())
            for split in ("forget", "retain", "holdout")
        ])
        for name in names
    }  # fmt: skip


def _leaks(scores: Scores, groups: Groups, seed: int) -> dict[str, Any] | None:
    if "retain" not in scores["original"]:
        return None
    found: dict[str, Any] = {"two_versions": two_version_leak(scores["original"], scores["unlearned"], groups, seed)}
    if "retain" in scores.get("judge", {}):
        found["retained"] = {
            name: retained_leak(scores[name], scores["judge"], groups, seed)
            for name in ("original", "unlearned", "retrained")
            if name in scores
        }
    return found


def _cases(
    scores: Scores, groups: Groups, splits: Mapping[str, Sequence[Item]], key: bytes | None
) -> list[dict[str, Any]]:
    """One row for each forgotten patient: scores, and its rank among the unseen patients before and after."""
    main, score = main_score(scores["original"]["holdout"]), attacked_score(scores["original"]["holdout"])
    out = scores["judge"]
    names = sorted(set(groups["forget"]))
    means = {name: group_means(rows["forget"][main], groups["forget"]) for name, rows in scores.items()}
    calibrated = {
        name: [group_means(scores[name][s][score] - out[s][score], groups[s]) for s in ("forget", "holdout")]
        for name in ("original", "unlearned")
    }
    rows = []
    for place, name in enumerate(names):
        ids = sorted(item_id(item) for item in splits["forget"] if str(item["group"]) == name)
        ranks = {model: rank_test(float(sides[0][place]), sides[1]) for model, sides in calibrated.items()}
        rows.append({
            "cases": [pseudonym(key, one) for one in ids] if key else len(ids),
            **{model: float(values[place]) for model, values in means.items()},
            "p_up_original": ranks["original"]["p_up"],
            "p_up": ranks["unlearned"]["p_up"],
            "p_down": ranks["unlearned"]["p_down"],
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["p_up"], str(row["cases"])))


def _subgroups(
    scores: Scores, items: Sequence[Item], groups: Sequence[str], columns: Sequence[str], main: str
) -> list[dict[str, Any]]:
    """The change on unseen cases, unlearned minus original, in each group of a column."""
    change = scores["unlearned"]["holdout"][main] - scores["original"]["holdout"][main]
    rows = []
    for column in columns:
        if not any(column in item for item in items):
            raise RequestError(f"subgroups: the unseen cases have no column {column!r}.")
        values = [str(item.get(column, "unknown")) for item in items]
        for value in sorted(set(values)):
            own = np.array([one == value for one in values])
            names = [group for group, inside in zip(groups, own) if inside]
            rows.append({"column": column, "value": value, "n": int(own.sum()), "change": float(change[own].mean()),
                         "ci": bootstrap_mean(change[own], names)})  # fmt: skip
    return rows


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


@torch.no_grad()
def _example_cases(
    networks: Mapping[str, nn.Module],
    judges: References | None,
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
    judged = attacked_score(scores["unlearned"][shown_split])
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
            if split == "forget" and judges is not None and sample["label"].ndim > 1:
                one = MemoryDataset([datasets[split].data[index]], datasets[split].transform, datasets[split].store)
                shown["residual"] = next(residual_memory(networks["unlearned"], judges, one, device, inferer))[None]
            cases.append({
                "split": split,
                **(_flat(shown) if sample["label"].ndim > 1 else shown),
                "scores": {
                    name: {key: float(values[index]) for key, values in scores[name][split].items() if values.ndim == 1}
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
    if "residual" in flat:
        flat["residual"] = coloured(flat["residual"][0])
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
