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
    """The mean of each group's values, in the order of the groups' names."""
    _, index = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    return np.bincount(index, np.asarray(values, float)) / np.bincount(index)


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


def bootstrap_auc(
    members: ArrayLike, others: ArrayLike, level: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the AUC; every value is one patient, both sides are drawn anew.

    Returns:
        Lower and upper end; both NaN where a side has fewer than two.
    """
    a, b = np.asarray(members, float), np.asarray(others, float)
    if len(a) < 2 or len(b) < 2:
        return float("nan"), float("nan")
    wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    rng = np.random.default_rng(seed)
    draws_a = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=resamples)
    draws_b = rng.multinomial(len(b), np.full(len(b), 1 / len(b)), size=resamples)
    values = ((draws_a @ wins) * draws_b).sum(1) / (len(a) * len(b))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
