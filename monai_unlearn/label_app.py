# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""An app for MONAI Label that does what its stock app cannot: classes, and a result of unlearning.

Beside what the ``monaibundle`` app does with the bundles, a task that unlearns ends with verdict and report as its
result and saves the residual-memory map of each forgotten case as its label version ``residual_memory``; and the
classification bundle trains on ``classes.csv`` of the studies folder (columns ``image_id`` and ``class``) and answers
with scores. It works inside MONAI Label's environment only, see ``docs/monai_label.md``.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monailabel
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask
from monailabel.utils.others.generic import get_bundle_models

from .checkpoint import write_json
from .preflight import site_key
from .request import RequestError, pseudonym

logger = logging.getLogger(__name__)
MAP_TAG, RESULT = "residual_memory", "label_result.json"


class UnlearnTrainTask(BundleTrainTask):
    """Training and unlearning of a bundle, see :mod:`monai_unlearn.monai_label`; unlearning has a result."""

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        done = super().__call__(request, datastore)
        if request.get("run_id") != "unlearn":
            return done
        output = Path(self.bundle_path) / "output"
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        result = {
            **done,
            "verdict": report["verdict"],
            "reasons": report["reasons"],
            "report": str(output / "report.html"),
            "residual_maps": self._save_maps(output, datastore),
        }
        write_json(result, output / RESULT)
        print(
            f"result: {json.dumps(result)}", flush=True
        )  # the task's log; its return value goes to a logger that is off
        return result

    def stats(self) -> dict[str, Any]:
        """The result of the last unlearning, for ``/info/``."""
        path = Path(self.bundle_path) / "output" / RESULT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else super().stats()

    def _save_maps(self, output: Path, datastore: Datastore) -> int:
        """Keep the map of each forgotten case as a label version of its image; the number of maps."""
        key, saved = site_key(output), 0
        for image_id in datastore.list_images():
            for path in (output / "private" / MAP_TAG).glob(f"{pseudonym(key, image_id)}.*"):
                datastore.save_label(image_id, str(path), MAP_TAG, {"made_by": "monai_unlearn"})
                saved += 1
        return saved


class ClassTrainTask(UnlearnTrainTask):
    """The same for classes, which stand in ``classes.csv`` of the studies folder."""

    def __init__(self, path: str, conf: dict[str, str], studies: str | Path) -> None:
        super().__init__(path, conf)
        self.studies = Path(studies)

    def _fetch_datalist(self, request: Mapping[str, Any], datastore: Datastore) -> list[dict[str, Any]]:
        table = self.studies / "classes.csv"
        if not table.is_file():
            raise RequestError(f"there is no {table}; write image_id and class of every image into it.")
        classes = list(self.bundle_config.get("classes"))
        known = {path.stem: path for path in (Path(datastore.get_image_uri(one)) for one in datastore.list_images())}
        items = []
        with table.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                if row.get("class") not in classes or row.get("image_id") not in known:
                    raise RequestError(f"{table}: {row} names no image of the studies or none of {classes}.")
                items.append({"image": str(known[row["image_id"]]), "label": classes.index(row["class"])})
        return items


class ClassInferTask(BundleInferTask):
    """Scores of the classes in place of a mask."""

    def __init__(self, path: str, conf: dict[str, str]) -> None:
        super().__init__(path, conf, type="classification", add_post_restore=False)

    def writer(self, data: dict[str, Any], extension: Any = None, dtype: Any = None) -> tuple[None, dict[str, Any]]:
        """The scores by class; no file."""
        names = {index: name for name, index in self.labels.items()}
        scores = [float(one) for one in data[self.output_label_key].flatten()]
        prediction = [{"idx": index, "label": names.get(index), "score": score} for index, score in enumerate(scores)]
        return None, {"prediction": prediction}


class MyApp(MONAILabelApp):
    """The bundles of the app's ``model`` folder that ``--conf models`` names."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.models = get_bundle_models(app_dir, conf)
        self.studies_dir = studies
        super().__init__(
            app_dir=app_dir, studies=studies, conf=conf, name=f"monai_unlearn ({monailabel.__version__})",
            description="Models that forget", version=monailabel.__version__,
        )  # fmt: skip

    def init_infers(self) -> dict[str, Any]:
        """Masks, or scores of classes."""
        return {
            name: ClassInferTask(path, self.conf) if "classification" in name else BundleInferTask(path, self.conf)
            for name, path in self.models.items()
        }

    def init_trainers(self) -> dict[str, Any]:
        """Training, and unlearning with ``run_id: unlearn``."""
        return {
            name: ClassTrainTask(path, self.conf, self.studies_dir)
            if "classification" in name
            else UnlearnTrainTask(path, self.conf)
            for name, path in self.models.items()
        }

    def init_strategies(self) -> dict[str, Any]:
        """A random next image."""
        return {"random": Random()}
