# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The site builds offline without a warning, the picture of the layers is true, and the words are careful."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted(ROOT.glob("bundles/*/docs/README.md")), *sorted(ROOT.glob("tutorials/*.py")),
         *sorted((ROOT / "monai_unlearn").rglob("*.py"))]  # fmt: skip


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_without_a_warning_and_without_the_network(site, tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9",
                   "https_proxy": "http://127.0.0.1:9"}  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-2000:]
    home = (tmp_path / "site" / "index.html").read_text()
    assert not re.search(r"<(script|link)[^>]*(src|rel=.stylesheet. href)=.https?:", home)
    assert (tmp_path / "site" / "images" / "architecture.svg").is_file()
    for number, functions in site.NUMBERS.items():
        text = (tmp_path / "site" / "numbers" / number / "index.html").read_text()
        assert all(f'id="monai_unlearn.audit.{function}"' in text for function in functions), number
    assert '<a href="scrub/"><code>scrub</code></a>' in (tmp_path / "site" / "methods" / "index.html").read_text()
    assert "../tutorials/06_your_own_model/" in (tmp_path / "site" / "howto" / "index.html").read_text()
    assert "PerturbedSignGradient" in (tmp_path / "site" / "reference" / "index.html").read_text()


def test_the_picture_of_the_layers_is_that_of_the_code(site):
    assert site.PICTURE.read_text(encoding="utf-8") == site.architecture(), "python docs/site.py draws it anew"


def test_links_within_the_repository_lead_somewhere():
    for page in PAGES:
        if page.suffix == ".md":
            for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_layer_imports_a_higher_one(site):
    rows = {name: row for row, (_, names) in enumerate(site.LAYERS) for name in names}
    used = site.imports(ROOT / "monai_unlearn")
    assert set(used) == set(rows)
    assert not [(name, other) for name, others in used.items() for other in others if rows[other] > rows[name]]


def test_the_questions_know_little_of_each_other(site):
    used = site.imports(ROOT / "monai_unlearn")
    for name in ("request", "losses", "compose", "boundary", "scan"):
        assert not used[name], name
    assert used["relabel"] <= {"checkpoint", "request"} and used["lora"] <= {"checkpoint"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_page_claims_what_nobody_can_claim(page):
    text = page.read_text(encoding="utf-8").lower()
    for word in ("certified", "guarantee", "compliant", "gdpr", "provably", "permanently delet", "truly forg"):
        assert word not in text, word


def test_every_overlay_is_described(site):
    text = (ROOT / "docs" / "methods.md").read_text()
    networks = {"flexible_unet", "densenet121", "resnet18", "size_180", "native", "paper_256"}
    overlays = {path.stem for path in ROOT.glob("bundles/*/configs/methods/*.json")} - networks
    assert not [name for name in sorted(overlays) if f"`{name}`" not in text]
