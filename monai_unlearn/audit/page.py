# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that a clinician can read; figures inside, nothing fetched, no names."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLOURS = {
    "original": "#2b6cb0",
    "unlearned": "#2f855a",
    "retrained": "#b7791f",
    "judge": "#718096",
    "reference": "#805ad5",
}
LABELS = {"iou": "IoU", "margin": "margin of the true class", "accuracy": "accuracy"}
VERDICTS = {"NOT REFUTED": "#2f855a", "INCONCLUSIVE": "#b7791f", "FAIL": "#c53030"}
SENTENCES = {
    "NOT REFUTED": "No test found a trace of the forgotten cases beyond what a model that never saw them would show.",
    "INCONCLUSIVE": "The tests could not decide; the reasons stand below.",
    "FAIL": "The model does not pass; the reasons stand below.",
}
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a202c;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.verdict{border-left:.5rem solid;padding:.75rem 1rem;background:#f7fafc;margin:1rem 0}
.verdict b{font-size:1.25rem}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #e2e8f0}
th:first-child,td:first-child{text-align:left}
th{font-weight:600;background:#f7fafc}.ci{color:#718096;font-size:.85em}img{max-width:100%}
p.note,li{color:#4a5568}
"""


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _distributions(scores: Mapping[str, Any], score: str, target: float | None) -> str:
    figure, axes = _figure(1, 3, 11, 3)
    for axis, split in zip(axes[0], ("forget", "holdout", "retain")):
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
    return _png(figure)


def _class_bars(scores: Mapping[str, Any], classes: Sequence[str]) -> str:
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
    return _png(figure)


def _trajectory(stop: Mapping[str, Any], restoration: Mapping[str, Any] | None) -> str:
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
    return _png(figure)


def _relearning(curves: Mapping[str, Any]) -> str:
    figure, axes = _figure(1, 1, 7, 3)
    for name, curve in curves.items():
        axes[0][0].plot(
            [at["steps"] for at in curve], [at["f1"] for at in curve], "o-", color=COLOURS[name], label=name
        )
    axes[0][0].set(xlabel="steps on five examples", ylabel="F1 on unseen cases", ylim=(0, 1))
    axes[0][0].legend(fontsize=8)
    return _png(figure)


def _drift(moved: Mapping[str, float], most: int = 12) -> str:
    layers = sorted(moved, key=lambda name: moved[name])[-most:]
    figure, axes = _figure(1, 1, 7, 0.28 * len(layers) + 0.8)
    axes[0][0].barh(range(len(layers)), [moved[name] for name in layers], color=COLOURS["unlearned"])
    axes[0][0].set(yticks=range(len(layers)), xlabel="‖ΔW‖ / ‖W‖")
    axes[0][0].set_yticklabels(layers, fontsize=7)
    return _png(figure)


def _shown(image: np.ndarray) -> np.ndarray:
    image = image.transpose(1, 2, 0)
    image = (image - image.min()) / max(float(np.ptp(image)), 1e-6)
    return image if image.shape[2] == 3 else image[..., 0]


def _mask_cases(cases: list[dict[str, Any]]) -> str:
    figure, axes = _figure(len(cases), 5, 13, 2.2 * len(cases))
    for row, case in zip(axes, cases):
        picture = _shown(case["image"])
        for axis in row[:4]:
            axis.imshow(picture, cmap="gray")
        for axis, key, colour in (
            (row[1], "label", "#e53e3e"),
            (row[2], "original", "#3182ce"),
            (row[3], "unlearned", "#38a169"),
        ):
            axis.contour(case[key][-1], levels=[0.5], colors=[colour], linewidths=1.0)
        row[4].imshow(np.abs(case["original"][-1] - case["unlearned"][-1]), cmap="magma", vmin=0, vmax=1)
        row[0].set_ylabel(case["split"], fontsize=9)
        for axis, name, letter in ((row[2], "original", "T"), (row[3], "unlearned", "S")):
            score = case["scores"][name]
            axis.set_xlabel(f"{letter}_fg {score['confidence']:.2f} · IoU {score['iou']:.2f}", fontsize=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ("image", "truth", "original (T)", "unlearned (S)", "|T − S|")):
        axis.set_title(title, fontsize=9)
    return _png(figure)


def _class_cases(cases: list[dict[str, Any]], classes: Sequence[str]) -> str:
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
    return _png(figure)


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(ci: Any) -> str:
    return "" if not ci or None in ci else f' <span class="ci">[{ci[0]:.3f}, {ci[1]:.3f}]</span>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{one}</th>" for one in head)
    body = "".join("<tr>" + "".join(f"<td>{one}</td>" for one in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _cost(cost: Mapping[str, Any]) -> str:
    rows = []
    for name, label in (
        ("unlearn", "unlearning, all of it"), ("cache", "– teacher outputs"), ("reference", "– teaching reference"),
        ("train", "– training"), ("retrain", "retraining"), ("audit", "audit, with its judge"),
    ):  # fmt: skip
        seconds, flops, images = (cost[f"{name}_{unit}"] for unit in ("seconds", "flops", "images"))
        rows.append([label, _number(seconds, 1), "–" if flops is None else f"{flops / 1e12:.2f}",
                     "–" if images is None else f"{images:,.0f}"])  # fmt: skip
    return _table(["cost", "seconds", "TFLOP", "image passes"], rows)


def _membership(report: Mapping[str, Any]) -> list[str]:
    attacks = [
        [name, *(f"{_number(rows[kind]['auc'])}{_interval(rows[kind]['ci'])}" for kind in ("raw", "calibrated")),
         rows["calibrated"]["direction"]]
        for name, rows in report["membership"].items()
    ]  # fmt: skip
    negative = report["controls"]["negative"]
    return [
        "<h2>Can an attack tell the forgotten from people the model never met?</h2>",
        _table(["membership AUC", "raw", "calibrated", "direction"], attacks),
        "<p class=note>.5 means it cannot. Control on the original: the attack "
        + ("finds" if report["controls"]["positive"]["ok"] else "does not find")
        + f" the forget set. Control on unseen patients: {negative['covering']} of {negative['splits']} halvings look "
        "alike.</p>",
    ]


def _suppression(report: Mapping[str, Any]) -> list[str]:
    found = report["suppression"]
    rows = [
        [name, *(_number(found[key].get(name)) for key in ("f1_unseen", "macro_f1_others", "linear_probe"))]
        for name in found["f1_unseen"]
    ]
    kind = html.escape(found["class"])
    return [
        f"<h2>Is {kind} gone?</h2>",
        _table(["unseen cases", f"F1 of {kind}", "macro-F1 of the others", "AUC of a linear probe"], rows),
        f"<p class=note>{found['unseen_members']} unseen members of the class. The probe looks for it in the features "
        "that the last layer reads; .5 means it is not there.</p>",
        "<h2>How fast five examples bring it back</h2>",
        _relearning(report["relearn"]),
    ]


def render(report: Mapping[str, Any]) -> str:
    """The page, from a report of :func:`monai_unlearn.audit.audit`."""
    scores, splits = report["scores"], [name for name in report["splits"] if report["splits"][name]]
    figures = report.get("_figures", {})
    key = "mean_iou" if "mean_iou" in scores["original"]["holdout"] else "accuracy"
    rows = [
        [name, *(f"{_number(scores[name][split][key])}{_interval(scores[name][split]['ci'])}" for split in splits)]
        for name in scores
    ]
    parts = [
        f"<h1>Unlearning report</h1><p class=note>Job: {html.escape(report['job'])} · request "
        f"{html.escape(report['request'])} · data: {html.escape(report['data'])} · "
        + ", ".join(f"{report['splits'][name]} {name}" for name in splits)
        + "</p>",
        f'<div class="verdict" style="border-color:{VERDICTS[report["verdict"]]}"><b>{report["verdict"]}</b><br>'
        f"{SENTENCES[report['verdict']]}</div><ul>"
        + "".join(f"<li>{html.escape(reason)}</li>" for reason in report["reasons"])
        + "</ul>",
        "<h2>How well each model does</h2>",
        _table(["mean IoU" if key == "mean_iou" else key, *splits], rows),
        "<p class=note>An unseen case like the forgotten ones is expected to score "
        f"{_number(report['expected_unseen'])}; completeness {_number(report['completeness'], 2)} (0: nothing "
        "forgotten, 1: as unseen, above 1: over-forgotten). Intervals: 95 %, patients drawn anew. Lower is not better: "
        "the goal is the model that never saw the cases.</p>",
    ]
    if report.get("suppression"):
        parts += _suppression(report)
    if "scores" in figures:
        score = "iou" if key == "mean_iou" else "margin"
        drawn = _distributions(figures["scores"], score, report["expected_unseen"])
        parts += ["<h2>Scores case by case</h2>", drawn]
    if key == "accuracy" and figures.get("classes"):
        parts += ["<h2>F1 of each class</h2>", _class_bars(scores, figures["classes"])]
    if report["membership"]:
        parts += _membership(report)
    if (report.get("stop") or {}).get("history"):
        parts += ["<h2>The way there</h2>", _trajectory(report["stop"], report.get("restoration"))]
    if report.get("drift"):
        parts += ["<h2>Which layers moved most</h2>", _drift(report["drift"])]
    if figures.get("cases"):
        is_mask = key == "mean_iou"
        drawn = _mask_cases(figures["cases"]) if is_mask else _class_cases(figures["cases"], figures["classes"])
        note = "<p class=note>T_fg and S_fg: mean probability inside the truth.</p>" if is_mask else ""
        parts += ["<h2>Cases</h2>", drawn, note]
    parts += [
        "<h2>Cost</h2>",
        _cost(report["cost"]),
        "<h2>Not tested</h2><ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in report["not_tested"]) + "</ul>",
        "<p class=note>Measured behaviour on the stated sets; no proof of erasure. "
        + " · ".join(f"{html.escape(k)} {html.escape(str(v))}" for k, v in report["environment"].items())
        + "</p>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Unlearning report: {report['verdict']}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
