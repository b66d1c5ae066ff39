# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Can an unlearned model be told from three retrained ones by what it answers, better than these from each other?

    python benchmarks/distances.py --dataset_dir "$MONAI_UNLEARN_DATA/isic2018_seg" --output_dir /runs
    python benchmarks/distances.py                           # prints the tables of the rows there are

Resumable: one CSV row for each model of a seed; the models are those of ``durability.py``. Scores, agreement (Dice of
the two models' masks) and Jensen-Shannon divergence (bits a pixel) are means over cases. The floor is what lies between
three retrained models that differ in their seed alone. Each attack that takes out how hard a case is is held against
the first retrained one, over the same patients; the strongest is chosen on the first seed and reported on the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from durability import DATA, RETRAINED, UNLEARNED, missing, networks
from medunlearn import SPLITS, mean
from rows import append, finished, markdown, parser_of
from torch import nn

from monai_unlearn import MemoryDataset
from monai_unlearn.audit import attack_difference, attacked_scores, compare_cases, score_cases
from monai_unlearn.audit.scores import main_score

ROWS = Path(__file__).with_suffix(".csv")
MODELS = ("original", *(name for name in UNLEARNED if name != "standard"), *RETRAINED)
KEYS = ("agreement", "js")
TOLD = ("difference", "low", "high")  # of an attack


def row_of(
    name: str, network: nn.Module, get: Callable[[str], Any], retrained: Mapping[str, nn.Module]
) -> dict[str, float | str]:
    """A network's scores, its distances to each retrained model but itself, how much more each attack finds of it."""
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
    out = get("judges").score(attacked, **options)
    for kind in attacked_scores(scores, out, groups):
        if kind.startswith("raw"):
            continue
        apart = attack_difference(scores, beside, out, groups, get("seed"), kind)
        if apart is None:
            raise ValueError("an attack needs two patients on each side.")
        row |= dict(zip([f"{kind}_{key}" for key in TOLD], [apart["difference"], *apart["ci"]], strict=True))
    return row


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
    return [*found, *attack_tables(seeds)] if complete else []


def attack_tables(seeds: Mapping[str, Mapping[str, Mapping[str, str]]]) -> list[str]:
    """What attacks find beyond the first retrained model: the calibrated one, and the strongest of the first seed."""
    first, *others = seeds
    kinds = [column.removesuffix("_difference") for column in seeds[first][MODELS[0]] if column.endswith("_difference")]

    def told(of: Mapping[str, str], kind: str) -> str:
        at, low, high = (float(of[f"{kind}_{key}"]) for key in TOLD)
        return f"{at:+.3f} [{low:+.3f}, {high:+.3f}]"

    def average(name: str, kind: str, over: Sequence[str]) -> str:
        return f"{np.mean([float(seeds[seed][name][f'{kind}_difference']) for seed in over]):+.3f}"

    calibrated = [["calibrated AUC minus the retrained model's", "mean", *(f"seed {seed}" for seed in seeds)]]
    strongest = [["strongest AUC minus the retrained model's", f"chosen on seed {first}", f"seed {first}",
                  "mean of the others", *(f"seed {seed}" for seed in others)]]  # fmt: skip
    for name in MODELS:
        own = [told(of[name], "calibrated") for of in seeds.values()]
        calibrated.append([name, average(name, "calibrated", list(seeds)), *own])
        kind = max(kinds, key=lambda kind: abs(float(seeds[first][name][f"{kind}_difference"])))
        if others and name != RETRAINED[0]:
            own = [told(seeds[seed][name], kind) for seed in others]
            strongest.append([name, kind.replace("_", " "), told(seeds[first][name], kind),
                              average(name, kind, others), *own])  # fmt: skip
    return [markdown(calibrated), *([markdown(strongest)] if others and len(kinds) > 1 else [])]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.dataset_dir:
        dataset_dir = str(Path(arguments.dataset_dir).absolute())
        for seed in arguments.seeds:
            place, wanted = (seed, dataset_dir, arguments.output_dir), missing(ROWS, seed, MODELS)
            retrained = {name: one for name, one, _ in networks(*place, RETRAINED if wanted else ())}
            for name, network, get in networks(*place, wanted):
                row = row_of(name, network, get, retrained)
                append(ROWS, {"data": DATA, "seed": seed, "method": name, **row})
    print("\n\n".join(tables(finished(ROWS))))


if __name__ == "__main__":
    main()
