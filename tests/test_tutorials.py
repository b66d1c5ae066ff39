# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorials_cells_run_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path))
    names: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            lines = [line for line in cell["source"] if not line.startswith("!")]
            exec(compile("".join(lines), str(path), "exec"), names)
    assert (tmp_path / "forget_a_patient" / "report.html").is_file()
