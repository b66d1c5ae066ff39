# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Exact unlearning where the model is an ensemble: only the members that saw the forget set are trained anew.

Members that each learned one part of the data make this cheap (SISA, Bourtoule et al., arXiv 1912.03817): one of them
holds the patient. Of the members of a cross-validation all but one do.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from .bundle import phase, plain_errors
from .checkpoint import atomic_path, file_digest, load_weights, write_json
from .request import RequestError, Resolution


@plain_errors
def retrain_members(
    config_id: str,
    members: Any,
    trained_on: str,
    resolution: Resolution,
    factory: Callable[[], nn.Module],
    output_dir: str | Path,
    seed: int = 0,
    **shared: Any,
) -> dict[str, Any]:
    """Train those members of an ensemble anew that were trained on a forget case, by their own recipe; keep the others.

    Args:
        config_id: of the trainer in the running configuration, such as ``train#trainer``.
        members: files of weights by fold, ``{"0": "fold0.pt", ...}``.
        trained_on: ``"fold"`` where a member was trained on the cases of its fold, ``"others"`` where it was trained on
            all but these (cross-validation).
        resolution: who is forgotten; its items have a ``fold``. Unseen items whose fold has a member were trained on by
            others, as everywhere in a cross-validation.
        factory: makes a plain network.
        output_dir: the ensemble's files go to ``models/ensemble/foldN.pt``, kept members bit for bit, and
            ``ensemble.json`` says of each what became of it.
        seed: of the new trainings.
        shared: what is computed once, see :func:`monai_unlearn.variant`.

    Returns:
        What ``ensemble.json`` holds: ``members`` (``fold``, ``retrained``, ``cases``, ``forgotten``, ``sha256``,
        ``seconds``, ``flops``), and ``retrained``, their number.

    Raises:
        RequestError: when the files do not come by fold, ``trained_on`` is neither, an item's fold has no member, or
            nothing would be left for a member to be trained on.
        CheckpointError: when a file does not fit the network.
    """
    if not isinstance(members, Mapping) or not members:
        raise RequestError("an ensemble comes by fold: --ensemble_models \"{0: 'fold0.pt', 1: 'fold1.pt'}\".")
    if trained_on not in ("fold", "others"):
        raise RequestError(f'--ensemble_trained_on takes "fold" or "others", got {trained_on!r}.')
    files = {str(fold): Path(path) for fold, path in members.items()}
    if strange := [fold for fold in files if not re.fullmatch(r"\w+", fold)]:  # it becomes part of a file's name
        raise RequestError(f"a fold is named by letters and digits, got {strange[0]!r}.")
    missing = sorted({str(item.get("fold", "unknown")) for item in resolution.training} - set(files))
    if missing:
        raise RequestError(f"the ensemble has no member for fold {', '.join(missing)} of the data list.")
    for path in files.values():  # all of them fit, before anything is trained
        load_weights(factory(), path)
    folded = [*resolution.training, *(item for item in resolution.holdout if str(item.get("fold")) in files)]
    parts = {fold: [item for item in folded if (str(item["fold"]) == fold) == (trained_on == "fold")] for fold in files}
    for fold, items in parts.items():
        if items and all(item.get("forget") for item in items):
            raise RequestError(f"every case of the member of fold {fold} is to be forgotten; leave the member out.")
    rows, folder = [], Path(output_dir) / "models" / "ensemble"
    for index, (fold, path) in enumerate(tqdm(files.items(), "ensemble")):
        kept, target = [item for item in parts[fold] if not item.get("forget")], folder / f"fold{fold}.pt"
        row: dict[str, Any] = {"fold": fold, "retrained": len(kept) < len(parts[fold]), "cases": len(kept),
                               "forgotten": len(parts[fold]) - len(kept), "seconds": 0.0, "flops": 0}  # fmt: skip
        if row["retrained"]:
            given: dict[str, Any] = {"train_items": kept, "network_seed": seed + 5000 + index}
            given["phase"] = f"ensemble_{fold}"
            record = phase(config_id, target, resolution=resolution, **given, **shared)
            row |= {key: record[key] for key in ("seconds", "flops")}
        else:
            with atomic_path(target) as temporary:
                shutil.copyfile(path, temporary)
        rows.append({**row, "sha256": file_digest(target)})
    found = {"trained_on": trained_on, "members": rows, "retrained": sum(row["retrained"] for row in rows)}
    write_json(found, Path(output_dir) / "ensemble.json")
    print(f"{found['retrained']} of {len(rows)} members were trained anew without the forget set: {folder}")
    return found
