# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Deletion of a random tenth of ISIC patients, against the retrained model; resumable, one CSV row per finished run.

    python benchmarks/isic_deletion.py --dataset_dir "$MONAI_UNLEARN_DATA/isic2018_seg" --output_dir /runs/isic
    python benchmarks/isic_deletion.py                       # prints the table of the rows there are

The methods of a seed share original, references and retrained model in one output folder. A whole seed takes about
15 minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rows import ROOT, append, costs, finished, markdown, run, share

ROWS = Path(__file__).with_suffix(".csv")
METHODS = ("default", "identity", "fine_tune", "background")
SPLITS = ("forget", "retain", "holdout")


def row_of(report: dict, method: str, seed: int) -> dict:
    """What the table needs of a report."""
    row: dict = {"method": method, "seed": seed, "verdict": report["verdict"],
                 "expected_unseen": report["expected_unseen"],
                 "n_forget": report["splits"]["forget"]}  # fmt: skip
    for model in ("original", "unlearned", "retrained"):
        row |= {f"{model}_{split}": report["scores"][model][split]["mean_iou"] for split in SPLITS}
        for kind in ("raw", "calibrated"):
            row[f"{model}_{kind}_auc"] = report["membership"][model][kind]["auc"]
    return row | costs(report, ("seconds", "images"))


def table(rows: list[dict]) -> str:
    """Means over seeds as Markdown; the smallest and the largest seed in brackets."""

    def cell(method_rows: list[dict], value) -> str:
        values = [value(row) for row in method_rows]
        spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.3f}{spread}"

    columns = {split: (lambda row, model, s=split: float(row[f"{model}_{s}"])) for split in SPLITS}
    columns["AUC raw"] = lambda row, model: float(row[f"{model}_raw_auc"])
    columns["AUC calibrated"] = lambda row, model: float(row[f"{model}_calibrated_auc"])
    shares = {
        "share of the retrain's seconds": ("seconds", ("cache", "train")),
        "with the reference": ("seconds", ("cache", "reference", "train")),
        "share of its image passes": ("images", ("cache", "train")),
        "with the reference ": ("images", ("cache", "reference", "train")),
    }
    lines = [["model", *columns, *shares, "verdict"]]
    first = [row for row in rows if row["method"] == "default"]
    for model in ("original", "retrained"):
        lines.append([model, *(cell(first, lambda row, c=c, m=model: c(row, m)) for c in columns.values()), *["–"] * 5])
    for method in METHODS:
        chosen = [row for row in rows if row["method"] == method]
        if chosen:
            cells = [cell(chosen, lambda row, c=c: c(row, "unlearned")) for c in columns.values()]
            costs = [cell(chosen, lambda row, s=s: share(row, *s)) for s in shares.values()]
            verdicts = "; ".join(sorted({row["verdict"] for row in chosen}))
            lines.append([method, *cells, *costs, verdicts])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", help="ISIC folder in the official layout, with a column fold in metadata.csv")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "bundles" / "isic_unlearn" / "output" / "benchmark")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.dataset_dir:
        for seed in arguments.seeds:
            for method in METHODS:
                if (method, str(seed)) not in {(row["method"], row["seed"]) for row in finished(ROWS)}:
                    overlays = () if method == "default" else (method,)
                    folder, options = arguments.output_dir / f"seed{seed}", {"forget_fraction": 0.1, "seed": seed}
                    report = run("isic_unlearn", overlays, arguments.dataset_dir, folder, **options)
                    append(ROWS, row_of(report, method, seed))
    print(table(finished(ROWS)))


if __name__ == "__main__":
    main()
