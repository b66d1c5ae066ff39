# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Closed forms and laws, one check for each kind of metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

TOLERANCE = 1e-6
Check = Callable[[Callable[..., Any]], list[str]]


def _close(found: Any, expected: float, what: str, tolerance: float = TOLERANCE) -> list[str]:
    value = float(np.asarray(found, float).reshape(-1)[0])
    if math.isfinite(value) and abs(value - expected) <= tolerance:
        return []
    return [f"{what}: {value:.6g} where {expected:.6g} is right"]


def dice(metric: Callable[..., Any]) -> list[str]:
    """``metric(mask, truth)`` of boolean arrays: 2|P∩Y| / (|P|+|Y|)."""
    mask, truth = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    mask.flat[:6], truth.flat[3:7] = True, True
    empty = np.zeros_like(mask)
    big = [np.kron(one, np.ones((2, 2), bool)) for one in (mask, truth)]
    return [
        *_close(metric(mask, truth), 0.6, "|P| = 6, |Y| = 4, |P∩Y| = 3"),
        *_close(metric(*big), 0.6, "the same on twice the grid"),
        *_close(metric(empty, empty), 1.0, "both empty"),
        *_close(metric(mask, empty), 0.0, "one empty"),
    ]


def iou(metric: Callable[..., Any]) -> list[str]:
    """``metric(mask, truth)`` of boolean arrays: |P∩Y| / |P∪Y|."""
    mask, truth = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    mask.flat[:6], truth.flat[3:7] = True, True
    return _close(metric(mask, truth), 3 / 7, "|P| = 6, |Y| = 4, |P∩Y| = 3")


def dense_accuracy(metric: Callable[..., Any]) -> list[str]:
    """``metric(logits, labels)`` of ``(B, C, H, W)`` and ``(B, H, W)``: the share of voxels that are right."""
    logits = torch.zeros(2, 2, 4, 4)
    logits[:, 1, :3] = 1.0
    labels = torch.ones(2, 4, 4, dtype=torch.long)
    big = logits.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.ones(2, 8, 8, dtype=torch.long)
    return [
        *_close(metric(logits, labels), 0.75, "three quarters right"),
        *_close(metric(*big), 0.75, "the same on twice the grid"),
        *_close(metric(logits[:1], labels[:1]), 0.75, "one case of the batch alone"),
    ]


def distillation(metric: Callable[..., Any]) -> list[str]:
    """``metric(student, teacher)`` of dense logits ``(B, C, H, W)``: a mean over voxels, 0 where they agree."""
    student, teacher = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3, 4, 4)
    big = [one.repeat_interleave(2, 2).repeat_interleave(2, 3) for one in (student, teacher)]
    once = float(metric(student, teacher))
    return [
        *_close(metric(*big), once, "the same on twice the grid", 1e-5),
        *_close(metric(torch.cat([student, student]), torch.cat([teacher, teacher])), once, "the batch twice", 1e-5),
        *_close(metric(student, student), 0.0, "no difference", 1e-5),
    ]


def auc(metric: Callable[..., Any]) -> list[str]:
    """``metric(members, others)``: P(a > b) + ½ P(a = b)."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 30).round(1), rng.normal(0, 1, 50).round(1)
    right = float(np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b)))
    return [
        *_close(metric(np.array([3.0, 2.0]), np.array([1.0, 2.0])), 0.875, "{3, 2} against {1, 2}"),
        *_close(metric(a, b), right, "with ties"),
        *_close(metric(-a, -b), 1 - right, "scores reversed"),
        *_close(metric(rng.permutation(a), rng.permutation(b)), right, "another order"),
    ]


def membership(metric: Callable[..., Any]) -> list[str]:
    """``metric(forget, retain, unseen)``: the AUC of an attack from the scores of three sets; members are F, not R."""
    rng = np.random.default_rng(0)
    forget, retain, unseen = rng.normal(3, 0.5, 40), rng.normal(3, 0.5, 60), rng.normal(0, 0.5, 60)
    never = rng.normal(0, 0.5, 40)
    return [
        *([] if float(metric(forget, retain, unseen)) > 0.95 else ["a wholly memorised forget set is not found"]),
        *([] if abs(float(metric(never, retain, unseen)) - 0.5) < 0.15 else ["a set that was never seen is found"]),
    ]


def direction(metric: Callable[..., Any]) -> list[str]:
    """``metric(members, others)``: a mapping whose ``direction`` tells remembering from over-forgetting."""
    rng = np.random.default_rng(0)
    unseen = rng.normal(0, 1, 60)
    said = [metric(rng.normal(level, 1, 60), unseen) for level in (3, -3)]
    if not all(isinstance(one, Mapping) and "direction" in one for one in said):
        return ["the attack has no direction: a number alone does not say which side is bad"]
    return [] if said[0]["direction"] != said[1]["direction"] else ["remembered and over-forgotten look the same"]


def js(metric: Callable[..., Any]) -> list[str]:
    """``metric(p, q)`` of ``(B, C)``: Jensen–Shannon divergence over ln 2, its mean over the batch."""
    half, first, second = (np.array([row]) for row in ([0.5, 0.5], [1.0, 0.0], [0.0, 1.0]))
    rng = np.random.default_rng(0)
    found = [
        *_close(metric(half, first), 0.311278124459, "(.5, .5) against (1, 0)"),
        *_close(metric(first, second), 1.0, "disjoint one-hot"),
        *_close(metric(first, first), 0.0, "the same"),
    ]
    for number in (10, 100):
        p, q = (rng.dirichlet(np.ones(number), 50) for _ in range(2))
        m = (p + q) / 2
        right = (0.5 * (p * np.log(p / m) + q * np.log(q / m)).sum(1) / np.log(2)).mean()
        found += _close(metric(p, q), right, f"random predictions over {number} classes", 1e-5)
    return found


def modified_entropy(metric: Callable[..., Any]) -> list[str]:
    """``metric(p, y)`` of ``(B, C)`` and ``(B,)``: −(1−p_y) log p_y − Σ_{i≠y} p_i log(1−p_i), per row."""
    p, y = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]), np.array([0, 0])
    right = [-(1 - row[0]) * math.log(row[0]) - sum(float(v) * math.log(1 - float(v)) for v in row[1:]) for row in p]
    both = np.asarray(metric(p, y), float)
    if both.shape != (2,):
        return [f"rows mix: shape {both.shape} where (2,) is right"]
    return [
        *_close(right[0], 0.1622, "the check itself", 5e-5),
        *_close(both[0], right[0], "(.7, .2, .1), y = 0", 1e-5),
        *_close(both[1], right[1], "(.1, .8, .1), y = 0", 1e-5),
    ]


def lira(metric: Callable[..., Any]) -> list[str]:
    """``metric(phi, mean_in, std_in, mean_out, std_out)``: the log ratio of two normal densities."""
    return [
        *_close(metric(np.array([2.0]), 2.0, 1.0, 0.0, 1.0), 2.0, "φ = 2, N(2, 1) against N(0, 1)"),
        *_close(metric(np.array([0.0]), 0.0, 1.0, 0.0, 2.0), math.log(2), "φ = 0, N(0, 1) against N(0, 4)"),
    ]


def rmia_ratio(metric: Callable[..., Any]) -> list[str]:
    """``metric(p, p_out, a)``: p(x|U) / ½[(1 + a) p_OUT + (1 − a)]."""
    return [
        *_close(metric(np.array([0.9]), np.array([0.5]), 0.0), 1.2, "p = .9, p_OUT = .5, a = 0"),
        *_close(metric(np.array([0.9]), np.array([0.5]), 1.0), 1.8, "p = .9, p_OUT = .5, a = 1"),
    ]


def epsilon(metric: Callable[..., Any]) -> list[str]:
    """``metric(fpr, fnr, delta)``: max of the two log ratios."""
    return [
        *_close(metric(0.1, 0.1, 0.0), math.log(9), "FPR = FNR = .1"),
        *_close(metric(0.4, 0.1, 0.0), math.log(6), "FPR = .4, FNR = .1"),
        *_close(metric(0.1, 0.4, 0.0), math.log(6), "FPR = .1, FNR = .4"),
    ]


def confidence_margin(metric: Callable[..., Any]) -> list[str]:
    """``metric(logits, y)`` of ``(B, C)`` and ``(B,)``: z_y − logsumexp of the others, as KLOM reads it."""
    logits = np.log(np.array([[0.7, 0.2, 0.1]]))
    return [
        *_close(metric(logits, np.array([0])), math.log(7 / 3), "p = .7"),
        *_close(metric(logits + 5.0, np.array([0])), math.log(7 / 3), "all logits raised by 5"),
    ]


def clopper_pearson(metric: Callable[..., Any]) -> list[str]:
    """``metric(successes, number)``: the exact 95 % interval."""
    return [
        *_close(metric(0, 20)[1], 0.16843, "0 of 20, upper end", 1e-5),
        *_close(metric(20, 20)[0], 1 - 0.16843, "20 of 20, lower end", 1e-5),
    ]


def tug_of_war(metric: Callable[..., Any]) -> list[str]:
    """``metric(gaps)``: Π (1 − |gap|)."""
    return [
        *_close(metric([0.1, 0.2, 0.0]), 0.72, "gaps .1, .2, 0"),
        *_close(metric([-0.1, 0.2, 0.0]), 0.72, "the sign of a gap"),
    ]


def rank(metric: Callable[..., Any]) -> list[str]:
    """``metric(patient, unseen)``: the conformal p of one patient above the unseen."""
    return [
        *_close(metric(9.0, np.zeros(100)), 1 / 101, "none of 100 above"),
        *_close(metric(0.0, np.zeros(100)), 1.0, "all of 100 as high"),
    ]


def removal(metric: Callable[..., Any]) -> list[str]:
    """``metric(unlearned, retrained)``: whether two networks count as the same; two random ones must not."""
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    return ["two random networks are accepted as equal"] if metric(*networks) else []


def optimiser(metric: Callable[..., Any]) -> list[str]:
    """``metric(student, teacher)``: an optimiser that moves the student and leaves the teacher."""
    student, teacher = nn.Linear(4, 2), nn.Linear(4, 2)
    before = [[p.detach().clone() for p in network.parameters()] for network in (student, teacher)]
    optimizer = metric(student, teacher)
    x = torch.ones(3, 4)
    (student(x) - teacher(x)).square().mean().backward()
    optimizer.step()
    moved = [
        any(not torch.equal(old, p) for old, p in zip(olds, network.parameters()))
        for olds, network in zip(before, (student, teacher))
    ]
    return [*([] if moved[0] else ["the student does not move"]), *(["the teacher moves"] if moved[1] else [])]


def selection(metric: Callable[..., Any]) -> list[str]:
    """``metric(candidates, target)``: the index of the candidate to keep for a deletion; each has ``forget``,
    ``retain`` and ``holdout`` scores and ``distance``, how far its activations lie from the original's."""
    retrain_like = {"forget": 0.75, "retain": 0.95, "holdout": 0.75, "distance": 1.0}
    others = [
        {"forget": 0.11, "retain": 0.95, "holdout": 0.75, "distance": 2.0},  # guesses on the forget set
        {"forget": 0.75, "retain": 0.30, "holdout": 0.25, "distance": 9.0},  # damaged
        {"forget": 0.99, "retain": 0.99, "holdout": 0.76, "distance": 0.0},  # the original
    ]
    found = []
    for place in range(4):
        candidates = [*others[:place], retrain_like, *others[place:]]
        if metric(candidates, 0.75) != place:
            found.append(f"candidate {metric(candidates, 0.75)} is kept where {place} behaves like the retrained model")
    return found


def missing(metric: Callable[..., Any]) -> list[str]:
    """``metric(measure)``: what a report holds of a measurement that fails: nothing, or the error."""

    def fails() -> float:
        raise RuntimeError("no such model")

    try:
        value = metric(fails)
    except RuntimeError:
        return []
    return [] if value is None else [f"a step that failed became the number {value}"]


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        dice, iou, dense_accuracy, distillation, auc, membership, direction, js, modified_entropy, lira, rmia_ratio,
        epsilon, confidence_margin, clopper_pearson, tug_of_war, rank, removal, optimiser, selection, missing,
    )
}  # fmt: skip


def violations(name: str, metric: Callable[..., Any]) -> list[str]:
    """What is wrong with an implementation of a metric; empty where nothing is.

    Args:
        name: of the check, see :data:`CHECKS`; its docstring says how ``metric`` is called.
        metric: the implementation.

    Raises:
        KeyError: when there is no such check.

    Example:
        >>> violations("tug_of_war", lambda gaps: 1 - sum(gaps))
        ['gaps .1, .2, 0: 0.7 where 0.72 is right', 'the sign of a gap: 0.9 where 0.72 is right']
    """
    if name not in CHECKS:
        raise KeyError(f"there is no check {name!r}; there are {_listed(CHECKS)}.")
    return CHECKS[name](metric)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
