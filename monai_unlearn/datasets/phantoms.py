# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Data sets drawn from nothing, in the layouts of the real ones: no download, no patient.

Each holds something that the pictures do not show (how an annotator wobbles, which vessel was drawn, what an
odd-looking lesion was called): what a network gets right about it, it has memorised, so there is something to forget.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .reading import DataError

PHANTOM_VERSION = 1
_KINDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], float, float, float]] = {
    # colour in the middle and at the rim, irregularity of the outline, strength of the texture, softness of the edge
    "nevus": ((118, 72, 48), (150, 98, 70), 0.06, 5.0, 2.0),
    "melanoma": ((52, 34, 36), (110, 62, 70), 0.20, 16.0, 1.2),
    "seborrheic keratosis": ((150, 116, 70), (168, 130, 92), 0.10, 22.0, 0.8),
    "vascular lesion": ((150, 40, 52), (176, 76, 84), 0.08, 6.0, 1.6),
    "actinic keratosis": ((196, 120, 104), (206, 142, 120), 0.14, 14.0, 2.6),
    "basal cell carcinoma": ((190, 108, 116), (178, 120, 110), 0.10, 9.0, 1.4),
    "dermatofibroma": ((176, 132, 118), (120, 84, 66), 0.05, 6.0, 2.2),
    "pigmented benign keratosis": ((104, 82, 44), (140, 110, 60), 0.12, 18.0, 1.0),
    "squamous cell carcinoma": ((206, 162, 140), (184, 104, 92), 0.18, 20.0, 1.6),
}
_SEGMENTED = ("nevus", "melanoma", "seborrheic keratosis", "vascular lesion")
_ODD = 0.2  # share of the classification's lesions that look like another class
_ANNOTATORS = {"A": (0.12, 0.15), "B": (-0.12, 0.15), "C": (0.0, 0.30)}  # habit (share of the radius), wobble
_DEVICES = {"contact": (0.5, (1.0, 1.0, 1.0)), "handheld": (1.2, (1.05, 0.97, 0.90))}  # vignette, colour cast


def _outline(rng: np.random.Generator, angle: np.ndarray, strength: float, waves: int) -> np.ndarray:
    order = np.arange(2, 2 + waves)
    height, phase = rng.standard_normal(waves) / order, rng.uniform(0, 2 * np.pi, waves)
    return strength * (height * np.cos(np.multiply.outer(angle, order) + phase)).sum(-1)


def _noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(rng.standard_normal(shape), sigma, mode="reflect")
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

    skin = tone + 6 * _noise(rng, (size, size), size / 13) + 3 * _noise(rng, (size, size), 1)
    depth = np.clip((radius - distance) / scale, 0, 1)[..., None]
    lesion = np.array(rim) * (1 - depth) + np.array(middle) * depth + texture * _noise(rng, (size, size), size / 51)
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
    recipe = {"phantom": "isic", "version": PHANTOM_VERSION, "number": number, "size": size, "seed": seed}
    return _make(root, recipe, lambda folder: _draw_segmentation(folder, number, size, seed))


def make_isic_classification_phantom(root: str | Path, number: int = 270, size: int = 64, seed: int = 0) -> str:
    """Draw a data set that looks like dermoscopy, in the published nine-class layout; no download, no patient.

    ``Train`` holds two thirds and ``Test`` one third, each class alike. Patients have one or two pictures, all on one
    side. A fifth of the lesions look like another class. ``metadata.csv`` holds class, patient_id and age_approx.

    Args:
        root: folder to make; kept as it is when it holds the same phantom already.
        number: pictures.
        size: height and width in pixels.
        seed: fixes every picture.

    Returns:
        ``root``.

    Raises:
        DataError: when ``root`` exists and holds something else.
    """
    recipe = {
        "phantom": "isic_classification",
        "version": PHANTOM_VERSION,
        "number": number,
        "size": size,
        "seed": seed,
    }
    return _make(root, recipe, lambda folder: _draw_classification(folder, number, size, seed))


def make_chase_phantom(root: str | Path, number: int = 28, size: int = 240, seed: int = 0) -> str:
    """Draw a data set that looks like fundus photographs, in the layout of CHASE_DB1; no download, no child.

    Two eyes a child; children 11 to 14 are the last ones (fewer where ``number`` is below 16), as in CHASE_DB1. The two
    observers mark the vessels as 1-bit PNG. Each draws some vessels that are not in the picture and leaves some out.

    Args:
        root: folder to make; kept as it is when it holds the same phantom already.
        number: photographs, two of each child.
        size: height in pixels; the width is a little larger, as there.
        seed: fixes every picture.

    Returns:
        ``root``.

    Raises:
        DataError: when ``root`` exists and holds something else.
    """
    recipe = {"phantom": "chase", "version": PHANTOM_VERSION, "number": number, "size": size, "seed": seed}
    return _make(root, recipe, lambda folder: _draw_fundi(folder, number, size, seed))


def make_hippocampus_phantom(root: str | Path, number: int = 40, size: int = 32, seed: int = 0) -> str:
    """Draw small MR-like volumes of an organ in two parts, in the layout of the Medical Segmentation Decathlon.

    ``imagesTr`` and ``labelsTr`` hold NIfTI files: 1 is the front (anterior), 2 the back (posterior). Where the parts
    meet differs from volume to volume in a way that the picture does not show. Intensities are unscaled, as there.

    Args:
        root: folder to make; kept as it is when it holds the same phantom already.
        number: volumes.
        size: width in voxels; the depth is a quarter more, the height a quarter less.
        seed: fixes every volume.

    Returns:
        ``root``.

    Raises:
        DataError: when ``root`` exists and holds something else.
    """
    recipe = {"phantom": "hippocampus", "version": PHANTOM_VERSION, "number": number, "size": size, "seed": seed}
    return _make(root, recipe, lambda folder: _draw_volumes(folder, number, size, seed))


def _make(root: str | Path, recipe: dict[str, Any], draw: Callable[[Path], None]) -> str:
    """Draw into a new folder that appears complete or not at all; keep one of the same recipe."""
    root = Path(root)
    if root.exists():
        if is_phantom(root) and json.loads((root / "phantom.json").read_text()) == recipe:
            return str(root)
        if not is_phantom(root):
            raise DataError(f"{root} exists and is no phantom data set; choose another folder.")
        shutil.rmtree(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        draw(folder)
        (folder / "phantom.json").write_text(json.dumps(recipe))
        folder.chmod(0o755)
        os.replace(folder, root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return str(root)


def _draw_segmentation(folder: Path, number: int, size: int, seed: int) -> None:
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
            diagnosis = _SEGMENTED[int(rng.integers(len(_SEGMENTED)))]
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
    _write_metadata(folder, rows)


def _write_metadata(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _draw_classification(folder: Path, number: int, size: int, seed: int) -> None:
    rng, rows, kinds = np.random.default_rng(seed), [], sorted(_KINDS)
    for index in range(number):
        kind, patient = kinds[index % len(kinds)], index // len(kinds) // 2 * len(kinds) + index % len(kinds)
        section = "Test" if (index // len(kinds) // 2) % 3 == 2 else "Train"
        look = kinds[int(rng.integers(len(kinds)))] if rng.random() < _ODD else kind
        tone = np.array((214, 168, 142)) * rng.uniform(0.75, 1.1)
        image, _ = draw_lesion(rng, look, tone, "contact", "C", size)
        (folder / section / kind).mkdir(parents=True, exist_ok=True)
        name = f"PHANTOM_{index:07d}"
        Image.fromarray(image).save(folder / section / kind / f"{name}.jpg", quality=95)
        rows.append({"image_id": name, "class": kind, "patient_id": f"P{patient:04d}",
                     "age_approx": int(rng.integers(18, 90))})  # fmt: skip
    _write_metadata(folder, rows)


def _vessel(
    rng: np.random.Generator, start: np.ndarray, heading: float, width: float, length: float, depth: int
) -> list[tuple[np.ndarray, float]]:
    """A wandering path of points ``(n, 2)`` with its width, and its branches; lengths in shares of the picture."""
    steps = max(3, int(length * 120))
    turns = heading + np.cumsum(rng.normal(0, 0.09, steps)) + rng.normal(0, 0.01) * np.arange(steps)
    points = start + np.cumsum(np.stack([np.sin(turns), np.cos(turns)], 1) / 120, 0)
    paths = [(points, width)]
    if depth > 0:
        for at in rng.integers(steps // 5, steps, rng.integers(2, 4)):
            side = turns[at] + rng.choice([-1, 1]) * rng.uniform(0.4, 1.0)
            paths += _vessel(rng, points[at], side, width * rng.uniform(0.5, 0.8), length * 0.55, depth - 1)
    return paths


def _rasterise(paths: list[tuple[np.ndarray, float]], height: int, width: int) -> np.ndarray:
    from PIL import ImageDraw

    canvas = Image.new("1", (width, height))
    pen = ImageDraw.Draw(canvas)
    for points, thickness in paths:
        pen.line([(float(x) * height, float(y) * height) for y, x in points], 1, max(1, round(thickness * height)))
    return np.asarray(canvas)


def _draw_fundi(folder: Path, number: int, size: int, seed: int) -> None:
    from scipy.ndimage import gaussian_filter

    rng, height, width = np.random.default_rng(seed), size, round(size * 999 / 960)
    children = number // 2
    held_out = 4 if children >= 8 else 2
    names = [f"{n:02d}" for n in (*range(1, children - held_out + 1), *range(11, 11 + held_out))]
    y, x = np.mgrid[0:height, 0:width] / height
    disc = np.hypot(y - 0.5, x - width / height / 2) < 0.48
    for child in names:
        tone = np.array((190, 100, 45)) * rng.uniform(0.75, 1.15)
        for eye in "LR":
            centre = np.array([0.5 + rng.normal(0, 0.03), 0.5 + (0.2 if eye == "L" else -0.2) + rng.normal(0, 0.03)])
            trunks = [
                _vessel(rng, centre, angle + rng.normal(0, 0.2), 0.018 * rng.uniform(0.8, 1.2), 0.6, 3)
                for angle in np.linspace(0, 2 * np.pi, 6, endpoint=False)
            ]
            seen = [path for trunk in trunks for path in trunk]
            visible = _rasterise(seen, height, width) & disc
            glow = np.exp(-((np.hypot(y - centre[0], x - centre[1]) / 0.06) ** 2))[..., None]
            image = tone * (1 + 0.06 * _noise(rng, (height, width), height / 12)) + glow * np.array((60, 90, 60))
            image -= 0.9 * gaussian_filter(visible.astype(float), height / 480)[..., None] * np.array((60, 50, 20))
            image = (image + rng.normal(0, 4, image.shape)) * disc[..., None]
            Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(
                folder / f"Image_{child}{eye}.jpg", quality=95
            )
            for ending in ("1stHO", "2ndHO"):
                kept = [path for path in seen if path[1] > 0.011 or rng.random() > 0.3]
                imagined = [
                    path
                    for _ in range(4)
                    for path in _vessel(rng, rng.uniform(0.25, 0.75, 2), rng.uniform(0, 2 * np.pi), 0.008, 0.3, 1)
                ]
                mask = _rasterise(kept + imagined, height, width) & disc
                Image.fromarray(mask).save(folder / f"Image_{child}{eye}_{ending}.png")


def _draw_volumes(folder: Path, number: int, size: int, seed: int) -> None:
    import nibabel as nib
    from scipy.ndimage import gaussian_filter

    rng, shape = np.random.default_rng(seed), (size, size * 5 // 4, size * 3 // 4)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir()
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"), -1)
    for index in range(number):
        lean, thick = rng.normal(0, 0.15), rng.uniform(0.26, 0.36)
        x, y, z = np.moveaxis(grid - rng.normal(0, 0.06, 3), -1, 0)
        x = x - lean * y - 0.25 * (y**2 - 0.2)
        bump = gaussian_filter(rng.standard_normal(shape), size / 8)
        organ = (x / thick) ** 2 + (y / 0.75) ** 2 + (z / thick) ** 2 + 0.35 * bump / bump.std() < 1
        front = y > rng.normal(0.1, 0.12)  # nothing in the picture shows where the parts meet
        image = 100 + 45 * gaussian_filter(organ.astype(float), 0.7) + 12 * gaussian_filter(y * organ, 1.5)
        image += 14 * gaussian_filter(rng.standard_normal(shape), 1.0) * 3 + rng.normal(0, 5, shape)
        scale = 10 ** rng.uniform(-0.5, 3)  # MR intensities mean nothing by themselves
        label = np.where(organ, np.where(front, 1, 2), 0).astype(np.uint8)
        affine = np.diag([1.0, 1.0, 1.0, 1.0])
        affine[:3, 3] = rng.uniform(-20, 20, 3).round(1)
        for kind, voxels in (("imagesTr", (scale * image.clip(0)).astype(np.float32)), ("labelsTr", label)):
            nib.save(nib.Nifti1Image(voxels, affine), folder / kind / f"PHANTOM_{index:07d}.nii.gz")
