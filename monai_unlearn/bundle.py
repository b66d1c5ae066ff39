# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""How a bundle's configuration carries out the phases of a run.

MONAI gives the expressions of a configuration no way to ask for the configuration itself. The functions here find the
``ConfigParser`` (and the ``ConfigWorkflow``) that is evaluating them on the call stack; this module is the only place
that does, and a test holds it to MONAI's behaviour.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.reference_resolver import ReferenceResolver
from torch import Tensor, nn

from . import lora
from .audit import audit
from .audit.reference import References, regression_reference
from .audit.scores import Inferer, main_score, score_cases
from .boundary import content_id
from .checkpoint import CheckpointError, load_weights, read_safetensors, save_weights, weights_digest, write_safetensors
from .compose import compose_networks
from .data import MemoryDataset, cache_outputs, store_key
from .datasets import DataError
from .distributed import process_rank
from .engines import MemoryShortError, forward_flops, load_phase, run_phase, training_flops
from .handlers import NotFiniteError
from .purge import purge
from .relabel import LabelStore, Relabel
from .release import SIGNATURE, ReleaseError, finalise
from .request import Item, RequestError, Resolution, item_id
from .saliency import Weights, mean_gradient

P = ParamSpec("P")
R = TypeVar("R")

# What changes where and how a run happens, not what it computes.
EPHEMERAL = {
    "bundle_root",
    "output_dir",
    "cache_gib",
    "device",
    "num_workers",
    "dataset_dir",
    "datalist",
    "data",
    "store",
    "phase",
}
# What tells one method from another.
METHOD_PARTS = (
    "durability",
    "lora_scope",
    "frozen_scope",
    "relabel",
    "unlearn_phase#sampler",
    "unlearn_phase#forget_loss",
    "unlearn_phase#distillation_loss",
    "unlearn_phase#optimizer",
)
EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (RequestError, 2),
    (lora.StudentError, 2),
    (DataError, 3),
    (CheckpointError, 3),
    (ReleaseError, 3),
    (MemoryShortError, 3),
    (NotFiniteError, 4),
)


class Stop(SystemExit):
    """Ends a bundle run with a message of a few lines and an exit code: 2 request or configuration, 3 data, 4 numbers.

    It derives from ``SystemExit`` because MONAI wraps every other exception of an expression in a traceback.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def stop(message: str, code: int) -> NoReturn:
    """Print a message for the person at the terminal, and end the run."""
    print(f"\nmonai_unlearn: {message}\n", file=sys.stderr, flush=True)
    raise Stop(message, code)


def plain_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Within a bundle run, turn the errors a person can mend into :class:`Stop`; elsewhere they stay exceptions."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except tuple(kind for kind, _ in EXIT_CODES) as error:
            if next(on_stack(ConfigWorkflow), None) is None:
                raise
            stop(str(error), next(code for kind, code in EXIT_CODES if isinstance(error, kind)))

    return wrapped


make_student, make_restorable = plain_errors(lora.make_student), plain_errors(lora.make_restorable)
hold_part, shrink = plain_errors(lora.hold_part), plain_errors(lora.shrink)


def on_stack(kind: type[R]) -> Iterator[R]:
    """The objects of a class whose methods are running, innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            yield owner
        frame = frame.f_back


def running_parser() -> ConfigParser:
    """The parser whose expression is being evaluated.

    Raises:
        RuntimeError: outside of a bundle's configuration.
    """
    for parser in on_stack(ConfigParser):
        return parser
    raise RuntimeError("this function works inside an expression of a MONAI bundle's configuration only.")


@plain_errors
def start_processes() -> torch.device:
    """Join the processes that ``torchrun`` has started, over nccl on GPUs and gloo elsewhere; the first one speaks.

    Returns:
        The device of this process.

    Raises:
        RequestError: when ``torchrun`` has not started this process.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise RequestError(
            f"{', '.join(missing)} are not set: start with torchrun --nproc_per_node=N -m monai.bundle run ..., or "
            "leave multi_gpu_train.json out."
        )
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if process_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for good)
            logging.disable(logging.WARNING)
    return device


def end_processes() -> None:
    """Leave the processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def bundle_root() -> str:
    """The folder of the bundle whose configuration is running: the parent of its ``configs``, never the current one.

    Raises:
        RuntimeError: outside of a ``ConfigWorkflow``.
    """
    for workflow in on_stack(ConfigWorkflow):
        return str(Path(workflow.config_root_path).parent)
    raise RuntimeError("no bundle is running; give bundle_root.")


def fingerprint(config_id: str, **overrides: Any) -> str:
    """sha256 of an item of the running configuration with everything it refers to, as text, and of ``overrides``.

    The package's version counts; paths, the device and the number of workers do not; the content of data and weights is
    hashed where it is used.
    """
    return _fingerprint(running_parser(), config_id, overrides)


def _fingerprint(parser: ConfigParser, config_id: str, overrides: dict[str, Any]) -> str:
    seen: dict[str, Any] = {}
    given = tuple(ReferenceResolver.normalize_id(key) for key in overrides)

    def visit(name: str) -> None:
        if name in seen or name.split("::")[0] in EPHEMERAL or any(f"{name}::".startswith(f"{key}::") for key in given):
            return
        config = parser.get(name, None)
        if config is None and name not in parser:
            return
        seen[name] = "" if isinstance(config, (dict, list)) else repr(config)
        for text in _leaves(config):
            for reference in ReferenceResolver.match_refs_pattern(ReferenceResolver.normalize_id(text)):
                visit(reference)
        if isinstance(config, (dict, list)):
            seen[name] = json.dumps(config, sort_keys=True, default=repr)

    visit(ReferenceResolver.normalize_id(config_id))
    numbers = {key: value for key, value in overrides.items() if isinstance(value, (int, float, str))}
    from . import __version__  # the package is complete only now

    content = json.dumps([__version__, sorted(seen.items()), sorted(numbers.items())], default=repr)
    return hashlib.sha256(content.encode()).hexdigest()


def _leaves(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, (dict, list)):
        for entry in config.values() if isinstance(config, dict) else config:
            yield from _leaves(entry)


def content(config_id: str) -> Any:
    """An item of the running configuration, resolved only now: what stands behind an ``if`` of an expression.

    A reference ``@id`` in an expression is resolved before the expression runs, whether it is needed or not.
    """
    return running_parser().get_parsed_content(config_id)


def _mentions(config_id: str, name: str) -> bool:
    """Whether the text of an item of the running configuration, or of what it refers to, holds a name.

    Nothing is resolved for it, so that it can be asked before anything is computed.
    """
    parser, waiting, seen = running_parser(), [config_id], set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        for text in _leaves(parser.get(one)):
            if name in text:
                return True
            waiting += ReferenceResolver.match_refs_pattern(text)
    return False


@plain_errors
def reference_wanted(stop_at_reference: bool, folds_teach: bool, reference_teaches: bool = False) -> bool:
    """Whether the running configuration needs the reference that teaches.

    Args:
        stop_at_reference: whether unlearning stops at the score expected of an unseen case.
        folds_teach: whether cross-validation models take the reference's place.
        reference_teaches: whether a method that can do without a reference is to be taught by one.

    Raises:
        RequestError: when fold models are to teach a method that asks none of them, or beside a reference.
    """
    if not folds_teach:
        return stop_at_reference or reference_teaches or _mentions("relabel", "reference_network")
    if reference_teaches:
        raise RequestError("--folds_teach 1 --reference_teaches 1: either of them teaches, not both; leave one out.")
    if not stop_at_reference and not _mentions("relabel", "fold_networks"):
        raise RequestError(
            "--folds_teach 1: this method learns nothing from cross-validation models. Leave the option out; given as "
            "--reference_models they judge."
        )
    return False


def resolved(config_id: str) -> dict[str, Any]:
    """The entries of a section of the running configuration that have been resolved so far, by name."""
    prefix = ReferenceResolver.normalize_id(config_id) + "::"
    found = running_parser().ref_resolver.resolved_content
    return {
        key.removeprefix(prefix): value
        for key, value in found.items()
        if key.startswith(prefix) and "::" not in key.removeprefix(prefix)
    }


def variant(config_id: str, **overrides: Any) -> Any:
    """Build an item of the running configuration anew, with other values for some of its keys.

    The retrained model and the references are the original's recipe on other data; this is how they cannot differ in
    anything else.

    Args:
        config_id: such as ``train#trainer``.
        overrides: Python objects by id, such as ``seed`` or ``phases#cache``; used as they are and never parsed.
    """
    parser = running_parser()
    for key in overrides:
        if key not in parser:
            raise KeyError(f"the configuration has no key {key!r} to override.")
    child = ConfigParser(copy.deepcopy(parser.get()), globals={"_overrides": overrides})
    for key in overrides:
        child[key] = f"$_overrides[{key!r}]"
    return child.get_parsed_content(config_id)


@plain_errors
def phase(config_id: str, path: str | Path, given: str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """Carry out one phase of the running configuration: train it, finish it, or take it as it is.

    Args:
        config_id: of the trainer, such as ``train#trainer``.
        path: the file of weights to make.
        given: a file of weights that makes the phase unnecessary; opened for reading only.
        overrides: see :func:`variant`; without any the configuration's own trainer is used.

    Returns:
        The record of :func:`monai_unlearn.engines.run_phase` with ``path``; for given weights just the path.
    """
    if given:
        return {"path": str(given), "given": True}
    parser = running_parser()
    trainer = variant(config_id, **overrides) if overrides else parser.get_parsed_content(config_id)
    return {**run_phase(trainer, path, _fingerprint(parser, config_id, overrides)), "path": str(path)}


@plain_errors
def frozen(network: nn.Module, record: dict[str, Any]) -> nn.Module:
    """A plain network with the weights of a phase, in eval mode and without gradients."""
    if record.get("given"):
        return load_weights(network, record["path"]).eval().requires_grad_(False)
    return load_phase(network, record["path"], record)


def given_reference(reference_models: Any, place: int) -> str | None:
    """The file of the teacher (0) or the judge (1) where the user gave such; fold models judge and never teach."""
    return None if not reference_models or isinstance(reference_models, Mapping) else str(reference_models[place])


@plain_errors
def audited(*arguments: Any, **options: Any) -> dict[str, Any]:
    """:func:`monai_unlearn.audit.audit` of the running bundle; ``settings`` of the report tells how it was run."""
    return {**audit(*arguments, **options), "settings": settings()}


def settings() -> dict[str, Any]:
    """How the running configuration unlearns: its options that are numbers, and the parts that make the method.

    Texts that a person types (paths, ids, rules) are left out.
    """
    parser = running_parser()
    config: dict[str, Any] = parser.get()  # type: ignore[assignment]
    numbers = {key: value for key, value in config.items() if isinstance(value, (bool, int, float))}
    parts = {key: parser.get(key, None) for key in METHOD_PARTS}
    return json.loads(json.dumps({"options": dict(sorted(numbers.items())), "parts": parts}, default=repr))


@plain_errors
def released(*arguments: Any, **options: Any) -> Path:
    """:func:`monai_unlearn.release.finalise` in a bundle; prints where the release is and how it is checked."""
    folder = finalise(*arguments, **options)
    signed = (folder / SIGNATURE).is_file()
    key = f" --public_key {Path(arguments[0]) / 'signing_public.pem'}" if signed else ""
    print(f"release: {folder}\ncheck it with: python -m monai_unlearn verify {folder}{key}")
    return folder


@plain_errors
def purged(output_dir: str | Path, resolution: Resolution, caches: Any = (), original: bool = False) -> dict[str, Any]:
    """:func:`monai_unlearn.purge.purge` in a bundle; prints what was removed and what could not be reached."""
    folders = [caches] if isinstance(caches, str) else list(caches or [])
    done = purge(output_dir, resolution.splits["forget"], folders, original)
    for kind, number in done["files"].items():
        print(f"removed: {number} files, {kind}")
    for folder, one in zip(folders, done["caches"]):
        print(f"removed: {one['removed']} of {one['removed'] + one['kept']} entries of {folder}")
    print("not reached: " + "; ".join(done["not_reached"]))
    return done


class from_bundle:
    """A component of another MONAI bundle, such as its network or its preprocessing: made anew at every call.

    A configuration is code: read a bundle from somebody else first (:mod:`monai_unlearn.scan`).

    Args:
        folder: the bundle.
        config_id: of the component, such as ``network_def`` or ``validate#preprocessing``.
        config_file: in the bundle's ``configs``.
        overrides: other values for keys of that file.

    Raises:
        RequestError: when there is no such file or no such component.

    Example:
        In an overlay: ``"network_factory": "$monai_unlearn.from_bundle('/models/spleen', 'network_def')"``.
    """

    def __init__(self, folder: str | Path, config_id: str, config_file: str = "train.json", **overrides: Any) -> None:
        self.folder, self.config_id, self.overrides = Path(folder), config_id, overrides
        self.file = self.folder / "configs" / config_file
        if not self.file.is_file():
            raise RequestError(f"there is no {self.file}; give the folder of a MONAI bundle.")
        if config_id not in self._parser():
            raise RequestError(f"{self.file} has no {config_id}; its keys are {', '.join(self._parser().get())}.")

    def _parser(self) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(str(self.file))
        if "bundle_root" in parser:
            parser["bundle_root"] = str(self.folder)
        parser.update(self.overrides)
        return parser

    def __call__(self) -> Any:
        """The component."""
        return self._parser().get_parsed_content(self.config_id)


@plain_errors
def fold_networks(
    factory: Callable[[], nn.Module], reference_models: Any, device: str | torch.device = "cpu"
) -> dict[str, nn.Module]:
    """Cross-validation models by the fold that each was not trained on, frozen.

    Args:
        factory: makes a plain network.
        reference_models: files by fold, ``{"0": "fold0.pt", ...}``.
        device: where to put them.

    Raises:
        RequestError: when the files do not come by fold.
    """
    if not isinstance(reference_models, Mapping) or not reference_models:
        raise RequestError(
            "fold models come by the fold each never saw: --reference_models \"{0: 'fold0.pt', 1: ...}\"."
        )
    return {str(fold): frozen(factory(), {"path": path, "given": True}).to(device)
            for fold, path in reference_models.items()}  # fmt: skip


@plain_errors
def judges(
    factory: Callable[[], nn.Module],
    reference_models: Any,
    part: Sequence[Item],
    resolution: Resolution,
    device: str | torch.device = "cpu",
) -> References:
    """The references that judge: the files given, the fold models given, or the one that this run trains.

    Args:
        factory: makes a plain network.
        reference_models: None; files, of which all but the first judge; or cross-validation models by the fold that
            each was not trained on, ``{"0": "fold0.pt", ...}``.
        part: what the run's own judge is trained on.
        resolution: who is forgotten.
        device: where to compute.

    Raises:
        RequestError: when a fold has no model, or a file does not fit.
    """
    if isinstance(reference_models, Mapping):
        networks = fold_networks(factory, reference_models, device)
        return References.of_folds(networks, resolution.training, resolution.holdout)
    if reference_models:  # what of the retained cases they saw is not known
        retained = {item_id(item) for item in resolution.splits["retain"]}
        given = [frozen(factory(), {"path": path, "given": True}).to(device) for path in reference_models[1:]]
        return References(given, [retained] * len(given))
    return References([content("judge_network")], [{item_id(item) for item in part}])


@plain_errors
def composed(
    base: nn.Module,
    factory: Callable[[], nn.Module],
    sources: Any,
    rules: Any,
    statistics: str,
    image: Tensor,
    path: str | Path,
) -> dict[str, Any]:
    """The phase that makes the unlearned model out of others, see :func:`monai_unlearn.compose_networks`.

    Args:
        base: the original.
        factory: makes a network of its kind.
        sources: files of weights by name.
        rules: mappings with ``keys`` and one of ``take``, ``mix`` and ``add``, in order.
        statistics: where running statistics come from: ``base`` or a source.
        image: one sample ``(C, *spatial)``, on which the result has to differ from the base.
        path: the file of weights to make.

    Returns:
        The phase's record: ``path``; composing is not training and costs nothing that is counted.

    Raises:
        RequestError: when sources or rules are missing, or cannot be carried out.
    """
    if not isinstance(sources, Mapping) or not sources or not rules:
        raise RequestError(
            "composing needs --compose_sources \"{'a': 'a.pt', 'b': 'b.pt'}\" and --compose_rules \"[{'keys': '*', "
            "'add': {'a': 1, 'b': 1}}]\"."
        )
    device = image.device
    networks = {str(name): load_weights(factory(), file).to(device) for name, file in sources.items()}
    try:
        network = compose_networks(base, networks, list(rules), statistics, image[None])
    except (TypeError, ValueError) as error:
        raise RequestError(f"the models cannot be composed like this: {error}") from error
    save_weights(network, path)
    return {"path": str(path), "given": True}


@plain_errors
def weight_gradients(
    original: nn.Module,
    parts: Mapping[str, Sequence[Item]],
    transform: Callable[[Any], Any],
    loss: Callable[[Tensor, Tensor], Tensor],
    squared: bool = False,
    store: dict[Any, Any] | None = None,
    device: str | torch.device = "cpu",
    stored: str | Path | None = None,
) -> dict[str, Any]:
    """The phase that finds which weights matter to which samples, see :func:`monai_unlearn.mean_gradient`.

    Args:
        original: the frozen original.
        parts: items by name, such as ``forget`` and ``data``.
        transform: deterministic preprocessing.
        loss: of logits and label.
        squared: the mean squared gradient, in place of the gradient of the mean.
        store: of decoded items, shared with the run.
        device: where to compute.
        stored: a file with the importance to ``data``: read where it exists, so that the training data are not needed
            any more, else written.

    Returns:
        The importance to each part under its name, and what it cost: ``seconds``, ``flops``, ``images``.

    Raises:
        CheckpointError: when the stored importance is not that of this network.
    """
    start, passes, flops = time.perf_counter(), 0, 0
    found: dict[str, Weights] = {}
    digest = weights_digest(original.state_dict())
    for name, items in parts.items():
        if name == "data" and stored is not None and Path(stored).is_file():
            found[name], metadata = read_safetensors(stored)
            if metadata.get("network") != digest:
                raise CheckpointError(f"{stored} holds the importance to another network; remove it and run again.")
            continue
        dataset = MemoryDataset(items, transform, store)
        found[name] = mean_gradient(original, dataset, loss, squared, device=device)
        passes += len(dataset)
        flops = training_flops(copy.deepcopy(original).requires_grad_(True), dataset[0]["image"].to(device))
        if name == "data" and stored is not None:
            write_safetensors(found[name], stored, {"network": digest}, mode=0o600)
    return {**found, "seconds": time.perf_counter() - start, "flops": passes * flops, "images": passes}


@plain_errors
def unlearning_targets(
    original: nn.Module,
    relabel: Relabel | Mapping[str, Item] | None,
    resolution: Resolution,
    transform: Callable[[Any], Any],
    store: dict[Any, Any] | None = None,
    reference: nn.Module | References | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    inferer: Inferer | None = None,
    teacher_on_forget: bool = False,
    label_store: LabelStore | None = None,
    weight: Relabel | None = None,
    shown: Sequence[Item] | None = None,
) -> dict[str, Any]:
    """What the unlearning phase needs to know of the frozen models, computed once on the deterministic view.

    Args:
        original: the frozen original, the teacher on retained items.
        relabel: makes the new labels of the forget items, see :mod:`monai_unlearn.relabel`; a mapping from their ids to
            other items gives them those items' labels; None leaves them theirs.
        resolution: who is forgotten.
        transform: deterministic preprocessing.
        store: of decoded items, shared with the run.
        reference: a frozen model that saw neither forget set nor holdout, or several of which each case is scored by
            those that never saw it; they say where to stop.
        device: where to compute.
        batch_size: items at a time.
        inferer: such as MONAI's ``SlidingWindowInferer``; None calls the networks.
        teacher_on_forget: whether the forget loss reads the teacher's logits too (its ``uses_teacher``).
        label_store: where labels that a search makes are kept from one run to the next; None keeps none.
        weight: says how much each voxel of a forget item counts, such as :class:`monai_unlearn.BoundaryMargin`; None
            weights none.
        shown: the items that the phase shows (:meth:`monai_unlearn.ForgetRetainSampler.shown`): the teacher need not
            look at others; None stands for all.

    Returns:
        ``values``: the teacher's logits (``teacher``), the new labels (``forget_label``) and the weights
        (``forget_weight_map``) by item, for the ``targets`` of a :class:`monai_unlearn.data.MemoryDataset`;
        ``stop_value``: the IoU or accuracy expected of the forget set
        (:func:`monai_unlearn.audit.regression_reference`), None without a reference; ``relabelling``: what the relabel
        reports of its search, if it does; and what it cost: ``seconds``, ``flops``, ``images`` (a forward pass counts a
        third). Labels that were kept count as if they had been made.

    Raises:
        CheckpointError: when kept labels do not belong to this network, search and data.
    """
    start = time.perf_counter()
    sets = {name: MemoryDataset(items, transform, store) for name, items in resolution.splits.items()}
    retain, forget, unseen = (sets[name] for name in ("retain", "forget", resolution.unseen_other))
    keys = None if shown is None else {store_key(item) for item in shown}
    kept = [item for item in retain.data if keys is None or store_key(item) in keys]
    taught = MemoryDataset([*kept, *forget.data] if teacher_on_forget else kept, transform, store)
    values = {"teacher": cache_outputs(original, taught, device, batch_size, inferer=inferer)} if len(taught) else {}
    forwards, stop_at, found = len(taught), None, None
    if isinstance(relabel, Mapping):
        donors = MemoryDataset([relabel[item_id(item)] for item in forget.data], transform, store)
        values["forget_label"] = {store_key(item): donors[index]["label"] for index, item in enumerate(forget.data)}
    elif relabel is not None:
        labels, found = _relabelled(relabel, original, forget, device, batch_size, label_store)
        values["forget_label"] = {store_key(item): label for item, label in zip(forget.data, labels)}
        forwards += found.get("passes", len(forget))
    if weight is not None:
        weights, weighing = _relabelled(weight, original, forget, device, batch_size, None)
        values["forget_weight_map"] = {store_key(item): one for item, one in zip(forget.data, weights)}
        forwards += weighing.get("passes", len(forget))
    if reference is not None:
        stop_at, passes = expected_score(
            original, reference, forget, unseen, device=device, batch_size=batch_size, inferer=inferer
        )
        forwards += passes
    return {
        "values": values,
        "stop_value": stop_at,
        "relabelling": found or None,
        "seconds": time.perf_counter() - start,
        "flops": forwards * forward_flops(original, forget[0]["image"].to(device), inferer),
        "images": forwards / 3,
    }


def expected_score(
    original: nn.Module,
    reference: nn.Module | References,
    forget: MemoryDataset,
    unseen: MemoryDataset,
    **options: Any,
) -> tuple[float, int]:
    """The IoU or accuracy to expect of the forget set had the original never seen it, and the forward passes it took.

    Args:
        original: frozen.
        reference: a frozen model that saw neither data set, or several of which each case is scored by those that never
            saw it.
        forget: the forget set.
        unseen: cases of a kind that both know (``Resolution.unseen_other``).
        options: ``device``, ``batch_size`` and ``inferer`` of :func:`monai_unlearn.audit.scores.score_cases`.
    """
    taught_by = References([reference]) if isinstance(reference, nn.Module) else reference
    rows = taught_by.score({"forget": forget, "holdout": unseen}, **options)
    of_original = score_cases(original, unseen, **options)
    expected = regression_reference(rows["forget"], rows["holdout"], of_original[main_score(of_original)])
    each = min(len(taught_by.never_saw(item)) for item in [*forget.data, *unseen.data])
    return expected, each * (len(forget) + len(unseen)) + len(unseen)


def _relabelled(
    relabel: Relabel,
    original: nn.Module,
    forget: MemoryDataset,
    device: str | torch.device,
    batch_size: int,
    label_store: LabelStore | None,
) -> tuple[list[Tensor], dict[str, Any]]:
    """The forget items' new labels, and what the relabel reports."""
    samples = [forget[index] for index in range(len(forget))]
    describe, description = getattr(relabel, "describe", None), {}
    if label_store is not None and describe is not None:
        seen = [content_id(sample["image"]) + content_id(sample["label"]) for sample in samples]
        description = label_store.describe(original, describe(), list(zip(forget.data, seen)))
        kept = label_store.load(description, forget.data)
        if kept is not None:
            return kept
    of = getattr(relabel, "of", lambda item: relabel)  # out-of-fold models differ from item to item
    alike: dict[Any, list[int]] = {}
    for index, sample in enumerate(samples):
        key = (id(of(forget.data[index])), sample["image"].shape, sample["label"].shape)
        alike.setdefault(key, []).append(index)
    found: dict[int, Tensor] = {}
    size = getattr(relabel, "batch_size", batch_size)
    for indices in alike.values():
        for first in range(0, len(indices), size):
            chosen = indices[first : first + size]
            image, label = (torch.stack([samples[index][key] for index in chosen]) for key in ("image", "label"))
            new = of(forget.data[chosen[0]])(image.to(device), label.to(device))
            found.update(zip(chosen, new.cpu()))
    labels = [found[index] for index in range(len(samples))]
    report = relabel.report() if hasattr(relabel, "report") else {}
    if description and label_store is not None:
        affines = [sample["affine"] for sample in samples if "affine" in sample]
        label_store.save(description, forget.data, labels, report, affines)
    return labels, report
