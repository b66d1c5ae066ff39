# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Suppression of a class of the nine-class ISIC folders, against the retrained model; resumable, one CSV row per run.

    python benchmarks/class_suppression.py --dataset_dir "$MONAI_UNLEARN_DATA/isic_cls" --output_dir /runs/suppression
    python benchmarks/class_suppression.py                    # prints the table of the rows there are

The class is *vascular lesion*. All methods share original and retrained model. ``retrained, other seed`` is a second
model that never saw the class: how far two such models differ is the floor of every other row.
"""

from __future__ import annotations

import json
from pathlib import Path

from rows import append, costs, finished, markdown, parser_of, run, share

ROWS = Path(__file__).with_suffix(".csv")
CLASS = "vascular lesion"
BUNDLE = "isic_classification_unlearn"
OTHER_SEED = "retrained, other seed"
METHODS = ("default", "delete", "logit_mask", OTHER_SEED)
MODELS = ("original", "unlearned", "retrained")


def row_of(report: dict, method: str) -> dict:
    """What the table needs of a report."""
    found = report["suppression"]
    row: dict = {"class": found["class"], "method": method, "verdict": report["verdict"]}
    row |= {"unseen_members": found["unseen_members"], "threads": report["environment"]["threads"]}
    for model in MODELS:
        row |= {f"{model}_{key}": found[key][model] for key in ("f1_unseen", "macro_f1_others", "linear_probe")}
        row |= {f"{model}_{split}": report["scores"][model][split]["accuracy"] for split in ("retain", "holdout_other")}
        row[f"{model}_relearn"] = json.dumps(
            {at["steps"]: round(at["f1"], 3) for at in report["relearn"]["few_shot"][model]}
        )
    return row | costs(report, ("seconds", "flops"))


def table(rows: list[dict]) -> str:
    """Original, retrained and every method, with the bars they meet."""
    head = ["F1 on unseen members", "macro-F1 of the others", "linear probe, AUC", "accuracy retain", "unseen, others"]
    lines = [["", *head, "relearning: F1 after 0 1 2 5 10 20 40 steps", "FLOPs, share of the retrain", "verdict"]]

    def line(name: str, row: dict, model: str, cost: str, verdict: str) -> list[str]:
        keys = ("f1_unseen", "macro_f1_others", "linear_probe", "retain", "holdout_other")
        curve = " ".join(f"{value:.2f}" for value in json.loads(row[f"{model}_relearn"]).values())
        return [name, *(f"{float(row[f'{model}_{key}']):.3f}" for key in keys), curve, cost, verdict]

    lines.append(line("original", rows[0], "original", "", ""))
    lines.append(line("retrained", rows[0], "retrained", "1", ""))
    for row in rows:
        cost = f"{share(row, 'flops'):.3f}" if row["train_flops"] else "1"
        lines.append(line(row["method"], row, "unlearned", cost, row["verdict"]))
    return markdown(lines)


def main() -> None:
    parser = parser_of(__doc__, "the nine-class folders")
    arguments = parser.parse_args()
    if arguments.dataset_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        request = arguments.output_dir / "request.yaml"
        request.write_text(f"id: suppression\njob: suppression\nselector: {{class: {CLASS}}}\n")
        for method in METHODS:
            if method not in {row["method"] for row in finished(ROWS)}:
                overlays = () if method in ("default", OTHER_SEED) else (method,)
                options = {"forget_request": str(request.absolute()), "seed": 0}
                folder, data = arguments.output_dir, arguments.dataset_dir
                if method == OTHER_SEED:
                    run(BUNDLE, (), data, folder / "other", "retrain", network_seed=1, **options)
                    options["unlearned_model"] = str((folder / "other" / "models" / "retrained.pt").absolute())
                append(ROWS, row_of(run(BUNDLE, overlays, data, folder, **options), method))
    print(table(finished(ROWS)))


if __name__ == "__main__":
    main()
