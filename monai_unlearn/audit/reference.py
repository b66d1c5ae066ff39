# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What a model that never saw the forget set would score on it, from a cheap one that did not."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ..checkpoint import weights_digest
from ..data import MemoryDataset
from ..request import Item, RequestError, item_id
from .scores import Rows, main_score, score_cases

COVARIATES = {"iou": ("iou", "entropy", "area"), "accuracy": ("accuracy", "margin", "entropy")}


@dataclass(frozen=True)
class References:
    """Models that never saw the cases they judge, and taught nobody.

    Attributes:
        networks: one or more; cross-validation models that exist already will do.
        saw: for each network the ids of the items it was trained on; empty where it saw none of the run's.
    """

    networks: Sequence[nn.Module]
    saw: Sequence[Collection[str]] = field(default_factory=list)

    @classmethod
    def of_folds(
        cls, networks: Mapping[Any, nn.Module], training: Sequence[Item], holdout: Sequence[Item] = ()
    ) -> References:
        """Cross-validation models by the fold that each was not trained on.

        An unseen item in a fold without a model lay outside of the cross-validation: no model saw it.

        Args:
            networks: by fold.
            training: items with their ``fold``.
            holdout: the unseen items.

        Raises:
            RequestError: when a training item has no fold, or one that no model belongs to.
        """
        names = {str(fold) for fold in networks}
        missing = sorted({str(item.get("fold", "unknown")) for item in training} - names)
        if missing:
            raise RequestError(f"no reference model for fold {', '.join(missing)} of the data list.")
        folded = [*training, *(item for item in holdout if str(item.get("fold")) in names)]
        saw = [{item_id(item) for item in folded if str(item["fold"]) != str(fold)} for fold in networks]
        return cls(list(networks.values()), saw)

    def refuse(self, teachers: Mapping[str, nn.Module]) -> None:
        """Raise RequestError where one of the networks holds the weights of a model that taught, or is judged."""
        taught = {weights_digest(network.state_dict()): name for name, network in teachers.items()}
        for network in self.networks:
            name = taught.get(weights_digest(network.state_dict()))
            if name is not None:
                raise RequestError(f"a judge must not be the {name} model; give two different models.")

    def never_saw(self, item: Item) -> list[nn.Module]:
        """The networks that were not trained on an item."""
        saw = self.saw or [()] * len(self.networks)
        return [network for network, ids in zip(self.networks, saw) if item_id(item) not in ids]

    def score(self, datasets: Mapping[str, MemoryDataset], seed: int = 0, **options: Any) -> dict[str, Rows]:
        """Scores of every case by those of the networks that never saw it.

        Every case of the forget set and the holdout is judged by equally many, so that one side's scores do not vary
        less than the other's; where more are at hand the seed draws.

        Args:
            datasets: by split.
            seed: draws the networks of a case.
            options: of :func:`monai_unlearn.audit.score_cases`.

        Returns:
            split -> rows, the means over a case's networks; ``likelihood`` is the mean of exp(−loss). NaN where too few
            of them never saw a case; ``true`` and ``predicted`` are the first one's. A retain set that they all saw is
            left out.

        Raises:
            RequestError: when a forget or unseen case was seen by every reference.
        """
        saw = [set(ids) for ids in self.saw] or [set() for _ in self.networks]
        may = {
            split: np.array([[item_id(item) not in ids for item in dataset.data] for ids in saw])
            for split, dataset in datasets.items()
        }
        counted = {split: allowed.sum(0) for split, allowed in may.items() if split != "retain"}
        number = min(int(count.min()) for count in counted.values())
        if number == 0:
            seen = sum(int((count == 0).sum()) for count in counted.values())
            raise RequestError(
                f"{seen} forget or unseen cases were seen by every reference; a case is judged only by models that "
                "never saw it. Give references that were trained without them."
            )
        rng, found = np.random.default_rng(seed), {}
        for split, dataset in datasets.items():
            priority = np.where(may[split], rng.random(may[split].shape), 2.0).argsort(0)
            chosen = np.zeros_like(may[split])
            np.put_along_axis(chosen, priority[:number], True, 0)
            chosen &= may[split] & (may[split].sum(0) >= number)
            if not chosen.any():
                continue
            found[split] = self._mean(chosen, dataset, options)
        return found

    def _mean(self, chosen: np.ndarray, dataset: MemoryDataset, options: Mapping[str, Any]) -> Rows:
        total: Rows = {}
        share = 1 / np.maximum(1, chosen.sum(0))
        for place, (network, mine) in enumerate(zip(self.networks, chosen)):
            if not mine.any():
                continue
            items = [item for item, own in zip(dataset.data, mine) if own]
            rows = score_cases(network, MemoryDataset(items, dataset.transform, dataset.store), **options)
            rows["likelihood"] = np.exp(-rows["loss"])
            first = mine & ~chosen[:place].any(0)
            for name, values in rows.items():
                mean = total.setdefault(name, np.zeros((len(mine), *values.shape[1:])))
                if name in ("true", "predicted"):
                    mean[first] = values[first[mine]]
                else:
                    mean[mine] += values * share[mine].reshape(-1, *[1] * (values.ndim - 1))
        return {name: np.where(chosen.any(0).reshape(-1, *[1] * (mean.ndim - 1)), mean, np.nan)
                for name, mean in total.items()}  # fmt: skip


def reference_parts(retain: Sequence[Item], parts: int = 3, seed: int = 0) -> list[list[Item]]:
    """The retain set in two, by whole groups: what the teaching reference is trained on, and what the judging one is.

    Args:
        retain: items with their ``group``.
        parts: the judge's part is one of so many of about equal size, the teacher's are the others.
        seed: of the draw, independent of the items' order.

    Raises:
        ValueError: with fewer groups than parts, or fewer than two parts.
    """
    if parts < 2:
        raise ValueError(f"references need two parts or more, one to teach and one to judge; got {parts}.")
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
    teacher, judge, *others = dealt
    return [[*teacher, *itertools.chain.from_iterable(others)], judge]


def expected_unseen(
    reference_forget: np.ndarray,
    original_unseen: np.ndarray,
    reference_unseen: np.ndarray,
    original_forget: np.ndarray | None = None,
) -> float:
    """q̂ = mean s(A, F) + [mean s(O, T) − mean s(A, T)]: the reference's score, lifted by its lag on unseen cases.

    The offset uses the original, not the unlearned model: a damaged model must not lower its own target. With the
    original's scores on the forget set, q̂ is at most their mean: what a model was trained on it knows no worse.

    Example:
        >>> round(expected_unseen(np.array([0.461]), np.array([0.482]), np.array([0.5])), 3)
        0.443
        >>> expected_unseen(np.array([0.461]), np.array([0.482]), np.array([0.5]), np.array([0.44]))
        0.44
    """
    estimate = float(np.mean(reference_forget) + np.mean(original_unseen) - np.mean(reference_unseen))
    return estimate if original_forget is None else min(estimate, float(np.mean(original_forget)))


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
