# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_unlearn``: what is asked about files, where no bundle runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import CheckpointError
from .release import ReleaseError, verify
from .scan import scan_bundle


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a release, or read a bundle from somebody else before it runs.

    Args:
        arguments: of the command line; None takes the process's.

    Returns:
        0 when nothing was found, 2 for a path that is none, 3 when something was.
    """
    parser = argparse.ArgumentParser(prog="python -m monai_unlearn", description=(main.__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="check a release's files, weights, receipt and signature, offline")
    command.add_argument("folder", type=Path, help="the release")
    command.add_argument("--public_key", type=Path, help="signing_public.pem of whoever should have signed")
    command = commands.add_parser("scan", help="list what in a bundle a person should read before it runs")
    command.add_argument("folder", type=Path, help="the bundle")
    given = parser.parse_args(arguments)
    if not given.folder.is_dir():
        print(f"there is no folder {given.folder}.", file=sys.stderr)
        return 2
    return _scan(given.folder) if given.command == "scan" else _verify(given.folder, given.public_key)


def _verify(folder: Path, public_key: Path | None) -> int:
    try:
        found = verify(folder, public_key)
    except (ReleaseError, CheckpointError) as error:
        print(f"REFUSED: {error}", file=sys.stderr)
        return 3
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {'; '.join(value) or 'no' if isinstance(value, list) else value}")
    return 0


def _scan(folder: Path) -> int:
    found = scan_bundle(folder)
    print("\n".join(found) or f"{folder}: nothing that has to be read first; that is no proof of harmlessness.")
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main())
