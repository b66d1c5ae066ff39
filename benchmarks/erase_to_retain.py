# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Erase to Retain's recipe beside our defaults, the retrained and the original model, on three real data sets.

    python benchmarks/erase_to_retain.py --task isic --dataset_dir "$MONAI_UNLEARN_DATA/isic2018_seg" --output_dir /runs
    python benchmarks/erase_to_retain.py                     # prints the tables of the rows there are

Resumable: one CSV row per finished run; the rows of a seed share original, references and retrained model in one folder
of ``--output_dir``. On ISIC the published recipe runs once with the published epochs and once with the published number
of steps on the forget set (75 of batch 64), each at 1, 3 and 10 times the published learning rate.
"""

from __future__ import annotations

from pathlib import Path

from rows import append, costs, finished, markdown, parser_of, run, share

ROWS = Path(__file__).with_suffix(".csv")
SPLITS = ("forget", "retain", "holdout")
# task -> bundle, overlays on every run, published numbers on forget, retain and holdout, whose paper row they are
TASKS = {
    "isic": ("isic_unlearn", (), "IoU .875 → .509, .647 and .677 on retain and validation (order unconfirmed)"),
    "isic_flexible_unet": ("isic_unlearn", ("flexible_unet",), "as isic"),
    "chase": ("chase_unlearn", (), "no number; forget lower, the rest preserved"),
    "isic_classification": (
        "isic_classification_unlearn",
        (),
        "accuracy .870 → .641 on forget, .839 → .906 on retain",
    ),
}
PAPER = ("erase_to_retain_paper",)
# row -> overlays and options
RUNS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "default": ((), {}),
    "erase_to_retain": (("erase_to_retain",), {}),
    **{f"paper lr×{factor}": (PAPER, {"learning_rate": 1e-4 * factor}) for factor in (1, 3, 10)},
}
EXTRA = {  # with a forget set of 77 an epoch holds 2 forget batches of 64
    f"paper 75 steps lr×{factor}": (PAPER, {"learning_rate": 1e-4 * factor, "unlearn_epochs": 38})
    for factor in (1, 3, 10)
}
ROWS_OF = {"isic": {**RUNS, **EXTRA}, "isic_flexible_unet": {**RUNS, **EXTRA}}


def row_of(report: dict, task: str, name: str, seed: int) -> dict:
    """What the table needs of a report."""
    row: dict = {"task": task, "row": name, "seed": seed, "verdict": report["verdict"],
                 "expected_unseen": report["expected_unseen"], "n_forget": report["splits"]["forget"],
                 "threads": report["environment"]["threads"]}  # fmt: skip
    key = "accuracy" if "accuracy" in report["scores"]["original"]["holdout"] else "mean_iou"
    for model in ("original", "unlearned", "retrained"):
        row |= {f"{model}_{split}": report["scores"][model][split][key] for split in SPLITS}
        row[f"{model}_auc"] = report["membership"][model]["calibrated"]["auc"]
    return row | costs(report, ("seconds", "flops"))


def sentence(rows: list[dict]) -> str:
    """What the means of a row say, in one sentence."""

    def mean(field: str) -> float:
        return sum(float(row[field]) for row in rows) / len(rows)

    gap = mean("unlearned_forget") - mean("retrained_forget")
    moved = mean("original_forget") - mean("unlearned_forget")
    lost = mean("retrained_holdout") - mean("unlearned_holdout")
    if mean("original_forget") - mean("retrained_forget") < 0.04:
        return "the original does not remember the set: nothing measurable to forget"
    damage = f", and unseen cases lose {lost:.3f} against the retrained model" if lost > 0.02 else ""
    if moved < 0.02:
        return "nothing is forgotten" + damage
    if abs(gap) <= 0.02:
        return "as if never seen" + damage
    return (f"still {gap:.3f} above the retrained model" if gap > 0 else f"{-gap:.3f} too low: over-forgotten") + damage


def table(rows: list[dict], task: str) -> str:
    """One Markdown table: means over seeds, the smallest and the largest seed in brackets."""

    def cell(chosen: list[dict], value) -> str:
        values = [value(row) for row in chosen]
        if None in values:
            return "–"  # one patient has a rank and no AUC
        spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.3f}{spread}"

    def number(row: dict, field: str) -> float | None:
        return float(row[field]) if row[field] else None

    columns = [*SPLITS, "auc"]
    lines = [
        ["", *SPLITS, "AUC calibrated", "FLOPs, share of the retrain", "seconds, share", "seeds", "in one sentence"]
    ]
    lines.append(["the paper's numbers", *[""] * 7, TASKS[task][2]])
    first = {row["seed"]: row for row in rows}  # original and retrained model are those of the seed
    for model in ("original", "retrained"):
        cells = [cell(list(first.values()), lambda row, m=model, c=c: number(row, f"{m}_{c}")) for c in columns]
        lines.append([model, *cells, "1" if model == "retrained" else "", "1" if model == "retrained" else "",
                      str(len(first)), ""])  # fmt: skip
    for name in ROWS_OF.get(task, RUNS):
        chosen = [row for row in rows if row["row"] == name]
        if chosen:
            cells = [cell(chosen, lambda row, c=c: number(row, f"unlearned_{c}")) for c in columns]
            costs = [cell(chosen, lambda row, u=u: share(row, u)) for u in ("flops", "seconds")]
            verdicts = "; ".join(sorted({row["verdict"] for row in chosen}))
            lines.append([name, *cells, *costs, str(len(chosen)), f"{sentence(chosen)} ({verdicts})"])
    return markdown(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only these rows")
    arguments = parser.parse_args()

    if arguments.dataset_dir:
        bundle, always, _ = TASKS[arguments.task]
        for seed in arguments.seeds:
            for name in arguments.rows or ROWS_OF.get(arguments.task, RUNS):
                key = (arguments.task, name, str(seed))
                if key in {(row["task"], row["row"], row["seed"]) for row in finished(ROWS)}:
                    continue
                overlays, options = ROWS_OF.get(arguments.task, RUNS)[name]
                folder = arguments.output_dir / arguments.task / f"seed{seed}"
                options = {"forget_fraction": 0.1, "seed": seed, **options}
                report = run(bundle, (*always, *overlays), arguments.dataset_dir, folder, **options)
                append(ROWS, row_of(report, arguments.task, name, seed))
    for task in TASKS:
        rows = [row for row in finished(ROWS) if row["task"] == task]
        if rows:
            print(f"\n{task}\n\n{table(rows, task)}")


if __name__ == "__main__":
    main()
