# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What a run and MONAI's caches still hold of the forgotten cases, found and removed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data.utils import json_hashing, pickle_hashing

from .checkpoint import atomic_path, hold_folder, write_json
from .datasets.reading import label_files
from .release import UNREACHABLE
from .request import Item, RequestError, item_id

LOCATION_KEYS = ("image", "label")


def names_of(item: Item) -> list[bytes]:
    """What a cache may call a case: its id and the file names of its image and masks, with their endings."""
    files = [str(item["image"]), *label_files(item)]
    return sorted({item_id(item).encode(), *(Path(file).name.encode() for file in files)})


def entry_names(item: Item) -> set[str]:
    """The names under which MONAI's ``PersistentDataset`` and its kin keep a case: the hash of its data list entry.

    The entry as it is in the data list, and with image and label alone, by both of MONAI's hash functions.
    """
    entries = [dict(item), {key: item[key] for key in LOCATION_KEYS if key in item}]
    hashes = set()
    for entry in entries:
        hashes.add(pickle_hashing(entry).decode())
        try:
            hashes.add(json_hashing(entry).decode())
        except TypeError:  # an entry that JSON cannot hold was never cached under such a hash
            continue
    return hashes


class _Traces:
    """Recognises forgotten cases in names and bytes of cache entries."""

    def __init__(self, items: Iterable[Item]) -> None:
        items = list(items)
        self.hashes = set().union(*map(entry_names, items)) if items else set()
        names = sorted(set().union(*map(names_of, items)), key=len, reverse=True) if items else []
        # a name inside a longer one belongs to another case
        self.pattern = re.compile(
            rb"(?<![0-9A-Za-z_])(?:" + b"|".join(map(re.escape, names)) + rb")(?![0-9A-Za-z_])"
        ) if names else None  # fmt: skip

    def in_name(self, name: str) -> bool:
        return any(name.startswith(one) for one in self.hashes)

    def in_bytes(self, content: bytes) -> bool:
        return self.pattern is not None and self.pattern.search(content) is not None


def purge_cache(folder: str | Path, items: Iterable[Item]) -> dict[str, int]:
    """Remove the entries of forgotten cases from a cache of MONAI's; those of other cases stay and are still served.

    ``PersistentDataset``, ``CacheNTransDataset`` and ``GDSDataset`` keep one file for each case, ``LMDBDataset`` one
    database. An entry is theirs when it bears the hash of their data list entry, or when an id or file name of theirs
    stands in it.

    Args:
        folder: of the cache.
        items: of the forgotten cases.

    Returns:
        ``removed`` and ``kept`` entries.

    Raises:
        RequestError: when there is no such folder, or a database is there and ``lmdb`` is not installed.
    """
    folder, traces = Path(folder), _Traces(items)
    if not folder.is_dir():
        raise RequestError(f"there is no folder {folder}; give the cache folder of a PersistentDataset or its kin.")
    removed = kept = 0
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        if path.suffix == ".lmdb":
            gone, stay = _purge_database(path, traces)
        elif path.name.endswith("-lock"):  # of a database, holds nothing
            continue
        else:
            gone = int(traces.in_name(path.name) or traces.in_bytes(path.read_bytes()))
            stay = 1 - gone
            if gone:
                path.unlink()
        removed, kept = removed + gone, kept + stay
    return {"removed": removed, "kept": kept}


def _purge_database(path: Path, traces: _Traces) -> tuple[int, int]:
    """Entries removed and kept; the file is written anew, because a database keeps the bytes of deleted entries."""
    try:
        import lmdb
    except ImportError as error:
        raise RequestError(f"{path} is an LMDB database; pip install lmdb to purge it.") from error
    removed = 0
    with lmdb.open(str(path), subdir=False, lock=False) as database:
        with database.begin(write=True) as change:
            doomed = [
                bytes(key)
                for key, value in change.cursor()
                if traces.in_name(bytes(key).decode(errors="replace")) or traces.in_bytes(bytes(value))
            ]
            for key in doomed:
                removed += change.delete(key)
        kept = database.stat()["entries"]
        with atomic_path(path, path.stat().st_mode & 0o777) as temporary:
            temporary.unlink()
            database.copy(str(temporary), compact=True)
    return removed, kept


def purge(
    output_dir: str | Path,
    items: Sequence[Item],
    caches: Sequence[str | Path] = (),
    original: bool = False,
) -> dict[str, Any]:
    """Remove what a finished run needs no more and what holds traces of the forgotten cases.

    In the run's folder: states of training with their optimizer (``private/resume``), kept labels and importances,
    residual-memory maps, the student before its restoration, temporaries; with ``original`` the original, its adapter
    and everything else that gives it back. Then their entries in the caches named. What was done is kept in
    ``private/purged.json`` (numbers, no names) and stands in the receipt of a release made afterwards.

    Args:
        output_dir: of the run.
        items: of the forgotten cases.
        caches: folders of MONAI caches.
        original: remove the original's weights from the run's folder too. A copy given by ``--original_model`` lies
            outside and stays.

    Returns:
        ``files`` removed by kind, ``caches`` (entries removed and kept, in the order given), ``bytes``, and
        ``not_reached``.

    Raises:
        RequestError: when the folder holds no finished run, or a cache cannot be purged.
    """
    folder = Path(output_dir)
    if not (folder / "report.json").is_file():
        raise RequestError(f"{folder} holds no finished run (no report.json); purge removes what a run still needs.")
    hold_folder(folder)
    kinds: Mapping[str, Sequence[str]] = {
        "training states": ["private/resume"],
        "kept labels and importances": ["private/labels", "private/*.safetensors"],
        "residual-memory maps": ["private/residual_memory"],
        "students before restoration": ["models/strong.*"],
        "temporaries": ["**/.*.tmp"],
        **({"the original and its adapter": ["models/original.*", "models/adapter"]} if original else {}),
    }
    files, size = {}, 0
    for kind, patterns in kinds.items():
        found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        inside = [one for path in found for one in ([path] if path.is_file() else path.rglob("*")) if one.is_file()]
        files[kind], size = len(inside), size + sum(one.stat().st_size for one in inside)
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    done = {
        "files": files,
        "bytes": size,
        "caches": [purge_cache(cache, items) for cache in caches],
        "not_reached": list(UNREACHABLE) + ([] if original else ["the original model and whatever teaches from it"]),
    }
    write_json(done, folder / "private" / "purged.json", mode=0o600)
    return done
