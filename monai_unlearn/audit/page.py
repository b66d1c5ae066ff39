# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that a clinician can read; figures inside, nothing fetched, no names."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

COLOURS = {
    "original": "#2b6cb0",
    "unlearned": "#2f855a",
    "retrained": "#b7791f",
    "judge": "#718096",
    "reference": "#805ad5",
}
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


def _distributions(scores: Mapping[str, Any], target: float | None) -> str:
    figure, axes = _figure(1, 3, 11, 3)
    for axis, split in zip(axes[0], ("forget", "holdout", "retain")):
        for name in ("original", "unlearned", "retrained"):
            if name in scores and len(scores[name][split]["iou"]):
                values = np.sort(scores[name][split]["iou"])
                share = np.arange(1, len(values) + 1) / len(values)
                axis.step(values, share, where="post", color=COLOURS[name], label=name)
        if split == "forget" and target is not None:
            axis.axvline(target, color="#1a202c", linestyle=":", label="expected of unseen")
        axis.set(title=split, xlabel="IoU of a case", xlim=(0, 1), ylim=(0, 1))
    axes[0][0].set_ylabel("share of cases at or below")
    axes[0][0].legend(fontsize=8)
    return _png(figure)


def _trajectory(stop: Mapping[str, Any]) -> str:
    figure, axes = _figure(1, 1, 7, 3)
    axis, history = axes[0][0], stop["history"]
    epochs = [entry["epoch"] for entry in history]
    axis.plot(epochs, [entry["forget"] for entry in history], "o-", color="#c53030", label="forget set")
    if "retain" in history[0]:
        axis.plot(epochs, [entry["retain"] for entry in history], "o-", color="#2f855a", label="retained sample")
    axis.axhline(stop["reference"], color="#1a202c", linestyle=":", label="reference")
    axis.axvline(stop["best_epoch"], color="#718096", linewidth=1, label="kept")
    axis.set(xlabel="epoch", ylabel="mean IoU")
    axis.legend(fontsize=8)
    return _png(figure)


def _cases(cases: list[dict[str, Any]]) -> str:
    figure, axes = _figure(len(cases), 3, 9, 2.2 * len(cases))
    for row, case in zip(axes, cases):
        image = case["image"].transpose(1, 2, 0)
        image = (image - image.min()) / max(float(np.ptp(image)), 1e-6)
        picture = image if image.shape[2] == 3 else image[..., 0]
        row[0].imshow(picture, cmap="gray")
        row[1].imshow(picture, cmap="gray")
        for key, colour, level in (
            ("label", "#e53e3e", 0.5),
            ("original", "#3182ce", 0.5),
            ("unlearned", "#38a169", 0.5),
        ):
            row[1].contour(case[key][-1], levels=[level], colors=[colour], linewidths=1.4)
        row[2].imshow(np.abs(case["original"][-1] - case["unlearned"][-1]), cmap="magma", vmin=0, vmax=1)
        row[0].set_ylabel(case["split"], fontsize=9)
        row[1].set_xlabel(f"IoU {case['iou']['original']:.2f} → {case['iou']['unlearned']:.2f}", fontsize=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ("image", "truth red, original blue, unlearned green", "|difference|")):
        axis.set_title(title, fontsize=9)
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


def render(report: Mapping[str, Any]) -> str:
    """The page, from a report of :func:`monai_unlearn.audit.audit`."""
    scores, splits = report["scores"], list(report["splits"])
    figures = report.get("_figures", {})
    rows = [
        [
            name,
            *(f"{_number(scores[name][split]['mean_iou'])}{_interval(scores[name][split]['ci'])}" for split in splits),
        ]
        for name in scores
    ]
    attacks = [
        [name, *(f"{_number(rows_[kind]['auc'])}{_interval(rows_[kind]['ci'])}" for kind in ("raw", "calibrated")),
         rows_["calibrated"]["direction"]]
        for name, rows_ in report["membership"].items()
    ]  # fmt: skip
    negative = report["controls"]["negative"]
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
        _table(["mean IoU", *splits], rows),
        "<p class=note>An unseen case like the forgotten ones is expected to score "
        f"{_number(report['expected_unseen'])}; completeness {_number(report['completeness'], 2)} (0: nothing "
        "forgotten, 1: as unseen, above 1: over-forgotten). Intervals: 95 %, patients drawn anew. Lower is not better: "
        "the goal is the model that never saw the cases.</p>",
    ]
    if "scores" in figures:
        parts += ["<h2>Scores case by case</h2>", _distributions(figures["scores"], report["expected_unseen"])]
    parts += [
        "<h2>Can an attack tell the forgotten from people the model never met?</h2>",
        _table(["membership AUC", "raw", "calibrated", "direction"], attacks),
        "<p class=note>.5 means it cannot. Control on the original: the attack "
        + ("finds" if report["controls"]["positive"]["ok"] else "does not find")
        + f" the forget set. Control on unseen patients: {negative['covering']} of {negative['splits']} halvings look "
        "alike.</p>",
    ]
    if (report.get("stop") or {}).get("history"):
        parts += ["<h2>The way there</h2>", _trajectory(report["stop"])]
    if figures.get("cases"):
        parts += ["<h2>Cases</h2>", _cases(figures["cases"])]
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
