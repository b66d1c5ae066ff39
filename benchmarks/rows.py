# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: a run of a bundle by its command line, and one CSV row per finished run."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from monai_unlearn.checkpoint import write_text

ROOT = Path(__file__).parents[1]
PARTS = ("cache", "reference", "train")  # of the cost of unlearning


def parser_of(description: str | None, data: str = "the real data") -> argparse.ArgumentParser:
    """The arguments of every benchmark: where its data is, without which it prints its tables, and where runs go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", help=f"{data}; without it the tables are printed")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output")
    return parser


def run(
    bundle: str, overlays: Sequence[str], dataset_dir: str, folder: Path, run_id: str = "run", **options: object
) -> dict:
    """Run a bundle with overlays and options, and return its report; what ``folder`` holds is not run again."""
    configs = [f"bundles/{bundle}/configs/train.json"]
    configs += [f"bundles/{bundle}/configs/methods/{name}.json" for name in overlays]
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(configs)]
    given = {"dataset_dir": os.path.abspath(dataset_dir), "output_dir": os.path.abspath(folder), "with_retrained": 1}
    for key, value in (given | options).items():
        command += [f"--{key}", str(value)]
    subprocess.run(command, cwd=ROOT, check=True)
    report = folder / "report.json"
    return json.loads(report.read_text()) if report.exists() else {}


def costs(report: dict, units: Sequence[str]) -> dict:
    """The parts of the cost of unlearning and the cost of retraining, in each unit."""
    return {f"{part}_{unit}": report["cost"][f"{part}_{unit}"] for unit in units for part in (*PARTS, "retrain")}


def finished(path: Path) -> list[dict]:
    """The rows there are."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def append(path: Path, row: dict) -> None:
    """Add one row, atomically; floats get five digits."""
    row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
    rows = [*finished(path), row]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(text.getvalue(), path)


def share(row: dict, unit: str, parts: Sequence[str] = PARTS) -> float:
    """Cost of unlearning as a share of retraining."""
    return sum(float(row[f"{part}_{unit}"]) for part in parts) / float(row[f"retrain_{unit}"])


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is the head."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])
