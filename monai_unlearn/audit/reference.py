# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What a model that never saw the forget set would score on it, from a cheap one that did not."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from ..request import Item
from .scores import main_score

COVARIATES = {"iou": ("iou", "entropy", "area"), "accuracy": ("accuracy", "margin", "entropy")}


def reference_parts(retain: Sequence[Item], parts: int = 3, seed: int = 0) -> list[list[Item]]:
    """Disjoint parts of the retain set by whole groups: the first teaches, the second judges.

    Args:
        retain: items with their ``group``.
        parts: how many parts of about equal size.
        seed: of the draw, independent of the items' order.

    Raises:
        ValueError: with fewer groups than parts.
    """
    members: dict[str, list[Item]] = defaultdict(list)
    for item in retain:
        members[str(item["group"])].append(item)
    if len(members) < parts:
        raise ValueError(
            f"{len(members)} retained groups cannot be dealt into {parts} parts; references need more data."
        )
    order = sorted(members)
    random.Random(seed).shuffle(order)
    dealt: list[list[Item]] = [[] for _ in range(parts)]
    for name in order:
        min(dealt, key=len).extend(members[name])
    return dealt


def expected_unseen(reference_forget: np.ndarray, original_unseen: np.ndarray, reference_unseen: np.ndarray) -> float:
    """q̂ = mean s(A, F) + [mean s(O, T) − mean s(A, T)]: the reference's score, lifted by its lag on unseen cases.

    The offset uses the original, not the unlearned model: a damaged model must not lower its own target.

    Example:
        >>> round(expected_unseen(np.array([0.461]), np.array([0.482]), np.array([0.5])), 3)
        0.443
    """
    return float(np.mean(reference_forget) + np.mean(original_unseen) - np.mean(reference_unseen))


def regression_reference(
    reference_forget: Mapping[str, np.ndarray],
    reference_unseen: Mapping[str, np.ndarray],
    original_unseen: np.ndarray,
    covariates: Sequence[str] | None = None,
) -> float:
    """The expected-unseen score by regression: what the original scores on unseen cases, given what the reference says.

    The original's scores on unseen cases are fitted by least squares on the reference's score and entropy (and, for
    masks, on the area of the label; for classes on the margin); the fit is then read off on the forget cases. With the
    score alone and slope 1 this is :func:`expected_unseen`; the fitted slope takes out the reference's own noise.

    Args:
        reference_forget: the reference's scores per forget case.
        reference_unseen: the same on the unseen cases.
        original_unseen: the original's score on the unseen cases.
        covariates: names in both mappings, the first is the score itself; None takes IoU, entropy and area of masks,
            and accuracy, margin and entropy of classes.

    Returns:
        The mean over the forget cases, within the range of the original's scores.
    """

    covariates = covariates or COVARIATES[main_score(reference_unseen)]

    def design(rows: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.column_stack([*(rows[name] for name in covariates), np.ones(len(rows[covariates[0]]))])

    if len(original_unseen) < 5 * (len(covariates) + 1):
        return expected_unseen(reference_forget[covariates[0]], original_unseen, reference_unseen[covariates[0]])
    weights, *_ = np.linalg.lstsq(design(reference_unseen), original_unseen, rcond=None)
    estimate = float((design(reference_forget) @ weights).mean())
    return float(np.clip(estimate, original_unseen.min(), original_unseen.max()))


def completeness(original: float, unlearned: float, target: float, least: float = 0.04) -> float | None:
    """(q_O − q_U) / (q_O − target): 0 nothing forgotten, 1 as unseen, above 1 over-forgotten.

    None where the original misses the target by less than ``least``: nothing measurable to forget.
    """
    return (original - unlearned) / (original - target) if abs(original - target) >= least else None
