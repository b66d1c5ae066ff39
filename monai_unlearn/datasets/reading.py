# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Photographs and masks read right, or refused by name."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..request import Item

MAX_PIXELS = 90_000_000
MAX_VOLUME_BYTES, MAX_RATIO, MAX_SLOPE = 2 * 2**30, 200, 1e6
FOV_LEVEL, FOV_MARGIN = 0.02, 0.003  # share of the bright parts that is not black; width of the rim, share of the image


class DataError(ValueError):
    """A file of the data set cannot be used; the message names it, the reason and the remedy.

    Attributes:
        problems: one line for each file, where several cannot be used.
        usable: the items that can, as :func:`inspect_items` gives them.
    """

    def __init__(self, message: str, problems: Sequence[str] = (), usable: Sequence[Item] = ()) -> None:
        super().__init__(message)
        self.problems, self.usable = list(problems), list(usable)


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


Reader = Callable[[Item], tuple[np.ndarray, np.ndarray | None]]


def _read(path: str | Path, convert: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    try:
        with Image.open(path) as file:
            return np.asarray(convert(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(describe_failure(path, error)) from error


def label_files(item: Item) -> list[str]:
    """The files behind an item's label: one mask, those of several observers, or none where it is a class."""
    label = item.get("label")
    if isinstance(label, (list, tuple)):
        return [str(one) for one in label]
    return [] if label is None or isinstance(label, int) else [str(label)]


def read_pair(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Read and check one photograph and its mask, or the masks of several observers.

    Returns:
        uint8 ``(H, W, 3)`` and boolean ``(H, W)``: what any of them marked.

    Raises:
        DataError: with the file's name and the reason.
    """
    image, masks = _read(item["image"], as_rgb), []
    if not label_files(item):
        raise DataError(f"{Path(item['image']).name}: its label {item.get('label')!r} is no path of a mask.")
    for path in label_files(item):
        masks.append(_read(path, as_mask) > 0)
        try:
            check_mask(masks[-1], image.shape[:2])
        except DataError as error:
            raise DataError(f"{Path(path).name}: {error}") from error
    return image, np.any(masks, axis=0)


def read_photograph(item: Item) -> tuple[np.ndarray, None]:
    """Read and check one photograph whose label is a class: uint8 ``(H, W, 3)`` and no mask.

    Raises:
        DataError: with the file's name and the reason.
    """
    return _read(item["image"], as_rgb), None


def read_volume(item: Item, number: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Read and check one volume and its label map: NIfTI, MetaImage, NRRD, or the folder of one DICOM series.

    Args:
        item: with the paths ``image`` and ``label``.
        number: of classes, background counted; the label map holds 0 to number − 1.

    Returns:
        The middle slice as an 8-bit picture ``(H, W, 3)`` and what is labelled anything but 0, boolean ``(H, W, D)``.

    Raises:
        DataError: with the file's name and the reason.
    """
    files = [str(item["image"]), *label_files(item)]
    if len(files) != 2:
        raise DataError(f"{Path(files[0]).name}: its label {item.get('label')!r} is no path of a label map.")
    volumes = []
    for path in files:
        volumes.append(_read_volume(path))
        if volumes[-1].ndim != 4 or volumes[-1].shape[0] != 1:
            raise DataError(f"{Path(path).name}: a volume of one channel is needed, got {tuple(volumes[-1].shape)}.")
    image, label = volumes
    name, values = Path(files[1]).name, np.unique(label.numpy())
    if image.shape != label.shape:
        raise DataError(
            f"{name}: the label map is {tuple(label.shape[1:])} and its image {tuple(image.shape[1:])} voxels."
        )
    if not np.allclose(image.affine, label.affine, atol=1e-3):
        raise DataError(f"{name}: the label map lies elsewhere than its image (their affines differ); resample it.")
    if not set(values.tolist()) <= set(range(number)):
        raise DataError(f"{name}: holds {values[:6].tolist()}; classes are whole numbers from 0 to {number - 1}.")
    voxels = image[0].numpy().astype(np.float64)
    if not np.isfinite(voxels).all() or np.ptp(voxels) == 0:
        raise DataError(f"{Path(files[0]).name}: its values are not finite, or all alike; fetch it again.")
    low, high = np.percentile(voxels, (1, 99))
    middle = np.clip((voxels[..., voxels.shape[2] // 2] - low) / max(high - low, 1e-12), 0, 1)
    return np.repeat((255 * middle).astype(np.uint8)[..., None], 3, -1), label[0].numpy() > 0


def _read_volume(path: str) -> Any:
    from monai.transforms import LoadImage
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    if not Path(path).exists():
        raise DataError(f"{Path(path).name}: there is no such file.")
    try:
        _check_header(Path(path))
        return LoadImage(image_only=True, ensure_channel_first=True)(path)
    except DataError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, ImageFileError, HeaderDataError, zlib.error,
            OverflowError, MemoryError, TypeError, IndexError) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise DataError(f"{Path(path).name}: cannot be read as a volume ({reason}); fetch it again.") from error


def _check_header(path: Path) -> None:
    """Refuse a volume by what its header says, before anything is decoded: bombs and places that are none.

    Raises:
        DataError: on more than 2 GB, a file that is too small by a factor of 200 for what it claims, an affine that is
            not finite or not invertible, an absurd intensity scale, or voxels that lie in another folder's file.
    """
    if path.name.lower().endswith((".nii", ".nii.gz")):
        import nibabel as nib

        image: Any = nib.load(path)
        header, size = image.header, int(np.prod([int(one) for one in image.shape], dtype=object))
        needed, stored = size * header.get_data_dtype().itemsize, path.stat().st_size
        if needed > (MAX_RATIO if path.name.lower().endswith(".gz") else 1) * stored:
            raise DataError(f"{path.name}: claims {needed:,} bytes of voxels and has {stored:,}; fetch it again.")
        _refuse_size(path, size)
        rows = [header[f"srow_{axis}"] for axis in "xyz"] if int(header["sform_code"]) > 0 else []
        turned = [header[name] for name in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
                                            "qoffset_z")] if int(header["qform_code"]) > 0 else []  # fmt: skip
        if not all(np.isfinite(one).all() for one in (*rows, *turned, image.affine)):
            raise DataError(f"{path.name}: its affine is not finite, so nobody knows where it lies; fetch it again.")
        if abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
            raise DataError(f"{path.name}: its affine cannot be inverted, so its voxels have no size; fetch it again.")
        scale = [float(image.dataobj.slope), float(image.dataobj.inter)]
        if any(abs(one) > MAX_SLOPE for one in scale):
            raise DataError(
                f"{path.name}: its intensities are scaled by {scale[0]:g} and {scale[1]:g}; that is absurd."
            )
        return
    if path.is_file() and path.suffix.lower() in (".mha", ".mhd", ".nrrd", ".nhdr"):
        _refuse_distant_voxels(path)
    import itk

    first = path if path.is_file() else min(one for one in path.iterdir() if one.is_file())
    reader = itk.ImageIOFactory.CreateImageIO(str(first), itk.CommonEnums.IOFileMode_ReadMode)
    if reader is None:
        raise DataError(f"{path.name}: not a volume that ITK can read.")
    reader.SetFileName(str(first))
    reader.ReadImageInformation()
    slices = 1 if path.is_file() else sum(one.is_file() for one in path.iterdir())
    _refuse_size(path, slices * int(reader.GetImageSizeInPixels()))


def _refuse_size(path: Path, voxels: int) -> None:
    if voxels * 4 > MAX_VOLUME_BYTES:  # they become 32-bit numbers
        raise DataError(f"{path.name}: {voxels:,} voxels are more than the {MAX_VOLUME_BYTES // 4:,} allowed.")


def _refuse_distant_voxels(path: Path) -> None:
    head = path.open("rb").read(2**14).decode("latin-1")
    for line in head.splitlines():
        key, _, value = line.replace("=", ":", 1).partition(":")
        name = value.strip()
        points = key.strip().lower() in ("elementdatafile", "data file", "datafile") and name.upper() != "LOCAL"
        if points and (name != Path(name).name or name.upper().startswith("LIST")):
            raise DataError(
                f"{path.name}: its voxels lie in {name[:60]!r}, outside of its folder; keep them beside it."
            )


def field_of_view(image: np.ndarray) -> np.ndarray:
    """Where a fundus photograph shows the eye and no black rim.

    The largest part brighter than 2 % of the picture's bright parts, without holes, and a rim of .3 % of the width.

    Args:
        image: ``(H, W, 3)``, any scale that starts at 0 for black.

    Returns:
        Boolean ``(H, W)``; False everywhere in a black picture.
    """
    from scipy import ndimage

    grey = ndimage.median_filter(np.asarray(image, float).max(-1), 5)
    parts, number = ndimage.label(grey > FOV_LEVEL * np.percentile(grey, 99))
    if number == 0:
        return np.zeros(grey.shape, bool)
    largest = 1 + int(np.argmax(ndimage.sum_labels(np.ones_like(grey), parts, range(1, number + 1))))
    filled = ndimage.binary_fill_holes(parts == largest)
    return ndimage.binary_dilation(filled, iterations=max(1, round(FOV_MARGIN * grey.shape[1])))


def perceptual_hash(image: np.ndarray) -> int:
    """64-bit difference hash of a photograph: equal for copies that were resized or compressed again.

    Args:
        image: uint8, ``(H, W, 3)``.
    """
    grey = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def _content(path: str | Path) -> bytes:
    """The bytes of a file, or of all files of a folder that is one volume."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
    return b"".join(one.read_bytes() for one in files)


def inspect_items(items: Sequence[Item], progress: bool = False, read: Reader = read_pair) -> list[Item]:
    """Read every file of a data list once, and add what the request needs to know about it.

    Args:
        items: with an ``image`` path and a ``label``: a path, a list of paths, or a class.
        progress: show a bar.
        read: reads and checks one item, such as :func:`read_pair`.

    Returns:
        Copies with ``sha256`` and ``label_sha256`` (of the files' bytes, or of the class), ``phash`` and ``empty`` (a
        mask with nothing marked).

    Raises:
        DataError: one error that lists every file that cannot be used.
    """
    from tqdm import tqdm

    done, problems = [], []
    for item in tqdm(items, "reading images", disable=not progress, leave=False):
        try:
            image, mask = read(item)
        except DataError as error:
            problems.append(str(error))
            continue
        content = b"".join(_content(path) for path in label_files(item)) or repr(item.get("label")).encode()
        done.append({**item, "sha256": hashlib.sha256(_content(item["image"])).hexdigest(),
                     "label_sha256": hashlib.sha256(content).hexdigest(), "phash": perceptual_hash(image),
                     "empty": mask is not None and not mask.any()})  # fmt: skip
    if problems:
        shown = "\n  ".join(problems[:6]) + (f"\n  and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise DataError(f"{len(problems)} of {len(items)} items cannot be used:\n  {shown}", problems, done)
    return done
