# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Our default beside every method people would otherwise pick, against the retrained model, on real data.

    python benchmarks/medunlearn.py --data isic --dataset_dir "$MONAI_UNLEARN_DATA/isic2018_seg" --output_dir /runs
    python benchmarks/medunlearn.py --data isic --dataset_dir ... --output_dir /runs --quick
    python benchmarks/medunlearn.py                           # prints the tables of the rows there are

Resumable: one CSV row per finished run. The runs of a seed and a request share original, references and two retrained
models of different seeds, whose difference is the floor: no method can be asked to come closer. Each run is audited
with a judge that taught nobody, without relearning. ``--quick`` runs three methods of one seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rows import PARTS, ROOT, append, costs, finished, markdown, run, share

from monai_unlearn import audit

ROWS = Path(__file__).with_suffix(".csv")
BUNDLES = {"isic": "isic_unlearn", "isic_classification": "isic_classification_unlearn",
           "hippocampus": "hippocampus_unlearn", "chase": "chase_unlearn"}  # fmt: skip
OURS = {"default": ((), {}), "standard": ((), {"durability": "standard"})}
METHODS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    **OURS,
    **{name: ((name,), {}) for name in ("identity", "fine_tune", "neggrad_plus", "salun", "scrub", "bad_teacher",
                                        "erase_to_retain", "l1_sparse", "gradient_ascent", "random_label", "msg", "ssd",
                                        "cf_k", "eu_k")},
}  # fmt: skip
CORE = [*OURS, "identity", "fine_tune", "neggrad_plus", "salun", "scrub", "bad_teacher", "erase_to_retain"]
QUICK = ["default", "identity", "fine_tune"]
SPLITS = ("forget", "retain", "holdout")
MODELS = ("original", "unlearned", "retrained", "retrained_other")


def row_of(report: dict, data: str, request: str, method: str, seed: int) -> dict:
    """What the tables need of a report."""
    row: dict = {"data": data, "request": request, "method": method, "seed": seed, "verdict": report["verdict"],
                 "n_forget": report["splits"]["forget"], "expected_unseen": report["expected_unseen"],
                 "threads": report["environment"]["threads"]}  # fmt: skip
    key = "accuracy" if "accuracy" in report["scores"]["original"]["holdout"] else "mean_iou"
    for model in MODELS:
        row |= {f"{model}_{split}": report["scores"][model][split][key] for split in SPLITS}
        row[f"{model}_auc"] = report["membership"].get(model, {}).get("calibrated", {}).get("auc")
        strongest = (report["strongest_attack"] or {}).get(model) or {}
        row |= {f"{model}_strongest": strongest.get("auc"), f"{model}_strongest_attack": strongest.get("score")}
        for measure in ("agreement", "js"):
            row |= {f"{model}_{split}_{measure}": report[measure].get(model, {}).get(split) for split in SPLITS}
    row["tug_of_war"] = report["tug_of_war"]["unlearned"]
    return row | costs(report, ("seconds", "flops", "images"))


def mean(rows: list[dict], value) -> str:
    """The mean of a value over rows, with the smallest and the largest where there are several."""
    values = [value(row) for row in rows]
    spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3f}{spread}"


def gaps(row: dict, model: str) -> list[float]:
    """Differences to the retrained model in forget, retain and holdout score."""
    return [float(row[f"{model}_{split}"]) - float(row[f"retrained_{split}"]) for split in SPLITS]


def table(rows: list[dict]) -> str:
    """One row per method; the second retrained model is the floor."""
    lines = [["", *SPLITS, "AUC calibrated", "average gap", "ToW", "forget: agreement", "JS", "retain: agreement", "JS",
              "FLOPs, share of the retrain", "without the reference", "seeds", "verdict"]]  # fmt: skip
    first = list({row["seed"]: row for row in rows}.values())

    def cells(chosen: list[dict], model: str) -> list[str]:
        fields = [*SPLITS, "auc"]
        return [mean(chosen, lambda row, f=f: float(row[f"{model}_{f}"])) if chosen[0][f"{model}_{f}"] else "–"
                for f in fields]  # fmt: skip

    def beside(chosen: list[dict], model: str) -> list[str]:
        fields = [f"{split}_{measure}" for split in ("forget", "retain") for measure in ("agreement", "js")]
        return [mean(chosen, lambda row: sum(map(abs, gaps(row, model))) / len(SPLITS)),
                mean(chosen, lambda row: audit.tug_of_war(gaps(row, model))),
                *(mean(chosen, lambda row, f=f: float(row[f"{model}_{f}"])) for f in fields)]  # fmt: skip

    lines.append(["retrained", *cells(first, "retrained"), *[""] * 6, "1", "1", str(len(first)), ""])
    for model, label in (("retrained_other", "retrained, other seed (floor)"), ("original", "original")):
        lines.append([label, *cells(first, model), *beside(first, model), "", "", str(len(first)), ""])
    for name in METHODS:
        chosen = [row for row in rows if row["method"] == name]
        if chosen:
            shares = [mean(chosen, lambda row, parts=parts: share(row, "flops", parts))
                     for parts in (PARTS, ("cache", "train"))]  # fmt: skip
            verdicts = "; ".join(sorted({row["verdict"] for row in chosen}))
            lines.append([name, *cells(chosen, "unlearned"), *beside(chosen, "unlearned"), *shares,
                          str(len(chosen)), verdicts])  # fmt: skip
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=BUNDLES)
    parser.add_argument("--dataset_dir", help="the real data; without it the tables are printed")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=CORE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="three methods, seed 0")
    arguments = parser.parse_args()

    if arguments.dataset_dir:
        methods, seeds = (QUICK, [0]) if arguments.quick else (arguments.methods, arguments.seeds)
        for seed in seeds:
            for name in methods:
                key = (arguments.data, "random", name, str(seed))
                if key in {(row["data"], row["request"], row["method"], row["seed"]) for row in finished(ROWS)}:
                    continue
                overlays, options = METHODS[name]
                folder = arguments.output_dir / arguments.data / f"seed{seed}"
                given = {"forget_fraction": 0.1, "seed": seed, "with_retrained": 2, "relearn_steps": 0, **options}
                report = run(BUNDLES[arguments.data], overlays, arguments.dataset_dir, folder, **given)
                append(ROWS, row_of(report, arguments.data, "random", name, seed))
    for data in BUNDLES:
        rows = [row for row in finished(ROWS) if row["data"] == data]
        for request in sorted({row["request"] for row in rows}):
            print(f"\n{data}, {request}\n\n{table([row for row in rows if row['request'] == request])}")


if __name__ == "__main__":
    main()
