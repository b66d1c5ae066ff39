# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Every benchmark prints the table of the rows that were measured; nothing is timed here."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if path.stem != "rows")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_table_shows_every_row_there_is(script):
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    with script.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    key = next(name for name in ("row", "method", "child") if name in rows[0])
    assert rows and all(f"| {row[key]} |" in done.stdout for row in rows)
