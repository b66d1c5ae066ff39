# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Is a suppressed class still inside: a linear probe on the features, and how fast a few examples bring it back."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader
from torch import Tensor, nn

from ..data import MemoryDataset, evaluating
from ..lora import freeze_norm, scope_pattern
from .scores import f1_scores, score_cases
from .statistics import auc


@torch.no_grad()
def penultimate_features(
    network: nn.Module, dataset: MemoryDataset, device: str | torch.device = "cpu", batch_size: int = 32
) -> np.ndarray:
    """What the classifying layer reads, ``(N, features)``; the network stays as it is.

    Raises:
        ValueError: when the head of the architecture is not known, see :func:`monai_unlearn.inject_lora`.
    """
    pattern = re.compile(scope_pattern(network, "head"))
    heads = [module for name, module in network.named_modules() if pattern.fullmatch(name)]
    if len(heads) != 1:
        raise ValueError(f"{type(network).__name__} has {len(heads)} heads; the probe needs one.")
    found: list[Tensor] = []
    hook = heads[0].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].flatten(1).cpu()))
    try:
        with evaluating(network):
            for batch in DataLoader(dataset, batch_size=batch_size, num_workers=0):
                network(batch["image"].to(device))
    finally:
        hook.remove()
    return torch.cat(found).numpy()


def embed(
    network: nn.Module,
    datasets: Mapping[str, MemoryDataset],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    device: str | torch.device = "cpu",
    most: int = 250,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The features of forget and retained cases in two dimensions: PCA to 50, then t-SNE; below 30 cases PCA alone.

    Args:
        network: a classifier, left as it is.
        datasets: ``forget`` and ``retain``.
        scores: of the same network on them, :func:`score_cases`.
        device: where to compute.
        most: cases of each; a fixed sample is drawn of more.
        seed: of sample and t-SNE.

    Returns:
        ``points`` ``(N, 2)``, ``predicted``, ``true`` and ``forget`` ``(N,)``.

    Raises:
        ValueError: when the head of the architecture is not known.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    features = []
    found: dict[str, list[np.ndarray]] = {"predicted": [], "true": [], "forget": []}
    for name in ("retain", "forget"):
        dataset = datasets[name]
        chosen = sorted(random.Random(seed).sample(range(len(dataset)), min(most, len(dataset))))
        part = MemoryDataset([dataset.data[index] for index in chosen], dataset.transform, dataset.store)
        features.append(penultimate_features(network, part, device))
        for key in ("predicted", "true"):
            found[key].append(scores[name][key][chosen])
        found["forget"].append(np.full(len(chosen), name == "forget"))
    points = np.concatenate(features)
    points = PCA(min(50, *points.shape), random_state=seed).fit_transform(points)
    points = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))  # a network may have a single feature
    if len(points) >= 30:
        points = TSNE(init="pca", random_state=seed, perplexity=min(30, len(points) // 4)).fit_transform(points)
    return {"points": points[:, :2], **{key: np.concatenate(values) for key, values in found.items()}}


def linear_probe(
    features: np.ndarray, is_class: np.ndarray, groups: Sequence[str], folds: int = 5, seed: int = 0
) -> float | None:
    """How well a linear classifier finds the class in frozen features of unseen cases: AUC over cross-validation.

    Standardised features, L2-regularised logistic regression (C = .1, classes weighted alike), folds by group; the AUC
    is that of each fold's unseen part, averaged.

    Args:
        features: ``(N, features)``.
        is_class: boolean ``(N,)``.
        groups: of each case; a group never lies on both sides.
        folds: of the cross-validation.
        seed: of the folds.

    Returns:
        The AUC; None with fewer groups than folds, or where a fold lacks one of the two kinds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(is_class.sum(), (~is_class).sum(), len(set(groups))) < folds:
        return None
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(features, is_class, list(groups))
        for train, test in splitter:
            if min(len(set(is_class[train])), len(set(is_class[test]))) < 2:
                return None
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000))
            decision = probe.fit(features[train], is_class[train]).decision_function(features[test])
            found.append(auc(decision[is_class[test]], decision[~is_class[test]]))
    return float(np.mean(found))


def relearn_class(
    network: nn.Module,
    shots: MemoryDataset,
    others: MemoryDataset,
    unseen: MemoryDataset,
    forgotten: int,
    steps: Sequence[int] = (0, 1, 2, 5, 10, 20, 40),
    learning_rate: float = 1e-4,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> list[dict[str, float]]:
    """How fast a few examples bring the class back: a fixed fine-tune of a copy, scored on unseen cases.

    Each step of AdamW on all weights sees every shot and four random retained samples for each of them; normalisation
    keeps its statistics. The loss is cross-entropy.

    Args:
        network: plain; left as it is.
        shots: the few examples of the class.
        others: retained samples.
        unseen: cases never trained on, with members of the class.
        forgotten: the class, in [0, C).
        steps: after how many steps to score.
        learning_rate: of AdamW.
        device: where to compute.
        seed: draws the retained samples.

    Returns:
        For each number of steps ``steps``, ``f1`` of the class and ``accuracy`` over all unseen cases.
    """
    student = freeze_norm(copy.deepcopy(network)).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(student.parameters(), learning_rate)
    generator, curve = torch.Generator().manual_seed(seed), []

    def batch(dataset: MemoryDataset, indices: Sequence[int]) -> list[Tensor]:
        samples = [dataset[index] for index in indices]
        return [torch.stack([sample[key] for sample in samples]).to(device) for key in ("image", "label")]

    few, number = batch(shots, range(len(shots))), 4 * len(shots)
    for step in range(max(steps) + 1):
        if step in steps:
            rows: Mapping[str, Any] = score_cases(student, unseen, device)
            f1 = f1_scores(rows["true"], rows["predicted"], few[1].shape[1])[forgotten]
            curve.append({"steps": step, "f1": float(np.nan_to_num(f1)), "accuracy": float(rows["accuracy"].mean())})
        kept = batch(others, torch.randint(len(others), (number,), generator=generator).tolist())
        image, label = (torch.cat(pair) for pair in zip(few, kept))
        loss = nn.functional.cross_entropy(student(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve
