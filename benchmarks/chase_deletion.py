# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Deletion of one child of CHASE_DB1, both eyes, against the retrained model; five children, one seed each; resumable.

    python benchmarks/chase_deletion.py --dataset_dir "$MONAI_UNLEARN_DATA/chase_db1" --output_dir /runs/chase
    python benchmarks/chase_deletion.py                       # prints the table of the rows there are

Observer 1, half resolution, children 11 to 14 held out. All children share the original of seed 0.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

from rows import append, costs, finished, markdown, parser_of, run, share

ROWS = Path(__file__).with_suffix(".csv")
CHILDREN = ("02", "04", "05", "07", "09")
MODELS = ("original", "unlearned", "retrained")


def row_of(report: dict, child: str) -> dict:
    """What the table needs of a report."""
    row: dict = {"child": child, "verdict": report["verdict"], "reason": report["reasons"][0]}
    row |= {"expected_unseen_iou": report["expected_unseen"], "threads": report["environment"]["threads"]}
    for model in MODELS:
        for split in ("forget", "retain", "holdout"):
            scores = report["scores"][model][split]
            row |= {f"{model}_{split}_{name}": scores[f"mean_{name}"] for name in ("dice", "iou", "cldice")}
    return row | costs(report, ("seconds", "flops"))


def table(rows: list[dict]) -> str:
    """Every child and the median, Dice inside the field of view."""
    head = ["child", "child: original", "unlearned", "retrained", "gap", "holdout: original", "unlearned", "retrained",
            "gap", "clDice holdout: unlearned", "retrained", "FLOPs, share", "remembered", "verdict"]  # fmt: skip
    names = [f"{model}_{split}_dice" for split in ("forget", "holdout") for model in MODELS]

    def values(row: dict) -> list[float]:
        dice = [float(row[name]) for name in names]
        cldice = [float(row[f"{model}_holdout_cldice"]) for model in MODELS[1:]]
        return [*dice[:3], dice[1] - dice[2], *dice[3:], dice[4] - dice[5], *cldice, share(row, "flops")]

    found = {row["child"]: values(row) for row in rows}
    lines = [head]
    for row in rows:
        cells = [f"{value:.3f}" for value in found[row["child"]]]
        memory = found[row["child"]][0] - found[row["child"]][2]
        lines.append([row["child"], *cells, "yes" if memory >= 0.04 else f"no ({memory:+.3f})", row["verdict"]])
    lines.append(["median", *(f"{median(column):.3f}" for column in zip(*found.values())), "", ""])
    return markdown(lines)


def main() -> None:
    parser = parser_of(__doc__, "the folder of CHASE_DB1")
    arguments = parser.parse_args()
    if arguments.dataset_dir:
        for child in CHILDREN:
            if child not in {row["child"] for row in finished(ROWS)}:
                options = {"forget_ids": f"['{child}L']", "seed": 0}
                report = run("chase_unlearn", (), arguments.dataset_dir, arguments.output_dir / "children", **options)
                append(ROWS, row_of(report, child))
    print(table(finished(ROWS)))


if __name__ == "__main__":
    main()
