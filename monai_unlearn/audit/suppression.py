# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Is a class or a structure gone, for unseen cases too, from the features and not from the head alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import DataLoader
from torch import Tensor, nn

from ..data import MemoryDataset
from ..request import Resolution
from .probes import linear_probe, penultimate_features, relearn_class
from .scores import Inferer, f1_scores, hard_masks
from .statistics import bootstrap_mean

PROBE_LIMIT, SHOTS = 0.10, 5  # AUC beside the retrained model's, and examples to relearn from
GONE = 0.05  # F1 or Dice on unseen cases that counts as gone
JUDGED = ("original", "unlearned", "retrained")


def suppressed_class(resolution: Resolution, classes: Sequence[str]) -> int | None:
    """The number of the class that the request suppresses; None for every other request.

    Raises:
        ValueError: when the model has no such class.
    """
    request = resolution.request
    if request.job != "suppression" or request.kind != "class" or not classes:
        return None
    name = str(request.selector["class"])
    if name not in classes:
        raise ValueError(f"the model has no class {name!r}; there are {', '.join(classes)}.")
    return list(classes).index(name)


def suppressed_structure(resolution: Resolution, structures: Sequence[str]) -> int | None:
    """The channel of the structure that the request suppresses, counted from 1; None for every other request.

    Raises:
        ValueError: when the model has no such structure.
    """
    number = suppressed_class(resolution, structures)
    return None if number is None else number + 1


def class_evidence(
    models: Mapping[str, nn.Module],
    scores: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    datasets: Mapping[str, MemoryDataset],
    groups: Mapping[str, list[str]],
    forgotten: int,
    classes: Sequence[str],
    device: str | torch.device,
    seed: int,
) -> dict[str, Any]:
    """What tells whether a class is gone and the others are not: F1 on unseen cases, probe and relearning.

    The macro-F1 of the other classes is taken over their own unseen cases: whatever a model without the class says
    about a member of it is wrong, also for the retrained one.
    """
    number, unseen = len(classes), datasets["holdout"]
    is_class = scores["original"]["holdout"]["true"] == forgotten
    _, index = np.unique([name for name, own in zip(groups["holdout"], is_class) if not own], return_inverse=True)
    share = np.full(index.max() + 1, 1 / (index.max() + 1))
    draws = np.random.default_rng(seed).multinomial(len(share), share, 2000)
    f1: dict[str, float] = {}
    others: dict[str, list[np.ndarray]] = {}
    for name in models:
        rows = scores[name]["holdout"]
        f1[name] = float(np.nan_to_num(f1_scores(rows["true"], rows["predicted"], number)[forgotten]))
        true, predicted = rows["true"][~is_class], rows["predicted"][~is_class]
        for weights in (np.ones(len(index)), draws[:, index]):
            values = f1_scores(true, predicted, number, weights)
            others.setdefault(name, []).append(np.nanmean(np.delete(values, forgotten, -1), axis=-1))
    change = others["unlearned"][1] - others["original"][1]
    shots = MemoryDataset(datasets["forget"].data[:SHOTS], unseen.transform, unseen.store)
    judged = [name for name in JUDGED if name in models]
    return {
        "class": classes[forgotten],
        "unseen_members": int(is_class.sum()),
        "f1_unseen": f1,
        "macro_f1_others": {name: float(values[0]) for name, values in others.items()},
        "macro_f1_others_change_ci": [float(q) for q in np.quantile(change, (0.025, 0.975))],
        "linear_probe": {
            name: linear_probe(penultimate_features(models[name], unseen, device), is_class, groups["holdout"])
            for name in judged
        },
        "relearn": {
            name: relearn_class(
                models[name], shots, datasets["retain"], unseen, forgotten, device=device, seed=seed
            )
            for name in judged
        },
    }  # fmt: skip


@torch.no_grad()
def structure_evidence(
    models: Mapping[str, nn.Module],
    unseen: MemoryDataset,
    groups: Sequence[str],
    forgotten: int,
    structures: Sequence[str],
    probe_layer: str,
    device: str | torch.device = "cpu",
    inferer: Inferer | None = None,
    seed: int = 0,
    voxels: int = 200,
) -> dict[str, Any]:
    """What tells whether a structure is gone from a segmentation and the rest is not, on unseen cases.

    Args:
        models: by name.
        unseen: cases never trained on, with the structure in their labels.
        groups: of these cases.
        forgotten: the structure's channel, 1 or more.
        structures: names of the foreground channels.
        probe_layer: the module whose input the probe reads, such as the last stage of the decoder.
        device: where to compute.
        inferer: for the masks; the features come from the whole image.
        seed: draws the voxels.
        voxels: at most so many of the structure, and as many of the other structures (of the background where there is
            no other), for each case.

    Returns:
        ``dice_unseen`` of the structure, ``dice_others``, the mean over the other structures, and ``dice_merged``, of
        all structures as one, by model; the interval of the change of the last; ``linear_probe``, the AUC of a linear
        classifier of the structure's voxels against those of the others, folds by group.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    probes: dict[str, float | None] = {}
    for name, network in models.items():
        network.eval()
        inputs: list[Tensor] = []
        hook = network.get_submodule(probe_layer).register_forward_pre_hook(
            lambda module, given, kept=inputs: kept.append(given[0])
        )
        rows: dict[str, list[float]] = {"dice_unseen": [], "dice_others": [], "dice_merged": []}
        features, is_structure, names = [], [], []
        generator = np.random.default_rng(seed)
        try:
            for index, batch in enumerate(DataLoader(unseen, batch_size=1, num_workers=0)):
                image, truth = batch["image"].to(device), batch["label"].to(device) > 0.5
                logits = network(image)
                masks = hard_masks(logits if inferer is None else inferer(image, network)) > 0.5
                others = [c for c in range(1, truth.shape[1]) if c != forgotten]
                rows["dice_unseen"].append(_dice(masks[:, forgotten], truth[:, forgotten]))
                rows["dice_others"].append(float(np.mean([_dice(masks[:, c], truth[:, c]) for c in others or [0]])))
                rows["dice_merged"].append(_dice(masks[:, 1:].any(1), truth[:, 1:].any(1)))
                if name in JUDGED:
                    layer = inputs[0][0].flatten(1).T.cpu().numpy()
                    classes = F.interpolate(truth.float(), inputs[0].shape[2:], mode="nearest")[0].argmax(0)
                    flat = classes.flatten().cpu().numpy()
                    for own in (True, False):
                        kind = flat == forgotten if own else np.isin(flat, others or [0])
                        where = generator.permutation(np.flatnonzero(kind))[:voxels]
                        features.append(layer[where])
                        is_structure.append(np.full(len(where), own))
                        names += [groups[index]] * len(where)
                inputs.clear()
        finally:
            hook.remove()
        found[name] = {key: np.array(values) for key, values in rows.items()}
        if name in JUDGED:
            probes[name] = linear_probe(np.concatenate(features), np.concatenate(is_structure), names, seed=seed)
    change = found["unlearned"]["dice_merged"] - found["original"]["dice_merged"]
    means = {key: {name: float(rows[key].mean()) for name, rows in found.items()} for key in rows}
    return {
        "class": structures[forgotten - 1],
        "unseen_members": len(unseen),
        **means,
        "dice_merged_change_ci": bootstrap_mean(change, list(groups)),
        "linear_probe": probes,
    }


def _dice(mask: Tensor, truth: Tensor) -> float:
    total = int(mask.sum() + truth.sum())
    return 2 * int((mask & truth).sum()) / total if total else 1.0


def judge_suppression(found: Mapping[str, Any], utility: float) -> tuple[str, list[str]]:
    """FAIL, INCONCLUSIVE or NOT REFUTED for a suppressed class or structure, with the reasons in plain words.

    FAIL: it is still found in unseen cases (F1 or Dice above .05), the others (macro-F1, or Dice of all structures as
    one) lost with an interval wholly beyond ``utility``, or the AUC of a linear probe for it differs by more than .10
    between the unlearned model's features and the retrained one's. INCONCLUSIVE: no retrained model to compare the
    probe with, or the probe finds it in the retrained model as well as in the original, so that it cannot tell.
    """
    failed, unclear = [], []
    name, probe = found["class"], found["linear_probe"]
    if "f1_unseen" in found:
        score, rest, what, others = "F1", "macro_f1_others", "the other classes", "macro-F1 of the other classes"
        gone = found["f1_unseen"]["unlearned"]
    else:
        score, rest, what, others = "Dice", "dice_merged", "all structures as one", "Dice of all structures as one"
        gone = found["dice_unseen"]["unlearned"]
    if gone > GONE:
        failed.append(f"unseen cases of {name} are still found: {score} {gone:.3f}, limit {GONE}.")
    lost = found[rest]["original"] - found[rest]["unlearned"]
    if found[f"{rest}_change_ci"][1] < -utility:
        failed.append(f"{what} lost {lost:.3f} {others.split()[0]}, more than {utility}.")
    if None in probe.values() or "retrained" not in probe:
        unclear.append(
            "the probe for the class needs the retrained model and enough unseen members (--with_retrained 1)."
        )
    else:
        if abs(probe["unlearned"] - probe["retrained"]) > PROBE_LIMIT:
            above = probe["unlearned"] > probe["retrained"]
            failed.append(
                f"a linear probe finds {name} in the features with AUC {probe['unlearned']:.3f}, in the retrained "
                f"model's with {probe['retrained']:.3f}: {'forgotten in the head only' if above else 'over-forgotten'}."
            )
        if probe["original"] - probe["retrained"] <= PROBE_LIMIT:
            unclear.append(
                f"the linear probe cannot tell: it finds {name} with AUC {probe['original']:.3f} in the original's "
                f"features and {probe['retrained']:.3f} in those of a model that was never taught it."
            )
    if failed:
        return "FAIL", failed + unclear
    if unclear:
        return "INCONCLUSIVE", unclear
    return "NOT REFUTED", [
        f"{score} of {name} on unseen cases {gone:.3f}; {others} changed by {-lost:+.3f}. "
        "This is measured behaviour, no proof of erasure."
    ]
