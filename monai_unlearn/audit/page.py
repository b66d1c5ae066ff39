# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that a clinician can read; figures inside, nothing fetched, no names."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from . import figures

VERDICTS = {"RETRAIN-EQUIVALENT": "#276749", "NOT REFUTED": "#2f855a", "INCONCLUSIVE": "#b7791f", "FAIL": "#c53030"}
SENTENCES = {
    "RETRAIN-EQUIVALENT": "Within the stated margins the model behaves like one that was retrained without the cases.",
    "NOT REFUTED": "No judged test found a trace of the forgotten cases beyond that of a model that never saw them.",
    "INCONCLUSIVE": "The tests could not decide; the reasons stand below.",
    "FAIL": "The model does not pass; the reasons stand below.",
}
TIERS = {
    0: "tier 0: no model that never saw the cases was at hand",
    1: "tier 1: beside references that never saw the cases",
    2: "tier 2: beside a model retrained without the cases",
}
JOBS = {
    "deletion": "Delete cases: the model should behave as if it had never seen them.",
    "suppression": "Suppress a class: the model should no longer know it.",
    "revision": "Revise a device or criterion: the model should behave as if it had never been taught these cases.",
}
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a202c;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.verdict{border-left:.5rem solid;padding:.75rem 1rem;background:#f7fafc;margin:1rem 0}
.verdict b{font-size:1.25rem}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #e2e8f0}
th:first-child,td:first-child{text-align:left}
th{font-weight:600;background:#f7fafc}.ci{color:#718096;font-size:.85em;white-space:nowrap}img{max-width:100%}
p.note,li{color:#4a5568}.target{color:#718096;font-weight:400;font-size:.85em;display:block}
details{margin:.5rem 0}summary{cursor:pointer}.scroll{max-height:24rem;overflow:auto}
code{font-size:.85em}
@media print{body{max-width:none;margin:0;font-size:11pt}h2{break-after:avoid}table,img,.verdict{break-inside:avoid}
.scroll{max-height:none}}
"""
HIGHER, LOWER = "↑", "↓"


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(ci: Any) -> str:
    return "" if not ci or None in ci else f' <span class="ci">[{ci[0]:.3f}, {ci[1]:.3f}]</span>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{one}</th>" for one in head)
    body = "".join("<tr>" + "".join(f"<td>{one}</td>" for one in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _head(name: str, target: str) -> str:
    """A column's name with its direction and target beneath."""
    return f'{name}<span class="target">{target}</span>'


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


def _membership(report: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    table, negative = report["membership"], report["controls"]["negative"]
    kinds = [kind for kind in ("raw", "calibrated", "rmia") if kind in table["unlearned"]]
    judged = "calibrated" if "calibrated" in kinds else "raw"
    null = table["unlearned"]["raw"].get("null")
    targets = {"raw": f"target {_number(null)}" if null is not None else "target unknown",
               "calibrated": "target .500", "rmia": "target .500"}  # fmt: skip
    rows = []
    for name, found in table.items():
        cells = [f"{_number(found[kind]['auc'])}{_interval(found[kind]['ci'])}" for kind in kinds]
        chosen = (report.get("strongest_attack") or {}).get(name)
        best = "–" if not chosen else f"{_number(chosen['auc'])}{_interval(chosen['ci'])} {_words(chosen['attack'])}"
        tpr = f"{_number(found[judged]['tpr_at_5pct_fpr'], 2)}{_interval(found[judged]['tpr_ci'])}"
        rows.append([name, *cells, best, tpr, found[judged]["direction"]])
    head = ["membership AUC", *(_head(_words(kind), targets[kind]) for kind in kinds),
            _head("strongest", "chosen on one half of the patients, tested on the other"),
            _head("found at 5 % false alarms", "target .05"), "direction"]  # fmt: skip
    parts = ["<h2>Can an attack tell the forgotten from people the model never met?</h2>", _table(head, rows)]
    row = table["unlearned"][judged]
    positive = report["controls"]["positive"]
    notes = [
        ".5 means it cannot; above, the model still knows them; below, they were over-forgotten and stand out as "
        "clearly. A raw attack has another target: what models that never saw the set show on it.",
        "Control on the original: the attack " + ("finds" if positive["ok"] else "does not find") + " the forget set. "
        f"Control on unseen patients: {negative['covering']} of {negative['splits']} halvings look alike.",
    ]
    if "rank_test" in positive:
        notes.append(
            f"One patient has a rank and no AUC: under the original p = {positive['rank_test']['p_up']:.3f} (small: "
            "remembered)."
        )
    elif row["resolution"] is not None:
        few = row["n_forget"] < 50
        notes.append(
            f"{row['n_forget']} forgotten and {row['n_holdout']} unseen patients resolve an AUC to ±"
            f"{row['resolution']:.3f}" + ("; with so few a smaller trace would not be seen." if few else ".")
        )
    beside = report.get("attack_beside_retrained")
    if beside is not None:
        notes.append(
            f"The calibrated AUC lies {beside['difference']:+.3f}{_interval(beside['ci'])} from the retrained model's, "
            "over the same patients."
        )
    parts += [f"<p class=note>{note}</p>" for note in notes]
    if data.get("attacked"):
        parts.append(figures.calibrated(data["attacked"]))
    family = [
        [_words(kind), *(f"{_number(table[name][kind]['auc'])}{_interval(table[name][kind]['ci'])}" for name in table),
         _number(table["unlearned"][kind].get("null", 0.5))]
        for kind in table["unlearned"]
    ]  # fmt: skip
    parts.append("<details><summary>Every attack</summary>" + _table(["AUC", *table, "target"], family) + "</details>")
    return parts + _leaks(report)


def _words(name: str) -> str:
    return "RMIA" if name == "rmia" else name.replace("_", " ")


def _leaks(report: Mapping[str, Any]) -> list[str]:
    leaks = report.get("leaks")
    if not leaks:
        return []
    two, lines = leaks["two_versions"], []
    if two["auc"] is not None:
        lines.append(
            "Whoever holds the original and the unlearned model tells forgotten from retained cases with AUC "
            f"{_number(two['auc'])}{_interval(two['ci'])}: so would a retrained model. Do not hand out both versions."
        )
    if "retained" in leaks:
        values = ", ".join(f"{name} {_number(row['auc'])}" for name, row in leaks["retained"].items())
        lines.append(f"The same attack on the patients who stay (no rise wanted): {values}.")
    return [f"<p class=note>{line}</p>" for line in lines]


def _retrained(report: Mapping[str, Any]) -> list[str]:
    """How close case by case, beside what two retrained models of different seeds differ by."""
    if not report.get("agreement"):
        return []
    rows, splits = [], [name for name in ("forget", "retain", "holdout") if name in report["agreement"]["unlearned"]]
    for name, split_means in report["agreement"].items():
        js = report["js"][name]
        rows.append([name, *(f"{_number(split_means[s])} · {_number(js[s])}" for s in splits),
                     _number((report["tug_of_war"] or {}).get(name))])  # fmt: skip
    target = "target: as retrained other" if "retrained_other" in report["agreement"] else f"{HIGHER} · {LOWER}"
    head = ["beside the retrained model", *(_head(f"{name}: agreement · divergence", target) for name in splits),
            _head("tug of war", f"{HIGHER} 1")]  # fmt: skip
    parts = ["<h2>How close to the retrained model, case by case</h2>", _table(head, rows)]
    found = report.get("equivalence")
    if found:
        test = found["forget"]
        low, high = test["ci90"]
        interval = "one patient, so no interval that could lie inside"
        if low is not None:
            interval = f"90 % interval [{low:+.3f}, {high:+.3f}] {'inside' if test['ok'] else 'not inside'}"
        parts.append(
            f"<p class=note>Equivalence: forget score {test['difference']:+.3f} beside the retrained model, {interval} "
            f"±{test['margin']:.3f}; unseen cases "
            f"{'not inferior' if found['utility']['ok'] else 'not shown to be not inferior'}; agreement and divergence "
            f"{'within' if found['agreement']['ok'] and found['js']['ok'] else 'not within'} those of a second "
            "retrained model.</p>"
        )
    return parts


def _calibration(report: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    scores = {name: rows["holdout"] for name, rows in report["scores"].items() if "ece" in rows["holdout"]}
    if not scores:
        return []
    columns = {"ece": "calibration error", "ece_band": "at the surface", "brier": "Brier score",
               "mean_hd95": "95 % surface distance, voxels", "mean_nsd": "surface Dice at 2 voxels",
               "mean_volume_error": "volume error, share of the picture"}  # fmt: skip
    shown = {key: label for key, label in columns.items() if key in scores["original"]}
    arrows = {"mean_nsd": HIGHER, "mean_volume_error": "→ 0"}
    rows = [[name, *(_number(row.get(key), 4 if "volume" in key else 3) for key in shown)]
            for name, row in scores.items()]  # fmt: skip
    head = ["unseen cases", *(_head(label, arrows.get(key, LOWER)) for key, label in shown.items())]
    parts = ["<h2>Sure where it is right?</h2>", _table(head, rows)]
    undefined = scores["unlearned"].get("n_hd95_undefined")
    if undefined is not None:
        parts.append(
            f"<p class=note>Both masks empty: Dice 1, distance 0. One empty: Dice 0, distance undefined and left out "
            f"({undefined} cases of the unlearned model).</p>"
        )
    if "scores" in data:
        parts.append(figures.reliability(data["scores"], "calibration"))
    return parts


def _subgroups(report: Mapping[str, Any]) -> list[str]:
    if not report.get("subgroups"):
        return []
    rows = [[f"{html.escape(row['column'])}: {html.escape(row['value'])}", str(row["n"]),
             f"{row['change']:+.3f}{_interval(row['ci'])}"] for row in report["subgroups"]]  # fmt: skip
    return [
        "<h2>Who loses?</h2>",
        _table(["unseen cases", "n", _head("change, unlearned − original", "target 0")], rows),
    ]


def _patients(report: Mapping[str, Any]) -> list[str]:
    rows = report.get("cases")
    if not rows:
        return []
    models = [name for name in ("original", "unlearned", "retrained", "judge") if name in rows[0]]
    table = [
        [f"<code>{', '.join(row['cases'])}</code>" if isinstance(row["cases"], list) else f"patient {number}",
         *(_number(row[name]) for name in models), *(_number(row[key]) for key in ("p_up_original", "p_up", "p_down"))]
        for number, row in enumerate(rows, 1)
    ]  # fmt: skip
    expected, seen = 0.05 * len(rows), {key: sum(row[key] <= 0.05 for row in rows) for key in ("p_up", "p_down")}
    head = ["pseudonym", *models, _head("p, original", "small: remembered"), _head("p ↑", "small: still remembered"),
            _head("p ↓", "small: over-forgotten")]  # fmt: skip
    return [
        "<h2>Patient by patient</h2>",
        f"<p class=note>p: the share of unseen patients that score as high (↑) or as low (↓), calibrated. "
        f"Of {len(rows)} patients about {expected:.0f} lie below .05 by chance on each side; here {seen['p_up']} and "
        f"{seen['p_down']}.</p><details><summary>The table</summary><div class=scroll>",
        _table(head, table),
        "</div></details>",
    ]


def _durability(report: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    parts = []
    if report.get("relearn") and "few_shot" not in report["relearn"]:
        scores = report["scores"]["original"]["forget"]
        level = scores.get("mean_iou", scores.get("accuracy"))
        parts += ["<h2>Does it stay forgotten?</h2>", figures.relearning(report["relearn"], level)]
        index = report.get("relearn_index") or {}
        other = "retrained" if "retrained" in report["relearn"]["forget"] else "reference"
        words = [f"{name} {'not within the steps' if steps is None else f'{steps:.0f} steps'}"
                 for name, steps in (("the unlearned model", index.get("unlearned")),
                                     (f"the {other} model", index.get("retrained")))]  # fmt: skip
        parts.append(
            "<p class=note>A copy is trained for a few steps. A model that forgot takes as long as one that never saw "
            f"the cases. Back within .02 of the original on the forget set: {' and '.join(words)}. Not judged.</p>"
        )
    probes = report.get("probes")
    if probes:
        kept = report["scores"]["unlearned"]
        key = "mean_iou" if "mean_iou" in kept["holdout"] else "accuracy"
        rows = [["as it is", *(_number(kept[split][key]) for split in ("forget", "holdout"))]]
        rows += [[f"rounded to {name}", *(_number(row[split]) for split in ("forget", "holdout"))]
                 for name, row in probes["rounding"].items()]  # fmt: skip
        if probes["original_statistics"]:
            found = probes["original_statistics"]
            rows.append(["with the original's running statistics", *(_number(found[s]) for s in ("forget", "holdout"))])
        head = ["unlearned model", _head("forget", "target: no jump upwards"), _head("holdout", HIGHER)]
        parts += ["<h3>After changes that train nothing</h3>", _table(head, rows)]
        if probes["adapter"] and probes["adapter"]["gives_original_back"]:
            parts.append(
                "<p class=note>The run keeps its adapter. Taken off the unlearned model it gives the original back: "
                "never hand it out.</p>"
            )
    if data.get("residual"):
        near = {split: row["near_surface"] for split, row in report["residual"].items()}
        parts += [
            "<h2>Where memory is left</h2>",
            figures.residual(data["residual"]),
            "<p class=note>The unlearned model's loss minus that of references that never saw the case; below 0 it "
            f"knows more. Near the surface: forget {_number(near['forget'])}, unseen {_number(near['holdout'])} "
            "nats. Maps for viewers lie in the run's private folder.</p>",
        ]
    return parts


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


def _asked(report: Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    limits = ", ".join(f"{name} ±{value}" for name, value in report["limits"].items())
    numbers = ", ".join(f"{report['splits'][name]} {_words(name)}" for name in splits)
    cost = report["cost"]
    seconds, again = cost["unlearn_seconds"], cost["retrain_seconds"]
    done = "The weights were given; how they were made is not known here."
    if seconds is not None:
        done = f"Unlearned in {seconds:.0f} s" + (f"; retraining takes {again:.0f} s." if again is not None else ".")
    return [
        f"<p class=note><b>Asked.</b> {JOBS[report['job']]} Request {html.escape(report['request'])}, data "
        f"{html.escape(report['data'])}: {numbers}. Limits fixed beforehand: {limits}.</p>",
        f"<p class=note><b>Done.</b> {done}</p>",
        f"<p class=note><b>Measured.</b> {TIERS[report['tier']].capitalize()}"
        + (f"; {report['references']} of them" if report["references"] > 1 else "")
        + ". Intervals of 95 % draw patients anew and hold for this one model; they do not speak of another seed.</p>",
        "<p class=note><b>Not tested.</b> " + html.escape("; ".join(report["not_tested"])) + ".</p>",
    ]


def render(report: Mapping[str, Any]) -> str:
    """The page, from a report of :func:`monai_unlearn.audit.audit`."""
    scores, splits = report["scores"], [name for name in report["splits"] if report["splits"][name]]
    data = report.get("_figures", {})
    key = "mean_iou" if "mean_iou" in scores["original"]["holdout"] else "accuracy"
    rows = [
        [name, *(f"{_number(scores[name][split].get(key))}{_interval(scores[name][split].get('ci'))}"
                 if split in scores[name] else "–" for split in splits)]
        for name in scores
    ]  # fmt: skip
    targets = {"forget": f"target {_number(report['expected_unseen'])}"}
    head = ["mean IoU" if key == "mean_iou" else key]
    head += [_head(_words(split), targets.get(split, f"{HIGHER} not lower than before")) for split in splits]
    parts = [
        "<h1>Unlearning report</h1>",
        f'<div class="verdict" style="border-color:{VERDICTS[report["verdict"]]}"><b>{report["verdict"]}</b><br>'
        f"{SENTENCES[report['verdict']]}</div><ul>"
        + "".join(f"<li>{html.escape(reason)}</li>" for reason in report["reasons"])
        + "</ul>",
        *_asked(report, splits),
        "<h2>How well each model does</h2>",
        _table(head, rows),
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
    if report["membership"]:
        parts += _membership(report, data)
    parts += _retrained(report)
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
    parts += _durability(report, data)
    parts += [*_calibration(report, data), *_subgroups(report), *_patients(report)]
    if (report.get("stop") or {}).get("history"):
        parts += ["<h2>The way there</h2>", figures.trajectory(report["stop"], report.get("restoration"))]
    if report.get("drift"):
        parts += ["<h2>Which layers moved most</h2>", figures.drift(report["drift"])]
    if data.get("cases"):
        is_mask = key == "mean_iou"
        picture = figures.mask_cases(data["cases"]) if is_mask else figures.class_cases(data["cases"], data["classes"])
        note = (
            "<p class=note>T_fg and S_fg: mean probability inside the truth. Residual memory, of forgotten cases: red "
            "where the model still knows more than one that never saw the case, blue where it knows less.</p>"
        )
        parts += ["<h2>Cases</h2>", picture, note if is_mask else ""]
    parts += [
        "<h2>Cost</h2>",
        _cost(report["cost"]),
        "<p class=note>Measured behaviour on the stated sets; no proof of erasure. "
        + " · ".join(f"{html.escape(k)} {html.escape(str(v))}" for k, v in report["environment"].items())
        + "</p>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Unlearning report: {report['verdict']}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
