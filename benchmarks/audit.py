# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Does the audit tell what it has to: five models of known verdict on real ISIC, and how well it sees and expects.

    python benchmarks/audit.py --dataset_dir "$MONAI_UNLEARN_DATA/isic2018_seg" --output_dir /runs/audit
    python benchmarks/audit.py                               # prints the tables of the rows there are

Resumable: one CSV row per finished audit. *identity* is the original handed in as unlearned, *collapsed* comes from
gradient ascent on the forget set until its score is the retrained model's, *contradicting* learned empty masks for it.
Every audit gets the same references (tier 2, with a second retrained model). *fit* rows attack originals that were
trained for fewer epochs. The last table sets the expected score of the forget set beside the retrained model's, from
the rows of ``erase_to_retain.csv``.
"""

from __future__ import annotations

from pathlib import Path

from rows import ROOT, append, finished, markdown, parser_of, run

ROWS = Path(__file__).with_suffix(".csv")
OTHERS = Path(__file__).with_name("erase_to_retain.csv")
BUNDLE = "isic_unlearn"
CONTROLS = {"identity": "FAIL", "retrained": "no FAIL", "retrained_other": "no FAIL", "collapsed": "FAIL",
            "contradicting": "FAIL", "background": "FAIL", "default": "no FAIL"}  # fmt: skip
FIT = (8, 12, 20, 40)  # epochs of the original
ATTACKS = ("raw", "calibrated", "raw_loss", "calibrated_loss", "rmia")


def row_of(report: dict, name: str, seed: int) -> dict:
    """What the tables need of a report."""
    row: dict = {"row": name, "seed": seed, "verdict": report["verdict"], "reason": report["reasons"][0],
                 "tier": report["tier"], "threads": report["environment"]["threads"],
                 "n_forget": report["splits"]["forget"], "n_holdout": report["splits"]["holdout"],
                 "expected_unseen": report["expected_unseen"], "audit_seconds": report["cost"]["audit_seconds"],
                 "audit_flops": report["cost"]["audit_flops"]}  # fmt: skip
    for model in ("original", "unlearned", "retrained"):
        for split in ("forget", "retain", "holdout"):
            row[f"{model}_{split}"] = report["scores"].get(model, {}).get(split, {}).get("mean_iou")
        for kind in ATTACKS:
            row[f"{model}_{kind}"] = report["membership"].get(model, {}).get(kind, {}).get("auc")
    chosen = (report["strongest_attack"] or {}).get("unlearned") or {}
    row |= {"strongest": chosen.get("attack"), "strongest_auc": chosen.get("auc")}
    row["agreement"] = ((report["agreement"] or {}).get("unlearned") or {}).get("forget")
    row["agreement_floor"] = ((report["agreement"] or {}).get("retrained_other") or {}).get("forget")
    row["tug_of_war"] = (report["tug_of_war"] or {}).get("unlearned")
    return row


def make_controls(dataset_dir: str, folder: Path, seed: int) -> None:
    """Write the weights of the collapsed and the contradicting model."""
    import torch
    from monai.bundle import ConfigWorkflow

    from monai_unlearn import load_weights, save_weights, seeded
    from monai_unlearn.audit import score_cases
    from monai_unlearn.audit.conformance.controls import collapsed, trained
    from monai_unlearn.data import MemoryDataset

    flow = ConfigWorkflow(str(ROOT / "bundles" / BUNDLE / "configs" / "train.json"), workflow_type="train",
                          logging_file=False, dataset_dir=str(Path(dataset_dir).resolve()), forget_fraction=0.1,
                          seed=seed, output_dir=str(folder))  # fmt: skip
    flow.initialize()
    names = ("resolution", "network_factory", "train#preprocessing", "train#loss_function")
    resolution, factory, transform, loss = (flow.parser.get_parsed_content(name) for name in names)
    store: dict = {}
    forget = resolution.splits["forget"]

    def model(name: str) -> torch.nn.Module:
        return load_weights(seeded(factory, 0), folder / "models" / f"{name}.pt").eval()

    def sample(item: dict) -> dict:
        found = MemoryDataset([item], transform, store)[0]
        return {**found, "label": torch.zeros_like(found["label"])} if item["forget"] else found

    target = float(score_cases(model("retrained"), MemoryDataset(forget, transform, store))["iou"].mean())
    fell = collapsed(model("original"), forget, target, transform=transform, loss=loss, learning_rate=3e-2)
    save_weights(fell, folder / "controls" / "collapsed.pt")
    against = trained(resolution.training, seed, 4, "contradicting", model("original"), sample, loss, 1e-3)
    save_weights(against, folder / "controls" / "contradicting.pt")


def controls_table(rows: list[dict]) -> str:
    """The verdicts, and what the numbers behind them were."""
    lines = [["handed in as unlearned", "right verdict", "verdict", "forget", "retain", "holdout", "AUC raw",
              "calibrated", "RMIA", "strongest", "tug of war", "agreement (floor)", "first reason"]]  # fmt: skip

    def number(text: str) -> str:
        return f"{float(text):.3f}" if text else "–"

    for row in sorted(rows, key=lambda row: (row["seed"], list(CONTROLS).index(row["row"]))):
        lines.append([
            row["row"], CONTROLS[row["row"]], row["verdict"],
            *(number(row[f"unlearned_{key}"]) for key in ("forget", "retain", "holdout", "raw", "calibrated", "rmia")),
            f"{number(row['strongest_auc'])} {row['strongest'].replace('_', ' ')}", number(row["tug_of_war"]),
            f"{number(row['agreement'])} ({number(row['agreement_floor'])})", row["reason"],
        ])  # fmt: skip
    return markdown(lines)


def fit_table(rows: list[dict]) -> str:
    """What each attack finds in originals that fit their training data more and more."""
    lines = [["epochs", "forget", "holdout", *(kind.replace("_", " ") for kind in ATTACKS), "verdict on identity"]]
    for row in sorted(rows, key=lambda row: int(row["row"].split()[1])):
        lines.append([row["row"], *(f"{float(row[f'original_{key}']):.3f}" for key in ("forget", "holdout", *ATTACKS)),
                      row["verdict"]])  # fmt: skip
    return markdown(lines)


def expected_table(rows: list[dict]) -> str:
    """The expected score of the forget set beside the retrained model's."""
    lines = [["data", "seed", "n", "expected", "retrained", "difference"]]
    for row in rows:
        if row["row"] == "default" and row["retrained_forget"]:
            expected, right = float(row["expected_unseen"]), float(row["retrained_forget"])
            cells = [f"{expected:.3f}", f"{right:.3f}", f"{expected - right:+.3f}"]
            lines.append([row["task"], row["seed"], row["n_forget"], *cells])
    return markdown(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def measured(name: str) -> bool:
        return (name, str(arguments.seed)) in {(row["row"], row["seed"]) for row in finished(ROWS)}

    if arguments.dataset_dir:
        folder, options = (
            arguments.output_dir / f"seed{arguments.seed}",
            {"forget_fraction": 0.1, "seed": arguments.seed},
        )
        for name, overlays in (("default", ()), ("background", ("background",))):
            if not measured(name):
                report = run(BUNDLE, overlays, arguments.dataset_dir, folder, with_retrained=2, **options)
                append(ROWS, row_of(report, name, arguments.seed))
        if not (folder / "controls" / "contradicting.pt").exists():
            make_controls(arguments.dataset_dir, folder, arguments.seed)
        models = {name: (folder / "models" / f"{name}.pt").absolute()
                  for name in ("original", "retrained", "retrained_other", "reference", "judge")}  # fmt: skip
        made = {name: (folder / "controls" / f"{name}.pt").absolute() for name in ("collapsed", "contradicting")}
        for name in ("identity", "retrained", "retrained_other", "collapsed", "contradicting"):
            if measured(name):
                continue
            others = ("retrained_other", "retrained") if name == "retrained" else ("retrained", "retrained_other")
            second = 2 if name in ("identity", "collapsed", "contradicting") else 1
            report = run(
                BUNDLE, (), arguments.dataset_dir, folder / "audits" / name, "audit", holdout_fold=4, relearn_steps=0,
                original_model=models["original"], unlearned_model={"identity": models["original"], **made}.get(name)
                or models[name], retrained_model=models[others[0]], retrained_other_model=models[others[1]],
                reference_models=[str(models["reference"]), str(models["judge"])], with_retrained=second, **options,
            )  # fmt: skip
            append(ROWS, row_of(report, name, arguments.seed))
        for epochs in FIT:
            if not measured(f"fit {epochs} epochs"):
                report = run(
                    BUNDLE, ("identity",), arguments.dataset_dir, arguments.output_dir / f"fit{epochs}",
                    original_epochs=epochs, with_retrained=0, relearn_steps=0, **options,
                )  # fmt: skip
                append(ROWS, row_of(report, f"fit {epochs} epochs", arguments.seed))
    rows = finished(ROWS)
    print(f"\nmodels of known verdict\n\n{controls_table([row for row in rows if row['row'] in CONTROLS])}")
    print(f"\noriginals of more and more epochs\n\n{fit_table([row for row in rows if row['row'].startswith('fit')])}")
    print(f"\nexpected of the forget set\n\n{expected_table(finished(OTHERS))}")


if __name__ == "__main__":
    main()
