# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Pages of the site that live elsewhere: those of bundles, methods, numbers of the audit and tutorials.

``python docs/site.py`` draws the picture of the layers, ``docs/images/architecture.svg``, from the code.
"""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path
from typing import Any

import jupytext
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
QUESTIONS = ("request", "datasets", "data", "relabel", "boundary", "losses", "lora", "saliency", "compose", "trunk")
LAYERS = (
    ("files and processes", ("distributed", "checkpoint")),
    ("the questions, each by itself", QUESTIONS),
    ("how a phase is trained", ("handlers", "engines")),
    ("did it work", ("audit",)),
    ("what may leave the house", ("release", "purge", "scan")),
    ("how a configuration drives it", ("bundle", "preflight", "tuning", "exact")),
    ("where people meet it", ("monai_label", "label_app", "label_server", "__main__")),
)

NUMBERS = {
    "verdict": ("judge_verdict",),
    "scores": ("score_cases", "surface_band", "expected_calibration_error", "cl_dice", "f1_scores", "bootstrap_mean"),
    "expected_unseen": ("expected_unseen", "References"),
    "completeness": ("completeness",),
    "membership": ("membership_table", "attack", "auc", "tpr_at_fpr", "rmia", "likelihood_ratio", "lira"),
    "strongest_attack": ("strongest_attack",),
    "controls": ("negative_control",),
    "leaks": ("two_version_leak", "retained_leak"),
    "cases": ("rank_test",),
    "agreement": ("compare_cases",),
    "js": ("js_divergence",),
    "floor": ("seed_margin",),
    "tug_of_war": ("tug_of_war",),
    "equivalence": ("equivalence", "non_inferiority"),
    "relearn": ("relearn_curve",),
    "relearn_index": ("anamnesis_index",),
    "probes": ("rounded", "with_statistics_of", "removable"),
    "residual": ("residual_memory",),
}  # key of report.json: the functions of monai_unlearn.audit behind it


def imports(package: Path) -> dict[str, set[str]]:
    """Which module of the package imports which other, read from the code; a sub-package counts as one."""
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        own = found.setdefault(parts[0], set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
                names = [base[0]] if base[0] else [alias.name for alias in node.names]
                own.update(name for name in names if (name and name != parts[0] and (package / name).exists())
                           or (package / f"{name}.py").exists())  # fmt: skip
    return {name: {one for one in used if one != name} for name, used in found.items()}


def architecture() -> str:
    """The layers and what imports what, as SVG; a red line points from a lower layer to a higher one."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "monai_unlearn", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    used = imports(ROOT / "monai_unlearn")
    places = {
        name: ((index + 0.5) / len(names) * 10, row)
        for row, (_, names) in enumerate(LAYERS)
        for index, name in enumerate(names)
    }
    missing = set(used) - set(places)
    if missing:
        raise ValueError(f"docs/site.py: the layers do not name {', '.join(sorted(missing))}.")
    figure, axes = plt.subplots(figsize=(11, 6.5))
    for name, others in used.items():
        for other in sorted(others & set(places)):
            (x, y), (u, v) = places[name], places[other]
            colour = "tab:red" if v > y else "0.75"
            axes.plot([x, u], [y, v], color=colour, linewidth=1.2 if v > y else 0.7, zorder=1)
    for name, (x, y) in places.items():
        axes.text(x, y, name, ha="center", va="center", fontsize=9, zorder=2,
                  bbox={"boxstyle": "round", "facecolor": "#e8f0fe", "edgecolor": "#3f51b5"})  # fmt: skip
    for row, (title, _) in enumerate(LAYERS):
        axes.text(-0.3, row, title, ha="right", va="center", fontsize=9, style="italic")
    axes.set_xlim(-3, 10)
    axes.set_ylim(-0.5, len(LAYERS) - 0.4)
    axes.axis("off")
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def overlays() -> dict[str, list[Path]]:
    """The files of each method, one for each bundle that has it."""
    found: dict[str, list[Path]] = {}
    for path in sorted(ROOT.glob("bundles/*/configs/methods/*.json")):
        found.setdefault(path.stem, []).append(path)
    return found


def method_page(name: str, files: list[Path]) -> str:
    """How a method is run in each bundle, and all that it is: its overlay."""
    parts = [f"# `{name}`", "What it does and where it comes from: [Methods](../methods.md)."]
    for path in files:
        bundle, overlay = path.parents[2].name, path.relative_to(ROOT)
        command = (
            f"python -m monai.bundle run --config_file \"['bundles/{bundle}/configs/train.json', '{overlay}']\" ..."
        )
        text = path.read_text(encoding="utf-8").strip()
        parts.append(f"## [{bundle}](../bundles/{bundle}.md)\n\n```\n{command}\n```\n\n```json\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def number_page(name: str) -> str:
    """What a number of the report is, and the functions that compute it with their formulas."""
    table = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in table if line.startswith("| `") and f"`{name}`" in line.split("|")[1])
    functions = "".join(f"\n::: monai_unlearn.audit.{function}\n" for function in NUMBERS[name])
    return f"# `{name}`\n\n{row.split('|')[2].strip()} ([the audit](../audit.md)).\n{functions}"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages; called by mkdocs."""

    def add(name: str, content: str | bytes) -> None:
        files.append(File.generated(config, name, content=content))

    for bundle in sorted((ROOT / "bundles").iterdir()):
        page = (bundle / "docs" / "README.md").read_text(encoding="utf-8").replace("(../../../docs/", "(../")
        add(f"bundles/{bundle.name}.md", page.replace("(images/", f"({bundle.name}/"))
        for picture in sorted((bundle / "docs" / "images").glob("*")):
            add(f"bundles/{bundle.name}/{picture.name}", picture.read_bytes())
    for name, paths in overlays().items():
        add(f"methods/{name}.md", method_page(name, paths))
    for name in NUMBERS:
        add(f"numbers/{name}.md", number_page(name))
    for script in sorted((ROOT / "tutorials").glob("*.py")):
        notebook = jupytext.read(script)
        first, *others = notebook.cells
        first.source = "# " + first.source.partition("\n# ")[2]  # the licence is the repository's
        notebook.cells = [first, *(cell for cell in others if "print_config()" not in cell.source)]
        text = jupytext.writes(notebook, "md")
        add(f"tutorials/{script.stem}.md", text.split("---\n", 2)[2] if text.startswith("---\n") else text)
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links of the repository become links of the site, methods and numbers links to their pages; called by mkdocs."""
    for own, folder, names in (("methods.md", "methods", overlays()), ("audit.md", "numbers", NUMBERS)):
        for name in names if page.file.src_uri == own else ():
            markdown = re.sub(rf"(?<![\[`])`{name}`(?!\])", f"[`{name}`]({folder}/{name}.md)", markdown)
    markdown = re.sub(r"\]\(\.\./tutorials/(\w+)\.ipynb\)", r"](tutorials/\1.md)", markdown)
    return re.sub(r"\]\(\.\./bundles/(\w+)/docs/README\.md\)", r"](bundles/\1.md)", markdown)


if __name__ == "__main__":
    PICTURE.write_text(architecture(), encoding="utf-8")
