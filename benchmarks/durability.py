# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Does it stay forgotten, when training goes on, the set is learned again, or weights are rounded?

    python benchmarks/durability.py --dataset_dir "$MONAI_UNLEARN_DATA/isic2018_seg" --output_dir /runs
    python benchmarks/durability.py                          # prints the tables of the rows there are

Resumable: one CSV row for each model of a seed and order of batches. Original, references and two retrained models are
those of ``medunlearn.py``, where it has run in the same folder; a third is trained beside them. *benign* trains a copy
on retained cases, *unrelated* on unseen ones, *relearn* on the forget set itself, for the number of steps behind it;
what is scored is the forget set. The floor is what lies between three retrained models that differ in their seed alone.
The order in which batches come moves single steps by as much, so some models are taught in several orders.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from medunlearn import BUNDLES, METHODS, OURS, VIEWS, content_of, fold_models, mean, third_retrained
from rows import append, finished, markdown, parser_of, run
from torch import nn

from monai_unlearn import MemoryDataset, load_weights
from monai_unlearn.audit import score_cases
from monai_unlearn.audit.durability import relearn_curve, rounded
from monai_unlearn.audit.scores import main_score

ROWS = Path(__file__).with_suffix(".csv")
DATA = "isic"
STEPS = (0, 5, 10, 20, 40, 60)
TAUGHT = {"benign": "retain", "unrelated": "holdout", "relearn": "forget"}
PRECISIONS = ("int8", "int4")
RETRAINED = ("retrained", "retrained_other", "retrained_third")
UNLEARNED = (*OURS, *VIEWS)
MODELS = ("original", *UNLEARNED, *RETRAINED)
ORDERS = 3  # of batches, for these; the others are taught in one
OFTEN = ("default", "views_hardened", "folds_and_views_hardened", *RETRAINED)
SHOWN = ("benign_20", "benign_60", "unrelated_20", "unrelated_60", *(f"relearn_{step}" for step in STEPS[1:]),
         *PRECISIONS)  # fmt: skip


def row_of(network: nn.Module, get: Callable[[str], Any], order: int = 0) -> dict[str, float]:
    """The forget score of a network as it is, after each number of steps on each set, and rounded."""
    splits = {**get("resolution").splits, "holdout": get("resolution").holdout}
    cases = {name: MemoryDataset(splits[name], get("validate#preprocessing"), get("store")) for name in TAUGHT.values()}
    options = {"device": get("device"), "inferer": get("validate#inferer")}
    row = {}
    for kind, taught in TAUGHT.items():
        curve = relearn_curve(network, cases[taught], cases["forget"], get("train#loss_function"), STEPS,
                              seed=get("seed") + 100 * order, desc=kind, **options)  # fmt: skip
        row |= {f"{kind}_{at['steps']}": at["score"] for at in curve}
    for precision in PRECISIONS:
        scores = score_cases(rounded(network, precision), cases["forget"], **options)
        row[precision] = float(scores[main_score(scores)].mean())
    return row


def missing(path: Path, seed: int, names: Sequence[str], often: Sequence[str] = ()) -> dict[str, list[int]]:
    """The models of a seed that lack rows, with the orders of batches that they lack."""
    there = {(row["seed"], row["method"], int(row.get("order", 0))) for row in finished(path)}
    lacking = {name: [order for order in range(ORDERS if name in often else 1) if (str(seed), name, order) not in there]
               for name in names}  # fmt: skip
    return {name: orders for name, orders in lacking.items() if orders}


def networks(
    seed: int, dataset_dir: str, output_dir: Path, names: Collection[str]
) -> Iterator[tuple[str, nn.Module, Callable[[str], Any]]]:
    """Models of a run by name, made where they are missing, each with what its configuration holds."""
    bundle, folder = BUNDLES[DATA], output_dir / DATA / f"seed{seed}"
    given: dict[str, Any] = {"forget_fraction": 0.1, "seed": seed, "with_retrained": 2, "relearn_steps": 0}
    if names and not (folder / "report.json").exists():  # made here they would hold the folder until this process ends
        run(bundle, (), dataset_dir, folder, **given)
    for name in names:
        overlays, options = METHODS[name] if name in UNLEARNED else ((), {})
        chosen = given | options
        if options.get("folds_teach"):
            chosen["reference_models"] = fold_models(bundle, {"dataset_dir": dataset_dir, **given}, folder)
        if name in UNLEARNED:
            run(bundle, overlays, dataset_dir, folder, "unlearn", **chosen)
        get = content_of(bundle, {"dataset_dir": dataset_dir, **chosen}, folder.absolute(), overlays)
        if name == "retrained_third":
            file = third_retrained(bundle, {"dataset_dir": dataset_dir, **given}, folder)
            yield name, load_weights(get("network_factory")(), file).eval(), get
        else:
            yield name, get("unlearned_network" if name in UNLEARNED else f"{name}_network"), get


def tables(rows: list[dict]) -> list[str]:
    """The scores, and how far they lie from the three retrained models'; of seeds whose rows are all there."""
    drawn: dict[str, dict[int, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        drawn[row["seed"]][int(row["order"])][row["method"]] = row
    once = [of[0] for of in drawn.values() if len(of[0]) == len(MODELS)]
    often = [[of[order] for order in range(ORDERS)] for of in drawn.values()]
    often = [orders for orders in often if all({*OFTEN} <= {*of} for of in orders)]
    return [*tables_of(once, MODELS, ""),
            *tables_of(list(itertools.chain(*often)), OFTEN, f", {ORDERS} orders of batches")]  # fmt: skip


def tables_of(complete: list[dict[str, dict]], names: Sequence[str], told: str) -> list[str]:
    """Scores and distances of some models over draws of batches."""
    if not complete:
        return []
    columns = ("benign_0", *SHOWN)

    def apart(pairs: list[tuple[str, str]]) -> list[str]:
        """The mean difference of pairs of models, draw by draw."""

        def distance(of: dict[str, dict], at: str) -> float:
            return sum(abs(float(of[one][at]) - float(of[other][at])) for one, other in pairs) / len(pairs)

        return [mean(complete, lambda of, at=at: distance(of, at)) for at in columns]

    scores = [[f"forget score{told}", "as it is", *SHOWN]]
    scores += [[name, *(mean(complete, lambda of, at=at, name=name: float(of[name][at])) for at in columns)]
               for name in names]  # fmt: skip
    gaps = [[f"distance to the retrained models{told}", "as it is", *SHOWN]]
    gaps += [[name, *apart([(name, other) for other in RETRAINED])] for name in names if name not in RETRAINED]
    gaps.append(["retrained models among each other (floor)", *apart(list(itertools.combinations(RETRAINED, 2)))])
    return [markdown(scores), markdown(gaps)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.dataset_dir:
        dataset_dir = str(Path(arguments.dataset_dir).absolute())
        for seed in arguments.seeds:
            wanted = missing(ROWS, seed, MODELS, OFTEN)
            for name, network, get in networks(seed, dataset_dir, arguments.output_dir, wanted):
                for order in wanted[name]:
                    row = row_of(network, get, order)
                    append(ROWS, {"data": DATA, "seed": seed, "method": name, "order": order, **row})
    print("\n\n".join(tables(finished(ROWS))))


if __name__ == "__main__":
    main()
