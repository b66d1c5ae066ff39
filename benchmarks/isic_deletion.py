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
import csv
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = Path(__file__).with_suffix(".csv")
METHODS = ("default", "identity", "fine_tune", "background")
SPLITS = ("forget", "retain", "holdout")


def run(method: str, seed: int, dataset_dir: str, output_dir: Path) -> dict:
    """Run one method on one seed, and return its report."""
    train = "bundles/isic_unlearn/configs/train.json"
    config = train if method == "default" else f"['{train}','bundles/isic_unlearn/configs/methods/{method}.json']"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config, "--dataset_dir", dataset_dir,
               "--forget_fraction", "0.1", "--with_retrained", "1", "--seed", str(seed),
               "--output_dir", str(output_dir / f"seed{seed}")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((output_dir / f"seed{seed}" / "report.json").read_text())


def row_of(report: dict, method: str, seed: int) -> dict:
    """What the table needs of a report."""
    row: dict = {"method": method, "seed": seed, "verdict": report["verdict"],
                 "expected_unseen": report["expected_unseen"],
                 "n_forget": report["splits"]["forget"]}  # fmt: skip
    for model in ("original", "unlearned", "retrained"):
        row |= {f"{model}_{split}": report["scores"][model][split]["mean_iou"] for split in SPLITS}
        for kind in ("raw", "calibrated"):
            row[f"{model}_{kind}_auc"] = report["membership"][model][kind]["auc"]
    for unit in ("seconds", "images"):
        for part in ("cache", "reference", "train", "unlearn", "retrain"):
            row[f"{part}_{unit}"] = report["cost"][f"{part}_{unit}"]
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def table(rows: list[dict]) -> str:
    """Means over seeds as Markdown; the smallest and the largest seed in brackets."""

    def cell(method_rows: list[dict], value) -> str:
        values = [value(row) for row in method_rows]
        spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.3f}{spread}"

    def share(row: dict, unit: str, parts: tuple[str, ...]) -> float:
        return sum(float(row[f"{part}_{unit}"]) for part in parts) / float(row[f"retrain_{unit}"])

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
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", help="ISIC folder in the official layout, with a column fold in metadata.csv")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "bundles" / "isic_unlearn" / "output" / "benchmark")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    rows = list(csv.DictReader(ROWS.open())) if ROWS.exists() else []
    if arguments.dataset_dir:
        for seed in arguments.seeds:
            for method in METHODS:
                if not any(row["method"] == method and int(row["seed"]) == seed for row in rows):
                    rows.append(row_of(run(method, seed, arguments.dataset_dir, arguments.output_dir), method, seed))
                    with ROWS.open("w", newline="") as file:
                        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                        writer.writeheader()
                        writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
