# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Can the forgotten be told from people the model never met? Members are the forget set, the others are the holdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .scores import main_score
from .statistics import auc, bootstrap_auc, clopper_pearson, group_means, tpr_at_fpr

# What an attack looks at, by task; higher = more like a training case. The first is the one that is judged.
SIGNS = {"iou": {"iou": 1.0, "loss": -1.0}, "accuracy": {"margin": 1.0, "loss": -1.0}}


def attack(members: np.ndarray, others: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """A threshold attack on one score per patient.

    Returns:
        ``auc`` with its 95 % ``ci`` (patients drawn anew), ``direction`` (``remembered`` above .5, ``over-forgotten``
        below, ``none`` where the interval covers it), ``tpr_at_5pct_fpr`` with its exact ``tpr_ci``, and how many
        patients stood on each side. Undefined values are None.
    """
    if len(members) < 2 or len(others) < 2:
        return {"auc": None, "ci": None, "direction": "undefined", "tpr_at_5pct_fpr": None, "tpr_ci": None,
                "n_forget": len(members), "n_holdout": len(others)}  # fmt: skip
    value, ci, tpr = auc(members, others), bootstrap_auc(members, others, seed=seed), tpr_at_fpr(members, others)
    return {
        "auc": value,
        "ci": list(ci),
        "direction": "remembered" if ci[0] > 0.5 else "over-forgotten" if ci[1] < 0.5 else "none",
        "tpr_at_5pct_fpr": tpr,
        "tpr_ci": list(clopper_pearson(round(tpr * len(members)), len(members))),
        "n_forget": len(members),
        "n_holdout": len(others),
    }


def membership_table(
    scores: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    judge: Mapping[str, Mapping[str, np.ndarray]],
    groups: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Raw and calibrated attacks on every model.

    The calibrated score is the model's minus the judge's on the same case (Watson et al.; audit in the docs). It takes
    out how hard the case is. A judge never saw the cases and never taught the model it judges.

    Args:
        scores: model -> split -> score -> values per case, with the splits ``forget`` and ``holdout``.
        judge: split -> score -> values per case.
        groups: split -> the patient of each case.
        seed: of the intervals.

    Returns:
        model -> ``raw``, ``calibrated`` (IoU; for classes the margin of the true one), ``raw_loss``,
        ``calibrated_loss`` (minus the cross-entropy) -> the result of :func:`attack` with its ``score``; the defined
        one farthest from .5 has ``strongest`` true.
    """
    table: dict[str, dict[str, Any]] = {}
    for model, splits in scores.items():
        rows: dict[str, Any] = {}
        for score, sign in SIGNS[main_score(splits["holdout"])].items():
            suffix = "_loss" if score == "loss" else ""
            for kind in ("raw", "calibrated"):
                sides = []
                for split in ("forget", "holdout"):
                    values = sign * splits[split][score]
                    if kind == "calibrated":
                        values = values - sign * judge[split][score]
                    sides.append(group_means(values, groups[split]))
                rows[kind + suffix] = {**attack(sides[0], sides[1], seed), "score": score}
        defined = [name for name in rows if rows[name]["auc"] is not None]
        strongest = max(defined, key=lambda name: abs(rows[name]["auc"] - 0.5), default=None)
        for name, row in rows.items():
            row["strongest"] = name == strongest
        table[model] = rows
    return table


def negative_control(values: np.ndarray, groups: Sequence[str], splits: int = 20, seed: int = 0) -> dict[str, Any]:
    """The same attack where there is nothing to find: one half of the unseen patients against the other.

    Args:
        values: the calibrated score of each unseen case.
        groups: their patients.
        splits: random halvings.
        seed: of the halvings.

    Returns:
        How many of the intervals cover .5, the mean AUC, and ``ok``: at least 17 of 20 (in proportion) cover it.
    """
    patients = group_means(values, groups)
    if len(patients) < 4:
        return {"splits": 0, "covering": 0, "mean_auc": None, "ok": False}
    rng, covering, values_found = np.random.default_rng(seed), 0, []
    for _ in range(splits):
        order = rng.permutation(len(patients))
        one, other = patients[order[: len(order) // 2]], patients[order[len(order) // 2 :]]
        low, high = bootstrap_auc(one, other, resamples=1_000, seed=int(rng.integers(2**31)))
        covering += low <= 0.5 <= high
        values_found.append(auc(one, other))
    return {"splits": splits, "covering": int(covering), "mean_auc": float(np.mean(values_found)),
            "ok": bool(covering >= 0.85 * splits)}  # fmt: skip


def attacked_score(rows: Mapping[str, Any]) -> str:
    """The score of the attack that is judged."""
    return next(iter(SIGNS[main_score(rows)]))


def rank_test(patient: float, unseen: np.ndarray) -> dict[str, float]:
    """One patient among the unseen ones: how often would one of them score as high, or as low (conformal rank test).

    Args:
        patient: the patient's mean calibrated score.
        unseen: that of each unseen patient.

    Returns:
        ``p_up`` (remembered), ``p_down`` (over-forgotten) and the two-sided ``p``.

    Example:
        >>> round(rank_test(9.0, np.zeros(100))["p_up"], 4)
        0.0099
    """
    p_up = (1 + int((unseen >= patient).sum())) / (len(unseen) + 1)
    p_down = (1 + int((unseen <= patient).sum())) / (len(unseen) + 1)
    return {"p_up": p_up, "p_down": p_down, "p": min(1.0, 2 * min(p_up, p_down))}
