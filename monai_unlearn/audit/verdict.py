# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""FAIL, INCONCLUSIVE, NOT REFUTED or RETRAIN-EQUIVALENT, by limits that were fixed beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..request import Resolution
from .membership import Groups, Rows, attacked_scores, negative_control, one_patient, unseen_from
from .scores import main_score
from .statistics import bootstrap_difference, bootstrap_mean, equivalence, non_inferiority, seed_margin

NAMES = {"iou": "IoU", "accuracy": "accuracy"}
RAW_NULL = 0.1  # a model that never saw the set has a raw AUC of .4 to .6: it may be harder or easier than the unseen
FLOOR_MARGIN = 0.02  # by which agreement and divergence may miss those of two retrained models
STRAY_MARGIN = 0.01  # of divergence, beyond half the way from the original to a second retrained model
Scores = Mapping[str, Mapping[str, Rows]]


def controls(scores: Scores, membership: Mapping[str, Mapping[str, Any]], groups: Groups, seed: int) -> dict[str, Any]:
    """Does the attack find what is there (the forget set in the original), and nothing where nothing is (one half of
    the unseen patients against the other)?"""
    out = scores.get("judge")
    judged = "calibrated" if out is not None else "raw"
    unseen = attacked_scores(scores["unlearned"], out, groups)[judged][1]
    positive = dict(membership["original"][judged])
    if positive["auc"] is None and out is not None:  # one patient: the rank test stands in for the AUC
        positive["rank_test"] = one_patient(scores["original"], out, groups)
        positive["ok"] = positive["rank_test"]["p_up"] <= 0.05
    else:
        positive["ok"] = bool(positive["ci"] and positive["ci"][0] > 0.5)
    return {"positive": positive, "negative": negative_control(unseen, [str(n) for n in range(len(unseen))], seed=seed)}


def equivalence_to_retrained(
    scores: Scores, compared: Mapping[str, Mapping[str, Rows]], groups: Groups, limits: Mapping[str, float], seed: int
) -> dict[str, Any] | None:
    """Everything that has to hold before a model may be called equivalent to the retrained one, within margins.

    Args:
        scores: with ``retrained`` and ``retrained_other``.
        compared: split -> model -> rows of :func:`monai_unlearn.audit.compare_cases` against the retrained model.
        groups: split -> patients.
        limits: of the request.
        seed: of the draws.

    Returns:
        ``forget``, the two one-sided tests of the paired difference in the forget score, with the larger of the
        request's margin and what two retrained models differ by; ``utility``, non-inferiority on unseen cases;
        ``agreement`` and ``js``: how much further than the second retrained model the unlearned one lies from the
        first, on forget cases, with its interval; ``ok``: all of them. None without a second retrained model.
    """
    if "retrained_other" not in scores:
        return None
    u, q, other = (scores[name] for name in ("unlearned", "retrained", "retrained_other"))
    main = main_score(q["holdout"])
    apart = u["forget"][main] - q["forget"][main]
    margin = seed_margin(q["forget"][main], other["forget"][main], groups["forget"], limits["forget"], seed)
    found: dict[str, Any] = {
        "forget": equivalence(float(apart.mean()), bootstrap_mean(apart, groups["forget"], level=0.9), margin),
        "utility": non_inferiority(u["holdout"][main] - q["holdout"][main], groups["holdout"], limits["utility"]),
    }
    rows = compared["forget"]
    for key, sign in (("agreement", -1), ("js", 1)):
        excess = sign * (rows["unlearned"][key] - rows["retrained_other"][key])
        high = bootstrap_mean(excess, groups["forget"], level=0.9)[1]
        found[key] = {"unlearned": float(rows["unlearned"][key].mean()), "excess_high": high, "margin": FLOOR_MARGIN,
                      "retrained_other": float(rows["retrained_other"][key].mean()),
                      "ok": bool(high <= FLOOR_MARGIN)}  # fmt: skip
    return {**found, "ok": all(found[key]["ok"] for key in ("forget", "utility", "agreement", "js"))}


def judge_verdict(
    resolution: Resolution,
    scores: Scores,
    groups: Groups,
    target: float | None,
    membership: Mapping[str, Mapping[str, Any]],
    controls: Mapping[str, Any],
    strongest: Mapping[str, Any] | None = None,
    equivalent: Mapping[str, Any] | None = None,
    compared: Mapping[str, Mapping[str, Rows]] | None = None,
    removable: bool = False,
    seed: int = 0,
) -> tuple[str, list[str]]:
    """The verdict, with the reasons in plain words.

    FAIL needs evidence: an interval that lies wholly beyond a limit of the request, on the forget score (too high and
    too low alike), on a membership attack (in either direction) or on the utility, or outputs on the forget set that,
    with two retrained models at hand, are further from the one than half the way from the original to the other:
    a score can be right by chance while the answers are anything. Patients who are harder or easier
    than the unseen ones are told apart in any model that never saw them: where a retrained model was attacked too, what
    lies between chance and its AUC fails nobody. INCONCLUSIVE means that a control
    did not behave, that there was nothing measurable to forget, or that no reference was at hand. RETRAIN-EQUIVALENT
    needs two retrained models, see :func:`equivalence_to_retrained`.

    Args:
        resolution: who was forgotten.
        scores: model -> split -> rows; ``judge`` are the references.
        groups: split -> the patient of each case.
        target: the score expected of the forget set; None without a reference.
        membership: of :func:`monai_unlearn.audit.membership_table`.
        controls: of :func:`controls`.
        strongest: the attack chosen on one half of the patients, on the other.
        equivalent: of :func:`equivalence_to_retrained`.
        compared: as there.
        removable: whether the unlearned weights hold adapters that can be taken off.
        seed: of the intervals.
    """
    limits = resolution.request.limits_in_force
    failed, unclear = _utility(scores, groups, limits), []

    def attacked(row: Mapping[str, Any], attack: str, margin: float, kind: str) -> list[str]:
        return _attacked(row, margin, kind, membership.get("retrained", {}).get(attack, {}).get("auc"))

    if removable:
        failed.append("the model holds adapters that can be taken off again: that is suppression. Merge them.")
    if resolution.request.job == "suppression":
        unclear.append("suppression is judged for a class of a classification; this audit has no probe for the rest.")
    elif target is None:
        failed += attacked(membership["unlearned"]["raw"], "raw", RAW_NULL, "raw")
        unclear.append("no reference that never saw the forget set (tier 0): nothing says what is expected of it.")
    else:
        failed += _forget_score(*unseen_from(scores, groups, resolution.unseen_other), target, limits["forget"], seed)
        failed += _strayed((compared or {}).get("forget", {}), groups, seed)
        row = membership["unlearned"]["calibrated"]
        if row["auc"] is None:
            alike, alike_groups = unseen_from(scores, groups, resolution.unseen_alike)
            tests = {name: one_patient(alike[name], alike["judge"], alike_groups)
                     for name in ("unlearned", "retrained") if name in alike}  # fmt: skip
            outlier = {name: (test["p"] <= 0.05, test["p_up"] < test["p_down"]) for name, test in tests.items()}
            if outlier["unlearned"][0] and outlier.get("retrained") != outlier["unlearned"]:
                p = tests["unlearned"]["p"]
                failed.append(f"the patient stands out among unseen patients (rank test p = {p:.3f}).")
        else:
            found = attacked(row, "calibrated", limits["membership"], "calibrated")
            if strongest is not None and not found:
                kind = f"{strongest['attack'].replace('_', ' ')}, the strongest"
                found = attacked(strongest, strongest["attack"], limits["membership"], kind)
            failed += found
        if resolution.request.job == "revision":
            failed += _alike(scores, groups, limits["forget"])
        memorised, name = float(scores["original"]["forget"][_main(scores)].mean()), NAMES[_main(scores)]
        if abs(memorised - target) < 2 * limits["forget"]:
            unclear.append(
                f"the original scores {memorised:.3f} {name} on the forget set and an unseen case would score "
                f"{target:.3f}: nothing measurable to forget."
            )
        if not controls["positive"]["ok"]:
            unclear.append("the attack does not find the forget set in the original model, so it proves nothing here.")
    if not controls["negative"]["ok"]:
        unclear.append("the attack finds differences between unseen patients too, so it cannot be relied on here.")
    if failed:
        return "FAIL", failed + unclear
    if unclear:
        return "INCONCLUSIVE", unclear
    score = scores["unlearned"]["forget"][_main(scores)].mean()
    if equivalent is not None and equivalent["ok"]:
        return "RETRAIN-EQUIVALENT", [
            f"forget score within ±{equivalent['forget']['margin']:.3f} of the retrained model's (two one-sided "
            "tests), unseen cases not inferior, and case by case as close to it as a second retrained model. This is "
            "measured behaviour within stated margins, no proof of erasure."
        ]
    return "NOT REFUTED", [
        f"forget score {score:.3f} against {target:.3f} expected of unseen cases; no test failed "
        "and both controls behave. This is measured behaviour, no proof of erasure."
    ]


def _main(scores: Scores) -> str:
    return main_score(scores["original"]["holdout"])


def _utility(scores: Scores, groups: Groups, limits: Mapping[str, float]) -> list[str]:
    main, u = _main(scores), scores["unlearned"]
    reference = scores.get("retrained", scores["original"])
    against = "the retrained model" if "retrained" in scores else "the original"
    failed = []
    for split, key, what in (("holdout", "utility", "unseen"), ("retain", "retain", "retained")):
        if split in u and (split == "holdout" or "retrained" in scores):
            test = non_inferiority(u[split][main] - reference[split][main], groups[split], limits[key])
            if test["worse"]:
                failed.append(
                    f"{what} cases lost {-test['change']:.3f} {NAMES[main]} against {against}, more than {limits[key]}."
                )
    return failed


def _forget_score(scores: Scores, groups: Groups, target: float, margin: float, seed: int) -> list[str]:
    main = _main(scores)
    u, o, j = (scores[name] for name in ("unlearned", "original", "judge"))
    score, name = u["forget"][main].mean(), NAMES[main]
    low, high = bootstrap_difference(
        u["forget"][main] - j["forget"][main], groups["forget"],
        o["holdout"][main] - j["holdout"][main], groups["holdout"], seed=seed,
    )  # fmt: skip
    if low > margin:
        return [f"the forget set still scores {score:.3f} {name} where an unseen case would score {target:.3f}."]
    if high < -margin:
        return [
            f"the forget set scores {score:.3f} {name}, below the {target:.3f} of an unseen case: over-forgotten, "
            "which marks the cases as clearly as remembering them."
        ]
    return []


def _strayed(rows: Mapping[str, Rows], groups: Groups, seed: int) -> list[str]:
    """Outputs on the forget set that did not come nearer to the retrained model's than half the way.

    The way leads from where the original lies to where a second retrained model does.
    """
    if "retrained_other" not in rows:
        return []
    u, original, other = (rows[name]["js"] for name in ("unlearned", "original", "retrained_other"))
    low, _ = bootstrap_mean(u - (original + other) / 2, groups["forget"], seed=seed)
    if not low > STRAY_MARGIN:
        return []
    return [
        f"its answers on the forget set diverge by {u.mean():.3f} from those of the retrained model (the original's by "
        f"{original.mean():.3f}, a second retrained model's by {other.mean():.3f}): who never saw the cases answers "
        "otherwise."
    ]


def _attacked(row: Mapping[str, Any], margin: float, kind: str, retrained: float | None) -> list[str]:
    """Beyond the margin with the whole interval, and further than chance takes so few patients: an interval that draws
    a handful of them anew can be a point. The margin begins at chance, or at the retrained model's AUC beyond it."""
    if row["auc"] is None:
        return []
    low, high = sorted((0.5, 0.5 if retrained is None else retrained))
    if row["ci"][0] <= high + margin and row["ci"][1] >= low - margin:
        return []
    if low - margin - row["resolution"] <= row["auc"] <= high + margin + row["resolution"]:
        return []
    beside = "" if retrained is None else f", {retrained:.3f} in the retrained model"
    return [
        f"an attack tells the forgotten from unseen patients: AUC {row['auc']:.3f} ({kind}) "
        f"[{row['ci'][0]:.3f}, {row['ci'][1]:.3f}]{beside}, direction {row['direction']}."
    ]


def _alike(scores: Scores, groups: Groups, margin: float) -> list[str]:
    """Unseen cases of a revised device or criterion have to score as under the retrained model."""
    if "retrained" not in scores or len(scores["unlearned"].get("holdout_alike", {}).get("loss", ())) < 2:
        return []
    main = _main(scores)
    apart = scores["unlearned"]["holdout_alike"][main] - scores["retrained"]["holdout_alike"][main]
    low, high = bootstrap_mean(apart, groups["holdout_alike"])
    if -margin <= high and low <= margin:
        return []
    return [
        f"unseen cases like the forgotten score {apart.mean():+.3f} {NAMES[main]} beside the retrained model "
        f"[{low:+.3f}, {high:+.3f}]."
    ]
