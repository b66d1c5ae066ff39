# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that a clinician can read; figures inside, nothing fetched, no names."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from . import figures

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
    kind = html.escape(found["class"])
    if "f1_unseen" in found:
        columns = {"f1_unseen": f"F1 of {kind}", "macro_f1_others": "macro-F1 of the others"}
    else:
        columns = {"dice_unseen": f"Dice of {kind}", "dice_others": "of the others", "dice_merged": "of all as one"}
    columns["linear_probe"] = "AUC of a linear probe"
    models = found[next(iter(columns))]
    rows = [[name, *(_number(found[key].get(name)) for key in columns)] for name in models]
    parts = [
        f"<h2>Is {kind} gone?</h2>",
        _table(["unseen cases", *columns.values()], rows),
        f"<p class=note>{found['unseen_members']} unseen cases of it. The probe looks for it in the model's last "
        "features; .5 means it is not there.</p>",
    ]
    if report["relearn"]:
        parts += ["<h2>How fast five examples bring it back</h2>", figures.relearning(report["relearn"])]
    return parts


def _relabelling(found: Mapping[str, Any] | None, classes: Sequence[str]) -> list[str]:
    if not found or "routes" not in found:
        return []
    went = ", ".join(f"{count} {html.escape(classes[int(c)])}" for c, count in found["destinations"].items())
    routes = ", ".join(f"{count} {route.replace('_', ' ')}" for route, count in found["routes"].items() if count)
    return [
        f"<p class=note>Labels across the boundary: {went}. How they were found: {routes}; "
        f"{_number(found['mean_steps'], 1)} steps on average.</p>"
    ]


def render(report: Mapping[str, Any]) -> str:
    """The page, from a report of :func:`monai_unlearn.audit.audit`."""
    scores, splits = report["scores"], [name for name in report["splits"] if report["splits"][name]]
    data = report.get("_figures", {})
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
    if "scores" in data:
        score = "iou" if key == "mean_iou" else "margin"
        picture = figures.distributions(data["scores"], score, report["expected_unseen"])
        parts += ["<h2>Scores case by case</h2>", picture]
    if key == "accuracy" and data.get("classes"):
        parts += ["<h2>F1 of each class</h2>", figures.class_bars(scores, data["classes"])]
        parts += ["<h2>Where the forgotten cases went</h2>", figures.destinations(data["scores"], data["classes"])]
        parts += _relabelling(report.get("relabelling"), data["classes"])
    if data.get("embedded"):
        parts += [
            "<h2>Decision regions</h2>",
            figures.decision_regions(data["embedded"], data["classes"]),
            "<p class=note>The features that the last layer reads, in two dimensions (t-SNE), each model by itself. "
            "Stars: forgotten cases, circles: a sample of the retained; colour: what the model says; edge: the truth "
            "where it says something else; background: the vote of the five nearest cases.</p>",
        ]
    if report["membership"]:
        parts += _membership(report)
    if (report.get("stop") or {}).get("history"):
        parts += ["<h2>The way there</h2>", figures.trajectory(report["stop"], report.get("restoration"))]
    if report.get("drift"):
        parts += ["<h2>Which layers moved most</h2>", figures.drift(report["drift"])]
    if data.get("cases"):
        is_mask = key == "mean_iou"
        picture = figures.mask_cases(data["cases"]) if is_mask else figures.class_cases(data["cases"], data["classes"])
        note = "<p class=note>T_fg and S_fg: mean probability inside the truth.</p>" if is_mask else ""
        parts += ["<h2>Cases</h2>", picture, note]
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
