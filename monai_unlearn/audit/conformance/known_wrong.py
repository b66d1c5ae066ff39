# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Mistakes found in code for unlearning, written anew as fixtures that the suite has to reject."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..statistics import auc


def _accuracy_by_batch(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def _batchmean(student: Tensor, teacher: Tensor) -> float:
    return float(F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean"))


def _retained_as_others(forget: np.ndarray, retain: np.ndarray, unseen: np.ndarray) -> float:
    return auc(forget, retain)


def _number_alone(members: np.ndarray, others: np.ndarray) -> float:
    return max(auc(members, others), 1 - auc(members, others))


def _js_turned_round(p: np.ndarray, q: np.ndarray) -> float:
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(0.5 * np.mean(m * np.log(m / p)) + 0.5 * np.mean(m * np.log(m / q)))


def _cosine(p: np.ndarray, q: np.ndarray) -> float:
    return float(((p * q).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1)).mean())


def _entropy_of_the_wrong_log(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    log = -np.log(p.clip(1e-12))
    own = np.eye(p.shape[1], dtype=bool)[y]
    return np.where(own, (1 - p) * log, p * log).sum(1)


def _entropy_of_mixed_rows(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    rest = p.copy()
    rest[:, y] = 0
    return -(1 - p[:, y]) * np.log(p[:, y]) - (rest * np.log(1 - rest)).sum(1, keepdims=True)


def _smaller_ratio(fpr: float, fnr: float, delta: float = 0.0) -> float:
    return float(np.log(min((1 - delta - fpr) / fnr, (1 - delta - fnr) / fpr)))


def _pooled(fpr: float, fnr: float, delta: float = 0.0) -> float:
    error = (fpr + fnr) / 2
    return float(np.log((1 - delta - error) / error))


def _near_in_weights(one: nn.Module, other: nn.Module) -> bool:
    distance = torch.sqrt(sum((a - b).square().sum() for a, b in zip(one.parameters(), other.parameters())))  # type: ignore
    return bool(distance <= 97.65)  # a bound that grows with the steps taken


def _optimiser_of_the_teacher(student: nn.Module, teacher: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(teacher.parameters(), 0.1)


def _guessing_is_best(candidates: Sequence[Mapping[str, float]], target: float) -> int:
    return max(range(len(candidates)), key=lambda k: candidates[k]["retain"] - abs(candidates[k]["forget"] - 1 / 9))


def _far_is_best(candidates: Sequence[Mapping[str, float]], target: float) -> int:
    return max(range(len(candidates)), key=lambda k: candidates[k]["distance"])


def _minus_one(measure: Callable[[], float]) -> float:
    try:
        return measure()
    except RuntimeError:
        return -1.0


def _empty_row(measure: Callable[[], float]) -> float:
    try:
        value: float | None = measure()
    except RuntimeError:
        value = None
    return 0.81 - (value or 0.0)


# name of the mistake -> the check that rejects it, the implementation
KNOWN_WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "accuracy divided by the batch size on dense output": ("dense_accuracy", _accuracy_by_batch),
    "batchmean on dense output": ("distillation", _batchmean),
    "retained patients as non-members": ("membership", _retained_as_others),
    "an attack without direction": ("direction", _number_alone),
    "JS with KL the wrong way round and a mean over elements": ("js", _js_turned_round),
    "cosine of the outputs called JS": ("js", _cosine),
    "modified entropy with log p for log(1 - p)": ("modified_entropy", _entropy_of_the_wrong_log),
    "modified entropy that indexes columns of all rows": ("modified_entropy", _entropy_of_mixed_rows),
    "epsilon from the smaller ratio": ("epsilon", _smaller_ratio),
    "epsilon of pooled populations": ("epsilon", _pooled),
    "a bound on the distance of weights as proof of removal": ("removal", _near_in_weights),
    "the optimiser holds the teacher": ("optimiser", _optimiser_of_the_teacher),
    "selection that rewards guessing on the forget set": ("selection", _guessing_is_best),
    "distance to the original, more is better": ("selection", _far_is_best),
    "a swallowed error logged as -1": ("missing", _minus_one),
    "a difference to an empty row": ("missing", _empty_row),
}
