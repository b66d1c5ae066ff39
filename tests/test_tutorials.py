# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The notebooks: in the cell format of Project-MONAI/tutorials, without outputs, equal to their scripts, and run."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").rglob("*.ipynb"))
QUICK = {"06_your_own_model"}
SECTIONS = ("Copyright (c)", "## Setup environment", "## Setup imports", "## Setup data directory",
            "## Cleanup data directory")  # fmt: skip


def mark(path):
    if "monai_label" in path.stem:
        return [pytest.mark.label]
    return [] if path.stem in QUICK else [pytest.mark.slow]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_notebook_has_the_sections_of_monais_tutorials_and_no_output(path):
    notebook = jupytext.read(path)
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for section in SECTIONS:
        assert any(one.startswith(section) for one in text), section
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert any("max_epochs = " in cell.source for cell in code) and any(
        "print_config()" in cell.source for cell in code
    )


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script(path):
    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]


@pytest.mark.parametrize("path", [pytest.param(path, marks=mark(path), id=path.stem) for path in TUTORIALS])
def test_a_notebook_runs(path, tmp_path):
    if "monai_label" in path.stem and "MONAI_UNLEARN_LABEL_PYTHON" not in os.environ:
        pytest.skip("needs MONAI Label: set MONAI_UNLEARN_LABEL_PYTHON to the interpreter of its environment")
    environment = {**os.environ, "MONAI_DATA_DIRECTORY": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=900", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--override-ini", "addopts=", str(path)], cwd=path.parent, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
