# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Before any work: arguments, request and data are checked, and the plan is shown."""

from __future__ import annotations

import atexit
import inspect
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.reference_resolver import ReferenceResolver
from monai.utils import ensure_tuple
from torch import nn

from .audit.scores import Inferer
from .bundle import Stop, on_stack, plain_errors, stop
from .checkpoint import read_weights, weights_digest, write_json, write_text
from .data import MemoryDataset
from .datasets import (
    DataError,
    inspect_items,
    is_phantom,
    isic_datalist,
    known_pairs,
    load_splits,
    make_isic_phantom,
    read_pair,
    settle_duplicates,
)
from .datasets.lists import FolderDatalist
from .datasets.reading import Reader
from .distributed import first_process_first
from .engines import forward_flops, saved_bytes, training_flops
from .request import Item, RequestError, Resolution, item_id, make_request, manifest, refuse_expressions, resolve
from .trunk import FrozenTrunk

TRACKING_KEYS = {"tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0", "trainer",
                 "validator", "evaluator", "_meta_"}  # fmt: skip


# arguments ------------------------------------------------------------------------------------------------------------


def __getattr__(name: str) -> Any:
    """``from monai_unlearn.preflight import arguments_checked`` checks the running bundle's arguments.

    A configuration's first import runs before anything else in it, even before an argument that is itself an import
    statement; this makes the check that import.
    """
    if name == "arguments_checked":
        try:
            check_arguments()
        except RequestError as error:
            stop(str(error), 2)
        return True
    raise AttributeError(name)


def check_arguments() -> None:
    """Refuse arguments of the running bundle that MONAI would take silently.

    Raises:
        RequestError: on a top-level key that no file of the bundle's ``configs`` has and nothing refers to, with the
            nearest that there is; and on an option whose value would be evaluated (``$``, ``@``, ``%``) and is not one
            of the files' own.
    """
    workflow = next(on_stack(ConfigWorkflow), None)
    if workflow is None:
        return
    shipped = _shipped_config(Path(workflow.config_root_path))
    arguments = {key: value for key, value in _raw_arguments().items() if "#" not in key and "::" not in key}
    config: dict[str, Any] = workflow.parser.get()  # type: ignore[assignment]
    for key in [*config, *arguments]:
        if key not in shipped and key not in TRACKING_KEYS and not _read_elsewhere(key, config):
            near = get_close_matches(key, list(shipped), n=1)
            raise RequestError(f"there is no option --{key}" + (f"; did you mean --{near[0]}?" if near else "."))
    method = _method_keys(Path(workflow.config_root_path))
    for source, free in ((arguments, set()), (config, {*method, *set(config) - set(shipped)})):
        for key, value in source.items():
            components = any(isinstance(own, dict) for own in shipped.get(key, ())) and key != "displayable_configs"
            if key not in free and not components and _text(value) not in map(_text, shipped.get(key, ())):
                refuse_expressions(value, f"--{key}")


def _read_elsewhere(key: str, config: Mapping[str, Any]) -> bool:
    """Whether another entry refers to this one, as to an overlay's own; a mistyped option is read by nothing."""
    others = json.dumps({name: value for name, value in config.items() if name != key}, default=repr)
    return re.search(rf"[@%]{re.escape(key)}\b", others) is not None


def _method_keys(folder: Path) -> set[str]:
    """What overlays of methods replace by expressions: parts of a method, and never who is forgotten or where."""
    files = [ConfigParser.load_config_file(str(path)) for path in sorted((folder / "methods").glob("*.json"))]
    parts = {key for file in files for key, value in file.items() if str(value).startswith("$")}
    return {"imports", *(key.lstrip("+").replace("::", "#").split("#")[0] for key in parts)}


def _text(value: Any) -> str:
    """A value of a configuration as text that is the same before and after MONAI has parsed it."""
    return ReferenceResolver.normalize_id(json.dumps(value, default=repr))


def _shipped_config(folder: Path) -> dict[str, list[Any]]:
    """The values that the configurations of a bundle, and those given to the running command, hold for each key."""
    shipped: dict[str, list[Any]] = {}
    given = [str(path) for frame in _frames("create_workflow") for path in ensure_tuple(frame.get("config_file") or ())]
    for path in [str(folder / "train.json"), *given, *sorted(map(str, folder.glob("**/*.json")))]:
        if Path(path).name != "metadata.json" and Path(path).is_file():
            for key, value in ConfigParser.load_config_file(path).items():
                shipped.setdefault(key.lstrip("+").replace("::", "#").split("#")[0], []).append(value)
    return shipped


def _frames(function: str) -> list[dict[str, Any]]:
    found, frame = [], inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == function:
            found.append(frame.f_locals)
        frame = frame.f_back
    return found


def _raw_arguments() -> dict[str, Any]:
    """What was given to ``monai.bundle.run``, before it was parsed; empty for a workflow that was built directly."""
    own = {"run_id", "init_id", "final_id", "meta_file", "logging_file", "tracking", "workflow_type", "properties_path"}
    return {
        key: value
        for frame in _frames("create_workflow")
        for key, value in (frame.get("_args") or {}).items()
        if key not in own
    }


def normalise_arguments() -> None:
    """Give the running bundle's options the type of their defaults: ``true`` and ``1`` become booleans, text numbers.

    Call it in ``initialize``: MONAI passes ``--quick true`` on as text.

    Raises:
        RequestError: when a value cannot be read as what the default is.
    """
    workflow = next(on_stack(ConfigWorkflow), None)
    if workflow is None:
        raise RuntimeError("normalise_arguments works inside a bundle's initialize only.")
    try:
        for key, (default, *others) in _shipped_config(Path(workflow.config_root_path)).items():
            value = workflow.parser.get(key, default)
            if isinstance(default, str) and default.startswith("$int(") and value != default:  # a computed number
                value = {"true": 1, "false": 0}.get(str(value).lower(), value)
                workflow.parser[key] = _typed(key, value, int)
                continue
            if key in TRACKING_KEYS or type(default) not in (bool, int, float):
                continue
            if isinstance(value, str) and _text(value) in map(_text, others):
                continue  # an overlay's own expression
            if type(value) is not type(default):
                workflow.parser[key] = _typed(key, value, type(default))
    except RequestError as error:
        stop(str(error), 2)


def _typed(key: str, value: Any, kind: type) -> Any:
    if kind is bool:
        words = {"0": False, "false": False, "1": True, "true": True}
        if str(value).lower() not in words:
            raise RequestError(f"--{key} takes 0, 1, true or false, got {value!r}.")
        return words[str(value).lower()]
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise RequestError(f"--{key} takes a number, got {value!r}.") from error
    if kind is int and number != int(number):
        raise RequestError(f"--{key} takes a whole number, got {value!r}.")
    return int(number) if kind is int else number


# data and request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """The data and the request of a run, checked.

    Attributes:
        resolution: who is forgotten.
        name: of the data, without a path; ``phantom`` for the phantom.
        phantom: whether no real data was given.
    """

    resolution: Resolution
    name: str
    phantom: bool


@plain_errors
@first_process_first()
def prepare(
    dataset_dir: str | Path | None = None,
    datalist: str | Path | None = None,
    holdout_fold: Any = None,
    forget_request: str | Path | None = None,
    forget_ids: Any = None,
    forget_fraction: float | None = None,
    job: str | None = None,
    seed: int = 0,
    original_model: str | Path | None = None,
    reference_models: Any = None,
    subgroups: Sequence[str] = (),
    output_dir: str | Path = "output",
    quick: bool = False,
    default_fold: int = 4,
    phantom: Callable[..., str] = make_isic_phantom,
    phantom_size: tuple[int, int] = (240, 60),
    class_key: str = "diagnosis",
    folder_datalist: FolderDatalist = isic_datalist,
    read: Reader = read_pair,
    duplicates: str | None = None,
    structures: Sequence[str] = (),
    tuning_share: float = 0.0,
) -> Prepared:
    """Find the data (or draw the phantom), read every file once, and resolve the request.

    Nothing is written but the phantom, and that only where the run may write: ``plan`` draws it in a temporary folder.

    Args:
        dataset_dir: folder in the data set's official layout; without it and ``datalist`` the phantom is drawn.
        datalist: MONAI data list instead.
        holdout_fold: the fold never trained on; ``default_fold`` where the bundle trains the original itself and the
            data have folds but no validation section.
        forget_request: request file; or ``forget_ids``, or ``forget_fraction``.
        forget_ids: ids of images.
        forget_fraction: share to forget.
        job: deletion, suppression or revision.
        seed: of a drawn forget set.
        original_model: weights given by the user; the split must be stated then.
        reference_models: files of weights that saw neither forget set nor holdout: the teacher, then the judges; or
            cross-validation models by the fold that each was not trained on, which judge.
        subgroups: metadata columns that the audit looks at group by group.
        output_dir: of the run; the phantom lies in it.
        quick: draw the small phantom.
        default_fold: see ``holdout_fold``.
        phantom: draws the phantom: ``phantom(folder, number=...)``.
        phantom_size: pictures of the phantom and of the quick one.
        class_key: metadata column of the class.
        folder_datalist: makes the data list of a folder, see :mod:`monai_unlearn.datasets`.
        read: reads and checks one item.
        duplicates: for classification what becomes of pictures that stand there twice, see
            :func:`monai_unlearn.datasets.settle_duplicates`; None does not look.
        structures: see :func:`monai_unlearn.resolve`.
        tuning_share: of the unseen groups, set apart for a search for settings and out of everything else.

    Raises:
        RequestError, DataError: with the file, key or id and the remedy. Within a bundle run they end it with exit
            code 2 or 3.
    """
    if reference_models:
        check_references(reference_models, original_model)
    no_data = not dataset_dir and not datalist
    if no_data:
        name = "phantom_quick" if quick else "phantom"
        folder = Path(output_dir) / name
        if not is_phantom(folder) and _plan_only():
            temporary = tempfile.mkdtemp(prefix="monai_unlearn_")
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
            folder = Path(temporary) / name
        dataset_dir = phantom(folder, number=phantom_size[bool(quick)])
    is_drawn = bool(dataset_dir) and is_phantom(str(dataset_dir))
    fold = default_fold if original_model is None else None
    training, holdout = load_splits(dataset_dir, datalist, holdout_fold, fold, folder_datalist)
    if duplicates is not None:
        training, holdout = settle_duplicates(training, holdout, duplicates)
    for column in subgroups:
        if not any(column in item for item in holdout):
            near = get_close_matches(column, sorted(set().union(*holdout)), n=1)
            raise RequestError(
                f"--subgroups: the unseen cases have no column {column!r}"
                + (f"; did you mean {near[0]!r}?" if near else ".")
            )
    request = make_request(forget_request, forget_ids, forget_fraction, job, seed, 0.15 if is_drawn else None)
    known = known_pairs(dataset_dir)
    resolve(request, training, holdout, class_key, structures=structures)  # refuses what needs no file to be read
    inspected = _inspected([*training, *holdout], read, None if _plan_only() else output_dir)
    training, holdout = inspected[: len(training)], inspected[len(training) :]
    if duplicates is not None:  # by their bytes too, now that they are known
        training, holdout = settle_duplicates(training, holdout, duplicates)
    resolution = resolve(request, training, holdout, class_key, known, structures).set_apart(tuning_share, seed)
    retained = len({item["group"] for item in resolution.splits["retain"]})
    if 0 < retained < 3 and not reference_models:
        raise RequestError(
            f"{retained} groups stay, too few to teach two references on disjoint parts of them. Forget fewer, or give "
            "--reference_models."
        )
    empty = sum(item["empty"] for item in inspected)
    if empty:
        resolution.warnings.append(f"{empty} masks are empty; a prediction that is empty too scores 1 there.")
    source = Path(dataset_dir or str(datalist)).resolve()
    return Prepared(resolution, "phantom" if is_drawn else source.stem if datalist else source.name, is_drawn)


def _inspected(items: Sequence[Item], read: Reader, output_dir: str | Path | None) -> list[Item]:
    """:func:`inspect_items`; where files cannot be used, all of them and all double pictures stand in one table.

    The table is printed where nothing may be written, else it is ``private/problems.txt``: it names files.
    """
    try:
        return inspect_items(items, progress=True, read=read)
    except DataError as error:
        alike: dict[str, list[str]] = {}
        for item in error.usable:
            alike.setdefault(item["sha256"], []).append(Path(item["image"]).name)
        double = [f"{', '.join(sorted(names))}: the same picture" for names in alike.values() if len(names) > 1]
        table = "\n".join([*error.problems, *sorted(double)]) + "\n"
        if output_dir is None:
            print(table)
            raise
        path = _private_folder(output_dir) / "problems.txt"
        write_text(table, path, mode=0o600)
        raise DataError(f"{error}\nall of it, double pictures too: {path}", error.problems, error.usable) from error


def check_references(paths: Any, original: str | Path | None = None) -> None:
    """Refuse references given by the user that could not do their two jobs.

    Raises:
        RequestError: when there are not two of them, two hold the same weights, or one those of the original.
        CheckpointError: when one cannot be read.
    """
    by_fold = isinstance(paths, Mapping)
    if not by_fold and (not isinstance(paths, (list, tuple)) or len(paths) < 2):
        raise RequestError(
            "reference_models takes two files or more, \"['teacher.pt', 'judge.pt']\": the first teaches, the others "
            "judge; or cross-validation models by the fold that each was not trained on, \"{0: 'fold0.pt', ...}\"."
        )
    files = list(paths.values()) if by_fold else list(paths)
    digests = [weights_digest(read_weights(path)) for path in files]
    if len(set(digests)) < len(files):
        raise RequestError("reference_models hold the same weights twice; the same model cannot teach and judge.")
    if original is not None and weights_digest(read_weights(original)) in digests:
        raise RequestError("reference_models hold the original; a reference has never seen the forget set.")


def _plan_only() -> bool:
    return any(workflow.run_id == "plan" for workflow in on_stack(ConfigWorkflow))


@first_process_first()
def site_key(output_dir: str | Path) -> bytes:
    """The key of the pseudonyms: the file ``MONAI_UNLEARN_KEY_FILE`` names, else ``private/key``, made when missing.

    Raises:
        RequestError: when the named file is missing or shorter than 16 bytes.
    """
    named = os.environ.get("MONAI_UNLEARN_KEY_FILE")
    path = Path(named) if named else Path(output_dir) / "private" / "key"
    if not path.is_file():
        if named:
            raise RequestError(f"MONAI_UNLEARN_KEY_FILE names {named}, and there is no such file.")
        _private_folder(output_dir)
        write_text(secrets.token_hex(32), path, mode=0o600)
    key = path.read_bytes().strip()
    if len(key) < 16:
        raise RequestError(f"the key in {path} has {len(key)} bytes; it needs at least 16.")
    return key


def _private_folder(output_dir: str | Path) -> Path:
    folder = Path(output_dir) / "private"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


@plain_errors
def record_request(prepared: Prepared, output_dir: str | Path) -> None:
    """Write ``manifest.json`` (no id in it) and, in ``private/``, the request and the table of pseudonyms and ids."""
    resolution, key = prepared.resolution, site_key(output_dir)
    content = manifest(resolution, key)
    write_json(content, Path(output_dir) / "manifest.json")
    table = {
        "request": {"selector": dict(resolution.request.selector), "reason": resolution.request.reason},
        "ids": sorted(item_id(item) for item in resolution.splits["forget"]),
        "warnings": resolution.warnings,
    }
    write_json(json.loads(json.dumps(table, default=str)), _private_folder(output_dir) / "ids.json", mode=0o600)
    if resolution.warnings:  # they name ids, which do not belong into logs
        print(f"{len(resolution.warnings)} things to look at: see `run plan` or private/ids.json.")
    counts = ", ".join(f"{number} {name}" for name, number in content["counts"].items())
    print(f"{resolution.request.job} by {resolution.request.kind}: {counts} items.")


# plan -----------------------------------------------------------------------------------------------------------------


PHASES = ("original", "reference", "judge", "targets", "unlearn", "audit", "retrain")


class PlannedCost(NamedTuple):
    """What one phase is expected to take.

    Attributes:
        images: passes of a sample forwards and backwards.
        looks: passes forwards only.
        flops: floating-point operations.
        seconds: on this machine, from a few samples timed when the plan was made.
    """

    images: int
    looks: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The costs of a run before it starts.

    Attributes:
        phases: by name; ``retrain`` is what the others are compared with, whether it is part of the run or not.
        device: where it was timed.
        gib: host memory of the decoded samples, and of what a training step keeps for its backward pass, by name.
    """

    phases: dict[str, PlannedCost]
    device: str
    gib: dict[str, float]

    def __str__(self) -> str:
        whole = self.phases["retrain"]
        lines = [f"on {self.device}, timed just now:", f"  {'':<12}{'passes':>10}{'TFLOP':>10}{'seconds':>10}"]
        for name, cost in self.phases.items():
            share = f"  {cost.flops / whole.flops:.0%} of a retrain" if whole.flops and name != "retrain" else ""
            passes = cost.images + cost.looks
            lines.append(f"  {name:<12}{passes:>10,}{cost.flops / 1e12:>10.2f}{cost.seconds:>10.0f}{share}")
        memory = ", ".join(f"{name} {value:.2f} GiB" for name, value in self.gib.items())
        return "\n".join([*lines, f"memory: {memory}"])


@plain_errors
def plan_costs(
    network: nn.Module,
    student: nn.Module,
    dataset: MemoryDataset,
    images: Mapping[str, float],
    looks: Mapping[str, float],
    items: int,
    batch_size: int,
    budget: float = 0.0,
    device: str | torch.device = "cpu",
    inferer: Inferer | None = None,
) -> Plan:
    """What each phase would take: operations are counted on one sample, seconds measured on eight.

    Args:
        network: the plain network; its weights do not matter.
        student: what the phase ``unlearn`` trains; the other phases train the network.
        dataset: of the trainer; its first sample is counted.
        images: by phase, the samples it trains on in all its epochs.
        looks: by phase, the cases it only looks at.
        items: decoded samples that are kept.
        batch_size: of a training step.
        budget: GiB for what the student's frozen part computes; 0 keeps nothing.
        device: where the run would compute.
        inferer: for whole cases, where it is not the network alone.
    """
    found = dataset.view(0)  # a list where the dataset gives patches
    sample = (found[0] if isinstance(found, list) else found)["image"]
    whole = MemoryDataset(dataset.data[:1], dataset.transform, dataset.store)[0]
    image, case = sample.to(device), whole["image"].to(device)
    forward, step = forward_flops(network, case, inferer), training_flops(network, image)
    trunk = None
    if budget > 0 and dataset.random_transform is None and not all(p.requires_grad for p in student.parameters()):
        trunk = FrozenTrunk(student, torch.stack([sample, sample.flip(-1)]).to(device))
    of_student = training_flops(student, image, trunk or None)
    batch = image.expand(8, *image.shape)
    seconds = math.inf
    for _ in range(4):  # the fastest counts: others may be using the machine
        start = time.perf_counter()
        network.train()(batch).sum().backward()
        seconds = min(seconds, (time.perf_counter() - start) / len(batch))
    phases = {}
    for name in sorted({**images, **looks}, key=PHASES.index):
        trained, looked = round(images.get(name, 0)), round(looks.get(name, 0))
        flops = trained * (of_student if name == "unlearn" else step) + looked * forward
        phases[name] = PlannedCost(trained, looked, flops, seconds * flops / step)
    size = sum(value.numel() * value.element_size() for value in whole.values() if isinstance(value, torch.Tensor))
    kept = batch_size * saved_bytes(network, image[None])
    return Plan(phases, str(device), {"decoded samples": items * size / 2**30, "a training step": kept / 2**30})


@plain_errors
def print_plan(prepared: Prepared, plan: Plan) -> None:
    """Print who would be forgotten, what looks wrong and what it would cost; write nothing."""
    resolution = prepared.resolution
    splits = resolution.splits
    print(
        f"\nrequest {resolution.request.id}: {resolution.request.job} by {resolution.request.kind}, "
        f"data: {prepared.name}"
    )
    for name, items in splits.items():
        print(f"  {name:<16}{len(items):>6} items in {len({item['group'] for item in items})} groups")
    for name, number in sorted(resolution.facts.items()):
        print(f"  {name.replace('_', ' ')}: {number}")
    names = [item_id(item) for item in splits["forget"]]
    print("would be forgotten: " + ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else ""))
    for warning in resolution.warnings or ["nothing that looks wrong"]:
        print(f"look at: {warning}")
    print(f"{plan}\nnothing was written.")


def print_spent(plan: Plan, report: Mapping[str, Any]) -> None:
    """Print what unlearning took beside what was planned for it."""
    parts = [plan.phases[name] for name in ("targets", "reference", "unlearn")]
    cost = report["cost"]
    if cost["unlearn_seconds"] is None:
        return
    flops, seconds = (sum(getattr(one, unit) for one in parts) for unit in ("flops", "seconds"))
    print(
        f"unlearning took {cost['unlearn_flops'] / 1e12:.2f} TFLOP (planned {flops / 1e12:.2f}) and "
        f"{cost['unlearn_seconds']:.0f} seconds (planned {seconds:.0f})."
    )


@plain_errors
def finish(report: Mapping[str, Any], fail_on_verdict: bool) -> None:
    """End a run: exit code 5 for a verdict other than NOT REFUTED where the user asked for that."""
    if fail_on_verdict and report["verdict"] not in ("NOT REFUTED", "RETRAIN-EQUIVALENT"):
        raise Stop(report["verdict"], 5)
