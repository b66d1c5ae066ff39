# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Boundary unlearning on the nine-class ISIC folders: a site, a criterion and a class, against the retrained model.

    python benchmarks/boundary.py --dataset_dir "$MONAI_UNLEARN_DATA/isic_cls" --output_dir /runs/boundary
    python benchmarks/boundary.py                             # prints the tables of the rows there are

Resumable: one CSV row per finished run. MONAI's ResNet-18 at 64 × 64; the three jobs of a seed share the original. A
second retrained model of another seed gives the floor: how far two models that never saw the set lie apart.
``legacy`` is the published code's behaviour; ``legacy, statistics put back`` is the same model with the original's
running statistics. The sweep forgets a share of the class *nevus* by hard labels; ``--figure`` draws it. Relearning,
which the tables do not hold, is left out of these audits.
"""

from __future__ import annotations

import random
from pathlib import Path

from rows import append, costs, finished, markdown, parser_of, run, share

ROWS = Path(__file__).with_suffix(".csv")
BUNDLE = "isic_classification_unlearn"
NETWORK = "resnet18"
JOBS = {
    "site": ("revision", "{rule: centre == 'HAM_vidir_modern'}"),
    "criterion": ("revision", "{rule: age_approx >= 80}"),
    "class": ("suppression", "{class: vascular lesion}"),
}
SWEEP = (1, 10, 25, 50, 75, 100)  # per cent of the class
SWEPT = "nevus"
OURS = {  # three seeds
    "site": {"reference (default)": (), "boundary_soft": ("boundary_soft",), "boundary": ("boundary",)},
    "criterion": {"reference (default)": (), "boundary_soft": ("boundary_soft",), "boundary": ("boundary",)},
    "class": {"fresh weights (default)": (), "boundary": ("boundary",)},
}
CONTROLS = {  # one seed
    "boundary_shrink": ("boundary_shrink",),
    "runner_up": ("runner_up",),
    "random_label": ("random_label",),
    "fine_tune": ("fine_tune",),
    "legacy": ("boundary_legacy",),
    "legacy, statistics put back": ("boundary_legacy", "restore_buffers"),
}
COMPOSED = "women, then men: changes added"  # two requests, each from the original, and their task vectors
PARTS = {"a": "sex == 'female'", "b": "sex != 'female'"}
SPLITS = ("forget", "retain", "holdout_alike", "holdout_other")
MODELS = ("original", "unlearned", "retrained", "retrained_other")


def row_of(report: dict, job: str, method: str, seed: int) -> dict:
    """What the tables need of a report."""
    row: dict = {"job": job, "method": method, "seed": seed, "verdict": report["verdict"],
                 "threads": report["environment"]["threads"]}  # fmt: skip
    for model in MODELS:
        for split in SPLITS:
            scores = report["scores"].get(model, {}).get(split, {})
            row |= {f"{model}_{split}_{key}": scores.get(key) for key in ("accuracy", "balanced_accuracy")}
        row[f"{model}_auc"] = report["membership"].get(model, {}).get("calibrated", {}).get("auc")
        for split in SPLITS:
            row[f"{model}_{split}_agreement"] = ((report["agreement"] or {}).get(model) or {}).get(split)
    for key in ("f1_unseen", "macro_f1_others", "linear_probe"):
        for model in MODELS:
            row[f"{model}_{key}"] = (report["suppression"] or {}).get(key, {}).get(model)
    return row | costs(report, ("seconds", "flops"))


def table(rows: list[dict], job: str) -> str:
    """Means over seeds, the smallest and the largest in brackets."""

    def cell(chosen: list[dict], field: str) -> str:
        values = [float(row[field]) for row in chosen if row.get(field)]
        if not values or len(values) < len(chosen):
            return "–"
        spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.3f}{spread}"

    extra = ("f1_unseen", "macro_f1_others", "linear_probe") if job == "class" else ("auc",)
    columns = [f"{split}_accuracy" for split in SPLITS] + ["holdout_alike_balanced_accuracy"]
    columns += [f"{split}_agreement" for split in ("forget", "holdout_alike", "holdout_other")] + [*extra]
    lines = [["", *(name.replace("_", " ") for name in columns), "FLOPs, share of the retrain", "seeds", "verdict"]]
    first = list({row["seed"]: row for row in rows}.values())
    for model in ("original", "retrained", "retrained_other"):
        lines.append([model.replace("_", ", "), *(cell(first, f"{model}_{c}") for c in columns),
                      "1" if "re" in model[:2] else "", str(len(first)), ""])  # fmt: skip
    for method in [*OURS.get(job, {}), COMPOSED, *CONTROLS]:
        chosen = [row for row in rows if row["method"] == method]
        if chosen:
            known = all(row["train_flops"] for row in chosen)  # what was composed of models that were given has none
            cost = f"{sum(share(row, 'flops') for row in chosen) / len(chosen):.3f}" if known else "–"
            verdicts = "; ".join(sorted({row["verdict"] for row in chosen}))
            lines.append([method, *(cell(chosen, f"unlearned_{c}") for c in columns), cost,
                          str(len(chosen)), verdicts])  # fmt: skip
    return markdown(lines)


def bars(rows: list[dict], job: str) -> str:
    """Each of our methods against what was aimed at, in means over seeds."""

    def mean(chosen: list[dict], field: str) -> float:
        return sum(float(row[field]) for row in chosen) / len(chosen)

    lines = [["", "forget: gap, allowed", "unseen alike: gap, allowed", "agreement, at least", "others lost, at most"]]
    for method in OURS[job]:
        chosen = [row for row in rows if row["method"] == method]
        if not chosen or not all(row["retrained_other_forget_accuracy"] for row in chosen):
            continue
        cells = []
        for split in ("forget", "holdout_alike"):
            q, other, u = (f"{m}_{split}_accuracy" for m in ("retrained", "retrained_other", "unlearned"))
            floor = sum(abs(float(row[q]) - float(row[other])) for row in chosen) / len(chosen)
            cells.append(f"{abs(mean(chosen, u) - mean(chosen, q)):.3f}, {max(0.03, floor):.3f}")
        pairs = (mean(chosen, f"{m}_holdout_alike_agreement") for m in ("unlearned", "retrained_other"))
        mine, theirs = pairs
        lost = mean(chosen, "retrained_holdout_other_accuracy") - mean(chosen, "unlearned_holdout_other_accuracy")
        lines.append([method, *cells, f"{mine:.3f}, {theirs - 0.05:.3f}", f"{lost:.3f}, 0.020"])
    return markdown(lines)


def sweep_table(rows: list[dict]) -> str:
    """Forget, retain and attack over the share of the class that is forgotten."""
    lines = [["share of the class, %", "forget: original", "unlearned", "retrained", "retain: unlearned", "retrained",
              "AUC: original", "unlearned", "retrained", "verdict"]]  # fmt: skip
    for row in sorted(rows, key=lambda row: int(row["method"])):
        names = [f"{m}_forget_accuracy" for m in ("original", "unlearned", "retrained")]
        names += [f"{m}_retain_accuracy" for m in ("unlearned", "retrained")]
        names += [f"{m}_auc" for m in ("original", "unlearned", "retrained")]
        values = [f"{float(row[name]):.3f}" if row[name] else "–" for name in names]
        lines.append([row["method"], *values, row["verdict"]])
    return markdown(lines)


def sweep_figure(rows: list[dict], path: Path) -> None:
    """Accuracy on forget and retain set, and the calibrated attack, over the share of the class that is forgotten."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted(rows, key=lambda row: int(row["method"]))
    shares = [int(row["method"]) for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    fields = ("forget_accuracy", "retain_accuracy", "auc")
    titles = ("accuracy, forget", "accuracy, retain", "calibrated attack, AUC")
    for axis, field, title in zip(axes, fields, titles):
        for model, colour in (("original", "#888888"), ("retrained", "#1b7837"), ("unlearned", "#c51b7d")):
            values = [float(row[f"{model}_{field}"]) if row[f"{model}_{field}"] else float("nan") for row in rows]
            axis.plot(shares, values, "o-", color=colour, label=model, markersize=4)
        axis.set(title=title, xlabel=f"share of {SWEPT} forgotten, %", ylim=(0, 1.05))
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = parser_of(__doc__, "the nine-class folders")
    parser.add_argument("--jobs", nargs="+", choices=[*JOBS, "sweep"], default=[*JOBS, "sweep"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--figure", type=Path, help="where to draw the sweep, a PNG file")
    parser.add_argument("--rows", nargs="+", help="only these methods, or shares of the sweep")
    arguments = parser.parse_args()

    def missing(job: str, method: str, seed: int) -> bool:
        there = {(row["job"], row["method"], row["seed"]) for row in finished(ROWS)}
        return method in (arguments.rows or [method]) and (job, method, str(seed)) not in there

    def given(seed: int) -> dict[str, object]:
        folder = arguments.output_dir / "original" / f"seed{seed}"
        run(BUNDLE, (NETWORK,), arguments.dataset_dir, folder, "original", forget_fraction=0.1, seed=seed)
        return {"original_model": (folder / "models" / "original.pt").absolute(), "seed": seed}

    def unlearn(
        folder: Path, job: str, overlays: tuple[str, ...], seed: int, also: str = "", **options: object
    ) -> dict:
        selector = JOBS[job][1].replace("}", f" and {also}}}") if also else JOBS[job][1]
        folder.mkdir(parents=True, exist_ok=True)
        request = folder / "request.yaml"
        split = "on_split_group: include\n" if job != "class" else ""
        request.write_text(f"id: {job}\njob: {JOBS[job][0]}\nselector: {selector}\n{split}")
        always = {"forget_request": request.absolute(), "with_retrained": 2, "relearn_steps": 0}
        return run(BUNDLE, (NETWORK, *overlays), arguments.dataset_dir, folder, **{**given(seed), **always, **options})

    if arguments.dataset_dir:
        for seed in arguments.seeds:
            for job in (one for one in arguments.jobs if one != "sweep"):
                folder = arguments.output_dir / job / f"seed{seed}"
                for method, overlays in {**OURS[job], **(CONTROLS if seed == 0 else {})}.items():
                    if missing(job, method, seed):
                        append(ROWS, row_of(unlearn(folder, job, overlays, seed), job, method, seed))
                if job == "site" and seed == 0 and missing(job, COMPOSED, seed):
                    files = {}
                    for name, also in PARTS.items():
                        unlearn(folder / name, job, (), seed, also, with_retrained=0)
                        files[name] = str((folder / name / "models" / "unlearned.pt").absolute())
                    rules = [{"keys": "*", "add": dict.fromkeys(files, 1.0)}]
                    options = {"compose_sources": files, "compose_rules": rules}
                    append(ROWS, row_of(unlearn(folder, job, ("compose",), seed, **options), job, COMPOSED, seed))
        if "sweep" in arguments.jobs:
            ids = sorted(path.stem for path in (Path(arguments.dataset_dir) / "Train" / SWEPT).glob("*.jpg"))
            random.Random(0).shuffle(ids)
            for percent in SWEEP:
                if missing("sweep", str(percent), 0):
                    folder = arguments.output_dir / "sweep" / str(percent)
                    chosen = ids[: max(1, round(len(ids) * percent / 100))]
                    options = given(0) | {"forget_ids": str(chosen), "job": "deletion", "relearn_steps": 0}
                    report = run(BUNDLE, (NETWORK, "boundary"), arguments.dataset_dir, folder, **options)
                    append(ROWS, row_of(report, "sweep", str(percent), 0))
    for job in JOBS:
        rows = [row for row in finished(ROWS) if row["job"] == job]
        if rows:
            print(f"\n{job}\n\n{table(rows, job)}\n" + (f"\n{bars(rows, job)}\n" if job != "class" else ""))
    swept = [row for row in finished(ROWS) if row["job"] == "sweep"]
    if swept:
        print(f"\nshare of {SWEPT}\n\n{sweep_table(swept)}")
        if arguments.figure:
            sweep_figure(swept, arguments.figure)


if __name__ == "__main__":
    main()
