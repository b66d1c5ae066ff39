# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers with their intervals; the unit is the patient (group), never the pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

RESAMPLES = 10_000


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """P(a > b) + ½ P(a = b) for a from ``members`` and b from ``others``, from ranks; NaN where either is empty.

    Example:
        >>> auc([3, 2], [1, 2])
        0.875
    """
    a, b = np.asarray(members, float), np.asarray(others, float)
    if not len(a) or not len(b):
        return float("nan")
    ranks = stats.rankdata(np.concatenate([a, b]))
    return float((ranks[: len(a)].sum() - len(a) * (len(a) + 1) / 2) / (len(a) * len(b)))


def group_means(values: ArrayLike, groups: Sequence[Any]) -> np.ndarray:
    """The mean of each group's defined values, in the order of the groups' names; NaN for a group without any."""
    _, index = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    numbers = np.asarray(values, float)
    defined = ~np.isnan(numbers)
    counts = np.bincount(index, defined)
    with np.errstate(invalid="ignore"):
        return np.bincount(index, np.where(defined, numbers, 0.0)) / counts


def bootstrap_mean(
    values: ArrayLike, groups: Sequence[Any], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """BCa interval of the mean over cases, from a cluster bootstrap over groups (Efron 1987).

    Args:
        values: one per case.
        groups: the group of each case; whole groups are drawn.
        level: two-sided coverage.
        resamples: bootstrap samples.
        seed: of the draws.

    Returns:
        Lower and upper end; both NaN with fewer than two groups.
    """
    values = np.asarray(values, float)
    _, index = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index).astype(float)
    number = len(sums)
    if number < 2:
        return float("nan"), float("nan")
    if np.ptp(sums / counts) == 0:
        return float(values.mean()), float(values.mean())
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    means = (draws @ sums) / (draws @ counts)
    estimate = values.mean()
    share = ((means < estimate).sum() + 0.5 * (means == estimate).sum()) / resamples
    bias = stats.norm.ppf(np.clip(share, 0.5 / resamples, 1 - 0.5 / resamples))
    jackknife = (sums.sum() - sums) / (counts.sum() - counts)
    apart = jackknife.mean() - jackknife
    spread = (apart**2).sum() ** 1.5
    acceleration = (apart**3).sum() / (6 * spread) if spread > 0 else 0.0
    ends = []
    for quantile in ((1 - level) / 2, (1 + level) / 2):
        z = bias + stats.norm.ppf(quantile)
        ends.append(float(np.quantile(means, stats.norm.cdf(bias + z / (1 - acceleration * z)))))
    return ends[0], ends[1]


def bootstrap_difference(
    one: ArrayLike,
    one_groups: Sequence[Any],
    other: ArrayLike,
    other_groups: Sequence[Any],
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of mean(one) − mean(other) from independent cluster bootstraps of two sets of patients."""
    rng, means = np.random.default_rng(seed), []
    for values, names in ((one, one_groups), (other, other_groups)):
        _, index = np.unique(np.asarray([str(name) for name in names]), return_inverse=True)
        sums, counts = np.bincount(index, np.asarray(values, float)), np.bincount(index).astype(float)
        draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
        means.append((draws @ sums) / (draws @ counts))
    low, high = np.quantile(means[0] - means[1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def non_inferiority(change: ArrayLike, groups: Sequence[Any], margin: float) -> dict[str, Any]:
    """Paired non-inferiority: the lower one-sided 95 % bound of the mean change lies above −``margin``.

    Args:
        change: of each case, new minus old.
        groups: its patient.
        margin: what may be lost, above 0.

    Returns:
        ``change``, its one-sided bounds ``low`` and ``high``, ``margin``, ``ok`` (shown to be not inferior) and
        ``worse`` (shown to be inferior); neither holds where the data do not tell.
    """
    values = np.asarray(change, float)
    low, high = bootstrap_mean(values, groups, level=0.9)
    return {"change": float(values.mean()), "low": low, "high": high, "margin": margin, "ok": bool(low > -margin),
            "worse": bool(high < -margin)}  # fmt: skip


def equivalence(difference: float, ci90: tuple[float, float], margin: float) -> dict[str, Any]:
    """Two one-sided tests at 5 % each (Schuirmann 1987): the 90 % interval lies inside ±``margin``."""
    inside = -margin < ci90[0] and ci90[1] < margin
    return {"difference": difference, "ci90": list(ci90), "margin": margin, "ok": bool(inside)}


def seed_margin(one: ArrayLike, other: ArrayLike, groups: Sequence[Any], least: float, seed: int = 0) -> float:
    """What two retrained models of different seeds may lie apart: max(least, 95th percentile of |mean difference|).

    Args:
        one: a score of each case under the one.
        other: under the other.
        groups: the patient of each case; whole patients are drawn.
        least: the margin cannot fall below it.
        seed: of the draws.
    """
    _, index = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    apart = np.bincount(index, np.asarray(one, float) - np.asarray(other, float))
    counts = np.bincount(index).astype(float)
    draws = np.random.default_rng(seed).multinomial(len(apart), np.full(len(apart), 1 / len(apart)), size=2_000)
    return max(least, float(np.quantile(np.abs((draws @ apart) / (draws @ counts)), 0.95)))


def epsilon(fpr: float, fnr: float, delta: float = 0.0) -> float:
    """The differential-privacy ε that an attack's two errors rule out: max{ln((1−δ−FPR)/FNR), ln((1−δ−FNR)/FPR)}.

    Kairouz et al. 2015, as used to score unlearning; for a bound on a measured model give upper Clopper–Pearson ends.

    Returns:
        At least 0; infinite where an error is 0.

    Example:
        >>> round(epsilon(0.1, 0.1), 4)  # ln 9
        2.1972
    """
    if 1 - delta <= max(fpr, fnr):
        return 0.0
    ratios = [(1 - delta - one) / other if other > 0 else np.inf for one, other in ((fpr, fnr), (fnr, fpr))]
    return max(0.0, float(np.log(max(ratios))))


def auc_resolution(number: int, other: int) -> float:
    """How far from .5 an AUC of so few patients has to lie to count at 5 %: 1.96 · √((n + m + 1) / (12 n m))."""
    return 1.96 * float(np.sqrt((number + other + 1) / (12 * number * other)))


def bootstrap_auc(
    members: ArrayLike, others: ArrayLike, level: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the AUC; every value is one patient, both sides are drawn anew.

    Returns:
        Lower and upper end; both NaN where a side has fewer than two.
    """
    (values,) = _drawn_aucs([(members, others)], resamples, seed)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_auc_difference(
    one: tuple[ArrayLike, ArrayLike],
    other: tuple[ArrayLike, ArrayLike],
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of AUC(one) − AUC(other), paired: the same patients are drawn for both.

    Args:
        one: the members' and the others' values under one model, a value for each patient.
        other: those of the same patients, in the same order, under the other model.
        level: two-sided coverage.
        resamples: bootstrap samples.
        seed: of the draws.

    Returns:
        Lower and upper end; both NaN where a side has fewer than two.
    """
    values = _drawn_aucs([one, other], resamples, seed)
    low, high = np.quantile(values[0] - values[1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _drawn_aucs(models: Sequence[tuple[ArrayLike, ArrayLike]], resamples: int, seed: int) -> list[np.ndarray]:
    """Each model's AUC, as often as patients are drawn anew; the draws are the same for all. NaN with too few."""
    number, other = (len(np.asarray(side)) for side in models[0])
    if number < 2 or other < 2:
        return [np.full(resamples, np.nan)] * len(models)
    rng = np.random.default_rng(seed)
    draws_a, draws_b = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) for n in (number, other))
    found = []
    for members, others in models:
        a, b = np.asarray(members, float), np.asarray(others, float)
        wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)
        found.append(((draws_a @ wins) * draws_b).sum(1) / (number * other))
    return found


def clopper_pearson(successes: int, number: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a binomial share.

    Example:
        >>> round(clopper_pearson(0, 20)[1], 4)
        0.1684
    """
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, number - successes + 1))
    high = 1.0 if successes == number else float(stats.beta.ppf(1 - tail, successes + 1, number - successes))
    return low, high


def tpr_at_fpr(members: ArrayLike, others: ArrayLike, fpr: float = 0.05) -> float:
    """Share of members above the threshold that at most a share ``fpr`` of the others exceeds."""
    a, b = np.asarray(members, float), np.sort(np.asarray(others, float))[::-1]
    if not len(a) or not len(b):
        return float("nan")
    return float((a > b[int(np.floor(fpr * len(b)))]).mean())
