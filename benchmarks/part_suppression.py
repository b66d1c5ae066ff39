# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Suppression of the posterior hippocampus in 3D, by what its voxels are taught; resumable, one CSV row per run.

    python benchmarks/part_suppression.py --dataset_dir "$MONAI_UNLEARN_DATA/volumes/Task04_Hippocampus"
    python benchmarks/part_suppression.py                     # prints the table of the rows there are

All methods share the original. The retrained model was taught that the part is the rest of the organ (for
``boundary_free`` that it is background).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rows import append, costs, finished, markdown, parser_of, run, share

ROWS = Path(__file__).with_suffix(".csv")
BUNDLE, PART = "hippocampus_unlearn", "posterior"
METHODS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "default": ((), {}),
    "adapters on the original": (("adapters",), {}),
    "background": (("adapters", "background"), {}),
    "random_label": (("adapters", "random_label"), {}),
    "boundary_free": (("adapters", "boundary_free"), {}),
}
OWN_RETRAIN = ("boundary_free",)
KEYS = ("dice_unseen", "dice_merged", "dice_others", "linear_probe")
MODELS = ("original", "unlearned", "retrained")


def row_of(report: dict, method: str) -> dict:
    """What the table needs of a report."""
    found = report["suppression"]
    row: dict = {"part": found["class"], "method": method, "verdict": report["verdict"]}
    row |= {"unseen": found["unseen_members"], "threads": report["environment"]["threads"]}
    row |= {f"{model}_{key}": found[key][model] for model in MODELS for key in KEYS}
    crossed = (report["relabelling"] or {}).get("mean_crossed")
    return row | {"crossed": crossed} | costs(report, ("seconds", "flops"))


def table(rows: list[dict]) -> str:
    """Original, retrained and every method."""
    head = [f"Dice of the {PART} part", "both parts as one", "the other part", "linear probe, AUC"]
    lines = [["unseen volumes", *head, "FLOPs, share of the retrain", "verdict"]]

    def line(name: str, row: dict, model: str, cost: str, verdict: str) -> list[str]:
        return [name, *(f"{float(row[f'{model}_{key}']):.3f}" for key in KEYS), cost, verdict]

    for name, row in (("retrained", rows[0]), *((row["method"], row) for row in rows if row["method"] in OWN_RETRAIN)):
        label = "retrained" if name == "retrained" else f"retrained, {name}"
        lines.append(line(label, row, "retrained", "1", ""))
    lines.insert(1, line("original", rows[0], "original", "", ""))
    for row in rows:
        lines.append(line(row["method"], row, "unlearned", f"{share(row, 'flops'):.3f}", row["verdict"]))
    return markdown(lines)


def main() -> None:
    parser = parser_of(__doc__, "the folder of the task")
    arguments = parser.parse_args()
    if arguments.dataset_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        request = arguments.output_dir / "request.yaml"
        request.write_text(f"id: part\njob: suppression\nselector: {{class: {PART}}}\n")
        for method, (overlays, options) in METHODS.items():
            if method in {row["method"] for row in finished(ROWS)}:
                continue
            folder = arguments.output_dir / ("free" if method in OWN_RETRAIN else "organ")
            shared = arguments.output_dir / "organ" / "models"
            if method in OWN_RETRAIN and shared.exists() and not folder.exists():
                (folder / "models").mkdir(parents=True)
                for name in ("original.pt", "original.json"):
                    shutil.copy(shared / name, folder / "models" / name)
            given = {"forget_request": request.absolute(), "seed": 0, **options}
            append(ROWS, row_of(run(BUNDLE, overlays, arguments.dataset_dir, folder, **given), method))
    if finished(ROWS):
        print(table(finished(ROWS)))


if __name__ == "__main__":
    main()
