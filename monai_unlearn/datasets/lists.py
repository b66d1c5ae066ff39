# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Data lists of public data sets and of users, with the split they state."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..request import Item, RequestError, item_id, refuse_expressions
from .reading import DataError

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
_INPUT = re.compile(r"(_Task1-2_(Training|Validation|Test)_Input|_(Training|Validation|Test|Test_v2)_Data)$", re.I)
_TRUTH = re.compile(r"(_Task1_|_Part1_|_)(Training|Validation|Test|Test_v2)(_Part1)?_GroundTruth$", re.I)
_MASK = re.compile(r"_segmentation$", re.I)
_COPY = re.compile(r" \(\d+\)$")  # what a second download of a file is called
_CHASE = re.compile(r"Image_(\d\d)([LR])\.jpe?g", re.I)
CHASE_HOLDOUT = ("11", "12", "13", "14")
FolderDatalist = Callable[[str], dict[str, list[Item]]]


def _images_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem = path.stem
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or stem.endswith("_superpixels"):
            continue
        name = _MASK.sub("", stem)
        if name in found:
            raise DataError(
                f"{folder.name} holds {found[name].name} and {path.name}: two files for one id; remove one."
            )
        found[name] = path
    return found


def _metadata(root: Path) -> dict[str, dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for path in sorted(root.glob("*metadata*.csv")):
        try:
            table = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(keepends=True), strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path.name} cannot be read as a table ({error}); save it as CSV in UTF-8.") from error
        key = next((name for name in ("image_id", "isic_id", "image") if table and name in table[0]), None)
        if table and key is None:
            raise DataError(f"{path.name} has no column image_id, isic_id or image; its rows cannot be joined.")
        for number, row in enumerate(table, start=2):
            if None in row or None in row.values():
                raise DataError(f"{path.name}: line {number} has more or fewer columns than the first one; mend it.")
            columns = {name: value for name, value in row.items() if name not in (key, "image", "label") and value}
            rows[row[str(key)]] = {**columns, **rows.get(row[str(key)], {})}
    return rows


def isic_datalist(root: str | Path, unpaired: str = "refuse") -> dict[str, list[Item]]:
    """The data list of an ISIC 2016, 2017 or 2018 Task 1 folder with its official folder and file names.

    Every ``*metadata*.csv`` beside the folders is joined by ``image_id`` (``isic_id``, ``image``); the first file in
    alphabetical order wins where two name the same column.

    Args:
        root: the folder that holds the official folders.
        unpaired: ``refuse`` or ``skip`` images without a mask and masks without an image.

    Returns:
        ``{"training": [...], "validation": [...], "test": [...]}``, the sections that exist, sorted by id. Items hold
        ``image``, ``label``, ``image_id`` and the metadata as text.

    Raises:
        DataError: when no such folders are there, two files share an id, or images and masks do not pair.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"dataset_dir {root} is not a folder; give the folder that holds the official ISIC folders.")
    folders: dict[str, dict[str, dict[str, Path]]] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for kind, pattern in (("label", _TRUTH), ("image", _INPUT)):
            match = pattern.search(folder.name)
            if match:
                section = next(part for part in match.groups() if part and part.lower()[:4] in ("trai", "vali", "test"))
                folders.setdefault(section.lower().removesuffix("_v2"), {})[kind] = _images_in(folder)
                break
    if not any(len(kinds) == 2 for kinds in folders.values()):
        raise DataError(
            f"{root} holds no pair of official ISIC folders such as ISIC2018_Task1-2_Training_Input and "
            "ISIC2018_Task1_Training_GroundTruth."
        )
    metadata, datalist = _metadata(root), {}
    for section, kinds in folders.items():
        images, labels = kinds.get("image", {}), kinds.get("label", {})
        lonely = [images[name].name for name in sorted(set(images) - set(labels))]
        lonely += [labels[name].name for name in sorted(set(labels) - set(images))]
        if lonely and unpaired != "skip":
            shown = ", ".join(lonely[:5]) + (f" and {len(lonely) - 5} more" if len(lonely) > 5 else "")
            raise DataError(f"{section}: no partner for {shown}; complete or remove them, or pass unpaired='skip'.")
        datalist[section] = [
            {**metadata.get(name, {}), "image": str(images[name]), "label": str(labels[name]), "image_id": name}
            for name in sorted(set(images) & set(labels))
        ]
    return datalist


def isic_classification_datalist(root: str | Path, classes: Sequence[str]) -> dict[str, list[Item]]:
    """The data list of a folder ``Train/<class>/*.jpg``, ``Test/<class>/*.jpg``, the published nine-class ISIC layout.

    Every ``*metadata*.csv`` beside the folders is joined by ``image_id``. The name of a second copy, such as
    ``ISIC_0000001 (1).jpg``, counts as the same id; :func:`settle_duplicates` deals with ids that stand there twice.

    Args:
        root: the folder that holds ``Train`` and ``Test``.
        classes: the names of the class folders; an item's label is its place in this list.

    Returns:
        ``{"training": [...], "test": [...]}`` sorted by class and name. Items hold ``image``, ``label`` (an int),
        ``diagnosis`` (the folder), ``image_id`` and the metadata as text.

    Raises:
        DataError: without the two folders, with a class folder that is not in ``classes``, or without pictures.
    """
    root, metadata, datalist = Path(root), {}, {}
    if root.is_dir():
        metadata = _metadata(root)
    for section, name in (("training", "Train"), ("test", "Test")):
        folder = root / name
        if not folder.is_dir():
            raise DataError(f"dataset_dir {root} has no folder {name} with one folder for each class in it.")
        strange = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in classes)
        if strange:
            raise DataError(f"{name} holds {', '.join(strange)}, which are no classes of this model: {list(classes)}.")
        datalist[section] = [
            {**metadata.get(_COPY.sub("", path.stem), {}), "image": str(path), "label": label, "diagnosis": kind,
             "image_id": _COPY.sub("", path.stem)}
            for label, kind in enumerate(classes)
            for path in sorted((folder / kind).glob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        ]  # fmt: skip
        if not datalist[section]:
            raise DataError(f"{folder} holds no pictures in its class folders.")
    return datalist


def settle_duplicates(
    training: Sequence[Item], holdout: Sequence[Item], policy: str = "refuse"
) -> tuple[list[Item], list[Item]]:
    """Find pictures that stand in a classification's data list more than once, by id or by their bytes.

    The published nine-class folders hold 155 ids in two class folders each: two answers for one picture.

    Args:
        training: with ``label`` and, once the files were read, ``sha256``.
        holdout: the same.
        policy: ``refuse``, or ``drop``: pictures with contradictory labels are left out altogether; of others the
            first copy stays, and one in the training list wins over one in the holdout.

    Returns:
        Training and holdout without them.

    Raises:
        DataError: on policy ``refuse``, naming the pictures and their classes.
        RequestError: on an unknown policy.
    """
    if policy not in ("refuse", "drop"):
        raise RequestError(f"duplicates must be refuse or drop, got {policy!r}.")
    everything = [*training, *holdout]
    same: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(everything):
        for key in (item_id(item), item.get("sha256")):
            if key:
                same[key].append(index)
    contradictory, copies, named = set(), set(), {}
    for found in same.values():
        if len({everything[index]["label"] for index in found}) > 1:
            contradictory.update(found)
        elif len(found) > 1:
            copies.update(found[1:])
        if len(found) > 1:
            copies_of = [everything[index] for index in found]
            names = {f"{item_id(item)} ({item.get('diagnosis', item['label'])})" for item in copies_of}
            named[tuple(found)] = " = ".join(sorted(names))
    if (contradictory or copies) and policy == "refuse":
        kinds = {
            "with contradictory classes": [text for found, text in named.items() if contradictory & set(found)],
            "more than once": [text for found, text in named.items() if not contradictory & set(found)],
        }
        found_texts = [
            f"{len(texts)} picture{'s' if len(texts) > 1 else ''} {kind}: {'; '.join(texts[:5])}"
            + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")
            for kind, texts in kinds.items()
            if texts
        ]
        raise DataError(
            ". ".join(found_texts) + ". Mend the folders, or pass --duplicates drop: it leaves out pictures with "
            "contradictory classes and keeps one copy of the others."
        )
    kept = [index for index in range(len(everything)) if index not in contradictory | copies]
    return (
        [everything[index] for index in kept if index < len(training)],
        [everything[index] for index in kept if index >= len(training)],
    )


def chase_datalist(root: str | Path, observer: str | int = 1) -> dict[str, list[Item]]:
    """The data list of CHASE_DB1: two eyes of each child, children 11 to 14 held out.

    Args:
        root: the folder with ``Image_01L.jpg``, ``Image_01L_1stHO.png``, ``Image_01L_2ndHO.png`` and so on.
        observer: whose masks: ``1``, ``2`` or ``both`` (a list of two files).

    Returns:
        ``{"training": [...], "validation": [...]}`` sorted by name. Items hold ``image``, ``label``, ``image_id`` (such
        as ``01L``), ``patient_id`` (``01``) and ``eye``.

    Raises:
        DataError: when no such files are there, or a mask is missing.
        RequestError: on an unknown observer.
    """
    endings = {"1": ("1stHO",), "2": ("2ndHO",), "both": ("1stHO", "2ndHO")}.get(str(observer))
    if endings is None:
        raise RequestError(f"observer must be 1, 2 or both, got {observer!r}.")
    root = Path(root)
    images = [(path, match) for path in sorted(root.glob("*")) if (match := _CHASE.fullmatch(path.name))]
    if not images:
        raise DataError(f"dataset_dir {root} holds no Image_01L.jpg and so on; give the folder of CHASE_DB1.")
    datalist: dict[str, list[Item]] = {"training": [], "validation": []}
    for path, match in images:
        child, eye = match.group(1), match.group(2).upper()
        labels = [str(path.with_name(f"{path.stem}_{ending}.png")) for ending in endings]
        missing = [Path(label).name for label in labels if not Path(label).is_file()]
        if missing:
            raise DataError(f"{', '.join(missing)} is missing beside {path.name}; fetch the data set again.")
        datalist["validation" if child in CHASE_HOLDOUT else "training"].append(
            {"image": str(path), "label": labels if len(labels) > 1 else labels[0], "image_id": child + eye,
             "patient_id": child, "eye": eye}
        )  # fmt: skip
    return datalist


def hippocampus_datalist(root: str | Path) -> dict[str, list[Item]]:
    """The data list of a task of the Medical Segmentation Decathlon, every fifth labelled volume held out.

    Args:
        root: the folder with ``imagesTr`` and ``labelsTr``: NIfTI, MetaImage, NRRD, or a folder for each DICOM series;
            an image and its label map bear the same name.

    Returns:
        ``{"training": [...], "validation": [...]}`` sorted by name. Items hold ``image``, ``label``, ``image_id`` and
        ``patient_id``, the name.

    Raises:
        DataError: without the folders, or when an image has no label map or the reverse.
    """
    folders = {name: Path(root) / name for name in ("imagesTr", "labelsTr")}
    found: dict[str, dict[str, Path]] = {}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise DataError(f"dataset_dir {root} has no folder {name}; give the folder of the task.")
        paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
        found[name] = {path.name.split(".")[0]: path for path in paths
                       if path.is_dir() or path.name.lower().endswith(VOLUME_SUFFIXES)}  # fmt: skip
    images, labels = found["imagesTr"], found["labelsTr"]
    if set(images) != set(labels) or not images:
        odd = sorted(set(images) ^ set(labels))
        raise DataError(
            f"{len(odd)} volumes of {root} have an image or a label map and not both: {', '.join(odd[:5])}; complete "
            "or remove them."
            if odd
            else f"dataset_dir {root} holds no volumes."
        )
    datalist: dict[str, list[Item]] = {"training": [], "validation": []}
    for index, name in enumerate(sorted(images)):
        datalist["validation" if index % 5 == 4 else "training"].append(
            {"image": str(images[name]), "label": str(labels[name]), "image_id": name, "patient_id": name}
        )
    return datalist


def read_datalist(path: str | Path) -> dict[str, list[Item]]:
    """A MONAI data list (JSON with ``training`` and ``validation`` or ``test``); relative paths start at its folder.

    Raises:
        DataError: when it does not parse, lacks a section, or an item lacks its image or label.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the data list {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        raise DataError(f"the data list {path} has no list 'training'.")
    datalist: dict[str, list[Item]] = {}
    for section in ("training", "validation", "test"):
        datalist[section] = []
        for index, item in enumerate(content.get(section, [])):
            label = item.get("label") if isinstance(item, dict) else None
            if not isinstance(label, (str, int)) or not isinstance(item.get("image"), str):
                raise DataError(
                    f"the data list {path}: {section}[{index}] needs the path 'image', and 'label', a path or a class."
                )
            paths = {key: str(path.parent / item[key]) for key in ("image", "label") if isinstance(item[key], str)}
            datalist[section].append({**item, **paths, "image_id": item_id(item)})
    return {section: items for section, items in datalist.items() if items}


def load_splits(
    dataset_dir: str | Path | None = None,
    datalist: str | Path | None = None,
    holdout_fold: Any = None,
    default_fold: Any = None,
    folder_datalist: FolderDatalist = isic_datalist,
) -> tuple[list[Item], list[Item]]:
    """Training items and holdout of a data list, by its own sections or by a fold, never by a random draw.

    Args:
        dataset_dir: folder in the data set's own layout.
        datalist: MONAI data list, instead of the folder.
        holdout_fold: value of the column ``fold`` that was never trained on.
        default_fold: the fold to hold out where none is given, no section states the split and the items have folds.
        folder_datalist: reads the folder.

    Returns:
        ``(training, holdout)``.

    Raises:
        RequestError: when no or both sources are given, or nothing states the split.
    """
    for name, value in (("dataset_dir", dataset_dir), ("datalist", datalist), ("holdout_fold", holdout_fold)):
        refuse_expressions(value, name)
    if datalist:
        sections = read_datalist(datalist)
    elif dataset_dir:
        sections = folder_datalist(str(dataset_dir))
    else:
        raise RequestError("give --dataset_dir FOLDER or --datalist FILE.")
    training = sections.get("training", [])
    holdout = [*sections.get("validation", []), *sections.get("test", [])]
    if holdout_fold is None and not holdout and any("fold" in item for item in training):
        holdout_fold = default_fold
    if holdout_fold is None:
        if not holdout:
            raise RequestError(
                "nothing states which items the model never saw: give --holdout_fold N (the column fold), or a data "
                "list with a section validation or test."
            )
        return training, holdout
    if not any("fold" in item for item in training):
        raise RequestError(f"--holdout_fold {holdout_fold} is given, but the data list has no column fold.")
    holdout = [item for item in training if str(item.get("fold")) == str(holdout_fold)]
    if not holdout:
        folds = sorted({str(item["fold"]) for item in training if "fold" in item})
        raise RequestError(f"no item has fold {holdout_fold}; there are {', '.join(folds)}.")
    return [item for item in training if str(item.get("fold")) != str(holdout_fold)], holdout


def known_pairs(dataset_dir: str | Path | None) -> list[tuple[str, str]]:
    """Published pairs of near-duplicates: every ``*near_duplicates*.csv`` in or beside a data set's folder."""
    if not dataset_dir:
        return []
    pairs = []
    for folder in (Path(dataset_dir), Path(dataset_dir).resolve().parent):
        for path in sorted(folder.glob("*near_duplicates*.csv")):
            with path.open(newline="", encoding="utf-8") as file:
                pairs += [(row["image_id_1"], row["image_id_2"]) for row in csv.DictReader(file)]
    return pairs
