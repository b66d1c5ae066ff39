# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, weights of which every key is accounted for, and training that resumes.

Nothing here unpickles: weights and checkpoints are read with ``weights_only=True`` or as safetensors.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from .distributed import process_rank

_SCALAR: Any = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),  # the name that numpy 1 gave it
    (_SCALAR, "numpy._core.multiarray.scalar"),
    *((type(np.dtype(kind)), f"numpy.dtypes.{type(np.dtype(kind)).__name__}")
      for kind in ("float16", "float32", "float64", "int32", "int64", "bool")),
    (np.dtype, "numpy.dtype"),
]  # fmt: skip


class CheckpointError(ValueError):
    """A file of weights cannot be used; the message names it, the reason and the remedy."""


# files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: str | Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary path in the same folder that takes the final name, flushed to disk, when the block ends well.

    A killed process leaves the old file, or none, and at most a temporary file, which the next write removes. Of
    several processes the first one writes; what the others put there is dropped.

    Raises:
        CheckpointError: when the disk is full; the file that was there is kept.
    """
    path = Path(path)
    if process_rank() > 0:
        with tempfile.TemporaryDirectory() as nowhere:
            yield Path(nowhere) / path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(
            f"{path} could not be written: {os.strerror(error.errno)}, {free:,} bytes are free. What was there before "
            "is kept; make room and run the same command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def require_space(folder: str | Path, needed: int) -> None:
    """Refuse to start what would not fit on the disk.

    Raises:
        CheckpointError: with the bytes that are free and needed.
    """
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(
            f"{folder} lies on a disk with {free:,} bytes free, and {needed:,} are needed; make room, or give another "
            "output_dir."
        )


_held: dict[Path, FileLock] = {}


def hold_folder(folder: str | Path) -> None:
    """Keep other processes from working in a folder until this one ends, however it ends.

    Raises:
        CheckpointError: when another process works there.
    """
    folder = Path(folder).resolve()
    if folder in _held or process_rank() > 0:
        return
    private = folder / "private"
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(private / "lock", timeout=0, mode=0o600)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"another process works in {folder}; wait for it to end, or give another output_dir."
        ) from error
    _held[folder] = lock


def write_text(text: str, path: str | Path, mode: int = 0o644) -> None:
    """Write a text file, atomically."""
    with atomic_path(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: Any, path: str | Path, mode: int = 0o644) -> None:
    """Write JSON, atomically; NaN and infinity are refused because JSON has neither."""
    write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", path, mode)


def write_safetensors(
    state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str], mode: int = 0o644
) -> None:
    """Write tensors as safetensors, atomically."""
    from safetensors.torch import save_file

    with atomic_path(path, mode) as temporary:
        save_file(dict(state), temporary, metadata={"format": "pt", **metadata})


def write_volume(volume: Tensor, affine: Tensor, path: str | Path, mode: int = 0o644) -> None:
    """Write a volume ``(X, Y, Z)`` as ``.nii.gz``, atomically; the affine maps voxels to millimetres (RAS)."""
    import gzip

    import nibabel as nib

    content = nib.Nifti1Image(volume.cpu().numpy(), affine.cpu().numpy()).to_bytes()
    with atomic_path(path, mode) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0))


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: when it is missing, damaged or holds values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error
    _refuse_not_finite(state, path)
    return state, metadata


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else (
            hashlib.sha256(file.read()).hexdigest()
        )  # fmt: skip


# weights --------------------------------------------------------------------------------------------------------------


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and values of a state dict, independent of order, device and file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def _refuse_not_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path} holds values that are not finite, in {', '.join(broken[:5])}; use another file.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: flat, or under ``model``, ``state_dict`` (Auto3DSeg) or ``network_weights`` (nnU-Net).

    Numbers of numpy, which nnU-Net keeps beside the weights, are read; any other object is refused.

    Raises:
        CheckpointError: when the file is missing, damaged, needs unpickling, or holds anything but finite tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; give the path of a state dict.")
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on damaged files; all mean the same here
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged or more than a plain state dict; save it again as "
            f"torch.save(network.state_dict(), path). ({type(error).__name__})"
        ) from error
    for key in ("model", "state_dict", "network_weights"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors.")
    _refuse_not_finite(content, path)
    return content


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load a state dict into a network, in place; every key on both sides must fit.

    Raises:
        CheckpointError: naming the keys that are missing, left over or of another shape.
    """
    state = read_weights(path)
    own = network.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])})"
        for what, names in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
        if names
    ]
    if problems:
        hint = " Release plain weights: merge adapters first." if any("lora_" in name for name in extra) else ""
        raise CheckpointError(f"{path} does not fit {type(network).__name__}: keys {'; '.join(problems)}.{hint}")
    network.load_state_dict(state)
    return network


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write a network's plain state dict, atomically.

    Raises:
        CheckpointError: when a value is not finite, or adapters are still in the network.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    if any(".lora_A." in name for name in state):
        raise CheckpointError("the network still has adapters; merge them before saving plain weights.")
    _refuse_not_finite(state, path)
    buffer = io.BytesIO()  # torch writes a file's own name into it; this way equal weights are equal bytes
    torch.save(state, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def compiled(network: nn.Module, wanted: bool = True) -> nn.Module:
    """The network, compiled in place where that is wanted; names and values of its weights stay as they are.

    ``torch.compile`` needs a C++ compiler on CPUs, and takes tens of seconds when the network first runs.
    """
    if wanted:
        network.compile()
    return network


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new network whose initial weights are fixed by ``seed``; the global random state stays as it was."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return build()
