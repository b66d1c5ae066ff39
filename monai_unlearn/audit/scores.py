# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""One row of scores per case, from one forward pass on the deterministic view.

Labels of shape ``(B, C, *spatial)`` are masks and scored by their overlap, labels ``(B, C)`` are classes.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import DataLoader
from monai.metrics import DiceMetric, MeanIoU, compute_hausdorff_distance, compute_surface_dice
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from ..data import MemoryDataset, evaluating
from ..distributed import all_shares, own_share, process_rank
from ..engines import forward_flops
from ..relabel import probabilities

Rows = dict[str, np.ndarray]
Inferer = Callable[[Tensor, nn.Module], Tensor]
MaskMetrics = Mapping[str, Callable[[np.ndarray, np.ndarray], float]]

BINS = 15  # of the calibration
BAND = 3  # voxels on each side of the label's surface
TOLERANCE = 2.0  # voxels that the normalised surface Dice forgives
CLIP = 1e-6  # probabilities are clipped to [CLIP, 1 - CLIP] before their logit is taken
CALIBRATION = ("calibration", "calibration_band")
NOT_SUMMARISED = (*CALIBRATION, "area", "entropy", "loss", "confidence", "band_loss", "band_logit", "top_loss", "brier",
                  "flip", "hd95", "likelihood")  # fmt: skip


def main_score(rows: Mapping[str, Any]) -> str:
    """The score that says how well a model does: ``iou`` of masks, ``accuracy`` of classes."""
    return "iou" if "iou" in rows else "accuracy"


def hard_masks(logits: Tensor) -> Tensor:
    """Masks from logits, ``(B, C, *spatial)``: above 0 for one channel, one-hot of the largest for several."""
    if logits.shape[1] == 1:
        return (logits > 0).float()
    return F.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1).float()


def cl_dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Centreline Dice of two masks of tubes (Shit et al., arXiv 2003.07311), from skeletons by scikit-image.

    The harmonic mean of the share of the prediction's skeleton that lies in the truth and the share of the truth's
    skeleton that lies in the prediction.

    Args:
        mask: boolean, ``(H, W)`` or ``(D, H, W)``.
        truth: the same.

    Returns:
        In [0, 1]; 1 where both are empty, 0 where one is.
    """
    from skimage.morphology import skeletonize

    if not mask.any() or not truth.any():
        return float(mask.any() == truth.any())
    precision, sensitivity = truth[skeletonize(mask) > 0].mean(), mask[skeletonize(truth) > 0].mean()
    return float(2 * precision * sensitivity / max(precision + sensitivity, 1e-12))


def mean_dice(masks: Tensor, others: Tensor) -> Tensor:
    """Dice of each case's masks ``(B, C, *spatial)``, the mean over foreground channels; 1 where both are empty."""
    metric = DiceMetric(include_background=masks.shape[1] == 1, ignore_empty=False)
    return torch.as_tensor(metric(masks, others)).mean(1)


def surface_band(label: Tensor, width: int = BAND) -> Tensor:
    """Voxels within ``width`` of the surface of any structure, counted along the axes and diagonals.

    Args:
        label: masks ``(B, C, *spatial)`` of 0 and 1; one channel is a foreground, of several the classes.
        width: voxels on each side of the surface.

    Returns:
        Boolean ``(B, 1, *spatial)``; empty where a mask is empty or full.
    """
    pool = F.max_pool2d if label.ndim == 4 else F.max_pool3d
    size = 2 * width + 1
    grown, shrunk = pool(label, size, 1, width), -pool(-label, size, 1, width)
    return (grown > shrunk).any(1, keepdim=True)


def expected_calibration_error(bins: np.ndarray) -> float:
    """ECE = Σ_b (n_b / N) |accuracy_b − confidence_b| over bins of equal width.

    Args:
        bins: counts, sums of confidence and sums of hits, ``(..., 3, bins)``; leading axes are summed.

    Returns:
        In [0, 1]; NaN without any count.
    """
    count, confidence, hits = bins.reshape(-1, 3, bins.shape[-1]).sum(0)
    return float(np.abs(hits - confidence).sum() / count.sum()) if count.sum() else float("nan")


def _calibration(confidence: Tensor, hit: Tensor, counted: Tensor) -> Tensor:
    """Counts, sums of confidence and of hits in each bin of each row, ``(B, 3, BINS)``, from ``(B, n)`` each."""
    bins = (confidence * BINS).long().clamp(0, BINS - 1)
    rows = [torch.zeros(len(bins), BINS, dtype=torch.double, device=bins.device) for _ in range(3)]
    for row, weight in zip(rows, (counted.double(), confidence * counted, hit * counted)):
        row.scatter_add_(1, bins, weight.double())
    return torch.stack(rows, 1)


def detailed_scores(
    logits: Tensor, label: Tensor, region: Tensor | None = None, flipped: Tensor | None = None
) -> dict[str, Tensor]:
    """What attacks and calibration look at beyond :func:`case_scores`.

    Args:
        logits: ``(B, C, *spatial)`` or ``(B, C)``.
        label: probabilities of the same shape.
        region: see :func:`case_scores`.
        flipped: the logits of the flipped image, flipped back; None leaves ``flip`` out.

    Returns:
        For masks, each ``(B,)``: ``band_loss``, the cross-entropy within 3 voxels of the label's surface, and
        ``band_logit``, the mean logit of the true class there (probabilities clipped to [1e-6, 1 − 1e-6]), both NaN
        without a surface; ``top_loss``, the mean of the largest 1 % of the voxels' cross-entropies; ``flip``, the Dice
        between the mask and that of the flipped image; ``brier``; ``hd95`` and ``nsd``, the 95th percentile of the
        surface distance and the surface Dice at 2 voxels (mean over foreground channels; both masks empty: 0 and 1,
        one empty: NaN and 0); ``volume_error``, predicted minus true share of the foreground. For classes
        ``modified_entropy`` (Song and Mittal, arXiv 2003.10595), in which a sure and wrong answer scores high, and
        ``brier``. In both ``calibration``, and for masks ``calibration_band``, ``(B, 3, 15)`` as
        :func:`expected_calibration_error` reads them.
    """
    p = probabilities(logits)
    if logits.ndim == 2:
        own = label > 0.5
        p_true = p[own]
        rest = (p * torch.log1p(-p.clamp_max(1 - CLIP))).masked_fill(own, 0).sum(1)
        confidence, predicted = p.max(1)
        return {
            "modified_entropy": -(1 - p_true) * p_true.clamp_min(CLIP).log() - rest,
            "brier": (p - label).square().sum(1),
            "calibration": _calibration(
                confidence[:, None], (predicted == label.argmax(1)).to(p)[:, None], torch.ones_like(p[:, :1])
            ),
        }
    single = p.shape[1] == 1
    inside = torch.ones_like(label[:, :1]) if region is None else region.to(label)
    masks, truth = hard_masks(logits) * inside, (label > 0.5).to(p) * inside
    p_true = (torch.where(label > 0.5, p, 1 - p) if single else (p * label).sum(1, keepdim=True)).clamp(CLIP, 1 - CLIP)
    band = surface_band((label > 0.5).to(p)) * inside
    flat = {name: value.flatten(1) for name, value in (("p", p_true), ("band", band), ("inside", inside))}
    loss = -flat["p"].log()
    number = flat["band"].sum(1)
    most = torch.where(flat["inside"] > 0, loss, -torch.inf).topk(max(1, round(0.01 * loss.shape[1])), dim=1).values
    confidence, hit = (
        (torch.maximum(p, 1 - p), (p > 0.5).eq(label > 0.5))
        if single
        else (p.amax(1, keepdim=True), p.argmax(1, keepdim=True).eq(label.argmax(1, keepdim=True)))
    )
    brier = (p - label).square().sum(1, keepdim=True).flatten(1)
    foreground = slice(0 if single else 1, None)
    found = {
        "band_loss": (loss * flat["band"]).sum(1) / number,
        "band_logit": (torch.logit(flat["p"]) * flat["band"]).sum(1) / number,
        "top_loss": most.where(most.isfinite(), 0).sum(1) / most.isfinite().sum(1),
        "brier": (brier * flat["inside"]).sum(1) / flat["inside"].sum(1),
        "volume_error": (masks - truth)[:, foreground].flatten(1).sum(1) / flat["inside"].sum(1),
        **_surface_distances(masks[:, foreground], truth[:, foreground]),
    }
    for name, counted in zip(CALIBRATION, (flat["inside"], flat["band"])):
        found[name] = _calibration(confidence.flatten(1), hit.flatten(1).to(p), counted)
    if flipped is not None:
        found["flip"] = mean_dice(masks, hard_masks(flipped) * inside)
    return found


def _surface_distances(masks: Tensor, truth: Tensor) -> dict[str, Tensor]:
    size = masks.flatten(2).sum(2), truth.flatten(2).sum(2)
    neither, one = (size[0] == 0) & (size[1] == 0), (size[0] == 0) ^ (size[1] == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's words on empty masks; they are settled below
        hd95 = compute_hausdorff_distance(masks, truth, include_background=True, percentile=95)
        nsd = compute_surface_dice(masks, truth, [TOLERANCE] * masks.shape[1], include_background=True)
    hd95 = hd95.masked_fill(neither, 0.0).masked_fill(one, torch.nan)
    return {"hd95": hd95.nanmean(1), "nsd": nsd.masked_fill(neither, 1.0).masked_fill(one, 0.0).mean(1)}


def case_scores(
    logits: Tensor, label: Tensor, region: Tensor | None = None, metrics: MaskMetrics | None = None
) -> dict[str, Tensor]:
    """Scores of each case of a batch.

    Args:
        logits: ``(B, C, *spatial)`` or ``(B, C)``.
        label: probabilities of the same shape.
        region: boolean ``(B, 1, *spatial)``: where masks are compared, such as a field of view; None is everywhere.
        metrics: further scores of one foreground mask against one truth, by name; the mean over foreground channels.

    Returns:
        For masks ``iou`` and ``dice`` of the hard masks in [0, 1] (mean over foreground channels; 1 where prediction
        and label are both empty), the further ``metrics``, ``confidence``, the mean foreground probability inside the
        label (NaN where that is empty), and ``loss``, the mean cross-entropy over voxels in nats. For classes
        ``accuracy`` (0 or 1), ``margin``, the true class's logit minus the logsumexp of the others, ``loss``, and the
        numbers ``true`` and ``predicted``. Each ``(B,)``.
    """
    if logits.ndim == 2:
        true, predicted = label.argmax(1), logits.argmax(1)
        others = logits.masked_fill(F.one_hot(true, logits.shape[1]).bool(), -torch.inf)
        return {
            "accuracy": (true == predicted).float(),
            "margin": logits.gather(1, true[:, None])[:, 0] - others.logsumexp(1),
            "loss": -(label * logits.log_softmax(1)).sum(1),
            "true": true,
            "predicted": predicted,
        }
    inside = torch.ones_like(label[:, :1]) if region is None else region.to(label)
    masks, truth = hard_masks(logits) * inside, (label > 0.5).float() * inside
    background = logits.shape[1] == 1
    overlap = MeanIoU(include_background=background, ignore_empty=False)
    scores = {"iou": torch.as_tensor(overlap(masks, truth)).mean(1), "dice": mean_dice(masks, truth)}
    foreground = slice(0 if background else 1, None)
    for name, one in (metrics or {}).items():
        pairs = zip(masks[:, foreground].cpu().numpy() > 0, truth[:, foreground].cpu().numpy() > 0)
        scores[name] = torch.tensor([np.mean([one(m, t) for m, t in zip(*pair)]) for pair in pairs])
    if background:
        loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
    else:
        loss = -(label * logits.log_softmax(1)).sum(1, keepdim=True)
    p = probabilities(logits)[:, foreground]
    scores["confidence"] = (p * truth[:, foreground]).flatten(1).sum(1) / truth[:, foreground].flatten(1).sum(1)
    return {**scores, "loss": (loss * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)}


@torch.no_grad()
def score_cases(
    network: nn.Module,
    dataset: MemoryDataset,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    inferer: Inferer | None = None,
    metrics: MaskMetrics | None = None,
    desc: str = "scores",
    detailed: bool = False,
) -> Rows:
    """Scores of every case, in the data list's order; the network's modes, weights and buffers stay as they are.

    Several processes (:mod:`monai_unlearn.distributed`) share the cases, and each gets all scores.

    Masks are compared inside the item ``region`` where the data set has one.

    Args:
        network: gives logits.
        dataset: its items hold ``image`` and ``label``.
        device: where to compute.
        batch_size: cases at a time.
        inferer: such as MONAI's ``SlidingWindowInferer``; None calls the network.
        metrics: see :func:`case_scores`.
        desc: name on the progress bar.
        detailed: add :func:`detailed_scores`; masks take a second forward pass, of the image flipped along its last
            axis.

    Returns:
        For each score of :func:`case_scores` an array ``(N,)``; also ``entropy``, the mean binary or categorical
        entropy of the prediction in nats, and for masks ``area``, the foreground's share of the label. Empty without
        cases.
    """
    mine = own_share(range(len(dataset)))
    loader = DataLoader(Subset(dataset, mine), batch_size=batch_size, num_workers=0)
    rows: list[dict[str, Tensor]] = []
    with evaluating(network):
        for batch in tqdm(loader, desc, leave=False, disable=process_rank() > 0):
            image, label = batch["image"].to(device), batch["label"].to(device)
            logits = network(image) if inferer is None else inferer(image, network)
            p = probabilities(logits)
            entropy = torch.special.entr(p)
            if p.shape[1] == 1:
                entropy = entropy + torch.special.entr(1 - p)
            found = case_scores(logits, label, batch["region"].to(device) if "region" in batch else None, metrics)
            found["entropy"] = entropy.sum(1).reshape(len(p), -1).mean(1)
            if label.ndim > 2:
                foreground = label if label.shape[1] == 1 else label[:, 1:]
                found["area"] = foreground.sum(1).flatten(1).mean(1)
            if detailed:
                flipped = None
                if label.ndim > 2:
                    turned = image.flip(-1)
                    flipped = (network(turned) if inferer is None else inferer(turned, network)).flip(-1)
                region = batch["region"].to(device) if "region" in batch else None
                found |= detailed_scores(logits, label, region, flipped)
            scores = {name: value.double().cpu() for name, value in found.items()}
            rows += [{name: value[place] for name, value in scores.items()} for place in range(len(p))]
    rows = all_shares(rows)
    return {name: torch.stack([row[name] for row in rows]).numpy() for name in rows[0]} if rows else {}


def rows_of(rows: Rows, chosen: Iterable[bool]) -> Rows:
    """The rows of some of the cases."""
    mask = np.fromiter(chosen, bool)
    return {name: values[mask] for name, values in rows.items()}


def f1_scores(true: np.ndarray, predicted: np.ndarray, number: int, weights: np.ndarray | None = None) -> np.ndarray:
    """F1 of each class: 2·TP / (2·TP + FP + FN); NaN where a class is neither true nor predicted anywhere.

    Args:
        true: classes ``(N,)`` in [0, number).
        predicted: the same.
        number: of classes.
        weights: how often each case counts, ``(N,)`` or ``(resamples, N)``; None counts each once.

    Returns:
        ``(number,)`` or ``(resamples, number)``.
    """
    weights = np.ones(len(true)) if weights is None else weights
    is_true, is_predicted = np.eye(number)[true.astype(int)], np.eye(number)[predicted.astype(int)]
    hits, counted = weights @ (is_true * is_predicted), weights @ (is_true + is_predicted)
    with np.errstate(invalid="ignore"):
        return 2 * hits / counted


class SplitEvaluator:
    """The main score of a network on named data sets, for :class:`monai_unlearn.handlers.StopAtReference`.

    Args:
        network: scored in eval mode, left as it was.
        datasets: by the name of the metric.
        device: where to compute.
        batch_size: cases at a time.
        limit: at most so many cases of each data set, a fixed sample drawn by ``seed``; None scores all.
        seed: of the sample.
        inferer: see :func:`score_cases`.

    Attributes:
        state: ``state.metrics`` holds the scores after :meth:`run`.
        cases: that one :meth:`run` scores.
    """

    def __init__(
        self,
        network: nn.Module,
        datasets: Mapping[str, MemoryDataset],
        device: str | torch.device = "cpu",
        batch_size: int = 32,
        limit: int | None = None,
        seed: int = 0,
        inferer: Inferer | None = None,
    ) -> None:
        self.network, self.device, self.batch_size, self.inferer = network, device, batch_size, inferer
        self.datasets = {}
        for name, dataset in datasets.items():
            items = list(dataset.data)
            if limit is not None and len(items) > limit:
                items = random.Random(seed).sample(items, limit)
            self.datasets[name] = MemoryDataset(items, dataset.transform, dataset.store)
        self.cases = sum(len(dataset) for dataset in self.datasets.values())
        self.state = SimpleNamespace(metrics={})

    def case_flops(self) -> int:
        """Floating-point operations that scoring one case takes, through the inferer where there is one."""
        image = next(iter(self.datasets.values()))[0]["image"].to(self.device)
        return forward_flops(self.network, image, self.inferer)

    def run(self) -> None:
        """Score; the random state of torch stays as it was."""
        self.state.metrics = {}
        for name, dataset in self.datasets.items():
            rows = score_cases(self.network, dataset, self.device, self.batch_size, self.inferer)
            self.state.metrics[name] = float(rows[main_score(rows)].mean())


def summary(rows: Rows, classes: Sequence[str] = ()) -> dict[str, Any]:
    """The numbers of a split: means over cases, and for classes the F1 of each and their means.

    Args:
        rows: of :func:`score_cases`.
        classes: names of the classes, in the order of the logits.

    Returns:
        ``mean_iou``, ``mean_dice``, ``loss``, ``n_empty`` and the mean of every further metric; or ``accuracy``,
        ``balanced_accuracy`` (mean recall of the classes that occur), ``macro_f1``, ``f1_per_class`` and ``loss``;
        and ``n``. Of rows with :func:`detailed_scores` also ``brier``, ``ece`` (over voxels or cases), ``ece_band``,
        and ``mean_hd95``, ``mean_nsd`` and ``mean_volume_error``; ``n_hd95_undefined`` cases have one empty mask and
        are left out of the first.
    """
    number = len(rows["loss"])
    calibrated = {f"ece{name.removeprefix('calibration')}": expected_calibration_error(rows[name])
                  for name in CALIBRATION if name in rows}  # fmt: skip
    if "brier" in rows:
        calibrated["brier"] = rows["brier"].mean()
    if "iou" in rows:
        means = {f"mean_{name}": values.mean() for name, values in rows.items() if name not in NOT_SUMMARISED}
        if "hd95" in rows:
            undefined = np.isnan(rows["hd95"])
            means["mean_hd95"] = rows["hd95"][~undefined].mean() if not undefined.all() else np.nan
            means["n_hd95_undefined"] = int(undefined.sum())
        counts = {"n": number, "n_empty": int((rows["area"] == 0).sum())}
        return {**means, **calibrated, "loss": rows["loss"].mean(), **counts}
    true, f1 = rows["true"].astype(int), f1_scores(rows["true"], rows["predicted"], len(classes))
    return {
        "accuracy": rows["accuracy"].mean(),
        "balanced_accuracy": np.mean([rows["accuracy"][true == one].mean() for one in np.unique(true)]),
        "macro_f1": np.nanmean(f1),
        "f1_per_class": dict(zip(classes, f1)),
        **calibrated,
        "loss": rows["loss"].mean(),
        "n": number,
    }
