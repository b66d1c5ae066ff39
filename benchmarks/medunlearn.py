# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Our default beside every method people would otherwise pick, against the retrained model, on real data.

    python benchmarks/medunlearn.py --data isic --dataset_dir "$MONAI_UNLEARN_DATA/isic2018_seg" --output_dir /runs
    python benchmarks/medunlearn.py --data isic --dataset_dir ... --output_dir /runs --quick
    python benchmarks/medunlearn.py                           # prints the tables of the rows there are
    python benchmarks/medunlearn.py --figures                 # and draws them into the pages of the bundles

Resumable: one CSV row per finished run. The runs of a seed and a request share original, references and two retrained
models of different seeds, whose difference is the floor: no method can be asked to come closer. Each run is audited
with a judge that taught nobody, without relearning. ``--request hardest`` forgets the patients that the original
remembers most, see :func:`hardest`; it needs the random request's run. ``--methods folds`` lets cross-validation models
teach, see :func:`fold_models`, ``views`` the original's own answers on other views, ``reference_and_views`` a cheap
reference and these, ``folds_and_views`` cross-validation models and these, each with ``_hardened`` behind the name so
that less comes back; ``--methods retrain`` hands in a third retrained model as if it had been unlearned. ``--tuned``
searches the settings of each method first, eight trials each, on a part of the unseen cases that no audit sees again;
its rows form tables of their own. ``--quick`` runs three methods of one seed.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from monai.bundle import ConfigWorkflow
from rows import PARTS, ROOT, append, costs, finished, markdown, parser_of, run, share

from monai_unlearn import MemoryDataset, audit
from monai_unlearn.audit.scores import score_cases
from monai_unlearn.checkpoint import write_json
from monai_unlearn.request import item_id

ROWS = Path(__file__).with_suffix(".csv")
BUNDLES = {"isic": "isic_unlearn", "isic_classification": "isic_classification_unlearn",
           "hippocampus": "hippocampus_unlearn", "chase": "chase_unlearn"}  # fmt: skip
THIRD = "retrain"
OURS = {"default": ((), {}), "standard": ((), {"durability": "standard"})}
VIEWS = {f"{others}views{suffix}": (("views",), taught | given)
         for suffix, given in {"": {}, "_hardened": {"durability": "hardened"}}.items()
         for others, taught in {"": {}, "reference_and_": {"reference_teaches": 1},
                                "folds_and_": {"folds_teach": 1}}.items()}  # fmt: skip
METHODS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    **OURS,
    "folds": ((), {"folds_teach": 1}),
    **{name: ((name,), {}) for name in ("identity", "fine_tune", "neggrad_plus", "salun", "scrub", "bad_teacher",
                                        "erase_to_retain", "l1_sparse", "gradient_ascent", "random_label", "msg", "ssd",
                                        "cf_k", "eu_k", "lean")},
    **VIEWS,
    THIRD: ((), {}),
}  # fmt: skip
CORE = [*OURS, "identity", "fine_tune", "neggrad_plus", "salun", "scrub", "bad_teacher", "erase_to_retain"]
TUNING_SHARE = 0.3  # of the unseen cases
TUNED = ", tuned"  # behind the request, in the rows
QUICK = ["default", "identity", "fine_tune"]
SPLITS = ("forget", "retain", "holdout")
MODELS = ("original", "unlearned", "retrained", "retrained_other")


def trained_on(
    items: list[dict], get: Callable[[str], Any], bundle: str, dataset_dir: str, place: Path, seed: int
) -> str:
    """Train a model as the original was, on some of the training cases alone; the file with its weights."""
    kept = ("image", "label", "fold", "group")
    sides = {"training": items, "validation": get("resolution").holdout}
    lists = {side: [{key: item[key] for key in kept if key in item} for item in those] for side, those in sides.items()}
    write_json(lists, place / "datalist.json")
    run(bundle, (), dataset_dir, place, "original", datalist=place.absolute() / "datalist.json", forget_fraction=0.1,
        seed=seed)  # fmt: skip
    return str(place.absolute() / "models" / "original.pt")


def fold_models(bundle: str, given: dict[str, object], folder: Path) -> dict[str, str]:
    """Train the models of a cross-validation, each on the training cases outside its fold.

    They stand for those that an institute has kept: their training is no part of what unlearning costs, and they serve
    every request.
    """
    get = content_of(bundle, given, folder)
    training = get("resolution").training
    return {
        fold: trained_on([item for item in training if item["fold"] != fold], get, bundle, str(given["dataset_dir"]),
                         folder / "folds" / fold, 10 * (int(str(given["seed"])) + 1) + int(fold))
        for fold in sorted({item["fold"] for item in training})
    }  # fmt: skip


def third_retrained(bundle: str, given: dict[str, object], folder: Path) -> str:
    """Train a third model on the retained cases; the run itself makes two."""
    get, seed = content_of(bundle, given, folder), int(str(given["seed"])) + 6000
    retained = get("resolution").splits["retain"]
    return trained_on(retained, get, bundle, str(given["dataset_dir"]), folder / "retrained_third", seed)


def content_of(
    bundle: str, given: dict[str, object], folder: Path, overlays: tuple[str, ...] = ()
) -> Callable[[str], Any]:
    """What entries of a run's configuration are."""
    configs = f"{ROOT}/bundles/{bundle}/configs"
    files = [f"{configs}/train.json", *(f"{configs}/methods/{name}.json" for name in overlays)]
    flow = ConfigWorkflow(files, workflow_type="train", logging_file=False, output_dir=str(folder), **given)
    flow.initialize()
    return flow.parser.get_parsed_content


def hardest(bundle: str, given: dict[str, object], folder: Path, request: Path, share: float = 0.1) -> None:
    """Write the request for the patients that the original of a finished run remembers most.

    What it remembers of a case is how much lower its loss is than that of the reference that never saw the case, each
    loss taken against the same model's mean on unseen cases: one of the run's two references never saw a retained case,
    neither saw a forgotten one. Patients are taken by their mean, the most remembered first, until a share of the
    training cases is reached.
    """
    get = content_of(bundle, given, folder)
    resolution, (_, judged) = get("resolution"), get("reference_items")
    names = ["original_network", "reference_network", "judge_network"]
    losses = []
    for network in map(get, names):
        of = [score_cases(network, MemoryDataset(items, get("validate#preprocessing"), get("store")), get("device"),
                          inferer=get("validate#inferer"))["loss"]
              for items in (resolution.training, resolution.holdout)]  # fmt: skip
        losses.append(of[0] - of[1].mean())
    original, teacher, judge = losses
    seen_by_judge = {item_id(item) for item in judged}
    patients: dict[str, list[float]] = defaultdict(list)
    members: dict[str, list[str]] = defaultdict(list)
    for index, item in enumerate(resolution.training):
        unseen = [teacher[index]] if item_id(item) in seen_by_judge else [judge[index]]
        unseen += [teacher[index]] if item["forget"] else []
        patients[item["group"]].append(float(np.mean(unseen) - original[index]))
        members[item["group"]].append(item_id(item))
    ids: list[str] = []
    for group in sorted(patients, key=lambda one: (-np.mean(patients[one]), one)):
        if len(ids) < share * len(resolution.training):
            ids += members[group]
    request.parent.mkdir(parents=True, exist_ok=True)
    request.write_text(yaml.safe_dump({"id": "hardest", "job": "deletion", "selector": {"ids": sorted(ids)}}))


def settings_found(bundle: str, overlays: tuple[str, ...], dataset_dir: str, folder: Path, given: dict) -> dict:
    """A method's settings by ``run tune``, for a run that has the same options."""
    run(bundle, overlays, dataset_dir, folder, "tune", **given)
    return json.loads((folder / "tuning.json").read_text())["best"]["settings"]


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
        row |= {f"{model}_strongest": strongest.get("auc"), f"{model}_strongest_attack": strongest.get("attack")}
        for measure in ("agreement", "js"):
            row |= {f"{model}_{split}_{measure}": report[measure].get(model, {}).get(split) for split in SPLITS}
    row["tug_of_war"] = report["tug_of_war"]["unlearned"]
    return row | costs(report, ("seconds", "flops", "images"))


def mean(rows: list[dict], value, digits: int = 3) -> str:
    """The mean of a value over rows, with the smallest and the largest where there are several."""
    values = [value(row) for row in rows]
    spread = f" [{min(values):.{digits}f}, {max(values):.{digits}f}]" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{spread}"


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
        if chosen and name == THIRD:
            seeds = str(len(chosen))
            lines.insert(3, ["retrained, third seed (floor)", *cells(chosen, "unlearned"),
                             *beside(chosen, "unlearned"), "", "", seeds, ""])  # fmt: skip
        elif chosen:
            shares = [mean(chosen, lambda row, parts=parts: share(row, "flops", parts))
                     for parts in (PARTS, ("cache", "train"))]  # fmt: skip
            verdicts = "; ".join(sorted({row["verdict"] for row in chosen}))
            lines.append([name, *cells(chosen, "unlearned"), *beside(chosen, "unlearned"), *shares,
                          str(len(chosen)), verdicts])  # fmt: skip
    return markdown(lines)


def frontier(rows: list[dict]) -> str:
    """The methods that no other is at least as good as in cost, unseen score and agreement on the forgotten at once."""
    found = {}
    for name in METHODS:
        chosen = [row for row in rows if row["method"] == name]
        if chosen and name != THIRD:
            values = (lambda row: share(row, "flops"), lambda row: float(row["unlearned_holdout"]),
                      lambda row: float(row["unlearned_forget_agreement"]))  # fmt: skip
            cost, unseen, agreement = (float(np.mean([value(row) for row in chosen])) for value in values)
            found[name] = (cost, -unseen, -agreement), chosen
    lines = [["frontier", "FLOPs, share of the retrain", "holdout", "forget: agreement", "verdict"]]
    for name, (point, chosen) in sorted(found.items(), key=lambda one: one[1][0]):
        others = [other for other, _ in found.values() if other != point]
        if not any(all(np.less_equal(other, point)) for other in others):
            verdicts = "; ".join(sorted({row["verdict"] for row in chosen}))
            lines.append([name, *(f"{abs(value):.3f}" for value in point), verdicts])
    return markdown(lines)


def figure(rows: list[dict], path: Path) -> None:
    """The forget-retain plane with the retrained models, and the cost of each method against its gap to them."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "monai_unlearn", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    def gap(row: dict, model: str) -> float:
        return sum(map(abs, gaps(row, model))) / len(SPLITS)

    first = list({row["seed"]: row for row in rows}.values())
    drawing, (plane, cost) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    third = [row for row in rows if row["method"] == THIRD]
    stars = (("retrained", "retrained", "*", 150, first), ("retrained_other", "retrained, other seed", "P", 80, first),
             ("unlearned", "retrained, third seed", "X", 80, third))  # fmt: skip
    for model, label, marker, size, chosen in stars if third else stars[:2]:
        forget, retain = ([float(row[f"{model}_{split}"]) for row in chosen] for split in ("forget", "retain"))
        plane.scatter(forget, retain, size, marker=marker, color="#b7791f", label=label, zorder=3)
    found = {row["method"] for row in rows} - {THIRD}
    for place, name in enumerate(name for name in METHODS if name in found):
        chosen = [row for row in rows if row["method"] == name]
        forget, retain = ([float(row[f"unlearned_{split}"]) for row in chosen] for split in ("forget", "retain"))
        spent, distances = [share(row, "flops") for row in chosen], [gap(row, "unlearned") for row in chosen]
        look: dict[str, Any] = {"color": plt.get_cmap("tab20")(place), "marker": "o^sDvXdp<>"[place % 10]}
        plane.scatter(forget, retain, s=16, alpha=0.5, **look)
        plane.scatter(np.mean(forget), np.mean(retain), s=70, label=name, edgecolors="black", linewidths=0.5, **look)
        cost.scatter(spent, distances, s=16, alpha=0.5, **look)
        cost.scatter(np.mean(spent), np.mean(distances), s=70, edgecolors="black", linewidths=0.5, **look)
    floor = float(np.mean([gap(row, "retrained_other") for row in first] + [gap(row, "unlearned") for row in third]))
    cost.axhline(floor, color="#b7791f", linestyle=":")
    cost.text(1, floor, "floor", color="#b7791f", ha="right", va="bottom", fontsize=8)
    plane.set(xlabel="score on the forget set", ylabel="score on the retained set")
    cost.set(xlabel="operations, share of the retrain, reference included",
             ylabel="average gap to the retrained model", xscale="log", yscale="log", xlim=(None, 1.1))  # fmt: skip
    drawing.legend(loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data", choices=BUNDLES)
    parser.add_argument("--request", choices=("random", "hardest"), default="random")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=CORE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuned", action="store_true", help="search each method's settings first")
    parser.add_argument("--quick", action="store_true", help="three methods, seed 0")
    parser.add_argument("--figures", action="store_true", help="draw what the tables say into the bundles' pages")
    arguments = parser.parse_args()

    if {*VIEWS} & {*arguments.methods} - {"views"} and arguments.data not in (None, "isic"):
        parser.error("only the lesion bundle has views that are hardened or teach with others: --data isic.")
    if arguments.dataset_dir:
        methods, seeds = (QUICK, [0]) if arguments.quick else (arguments.methods, arguments.seeds)
        for seed in seeds:
            for name in methods:
                request_name = arguments.request + TUNED * arguments.tuned
                key = (arguments.data, request_name, name, str(seed))
                if key in {(row["data"], row["request"], row["method"], row["seed"]) for row in finished(ROWS)}:
                    continue
                overlays, options = METHODS[name]
                bundle, drawn = BUNDLES[arguments.data], arguments.output_dir / arguments.data / f"seed{seed}"
                folder = drawn
                given: dict[str, object] = {"forget_fraction": 0.1, "seed": seed}
                data = {"dataset_dir": str(Path(arguments.dataset_dir).absolute())}
                if arguments.request == "hardest":
                    folder = drawn.with_name(f"hardest{seed}")
                    request = folder.absolute() / "request.yaml"
                    if not request.exists():
                        hardest(bundle, {**given, **data}, drawn.absolute(), request)
                        (folder / "models").mkdir(exist_ok=True)
                        for file in ("original.pt", "original.json"):  # of the same training data: it is shared
                            shutil.copy(drawn / "models" / file, folder / "models" / file)
                    given = {"forget_request": request, "seed": seed}
                if options.get("folds_teach"):
                    given["reference_models"] = fold_models(bundle, given | data, drawn)
                if name == THIRD:
                    given["unlearned_model"] = third_retrained(bundle, given | data, folder)
                given |= {"with_retrained": 2, "relearn_steps": 0, **options}
                settings: dict[str, float] = {}
                if arguments.tuned:
                    given["tuning_share"] = TUNING_SHARE
                    settings = settings_found(bundle, overlays, arguments.dataset_dir, folder, given)
                report = run(bundle, overlays, arguments.dataset_dir, folder, **given | settings)
                row = row_of(report, arguments.data, request_name, name, seed)
                append(ROWS, row | {"settings": json.dumps(settings) if settings else ""})
    for data in BUNDLES:
        rows = [row for row in finished(ROWS) if row["data"] == data]
        for request in sorted({row["request"] for row in rows}):
            chosen = [row for row in rows if row["request"] == request]
            print(f"\n{data}, {request}\n\n{table(chosen)}\n\n{frontier(chosen)}")
            if arguments.figures and not request.endswith(TUNED):
                file_name = f"methods_{request.replace(TUNED, '_tuned')}.svg"
                figure(chosen, ROOT / "bundles" / BUNDLES[data] / "docs" / "images" / file_name)


if __name__ == "__main__":
    main()
