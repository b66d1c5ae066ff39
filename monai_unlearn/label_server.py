# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""A MONAI Label server on this machine with a bundle of ours in it: ``python -m monai_unlearn.label_server``."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from .datasets import make_chase_phantom, make_hippocampus_phantom, make_isic_classification_phantom, make_isic_phantom
from .request import RequestError

APPS = ("monai_unlearn", "monaibundle")
OURS = 'from monai_unlearn.label_app import MyApp\n\n__all__ = ["MyApp"]\n'


def make_studies(folder: Path, bundle: str = "isic_unlearn", number: int = 60) -> Path:
    """Draw the bundle's phantom as MONAI Label wants it: images, and masks in ``labels/final`` or ``classes.csv``.

    Args:
        folder: where ``studies``, and the phantom it is copied from, are put.
        bundle: name of the bundle, which says which phantom.
        number: images; the nine classes take at least 90, fundus photographs at most 28.
    """
    studies = folder / "studies"
    labels = studies / "labels" / "final"
    labels.mkdir(parents=True, exist_ok=True)
    if "classification" in bundle:
        drawn = Path(make_isic_classification_phantom(folder / "phantom", number=max(number, 90)))
        rows = []
        for path in sorted(drawn.glob("Train/*/*")):
            shutil.copy(path, studies / path.name)
            rows.append(f"{path.stem},{path.parent.name}\n")
        (studies / "classes.csv").write_text("image_id,class\n" + "".join(rows), encoding="utf-8")
    elif "hippocampus" in bundle:
        drawn = Path(make_hippocampus_phantom(folder / "phantom", number=number))
        for path in sorted(drawn.glob("imagesTr/*.nii.gz")):
            shutil.copy(path, studies / path.name)
            shutil.copy(drawn / "labelsTr" / path.name, labels / path.name)
    else:
        if "chase" in bundle:
            drawn = Path(make_chase_phantom(folder / "phantom", number=min(number, 28)))
            pictures, masks, ending = drawn, drawn, "1stHO"
        else:
            drawn = Path(make_isic_phantom(folder / "phantom", number=number))
            pictures, masks = drawn / "ISIC2018_Task1-2_Training_Input", drawn / "ISIC2018_Task1_Training_GroundTruth"
            ending = "segmentation"
        for path in sorted(pictures.glob("*.jpg")):
            shutil.copy(path, studies / path.name)
            shutil.copy(masks / f"{path.stem}_{ending}.png", labels / f"{path.stem}.png")
    return studies


def server_command(
    bundle: Path, folder: Path, studies: Path | None = None, port: int = 8123, name: str = APPS[0]
) -> list[str]:
    """Lay out an app with a bundle in ``folder`` and give the command that serves it on 127.0.0.1.

    Args:
        bundle: one of this project's bundles; it is copied.
        folder: of the app; what is there is kept.
        studies: images, with masks in ``labels/final``; None draws the phantom.
        port: to listen on.
        name: of the app: ``monai_unlearn`` is :mod:`monai_unlearn.label_app`, ``monaibundle`` MONAI Label's own.

    Raises:
        RequestError: when MONAI Label is not installed in this environment.
    """
    if find_spec("monailabel") is None:
        raise RequestError(f"MONAI Label is not installed for {sys.executable}; see docs/monai_label.md.")
    program = [sys.executable, "-m", "monailabel.main"]
    app = folder / "apps" / name
    if name == "monai_unlearn":
        app.mkdir(parents=True, exist_ok=True)
        (app / "main.py").write_text(OURS, encoding="utf-8")
    elif not app.exists():
        subprocess.run([*program, "apps", "--download", "--name", app.name, "--output", str(app.parent)], check=True)
    model = app / "model" / bundle.name
    if not model.exists():
        shutil.copytree(bundle, model, ignore=shutil.ignore_patterns("output"))
    return [
        *program, "start_server", "--app", str(app), "--studies", str(studies or make_studies(folder, bundle.name)),
        "--conf", "models", bundle.name, "--conf", "sam2", "false", "--conf", "zoo_source", "local",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """That of the server: its tasks call a bare ``python``, which has to be this one."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def main() -> None:
    """Serve a bundle in MONAI Label on this machine, with the phantom where no studies are given."""
    parser = argparse.ArgumentParser(prog="python -m monai_unlearn.label_server", description=main.__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/isic_unlearn"))
    parser.add_argument("--folder", type=Path, default=Path("monai_label"), help="where app and phantom are put")
    parser.add_argument("--studies", type=Path, help="images, with masks in labels/final; default: the phantom")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--app", choices=APPS, default=APPS[0], help="ours, or MONAI Label's own")
    given = parser.parse_args()
    command = server_command(given.bundle.resolve(), given.folder.resolve(), given.studies, given.port, given.app)
    os.execve(command[0], command, environment())


if __name__ == "__main__":
    main()
