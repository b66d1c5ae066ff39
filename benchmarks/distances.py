# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Can an unlearned model be told from three retrained ones by what it answers, better than these from each other?

    python benchmarks/distances.py --dataset_dir "$MONAI_UNLEARN_DATA/isic2018_seg" --output_dir /runs
    python benchmarks/distances.py                           # prints the tables of the rows there are

Resumable: one CSV row for each model of a seed; the models are those of ``durability.py``. Scores, agreement (Dice of
the two models' masks) and Jensen-Shannon divergence (bits a pixel) are means over cases. The floor is what lies between
three retrained models that differ in their seed alone. The calibrated attack is held against the first retrained one,
over the same patients.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from durability import RETRAINED, UNLEARNED, missing, networks
from medunlearn import SPLITS, mean
from rows import ROOT, append, finished, markdown
from torch import nn

from monai_unlearn import MemoryDataset
from monai_unlearn.audit import attack_difference, compare_cases, score_cases
from monai_unlearn.audit.scores import main_score

ROWS = Path(__file__).with_suffix(".csv")
MODELS = ("original", *(name for name in UNLEARNED if name != "standard"), *RETRAINED)
KEYS = ("agreement", "js")


def row_of(
    name: str, network: nn.Module, get: Callable[[str], Any], retrained: Mapping[str, nn.Module]
) -> dict[str, float | str]:
    """A network's scores, its distances to each retrained model but itself, and how much more an attack finds of it."""
    row: dict[str, float | str] = {}
    options = {"device": get("device"), "inferer": get("validate#inferer")}
    others = {other: one for other, one in retrained.items() if other != name}
    splits = {**get("resolution").splits, "holdout": get("resolution").holdout}
    cases = {split: MemoryDataset(splits[split], get("validate#preprocessing"), get("store")) for split in SPLITS}
    scores = {split: score_cases(network, cases[split], **options) for split in SPLITS}
    for split in SPLITS:
        row[f"{split}_score"] = float(scores[split][main_score(scores[split])].mean())
        found = compare_cases({name: network, **others}, name, cases[split], **options)
        for key in KEYS:
            row |= {f"{split}_{key}_{other}": float(found[other][key].mean()) if other in found else ""
                    for other in RETRAINED}  # fmt: skip
    attacked = {split: cases[split] for split in ("forget", "holdout")}
    beside = {split: score_cases(retrained["retrained"], of, **options) for split, of in attacked.items()}
    groups = {split: [item["group"] for item in splits[split]] for split in attacked}
    apart = attack_difference(scores, beside, get("judges").score(attacked, **options), groups, seed=get("seed"))
    if apart is None:
        raise ValueError("an attack needs two patients on each side.")
    return row | {"auc_difference": apart["difference"], "auc_low": apart["ci"][0], "auc_high": apart["ci"][1]}


def tables(rows: list[dict]) -> list[str]:
    """For each split the mean distances to the three retrained models and the floor; the attacks. Of whole seeds."""
    found_of: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        found_of[row["seed"]][row["method"]] = row
    seeds = {seed: of for seed, of in found_of.items() if len(of) == len(MODELS)}
    complete = list(seeds.values())

    def shown(names: tuple[str, ...], *columns: str, digits: int = 3) -> str:
        """The mean of columns over models, seed by seed; a model has no distance to itself."""

        def value(of: dict[str, dict]) -> float:
            values = [of[name][column] for name in names for column in columns]
            return float(np.mean([float(one) for one in values if one != ""]))

        return mean(complete, value, digits)

    found = []
    for split in SPLITS if complete else ():
        lines = [[split, "score", *KEYS]]
        models: dict[str, tuple[str, ...]] = {name: (name,) for name in MODELS}
        for label, names in {**models, "retrained models, to each other (floor)": RETRAINED}.items():
            distances = [shown(names, *(f"{split}_{key}_{other}" for other in RETRAINED), digits=4) for key in KEYS]
            lines.append([label, shown(names, f"{split}_score"), *distances])
        found.append(markdown(lines))
    attacks = [["calibrated AUC minus the retrained model's", "mean", *(f"seed {seed}" for seed in seeds)]]
    for name in MODELS if complete else ():
        told = [[float(of[name][f"auc_{key}"]) for key in ("difference", "low", "high")] for of in complete]
        average = np.mean([difference for difference, _, _ in told])
        attacks.append([name, f"{average:+.3f}", *(f"{at:+.3f} [{low:+.3f}, {high:+.3f}]" for at, low, high in told)])
    return [*found, markdown(attacks)] if complete else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", help="the real data; without it the tables are printed")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.dataset_dir:
        dataset_dir = str(Path(arguments.dataset_dir).absolute())
        for seed in arguments.seeds:
            place = ("isic", seed, dataset_dir, arguments.output_dir / "isic" / f"seed{seed}")
            wanted = missing(ROWS, "isic", seed, MODELS)
            retrained = {name: one for name, one, _ in networks(*place, RETRAINED if wanted else ())}
            for name, network, get in networks(*place, wanted):
                row = row_of(name, network, get, retrained)
                append(ROWS, {"data": "isic", "seed": seed, "method": name, **row})
    print("\n\n".join(tables(finished(ROWS))))


if __name__ == "__main__":
    main()
