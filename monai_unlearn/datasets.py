# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Data lists of public data sets, photographs and masks read right or refused, and a phantom drawn from nothing."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .request import Item, RequestError, item_id, refuse_expressions

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
MAX_PIXELS = 90_000_000
_INPUT = re.compile(r"(_Task1-2_(Training|Validation|Test)_Input|_(Training|Validation|Test|Test_v2)_Data)$", re.I)
_TRUTH = re.compile(r"(_Task1_|_Part1_|_)(Training|Validation|Test|Test_v2)(_Part1)?_GroundTruth$", re.I)
_MASK = re.compile(r"_segmentation$", re.I)


class DataError(ValueError):
    """A file of the data set cannot be used; the message names it, the reason and the remedy."""


# reading --------------------------------------------------------------------------------------------------------------


def as_rgb(image: Image.Image) -> Image.Image:
    """A photograph as 8-bit RGB, upright; the ``converter`` of MONAI's ``PILReader``.

    Palettes, grey levels and CMYK are converted, an alpha channel is dropped, an EXIF orientation is carried out.

    Raises:
        DataError: on more than 8 bits per channel, or more than 90 million pixels.
    """
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} allowed.")
    if image.mode[0] in "IF":
        raise DataError(f"a photograph of mode {image.mode} has more than 8 bits per channel; convert it to 8-bit RGB.")
    return ImageOps.exif_transpose(image).convert("RGB")


def as_mask(image: Image.Image) -> Image.Image:
    """A mask as 8-bit 0 and 255, upright; the ``converter`` of MONAI's ``PILReader``.

    One channel, or three equal ones; a palette is resolved. Lossless files count every value above 0 as foreground
    (so 1-bit, 0/1, 0/255 and 16-bit masks agree); JPEG and WebP, which blur the border, every value above 127.

    Raises:
        DataError: when the colour channels differ, so that it is no mask.
    """
    kind = image.format
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} allowed.")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("P", "RGBA", "LA", "PA", "CMYK"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.ndim == 3:
        if np.ptp(values.astype(np.int16), axis=2).max() > (8 if kind in ("JPEG", "WEBP") else 0):
            raise DataError("its colour channels differ, so it is a picture and no mask.")
        values = values[..., 0]
    return Image.fromarray(np.where(values > (127 if kind in ("JPEG", "WEBP") else 0), 255, 0).astype(np.uint8))


def check_mask(mask: np.ndarray, image_shape: Sequence[int]) -> None:
    """Refuse a mask that does not fit its photograph.

    Args:
        mask: boolean, ``(H, W)``.
        image_shape: height and width of the photograph.

    Raises:
        DataError: when the sizes differ, or nine tenths of the border are foreground (a full or inverted mask).
    """
    if tuple(mask.shape) != tuple(image_shape):
        raise DataError(
            f"the mask is {mask.shape} and its image {tuple(image_shape)} pixels (height, width); they must agree."
        )
    border = np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]])
    if border.mean() > 0.9:
        kind = "full" if mask.all() else "inverted"
        raise DataError(f"the mask looks {kind}: the border of the image is foreground; foreground must be the lesion.")


def describe_failure(path: str | Path, error: Exception) -> str:
    """One line that says what is wrong with a file, for a person who has to mend it."""
    path = Path(path)
    if isinstance(error, DataError):
        return f"{path.name}: {error}"
    if not path.is_file():
        return f"{path.name}: there is no such file."
    head = path.open("rb").read(64)
    if not head:
        return f"{path.name}: the file is empty; fetch it again."
    if head.startswith(b"version https://git-lfs"):
        return f"{path.name}: a Git LFS pointer and no image; run git lfs pull."
    if head.lstrip()[:1] == b"<":
        return f"{path.name}: a web page and no image; fetch the file again."
    if isinstance(error, UnidentifiedImageError):
        return f"{path.name}: not an image that can be read."
    return f"{path.name}: {error}; the file is damaged, fetch it again."


def read_pair(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Read and check one photograph and its mask.

    Returns:
        uint8 ``(H, W, 3)`` and boolean ``(H, W)``.

    Raises:
        DataError: with the file's name and the reason.
    """
    arrays: list[np.ndarray] = []
    for key, convert in (("image", as_rgb), ("label", as_mask)):
        try:
            with Image.open(item[key]) as file:
                arrays.append(np.asarray(convert(file)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(describe_failure(item[key], error)) from error
    image, mask = arrays[0], arrays[1] > 0
    try:
        check_mask(mask, image.shape[:2])
    except DataError as error:
        raise DataError(f"{Path(item['label']).name}: {error}") from error
    return image, mask


def perceptual_hash(image: np.ndarray) -> int:
    """64-bit difference hash of a photograph: equal for copies that were resized or compressed again.

    Args:
        image: uint8, ``(H, W, 3)``.
    """
    grey = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def inspect_items(items: Sequence[Item], progress: bool = False) -> list[Item]:
    """Read every file of a data list once, and add what the request needs to know about it.

    Args:
        items: with ``image`` and ``label`` paths.
        progress: show a bar.

    Returns:
        Copies with ``sha256`` and ``label_sha256`` (of the files' bytes), ``phash`` and ``empty`` (nothing marked).

    Raises:
        DataError: one error that lists every file that cannot be used.
    """
    from tqdm import tqdm

    done, problems = [], []
    for item in tqdm(items, "reading images", disable=not progress, leave=False):
        try:
            image, mask = read_pair(item)
        except DataError as error:
            problems.append(str(error))
            continue
        digests = [hashlib.sha256(Path(item[key]).read_bytes()).hexdigest() for key in ("image", "label")]
        done.append({**item, "sha256": digests[0], "label_sha256": digests[1], "phash": perceptual_hash(image),
                     "empty": not mask.any()})  # fmt: skip
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise DataError(f"{len(problems)} of {len(items)} items cannot be used:\n  {shown}")
    return done


# data lists -----------------------------------------------------------------------------------------------------------


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
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            key = next((name for name in ("image_id", "isic_id", "image") if name in (reader.fieldnames or ())), None)
            if key is None:
                raise DataError(f"{path.name} has no column image_id, isic_id or image; its rows cannot be joined.")
            for row in reader:
                columns = {name: value for name, value in row.items() if name not in (key, "image", "label") and value}
                rows[row[key]] = {**columns, **rows.get(row[key], {})}
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
            if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("image", "label")):
                raise DataError(f"the data list {path}: {section}[{index}] needs the paths 'image' and 'label'.")
            paths = {key: str(path.parent / item[key]) for key in ("image", "label")}
            datalist[section].append({**item, **paths, "image_id": item_id(item)})
    return {section: items for section, items in datalist.items() if items}


def load_splits(
    dataset_dir: str | Path | None = None,
    datalist: str | Path | None = None,
    holdout_fold: Any = None,
    default_fold: Any = None,
) -> tuple[list[Item], list[Item]]:
    """Training items and holdout of a data list, by its own sections or by a fold, never by a random draw.

    Args:
        dataset_dir: folder in the official ISIC layout.
        datalist: MONAI data list, instead of the folder.
        holdout_fold: value of the column ``fold`` that was never trained on.
        default_fold: the fold to hold out where none is given, no section states the split and the items have folds.

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
        sections = isic_datalist(dataset_dir)
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


# phantom --------------------------------------------------------------------------------------------------------------

PHANTOM_VERSION = 1
_KINDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], float, float, float]] = {
    # colour in the middle and at the rim, irregularity of the outline, strength of the texture, softness of the edge
    "nevus": ((118, 72, 48), (150, 98, 70), 0.06, 5.0, 2.0),
    "melanoma": ((52, 34, 36), (110, 62, 70), 0.20, 16.0, 1.2),
    "seborrheic keratosis": ((150, 116, 70), (168, 130, 92), 0.10, 22.0, 0.8),
    "vascular lesion": ((150, 40, 52), (176, 76, 84), 0.08, 6.0, 1.6),
}
_ANNOTATORS = {"A": (0.12, 0.15), "B": (-0.12, 0.15), "C": (0.0, 0.30)}  # habit (share of the radius), wobble
_DEVICES = {"contact": (0.5, (1.0, 1.0, 1.0)), "handheld": (1.2, (1.05, 0.97, 0.90))}  # vignette, colour cast


def _outline(rng: np.random.Generator, angle: np.ndarray, strength: float, waves: int) -> np.ndarray:
    order = np.arange(2, 2 + waves)
    height, phase = rng.standard_normal(waves) / order, rng.uniform(0, 2 * np.pi, waves)
    return strength * (height * np.cos(np.multiply.outer(angle, order) + phase)).sum(-1)


def _noise(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(rng.standard_normal((size, size)), sigma, mode="reflect")
    return (noise / noise.std())[..., None]


def draw_lesion(
    rng: np.random.Generator, diagnosis: str, tone: np.ndarray, device: str, annotator: str, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """One photograph with its mask.

    The mask follows the annotator's habit and a wobble that nothing in the picture shows: what a network gets right
    about it, it has memorised.

    Returns:
        uint8 ``(size, size, 3)`` and boolean ``(size, size)``.
    """
    middle, rim, irregular, texture, soft = _KINDS[diagnosis]
    vignette, cast = _DEVICES[device]
    y, x = np.mgrid[0:size, 0:size].astype(float)
    centre_x, centre_y = rng.uniform(0.36, 0.64, 2) * size
    scale = rng.uniform(0.15, 0.30) * size
    angle, distance = np.arctan2(y - centre_y, x - centre_x), np.hypot(y - centre_y, x - centre_x)
    aspect, turn = np.sqrt(rng.uniform(0.75, 1.3)), rng.uniform(0, np.pi)
    ellipse = 1 / np.hypot(np.cos(angle - turn) * aspect, np.sin(angle - turn) / aspect)
    radius = scale * ellipse * (1 + _outline(rng, angle, irregular, 7))

    habit, wobble = _ANNOTATORS[annotator]
    mask = distance < radius * (1 + habit + _outline(rng, angle, wobble, 5))

    skin = tone + 6 * _noise(rng, size, size / 13) + 3 * _noise(rng, size, 1)
    depth = np.clip((radius - distance) / scale, 0, 1)[..., None]
    lesion = np.array(rim) * (1 - depth) + np.array(middle) * depth + texture * _noise(rng, size, size / 51)
    inside = (1 / (1 + np.exp((distance - radius) / (soft + 3) * 128 / size)))[..., None]
    image = skin * (1 - inside) + lesion * inside
    for _ in range(rng.integers(0, 7)):  # hairs
        start, lean, bend = rng.uniform(0, size, 2), rng.uniform(0, np.pi), rng.uniform(-0.01, 0.01)
        along = (x - start[0]) * np.cos(lean) + (y - start[1]) * np.sin(lean)
        across = (y - start[1]) * np.cos(lean) - (x - start[0]) * np.sin(lean) - bend * along**2
        image *= 1 - 0.6 * np.exp(-((across / 0.7) ** 2))[..., None]
    edge = np.hypot(y / size - 0.5, x / size - 0.5) * 2
    image *= (1 - vignette * np.clip(edge - 0.6, 0, None) ** 2)[..., None] * np.array(cast)
    image += 3 * rng.standard_normal((size, size, 1))
    return np.clip(image, 0, 255).astype(np.uint8), mask


def is_phantom(root: str | Path) -> bool:
    """Whether a folder holds the phantom and no real data."""
    return (Path(root) / "phantom.json").is_file()


def make_isic_phantom(root: str | Path, number: int = 240, size: int = 128, seed: int = 0) -> str:
    """Draw a data set that looks like dermoscopy, in the layout of ISIC 2018 Task 1; no download, no patient.

    Patients have one to three images, five folds keep them whole. ``metadata.csv`` holds diagnosis, patient_id, fold,
    age_approx (missing now and then), sex, device and annotator. The folder appears complete or not at all.

    Args:
        root: folder to make; kept as it is when it holds the same phantom already.
        number: images.
        size: height and width in pixels.
        seed: fixes every picture.

    Returns:
        ``root``.

    Raises:
        DataError: when ``root`` exists and holds something else.
    """
    root = Path(root)
    recipe = {"phantom": "isic", "version": PHANTOM_VERSION, "number": number, "size": size, "seed": seed}
    if root.exists():
        if is_phantom(root) and json.loads((root / "phantom.json").read_text()) == recipe:
            return str(root)
        if not is_phantom(root):
            raise DataError(f"{root} exists and is no phantom data set; choose another folder.")
        shutil.rmtree(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _draw_phantom(folder, number, size, seed)
        (folder / "phantom.json").write_text(json.dumps(recipe))
        folder.chmod(0o755)
        os.replace(folder, root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return str(root)


def _draw_phantom(folder: Path, number: int, size: int, seed: int) -> None:
    inputs, truths = folder / "ISIC2018_Task1-2_Training_Input", folder / "ISIC2018_Task1_Training_GroundTruth"
    inputs.mkdir()
    truths.mkdir()
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    patient = 0
    while len(rows) < number:
        tone = np.array((214, 168, 142)) * rng.uniform(0.75, 1.1)
        age, sex = int(rng.integers(18, 90)), ("female", "male")[int(rng.integers(2))]
        for _ in range(min(int(rng.integers(1, 4)), number - len(rows))):
            diagnosis = list(_KINDS)[int(rng.integers(len(_KINDS)))]
            device = "contact" if rng.random() < 0.7 else "handheld"
            annotator = "ABC"[int(rng.integers(3))]
            name = f"PHANTOM_{len(rows):07d}"
            image, mask = draw_lesion(rng, diagnosis, tone, device, annotator, size)
            Image.fromarray(image).save(inputs / f"{name}.jpg", quality=95)
            Image.fromarray(mask.astype(np.uint8) * 255).save(truths / f"{name}_segmentation.png")
            rows.append(
                {"image_id": name, "diagnosis": diagnosis, "fold": patient % 5, "patient_id": f"P{patient:04d}",
                 "age_approx": age if rng.random() < 0.95 else "", "sex": sex, "device": device,
                 "annotator": annotator}
            )  # fmt: skip
        patient += 1
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
