# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The report's figures, each drawn into an ``img`` element; no names in them."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLOURS = {
    "original": "#2b6cb0",
    "unlearned": "#2f855a",
    "retrained": "#b7791f",
    "retrained_other": "#d69e2e",
    "judge": "#718096",
    "reference": "#805ad5",
}
LABELS = {"iou": "IoU", "margin": "margin of the true class", "accuracy": "accuracy"}


def _png(figure: Any, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def distributions(scores: Mapping[str, Any], score: str, target: float | None) -> str:
    """The share of cases at or below each score, on forget, holdout and retain."""
    splits = [split for split in ("forget", "holdout", "retain") if split in scores["original"]]
    figure, axes = _figure(1, len(splits), 0.5 + 3.5 * len(splits), 3)
    for axis, split in zip(axes[0], splits):
        for name in ("original", "unlearned", "retrained"):
            if name in scores:
                values = np.sort(scores[name][split][score])
                share = np.arange(1, len(values) + 1) / len(values)
                axis.step(values, share, where="post", color=COLOURS[name], label=name)
        if split == "forget" and score == "iou" and target is not None:
            axis.axvline(target, color="#1a202c", linestyle=":", label="expected of unseen")
        axis.set(title=split, xlabel=f"{LABELS[score]} of a case", ylim=(0, 1))
        if score == "iou":
            axis.set(xlim=(0, 1))
    axes[0][0].set_ylabel("share of cases at or below")
    axes[0][0].legend(fontsize=8)
    return _png(figure, "distribution of the scores")


def class_bars(scores: Mapping[str, Any], classes: Sequence[str]) -> str:
    """F1 of each class for original, unlearned and retrained model on forget, retain and holdout."""
    figure, axes = _figure(3, 1, 10, 7)
    names = [name for name in ("original", "unlearned", "retrained") if name in scores]
    for (axis,), split in zip(axes, ("forget", "retain", "holdout")):
        for place, name in enumerate(names):
            f1 = scores[name][split]["f1_per_class"]
            heights = [f1[kind] or 0.0 for kind in classes]
            axis.bar(np.arange(len(classes)) + 0.27 * (place - 1), heights, 0.25, color=COLOURS[name], label=name)
        axis.set(ylabel=f"F1, {split}", ylim=(0, 1), xticks=range(len(classes)), xticklabels=[])
    axes[-1][0].set_xticklabels(classes, rotation=25, ha="right", fontsize=8)
    axes[0][0].legend(fontsize=8, ncols=3)
    return _png(figure, "F1 of each class")


def trajectory(stop: Mapping[str, Any], restoration: Mapping[str, Any] | None) -> str:
    """Forget and retain score over the epochs of both phases, with the reference and the epochs that were kept."""
    figure, axes = _figure(1, 1, 7, 3)
    axis, history = axes[0][0], list(stop["history"])
    if restoration:
        strong = history[-1]["epoch"]
        history += [{**entry, "epoch": strong + entry["epoch"]} for entry in restoration["history"]]
        axis.axvspan(strong, history[-1]["epoch"], color="#edf2f7", label="restoration")
        axis.axvline(strong + restoration["best_epoch"], color="#718096", linewidth=1)
    epochs = [entry["epoch"] for entry in history]
    axis.plot(epochs, [entry["forget"] for entry in history], "o-", color="#c53030", label="forget set")
    if "retain" in history[0]:
        axis.plot(epochs, [entry["retain"] for entry in history], "o-", color="#2f855a", label="retained sample")
    axis.axhline(stop["reference"], color="#1a202c", linestyle=":", label="reference")
    axis.axvline(stop["best_epoch"], color="#718096", linewidth=1, label="kept")
    axis.set(xlabel="epoch", ylabel="mean score")
    axis.legend(fontsize=8)
    return _png(figure, "scores over the epochs")


TAUGHT = {
    "few_shot": "steps on five examples",
    "forget": "steps on the forget set",
    "benign": "steps on retained cases",
    "unrelated": "steps on unseen cases",
}


def relearning(kinds: Mapping[str, Mapping[str, Any]], level: float | None = None) -> str:
    """What a few steps of training bring back: the score over the steps, by what was trained on.

    Args:
        kinds: curves of each model by kind.
        level: the original's score on the forget set.
    """
    figure, axes = _figure(1, len(kinds), 0.5 + 4 * len(kinds) if len(kinds) > 1 else 7, 3)
    for axis, (kind, curves) in zip(axes[0], kinds.items()):
        for name, curve in curves.items():
            values = [at.get("f1", at.get("score")) for at in curve]
            axis.plot([at["steps"] for at in curve], values, "o-", color=COLOURS[name], label=name)
        if level is not None:
            axis.axhline(level, color=COLOURS["original"], linestyle=":", label="original")
        axis.set(xlabel=TAUGHT[kind])
        if kind == "few_shot":
            axis.set(ylim=(0, 1))
    if len(kinds) > 1:
        low = min(axis.get_ylim()[0] for axis in axes[0])
        high = max(axis.get_ylim()[1] for axis in axes[0])
        for axis in axes[0]:
            axis.set(ylim=(low, high))
    axes[0][0].set_ylabel("F1 on unseen cases" if "few_shot" in kinds else "score on the forget set")
    axes[0][0].legend(fontsize=8)
    return _png(figure, "scores over a few steps of training")


def calibrated(attacked: Mapping[str, Mapping[str, Any]]) -> str:
    """What the judged attack sees of each model: forgotten against unseen patients, one point a patient's score."""
    kind = "calibrated" if "calibrated" in attacked["unlearned"] else "raw"
    names = [name for name in ("original", "unlearned", "retrained") if name in attacked]
    figure, axes = _figure(1, len(names), 0.5 + 3.5 * len(names), 2.6)
    sides = {name: [side[~np.isnan(side)] for side in attacked[name][kind]] for name in names}
    values = np.concatenate([side for pair in sides.values() for side in pair])
    bins = np.linspace(values.min(), values.max() + 1e-9, 25)
    for axis, name in zip(axes[0], names):
        for side, label, colour in zip(sides[name], ("forgotten", "unseen"), ("#c53030", "#4a5568")):
            weights = np.full(len(side), 1 / max(1, len(side)))
            axis.hist(side, bins, weights=weights, histtype="stepfilled", alpha=0.45, color=colour, label=label)
        axis.set(title=name, xlabel=f"{kind} score of a patient")
    axes[0][0].set_ylabel("share of patients")
    axes[0][0].legend(fontsize=8)
    return _png(figure, "scores that the attack sees")


def reliability(scores: Mapping[str, Any], key: str) -> str:
    """How often each model is right when it is so sure, on unseen cases."""
    figure, axes = _figure(1, 1, 3.6, 3.4)
    axes[0][0].plot([0, 1], [0, 1], color="#a0aec0", linestyle=":")
    for name in ("original", "unlearned", "retrained"):
        if name in scores:
            count, confidence, hits = scores[name]["holdout"][key].sum(0)
            seen = count > 0
            axes[0][0].plot(
                confidence[seen] / count[seen], hits[seen] / count[seen], "o-", color=COLOURS[name], label=name
            )
    axes[0][0].set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02))
    axes[0][0].legend(fontsize=8)
    return _png(figure, "confidence against accuracy")


def residual(profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """The residual memory by distance from the surface of the truth, forget cases beside unseen ones."""
    figure, axes = _figure(1, 1, 7, 3)
    for split, colour in (("forget", "#c53030"), ("holdout", "#4a5568")):
        axes[0][0].plot(profiles[split]["distance"], profiles[split]["profile"], "o-", color=colour, label=split)
    axes[0][0].axhline(0, color="#a0aec0", linestyle=":")
    axes[0][0].axvline(0, color="#a0aec0", linewidth=1)
    axes[0][0].set(xlabel="voxels from the surface of the truth (left: inside)", ylabel="loss − references' loss, nats")
    axes[0][0].legend(fontsize=8)
    return _png(figure, "residual memory by distance from the surface")


def drift(moved: Mapping[str, float], most: int = 12) -> str:
    """The layers whose adapters moved their weights most."""
    layers = sorted(moved, key=lambda name: moved[name])[-most:]
    figure, axes = _figure(1, 1, 7, 0.28 * len(layers) + 0.8)
    axes[0][0].barh(range(len(layers)), [moved[name] for name in layers], color=COLOURS["unlearned"])
    axes[0][0].set(yticks=range(len(layers)), xlabel="‖ΔW‖ / ‖W‖")
    axes[0][0].set_yticklabels(layers, fontsize=7)
    return _png(figure, "layers that moved most")


def _shown(image: np.ndarray) -> np.ndarray:
    image = image.transpose(1, 2, 0)
    image = (image - image.min()) / max(float(np.ptp(image)), 1e-6)
    return image if image.shape[2] == 3 else image[..., 0]


def mask_cases(cases: list[dict[str, Any]]) -> str:
    """Cases in rows: image, truth, both models' outlines and what changed; of several structures the first is drawn in
    full lines, the others dashed and dotted."""
    residuals = any("residual" in case for case in cases)
    figure, axes = _figure(len(cases), 5 + residuals, 13 + 2.6 * residuals, 2.2 * len(cases))
    for row, case in zip(axes, cases):
        picture = _shown(case["image"])
        for axis in row[:4]:
            axis.imshow(picture, cmap="gray")
        for axis, key, colour in (
            (row[1], "label", "#e53e3e"),
            (row[2], "original", "#3182ce"),
            (row[3], "unlearned", "#38a169"),
        ):
            for mask, line in zip(case[key], itertools.cycle(("solid", "dashed", "dotted"))):
                if mask.min() < 0.5 < mask.max():
                    axis.contour(mask, levels=[0.5], colors=[colour], linewidths=1.0, linestyles=line)
        row[4].imshow(np.abs(case["original"] - case["unlearned"]).max(0), cmap="magma", vmin=0, vmax=1)
        if residuals:
            row[5].imshow(picture, cmap="gray")
            if "residual" in case:
                row[5].imshow(case["residual"], interpolation="nearest")
        row[0].set_ylabel(case["split"], fontsize=9)
        for axis, name, letter in ((row[2], "original", "T"), (row[3], "unlearned", "S")):
            score = case["scores"][name]
            axis.set_xlabel(f"{letter}_fg {score['confidence']:.2f} · IoU {score['iou']:.2f}", fontsize=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ("image", "truth", "original (T)", "unlearned (S)", "|T − S|", "residual memory")):
        axis.set_title(title, fontsize=9)
    return _png(figure, "example cases")


def class_cases(cases: list[dict[str, Any]], classes: Sequence[str]) -> str:
    """Cases in rows: image, and both models' probabilities."""
    figure, axes = _figure(len(cases), 2, 9, 1.9 * len(cases))
    for row, case in zip(axes, cases):
        row[0].imshow(_shown(case["image"]), cmap="gray")
        row[0].set_ylabel(case["split"], fontsize=9)
        row[0].set(xticks=[], yticks=[], xlabel=classes[int(case["scores"]["original"]["true"])])
        for place, name in enumerate(("original", "unlearned")):
            row[1].bar(np.arange(len(classes)) + 0.4 * place, case[name], 0.38, color=COLOURS[name], label=name)
        row[1].set(ylim=(0, 1), xticks=range(len(classes)), xticklabels=[])
    axes[-1][1].set_xticklabels(classes, rotation=25, ha="right", fontsize=7)
    axes[0][1].legend(fontsize=8)
    return _png(figure, "example cases")


def destinations(scores: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Where the forgotten cases went: what each model says of each true class of the forget set."""
    names = [name for name in ("original", "unlearned", "retrained") if name in scores]
    figure, axes = _figure(1, len(names), 1 + 4 * len(names), 4)
    for axis, name in zip(axes[0], names):
        rows = scores[name]["forget"]
        table = np.zeros((len(classes), len(classes)))
        np.add.at(table, (rows["true"].astype(int), rows["predicted"].astype(int)), 1)
        share = table / table.sum(1, keepdims=True).clip(1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for true, said in zip(*np.nonzero(table)):
            colour = "white" if share[true, said] > 0.6 else "black"
            axis.text(said, true, int(table[true, said]), ha="center", va="center", fontsize=7, color=colour)
        axis.set(title=name, xticks=range(len(classes)), yticks=range(len(classes)), yticklabels=[])
        axis.set_xticklabels(classes, rotation=90, fontsize=7)
    axes[0][0].set_yticklabels(classes, fontsize=7)
    axes[0][0].set_ylabel("true class, number of cases")
    return _png(figure, "what the models say of the forgotten")


def decision_regions(embedded: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[str], grid: int = 150) -> str:
    """Each model's features in two dimensions, coloured by what it says there.

    Args:
        embedded: for each model ``points`` ``(N, 2)``, ``predicted``, ``true`` and ``forget`` of the same cases.
        classes: their names.
        grid: side of the background, whose colour is the vote of the five nearest cases.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from sklearn.neighbors import KNeighborsClassifier

    figure, axes = _figure(1, len(embedded), 4.2 * len(embedded), 4.6)
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20"](range(len(classes)))
    for axis, (name, rows) in zip(axes[0], embedded.items()):
        points, predicted, true = rows["points"], rows["predicted"].astype(int), rows["true"].astype(int)
        low, high = points.min(0), points.max(0)
        edge = 0.05 * (high - low).clip(1e-6)
        low, high = low - edge, high + edge
        x, y = (np.linspace(low[k], high[k], grid) for k in (0, 1))
        cells = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
        votes = KNeighborsClassifier(min(5, len(points))).fit(points, predicted).predict(cells).reshape(grid, grid)
        axis.imshow(palette[votes], extent=(low[0], high[0], low[1], high[1]),
                    origin="lower", aspect="auto", alpha=0.25)  # fmt: skip
        edges = np.where((predicted == true)[:, None], [[1.0, 1.0, 1.0, 1.0]], palette[true])
        for chosen, marker, size in ((~rows["forget"], "o", 14), (rows["forget"], "*", 60)):
            axis.scatter(*points[chosen].T, c=palette[predicted[chosen]], s=size,
                         marker=marker, edgecolors=edges[chosen], linewidths=0.8)  # fmt: skip
        axis.set(title=name, xticks=[], yticks=[])
    handles = [Line2D([], [], marker="o", linestyle="", color=palette[k], label=kind)
               for k, kind in enumerate(classes)]  # fmt: skip
    figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=8, bbox_to_anchor=(0.5, -0.08))
    return _png(figure, "features in two dimensions")
