# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Can the forgotten be told from people the model never met? Members are the forget set, the others are the holdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .scores import main_score
from .statistics import (
    auc,
    auc_resolution,
    bootstrap_auc,
    bootstrap_auc_difference,
    clopper_pearson,
    group_means,
    tpr_at_fpr,
)

# What an attack looks at, by task; higher = more like a training case. The first is the one that is judged.
SIGNS = {
    "iou": {"iou": 1, "loss": -1, "band_loss": -1, "band_logit": 1, "top_loss": -1, "flip": 1, "entropy": -1},
    "accuracy": {"margin": 1, "loss": -1, "modified_entropy": -1, "entropy": -1},
}
RMIA_A, RMIA_GAMMA = 0.3, 1.0
Rows = Mapping[str, np.ndarray]
Sides = tuple[np.ndarray, np.ndarray]
Groups = Mapping[str, Sequence[str]]


def attack(
    members: np.ndarray, others: np.ndarray, seed: int = 0, sides: tuple[str, str] = ("forget", "holdout")
) -> dict[str, Any]:
    """A threshold attack on one score per patient; patients whose score is undefined are left out.

    Returns:
        ``auc`` with its 95 % ``ci`` (patients drawn anew), ``direction`` (``remembered`` above .5, ``over-forgotten``
        below, ``none`` where the interval covers it), ``resolution``, how far from .5 an AUC of so few patients has to
        lie to count, ``tpr_at_5pct_fpr`` with its exact ``tpr_ci``, ``tpr_at_1pct_fpr`` from 100 unseen patients on,
        and how many patients stood on each side, ``n_`` with the names of the ``sides``. Undefined values are None.
    """
    members, others = members[~np.isnan(members)], others[~np.isnan(others)]
    counts = {f"n_{sides[0]}": len(members), f"n_{sides[1]}": len(others)}
    if len(members) < 2 or len(others) < 2:
        return {"auc": None, "ci": None, "direction": "undefined", "resolution": None, "tpr_at_5pct_fpr": None,
                "tpr_ci": None, "tpr_at_1pct_fpr": None, **counts}  # fmt: skip
    ci, tpr = bootstrap_auc(members, others, seed=seed), tpr_at_fpr(members, others)
    return {
        "auc": auc(members, others),
        "ci": list(ci),
        "direction": "remembered" if ci[0] > 0.5 else "over-forgotten" if ci[1] < 0.5 else "none",
        "resolution": auc_resolution(len(members), len(others)),
        "tpr_at_5pct_fpr": tpr,
        "tpr_ci": list(clopper_pearson(round(tpr * len(members)), len(members))),
        "tpr_at_1pct_fpr": tpr_at_fpr(members, others, 0.01) if len(others) >= 100 else None,
        **counts,
    }


def rmia(
    p: np.ndarray,
    p_out: np.ndarray,
    z: np.ndarray,
    z_out: np.ndarray,
    a: float = RMIA_A,
    gamma: float = RMIA_GAMMA,
    same: bool = False,
) -> np.ndarray:
    """The offline relative attack (Zarifzadeh et al., arXiv 2312.03262): how many unseen cases is x more likely than?

    LR(x, z) = (p(x|U) / p(x)) / (p(z|U) / p(z)) with p(x) ≈ ½[(1 + a) p_OUT(x) + (1 − a)].

    Args:
        p: probability of each case under the attacked model, ``(N,)``; for dense outputs exp(−mean cross-entropy).
        p_out: mean of the same over references that never saw the case.
        z: probability of unseen cases under the attacked model, ``(M,)``.
        z_out: under the references.
        a: of the linear estimate.
        gamma: threshold of the ratio.
        same: cases and unseen cases are the same ones; none is compared with itself.

    Returns:
        The share of z with LR > γ for each case, in [0, 1].
    """
    above = likelihood_ratio(p, p_out, a)[:, None] > gamma * likelihood_ratio(z, z_out, a)[None]
    if same:
        above &= ~np.eye(len(above), dtype=bool)
    return above.sum(1) / max(1, above.shape[1] - same)


def likelihood_ratio(p: np.ndarray, p_out: np.ndarray, a: float = RMIA_A) -> np.ndarray:
    """p(x|U) / p(x) of :func:`rmia`.

    Example:
        >>> [round(float(likelihood_ratio(np.array(0.9), np.array(0.5), a)), 6) for a in (0, 1)]
        [1.2, 1.8]
    """
    return p / (0.5 * ((1 + a) * p_out + (1 - a)))


def lira(
    phi: np.ndarray, mean_in: np.ndarray, std_in: np.ndarray, mean_out: np.ndarray, std_out: np.ndarray
) -> np.ndarray:
    """The likelihood-ratio attack (Carlini et al., arXiv 2112.03570): log N(φ; in) − log N(φ; out).

    For U-LiRA (Hayes et al., arXiv 2403.01218) *in* are models trained with the case and then unlearned.

    Args:
        phi: log(p / (1 − p)) of each case under the attacked model.
        mean_in: of φ over models of the first kind, and so on.

    Example:
        >>> float(lira(np.array(2.0), 2.0, 1.0, 0.0, 1.0))
        2.0
    """

    def log_density(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        return -0.5 * ((phi - mean) / std) ** 2 - np.log(std)

    return log_density(mean_in, std_in) - log_density(mean_out, std_out)


def attacked_scores(rows: Mapping[str, Rows], out: Mapping[str, Rows] | None, groups: Groups) -> dict[str, Sides]:
    """What every attack of the family sees: one number per patient for the forget set and for the unseen.

    The calibrated score is the model's minus the references' mean on the same case (Watson et al., arXiv 2111.08440);
    it takes out how hard the case is.

    Args:
        rows: of the attacked model, split -> score -> values per case, with ``forget`` and ``holdout``.
        out: the same of references that never saw the case and taught nobody; None leaves raw attacks alone.
        groups: split -> the patient of each case.

    Returns:
        ``raw`` and ``calibrated`` (IoU; for classes the margin of the true one), the same with the name of a further
        score behind them, and ``rmia``.
    """
    found: dict[str, Sides] = {}
    judged = attacked_score(rows["holdout"])
    for score, sign in SIGNS[main_score(rows["holdout"])].items():
        if score not in rows["holdout"]:
            continue
        for kind in ("raw", "calibrated") if out is not None else ("raw",):
            sides = []
            for split in ("forget", "holdout"):
                values = rows[split][score] - (out[split][score] if out is not None and kind == "calibrated" else 0)
                sides.append(group_means(sign * values, groups[split]))
            found[kind if score == judged else f"{kind}_{score}"] = (sides[0], sides[1])
    if out is not None and "likelihood" in out["holdout"]:
        p = {split: (np.exp(-rows[split]["loss"]), out[split]["likelihood"]) for split in ("forget", "holdout")}
        shares = [rmia(*p[split], *p["holdout"], same=split == "holdout") for split in ("forget", "holdout")]
        found["rmia"] = (group_means(shares[0], groups["forget"]), group_means(shares[1], groups["holdout"]))
    return found


def unseen_from(scores: Mapping[str, Mapping[str, Rows]], groups: Groups, split: str) -> tuple[dict[str, Any], Groups]:
    """The same scores and patients with a part of the holdout, such as ``holdout_alike``, in the place of all of it."""
    found = {name: {**rows, "holdout": rows[split]} for name, rows in scores.items()}
    return found, {**groups, "holdout": groups[split]}


def membership_table(
    scores: Mapping[str, Mapping[str, Rows]],
    out: Mapping[str, Rows] | None,
    groups: Groups,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Every attack of :func:`attacked_scores` on every model.

    Args:
        scores: model -> split -> score -> values per case, with the splits ``forget`` and ``holdout``.
        out: of the references, see :func:`attacked_scores`.
        groups: split -> the patient of each case.
        seed: of the intervals.

    Returns:
        model -> attack -> the result of :func:`attack` with its ``score``, and for raw attacks ``null``, the same AUC
        of the references themselves: what a model that never saw the set would show. The defined attack farthest from
        its null has ``strongest`` true.
    """
    nulls = {} if out is None else {
        name: auc(*(side[~np.isnan(side)] for side in sides))
        for name, sides in attacked_scores(out, None, groups).items()
    }  # fmt: skip
    table: dict[str, dict[str, Any]] = {}
    for model, rows in scores.items():
        judged, found = attacked_score(rows["holdout"]), {}
        for name, sides in attacked_scores(rows, out, groups).items():
            score = "loss" if name == "rmia" else name.partition("_")[2] or judged
            found[name] = {**attack(*sides, seed), "score": score}
            if name in nulls:
                found[name]["null"] = nulls[name]
        far = {name: abs(row["auc"] - row.get("null", 0.5)) for name, row in found.items() if row["auc"] is not None}
        strongest = max(far, key=lambda name: far[name], default=None)
        for name, row in found.items():
            row["strongest"] = name == strongest
        table[model] = found
    return table


def strongest_attack(
    rows: Mapping[str, Rows], out: Mapping[str, Rows], groups: Groups, seed: int = 0
) -> dict[str, Any] | None:
    """The strongest attack, chosen on one half of the patients and tested on the other.

    Chosen among those whose value for a model that never saw the set is .5: the calibrated ones and RMIA.

    Returns:
        ``attack`` and the result of :func:`attack` on the other half; None with fewer than four patients on a side.
    """
    family = {name: sides for name, sides in attacked_scores(rows, out, groups).items() if not name.startswith("raw")}
    number = [len(side) for side in next(iter(family.values()))]
    if min(number) < 4:
        return None
    rng = np.random.default_rng(seed)
    order = [rng.permutation(one) for one in number]
    halves = [[one[: len(one) // 2] for one in order], [one[len(one) // 2 :] for one in order]]

    def half(name: str, which: int) -> dict[str, Any]:
        members, others = (side[kept] for side, kept in zip(family[name], halves[which]))
        return attack(members, others, seed)

    chosen_from = {name: half(name, 0)["auc"] for name in family}
    far = {name: abs(value - 0.5) for name, value in chosen_from.items() if value is not None}
    chosen = max(far, key=lambda name: far[name])
    return {"attack": chosen, **half(chosen, 1)}


def attack_difference(
    rows: Mapping[str, Rows],
    other: Mapping[str, Rows],
    out: Mapping[str, Rows],
    groups: Groups,
    seed: int = 0,
    name: str = "calibrated",
) -> dict[str, Any] | None:
    """How much more an attack finds of one model than of another, on the same patients.

    Args:
        rows: of the one, see :func:`attacked_scores`.
        other: of the other, such as the retrained model.
        out: of the references.
        groups: split -> the patient of each case.
        seed: of the interval.
        name: of the attack, see :func:`attacked_scores`.

    Returns:
        ``difference`` of the two AUCs with its 95 % ``ci``, a paired bootstrap over patients; patients whose score is
        undefined under either are left out. None with fewer than two on a side.
    """
    pairs = [attacked_scores(one, out, groups)[name] for one in (rows, other)]
    kept = [~np.isnan(pairs[0][side]) & ~np.isnan(pairs[1][side]) for side in (0, 1)]
    one, two = ((sides[0][kept[0]], sides[1][kept[1]]) for sides in pairs)
    if min(map(len, one)) < 2:
        return None
    return {"difference": auc(*one) - auc(*two), "ci": list(bootstrap_auc_difference(one, two, seed=seed))}


def two_version_leak(
    original: Mapping[str, Rows], unlearned: Mapping[str, Rows], groups: Groups, seed: int = 0
) -> dict[str, Any]:
    """Whoever holds both versions: the AUC of s(O, x) − s(U, x), the forgotten against the retained.

    Even a retrained model leaks here; the number is printed and not judged.
    """
    score = attacked_score(original["forget"])
    sides = [group_means(original[s][score] - unlearned[s][score], groups[s]) for s in ("forget", "retain")]
    return attack(sides[0], sides[1], seed, ("forget", "retain"))


def retained_leak(rows: Mapping[str, Rows], out: Mapping[str, Rows], groups: Groups, seed: int = 0) -> dict[str, Any]:
    """The calibrated attack on the patients who stay, as far as a reference never saw them."""
    score = attacked_score(rows["retain"])
    sides = [group_means(rows[s][score] - out[s][score], groups[s]) for s in ("retain", "holdout")]
    return attack(sides[0], sides[1], seed, ("retain", "holdout"))


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


def one_patient(rows: Mapping[str, Rows], out: Mapping[str, Rows], groups: Groups) -> dict[str, float]:
    """:func:`rank_test` of a forget set that is one patient; several studies of it make one mean score."""
    score = attacked_score(rows["holdout"])
    sides = [rows[split][score] - out[split][score] for split in ("forget", "holdout")]
    return rank_test(float(sides[0].mean()), group_means(sides[1], groups["holdout"]))


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
