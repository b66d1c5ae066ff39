# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Read a bundle from somebody else before it runs: a MONAI configuration is code.

``python -m monai_unlearn scan BUNDLE`` lists every ``_target_`` outside of an allow list and every expression that
imports, opens, downloads, executes or reaches into Python's inside. Nothing is evaluated, imported or unpickled; the
scan says what a person should read, and an empty list is no proof of harmlessness.
"""

from __future__ import annotations

import ast
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from monai.bundle.utils import ID_SEP_KEY

ALLOWED_TARGETS = (
    "monai.", "monai_unlearn.", "torch.nn.", "torch.optim.", "torch.utils.data.", "torch.mean", "torch.sigmoid",
    "torch.softmax", "torch.argmax", "ignite.metrics.", "ignite.handlers.",
)  # fmt: skip
ALLOWED_IMPORTS = {
    "torch", "monai", "monai_unlearn", "monai_unlearn.preflight", "ignite", "math", "numpy", "glob", "os", "json",
    "pathlib",
}  # fmt: skip
REFUSED_TARGETS = (
    "monai.bundle.", "monai.utils.", "monai.apps.utils.", "monai.apps.datasets.", "monai.apps.nnunet.",
    "monai.apps.auto3dseg.", "monai.data.utils.", "torch.utils.data._utils.",
)  # fmt: skip
REFUSED_CALLS = {
    "eval", "exec", "compile", "open", "__import__", "getattr", "setattr", "delattr", "globals", "locals", "vars",
    "input", "breakpoint", "memoryview",
}  # fmt: skip
REFUSED_ATTRIBUTES = {
    "system", "popen", "spawn", "spawnl", "spawnv", "execv", "execve", "fork", "kill", "remove", "unlink", "rmdir",
    "rmtree", "rename", "replace", "chmod", "chown", "symlink", "putenv", "environ", "getenv", "load", "save", "hub",
    "load_url", "download", "download_url", "download_and_extract", "extractall", "urlopen", "requests",
    "socket", "subprocess", "Popen", "check_output", "check_call", "import_module", "load_state_dict_from_url",
    "write_text", "write_bytes", "read_text", "read_bytes", "open", "jit", "modules", "run_path", "run_module", "loads",
    "unpickle", "pickle", "shutil", "ctypes", "sys", "importlib", "builtins",
}  # fmt: skip
CODE_FILES = {".py", ".pyc", ".so", ".dll", ".sh", ".bat", ".exe", ".pkl", ".pickle", ".joblib", ".npy", ".pt2"}


def scan_expression(text: str) -> list[str]:
    """What in an expression of a configuration a person should read.

    Args:
        text: without the leading ``$``; references ``@id`` and ``%id`` are names.

    Returns:
        One line for each find; empty where there is none.
    """
    code = "".join("_" if letter in "@%" else letter for letter in text.replace(ID_SEP_KEY, "_").replace("#", "_"))
    try:
        tree = ast.parse(code.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ["cannot be parsed"]
    return sorted(set(_finds(tree)))


def _finds(tree: ast.AST) -> Iterator[str]:
    fixed = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _fixed_attribute(node)}
    for node in ast.walk(tree):
        if id(node) in fixed:
            continue
        if isinstance(node, ast.Import):
            yield from (f"imports {one.name}" for one in node.names if one.name not in ALLOWED_IMPORTS)
        elif isinstance(node, ast.ImportFrom):
            if node.module not in ALLOWED_IMPORTS or node.module == "os":
                yield f"imports from {node.module}"
        elif isinstance(node, ast.Name) and (node.id in REFUSED_CALLS or node.id.startswith("__")):
            yield f"uses {node.id}"
        elif isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            yield f"reaches into {node.attr}"
        elif isinstance(node, ast.Attribute) and node.attr in REFUSED_ATTRIBUTES and not _of_str_or_dict(node):
            yield f"uses .{node.attr}"
        elif isinstance(node, (ast.Lambda, ast.NamedExpr, ast.Await, ast.Yield)):
            yield f"holds a {type(node).__name__.lower()}"


def _fixed_attribute(call: ast.Call) -> bool:
    """``getattr`` of a name that is written out, and harmless as ``.name``."""
    name = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else None
    is_getattr = isinstance(call.func, ast.Name) and call.func.id == "getattr"
    return is_getattr and isinstance(name, str) and not name.startswith("_") and name not in REFUSED_ATTRIBUTES


def _of_str_or_dict(node: ast.Attribute) -> bool:
    """``'text'.replace`` is a string's method."""
    return node.attr == "replace" and isinstance(node.value, ast.Constant)


def scan_config(config: Any, place: str = "") -> list[str]:
    """What in a configuration a person should read: targets outside of the allow list and expressions.

    Args:
        config: as JSON or YAML give it.
        place: where it stands, for the messages.

    Returns:
        ``place: what`` for each find.
    """
    found: list[str] = []
    if isinstance(config, dict):
        for key, value in config.items():
            where = f"{place}#{key}" if place else str(key)
            if key == "_target_" and not _allowed_target(value):
                found.append(f"{where}: target {str(value)[:80]!r} is not on the list")
                continue
            found += scan_config(value, where)
            if isinstance(key, str) and key.startswith("$"):
                found.append(f"{where}: a key that is an expression")
    elif isinstance(config, list):
        for number, value in enumerate(config):
            found += scan_config(value, f"{place}#{number}")
    elif isinstance(config, str):
        text = config.strip()
        if text.startswith("$"):
            found += [f"{place}: {find}" for find in scan_expression(text[1:])]
        elif (text.startswith("%") and any(one in text for one in ("..", "://"))) or text.startswith("%/"):
            found.append(f"{place}: takes in the file {text[1:80]!r}")
    return found


def _allowed_target(target: Any) -> bool:
    if not isinstance(target, str) or target.startswith("$"):
        return isinstance(target, str) and not scan_expression(target[1:])
    if "." not in target:  # a short name is looked up among MONAI's components
        return target.isidentifier()
    return target.startswith(ALLOWED_TARGETS) and not target.startswith(REFUSED_TARGETS)


def scan_bundle(folder: str | Path) -> list[str]:
    """What in a bundle a person should read before it runs.

    Args:
        folder: the bundle; all its JSON and YAML files, ``logging.conf``, scripts and weights are looked at.

    Returns:
        ``file: what`` for each find, sorted; empty where there is none.

    Raises:
        FileNotFoundError: when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found.append(f"{name}: a link")
        elif path.is_file():
            found += [f"{name}: {what}" for what in _scan_file(path)]
    return found


def _scan_file(path: Path) -> list[str]:
    kind = path.suffix.lower()
    if kind in CODE_FILES:
        return ["code, or a file that can hold some"]
    if kind in (".pt", ".pth", ".ckpt", ".ts", ".bin"):
        return _scan_weights(path)
    if kind in (".json", ".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if kind == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            return [f"cannot be read ({type(error).__name__})"]
        if path.name == "metadata.json":  # a description: nothing in it is a component
            return [f"{one}" for one in scan_config(content) if "target" not in one]
        return scan_config(content)
    if path.name == "logging.conf":  # Python's logging evaluates the arguments of its handlers
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        return [f"{line[:60]!r}" for line in lines if _odd_logging(line)]
    return []


def _odd_logging(line: str) -> bool:
    key, _, value = (part.strip() for part in line.partition("="))
    if key == "class":
        return value not in ("StreamHandler", "FileHandler", "logging.StreamHandler")
    return key in ("args", "kwargs") and bool(value) and value not in ("(sys.stdout,)", "(sys.stderr,)", "()")


def _scan_weights(path: Path) -> list[str]:
    """Names in the pickle of a file of weights that tensors do not need; nothing is unpickled."""
    import pickletools

    if not zipfile.is_zipfile(path):
        return ["weights in a format that has to be unpickled whole; ask for a state dict or safetensors"]
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any("/code/" in name for name in names):
            return ["TorchScript: it brings its own code"]
        found: set[str] = set()
        for name in names:
            if not name.endswith(".pkl"):
                continue
            texts: list[str] = []
            try:
                for opcode, argument, _ in pickletools.genops(archive.read(name)):
                    if opcode.name in ("GLOBAL", "INST"):
                        found.add(str(argument).replace(" ", "."))
                    elif opcode.name == "STACK_GLOBAL":
                        found.add(".".join(texts[-2:]))
                    elif isinstance(argument, str):
                        texts.append(argument)
            except ValueError:
                return ["weights that cannot be read"]
    odd = sorted(one for one in found if not _harmless_global(one))
    return [f"weights that call {', '.join(odd[:5])}"] if odd else []


def _harmless_global(name: str) -> bool:
    return name == "collections.OrderedDict" or name in {
        "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.serialization._get_layout",
    } or (name.startswith("torch.") and name.endswith(("Storage", "Size", "dtype")))  # fmt: skip
