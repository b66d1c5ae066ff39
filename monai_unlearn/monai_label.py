# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The bundles inside MONAI Label's ``monaibundle`` app, which replaces parts of their configuration and runs them.

The app passes its labelled images as ``train#dataset#data``, sets ``train#trainer#max_epochs`` and puts a loader of the
chosen weights in front of ``train#handlers``. :func:`follow_monai_label` sees that and does what its user means: the
Train button (``run_id`` *run*) trains the plain model, by the configuration's ``label_train``, and *unlearn* unlearns,
audits and offers the result beside the model, by ``label_unlearn``. Without such overrides nothing here happens.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from torch import nn

from .bundle import on_stack, plain_errors
from .checkpoint import atomic_path, file_digest, save_weights, write_json, write_text
from .request import LIMITS, RequestError, item_id

DATA, HELD_OUT, HANDLERS, EPOCHS = (
    "train#dataset#data", "validate#dataset#data", "train#handlers", "train#trainer#max_epochs"
)  # fmt: skip


@plain_errors
def follow_monai_label() -> None:
    """Arrange the running bundle for MONAI Label, where its overrides are found; call it in ``initialize``.

    Raises:
        RequestError: when nobody is to be forgotten, a forget case would be used for validation, no model is there, or
            nothing says which cases the model never saw.
    """
    workflow = next(on_stack(ConfigWorkflow), None)
    if workflow is None:
        raise RuntimeError("follow_monai_label works inside a bundle's initialize only.")
    parser = workflow.parser
    items, held_out = parser.get(DATA), parser.get(HELD_OUT)
    if not isinstance(items, list):
        return
    held_out = held_out if isinstance(held_out, list) else None
    folder = Path(parser.get_parsed_content("output_dir")) / "private"
    lists: dict[str, Sequence[Mapping[str, Any]]] = {"training": items}
    lists |= {"validation": held_out} if held_out else {}
    write_json(
        lists, folder / "label_datalist.json", mode=0o600
    )  # names of files are data: no configuration holds them
    handlers = list(parser.get(HANDLERS) or [])
    loader = next((one for one in handlers if one.get("_target_") == "CheckpointLoader"), None)
    if workflow.run_id == "unlearn":
        _unlearn(parser, folder, lists, loader)
        parser[HANDLERS] = [one for one in handlers if one is not loader]
        workflow.run_id = "label_unlearn"
    else:
        _train(parser, folder, handlers, bool(held_out))
        workflow.run_id = "label_train"


def _train(parser: ConfigParser, folder: Path, handlers: Sequence[Mapping[str, Any]], validated: bool) -> None:
    """The plain model on the labelled images."""
    parser["label_datalist"] = str(folder / "label_datalist.json")
    parser[DATA] = "$monai_unlearn.monai_label.items_of(@label_datalist, 'training')"
    parser[HELD_OUT] = "$monai_unlearn.monai_label.items_of(@label_datalist, 'validation')"
    kept = [one for one in handlers if validated or one.get("_target_") != "ValidationHandler"]
    parser[HANDLERS] = kept


def _unlearn(
    parser: ConfigParser,
    folder: Path,
    lists: Mapping[str, Sequence[Mapping[str, Any]]],
    loader: Mapping[str, Any] | None,
) -> None:
    """The whole run, audit included, with the chosen weights as the original."""
    options = dict(parser.get("displayable_configs") or {})
    given, ids = str(options.get("forget_request") or ""), str(options.get("forget_ids") or "")
    wanted = [one.strip() for one in ids.split(",") if one.strip()]
    if bool(given) == bool(wanted):
        raise RequestError("give forget_ids, names of images joined by commas, or forget_request, a file: exactly one.")
    if not given:
        unseen = sorted(set(wanted) & {item_id(dict(item)) for item in lists.get("validation", ())})
        if unseen:
            raise RequestError(
                f"{len(unseen)} of the cases to forget would be used for validation; val_split has to be what it was "
                "when the model was trained, and a case that it set apart was never learned."
            )
        request = {
            "id": "monai-label", "job": str(options.get("job") or "deletion"), "selector": {"ids": wanted},
            "limits": {name: float(options.get(f"{name}_limit", value)) for name, value in LIMITS.items()},
        }  # fmt: skip
        given = str(folder / "label_request.yaml")
        write_text(yaml.safe_dump(request), Path(given), mode=0o600)
    datalist = str(options.get("datalist") or "")
    if not datalist and "validation" not in lists:
        raise RequestError(
            "nothing says which cases the model never saw: send val_split as it was when the model was trained, or "
            "datalist, a file with the sections training and validation."
        )
    if loader is None:
        raise RequestError("there is no model to unlearn from: train one first, or put its weights at models/model.pt.")
    parser["original_model"] = str(loader["load_path"])
    parser["datalist"] = datalist or str(folder / "label_datalist.json")
    parser["forget_request"] = given
    parser["forget_ids"] = None
    parser["learning_rate"] = options.get("learning_rate", parser.get("learning_rate"))
    parser[DATA], parser[HELD_OUT], parser[EPOCHS] = "@train_items", "$@resolution.holdout", "@original_epochs"


def items_of(path: str | Path, section: str) -> list[dict[str, Any]]:
    """Image and label (a file or a class) of a section of a data list as files; without one of those an empty list."""
    content = ConfigParser.load_config_file(str(path)).get(section, [])
    labels = [item["label"] if isinstance(item["label"], int) else str(item["label"]) for item in content]
    return [{"image": str(item["image"]), "label": label} for item, label in zip(content, labels)]


def keep_trained(network: nn.Module, bundle_root: str | Path) -> None:
    """Write a trained network to ``models/model.pt``; what was there stays, as ``model_<digest>.pt``."""
    path = Path(bundle_root) / "models" / "model.pt"
    if path.is_file():
        earlier = path.with_name(f"model_{file_digest(path)[:8]}.pt")
        if not earlier.exists():
            earlier.hardlink_to(path)
    save_weights(network, path)
    print(f"trained: {path}")


def offer(record: Mapping[str, Any], bundle_root: str | Path, output_dir: str | Path) -> None:
    """Put an unlearned model beside the bundle's model, under a name of its own, and say where its report is.

    Args:
        record: of the phase that made it.
        bundle_root: whose ``models`` the app offers.
        output_dir: of the run.
    """
    models = Path(bundle_root) / "models"
    name, number = "unlearned.pt", 1
    while (models / name).exists():
        number += 1
        name = f"unlearned_{number}.pt"
    with atomic_path(models / name) as temporary:
        shutil.copyfile(record["path"], temporary)
    print(f"unlearned: {models / name}\nreport: {Path(output_dir) / 'report.html'}")
