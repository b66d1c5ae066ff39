# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""How MONAI's SupervisedTrainer gets a batch to unlearn from, and how one phase of a run is carried out."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from monai.engines import PrepareBatch, Trainer, default_prepare_batch
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from .checkpoint import (
    CheckpointError,
    file_digest,
    hold_folder,
    load_weights,
    require_space,
    save_weights,
    weights_digest,
    write_json,
)
from .distributed import process_rank, wait_for_all
from .handlers import ResumeEachEpoch, ends_when_asked
from .lora import adapted_layers, drift, merge_lora, save_adapter
from .losses import Target
from .relabel import Relabel, keep_label
from .trunk import FrozenTrunk

logger = logging.getLogger(__name__)
REPORTS_BYTES = 32 * 2**20


class MemoryShortError(RuntimeError):
    """The machine has too little memory for a step; the message says what makes it smaller."""


@contextmanager
def memory_explained() -> Iterator[None]:
    """Say in plain words that memory ran out.

    Raises:
        MemoryShortError: in place of the allocator's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            phrase in text for phrase in ("can't allocate memory", "not enough memory")
        ):
            raise
        raise MemoryShortError(
            f"memory ran out ({text.strip().splitlines()[0][:120] if text.strip() else type(error).__name__}); give a "
            "smaller --batch_size, spatial_size or --cache_gib. `run plan` prints what a step needs."
        ) from error


class PrepareUnlearning(PrepareBatch):
    """The ``prepare_batch`` of a trainer that unlearns: gives the samples to forget their new labels.

    A label computed beforehand (the item ``forget_label``) is used where the batch holds one, else ``relabel`` makes
    it. The teacher's logits are taken from the batch (the item ``teacher``) where it holds them, else from ``teacher``;
    weights for a weighted forget loss from the item ``forget_weight_map``. The batch is left as it is.

    Args:
        relabel: new labels for the samples to forget, see :mod:`monai_unlearn.relabel`.
        teacher: the frozen original model, used in eval mode; None when its logits come with the batch, or nothing is
            distilled.
        forget_key: the batch item that says which samples to forget, ``(B,)``.

    Raises:
        ValueError: in use, when the batch lacks its label or its forget flags.
    """

    def __init__(
        self, relabel: Relabel = keep_label, teacher: nn.Module | None = None, forget_key: str = "forget"
    ) -> None:
        self.relabel = relabel
        self.teacher = teacher
        self.forget_key = forget_key

    def __call__(
        self,
        batchdata: dict[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Target, tuple, dict]:
        for key in ("label", self.forget_key):
            if key not in batchdata:
                raise ValueError(f"the batch has no item {key!r}; it holds {', '.join(map(str, batchdata))}.")
        image, label = cast(tuple[Tensor, Tensor], default_prepare_batch(batchdata, device, non_blocking, **kwargs))
        forget = torch.as_tensor(batchdata[self.forget_key]).to(device).bool()  # 0 and 1 would be taken for indices
        label = label.clone()
        if forget.any():
            if "forget_label" in batchdata:
                label[forget] = batchdata["forget_label"].to(device, non_blocking=non_blocking)[forget]
            else:
                label[forget] = self.relabel(image[forget], label[forget])
        teacher = None
        if "teacher" in batchdata:
            teacher = batchdata["teacher"].to(device, non_blocking=non_blocking)
        elif self.teacher is not None:
            self.teacher.eval()
            with torch.no_grad():
                teacher = self.teacher(image)
        weight = batchdata.get("forget_weight_map")
        weight = None if weight is None else weight.to(device, non_blocking=non_blocking)
        return image, Target(label, forget, teacher, weight), (), {}


class AutocastInferer(Inferer):
    """The network in half precision, its output in single: what MONAI's ``amp`` does on CUDA, on every device.

    Losses and metrics see 32 bits, and bfloat16 has the range of float32, so no scaling of gradients is needed.

    Args:
        inferer: MONAI's, such as ``SlidingWindowInferer``; None calls the network.
        dtype: ``bfloat16`` or ``float32``, which changes nothing; also by name.

    Raises:
        ValueError: on another dtype; float16 needs ``amp`` and its gradient scaler.
    """

    def __init__(self, inferer: Inferer | None = None, dtype: torch.dtype | str = "bfloat16") -> None:
        name = str(dtype).removeprefix("torch.")
        if name not in ("bfloat16", "float32"):
            raise ValueError(f"precision must be bfloat16 or float32, got {name}; float16 is amp's, on CUDA.")
        self.inferer, self.enabled = inferer or SimpleInferer(), name == "bfloat16"

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The network's output in float32."""
        if not self.enabled:
            return self.inferer(inputs, network, *args, **kwargs)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            output = self.inferer(inputs, network, *args, **kwargs)
        return tree_map(lambda one: one.float() if isinstance(one, Tensor) else one, output)


def training_flops(network: nn.Module, image: Tensor, trunk: FrozenTrunk | None = None) -> int:
    """Floating-point operations of one forward and backward pass for one sample, counted on a copy.

    Args:
        network: what trains is what requires gradients in it.
        image: one sample, ``(C, *spatial)``.
        trunk: of the network, played back and not counted; None computes everything.
    """
    probe = copy.deepcopy(network).eval()
    kept = nullcontext() if trunk is None else trunk.played_back(probe, trunk.record(probe, image[None]))
    with kept, FlopCounterMode(display=False) as counter:
        output = probe(image[None])
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops()


def saved_bytes(network: nn.Module, images: Tensor, trunk: FrozenTrunk | None = None) -> int:
    """Memory that a forward pass keeps for the backward pass, without the weights; counted on a copy.

    Args:
        network: what trains is what requires gradients in it.
        images: a batch, ``(B, C, *spatial)``.
        trunk: of the network, played back; None computes everything.
    """
    probe = copy.deepcopy(network).eval()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*probe.parameters(), *probe.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    played = nullcontext() if trunk is None else trunk.played_back(probe, trunk.record(probe, images))
    with played, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = probe(images)
    del output
    return sum(kept.values())


def forward_flops(
    network: nn.Module, image: Tensor, inferer: Callable[[Tensor, nn.Module], Tensor] | None = None
) -> int:
    """Floating-point operations of one forward pass for one sample ``(C, *spatial)``, through an inferer if given."""
    probe = copy.deepcopy(network).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        probe(image[None]) if inferer is None else inferer(image[None], probe)
    return counter.get_total_flops()


def run_phase(trainer: Trainer, path: str | Path, fingerprint: str) -> dict[str, Any]:
    """Train to the end, from wherever an earlier attempt was stopped, and write plain weights.

    A phase that is complete is not run again: its weights are loaded instead. What identifies it is the configuration
    (``fingerprint``), the initial weights, and the content of the data. A file of the same name from another
    configuration is replaced. Of several processes the first one writes, and all return the same record.

    Args:
        trainer: built and not yet run. Its network holds the phase's initial weights; adapters are merged for the file.
        path: the file of weights to make, such as ``models/original.pt``; ``path`` with the suffix ``.json`` holds its
            record, and the folder ``adapter`` beside it the adapters in peft's format, where there are any. While it
            runs, its state lies in ``private/resume`` beside the folder of ``path``.
        fingerprint: of the configuration.

    Returns:
        The record: ``sha256`` of the file, ``seconds``, ``flops`` and ``images`` spent (an image that only went forward
        counts a third), numbers of parameters, ``reused``, and what the phase's handlers reported.

    Raises:
        CheckpointError: when the finished file fails its digest, the loaded weights do not fit, the disk has too little
            room, or another process works in the folder.
        MemoryShortError: when memory runs out.
    """
    path = Path(path)
    network: nn.Module = trainer.network  # type: ignore[attr-defined]
    dataset: Any = trainer.data_loader.dataset  # type: ignore[union-attr]
    key = hashlib.sha256(
        f"{fingerprint}:{weights_digest(network.state_dict())}:{dataset.digest()}".encode()
    ).hexdigest()
    record_path = path.with_suffix(".json")
    record = _read_record(record_path)
    wait_for_all()  # before the first process may replace what the others read
    if record.get("key") == key and path.is_file():
        if file_digest(path) == record["sha256"]:
            return {**record, "reused": True}
        logger.warning("%s fails its digest and is made anew.", path.name)
    epochs = trainer.state.max_epochs or 0
    size = sum(value.nbytes for value in network.state_dict().values())
    require_space(path.parent, 2 * 3 * size + REPORTS_BYTES)  # two states at a time, of weights and two moments each
    hold_folder(path.parent.parent)
    resumable = ResumeEachEpoch(path.parent.parent / "private" / "resume" / path.name, key)
    resumable.attach(trainer)
    start = time.perf_counter()
    if epochs > 0:
        with ends_when_asked(trainer), memory_explained():
            trainer.run()
    seconds = time.perf_counter() - start + resumable.seconds_before
    if process_rank() > 0:
        wait_for_all()
        return {**_read_record(record_path), "reused": False}
    if adapted_layers(network):
        save_adapter(network, path.parent / "adapter")
    save_weights(merge_lora(network), path)
    sample = dataset.view(0)  # a list where the dataset gives patches
    image = (sample[0] if isinstance(sample, list) else sample)["image"].to(next(network.parameters()).device)
    trunk = getattr(trainer.inferer, "trunk", None)  # type: ignore[attr-defined]
    record = {
        "key": key,
        "sha256": file_digest(path),
        "seconds": seconds,
        "images": resumable.images + resumable.scored / 3,
        "flops": resumable.images * training_flops(network, image, trunk) + resumable.scored_flops(),
        "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in merge_lora(network).parameters()),
        "drift": drift(network) if adapted_layers(network) else None,
        "reports": resumable.reports(),
    }
    write_json(record, record_path)
    resumable.remove()
    wait_for_all()
    return {**record, "reused": False}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        logger.warning("%s cannot be read; its phase is run again.", path.name)
        return {}


def load_phase(network: nn.Module, path: str | Path, record: Mapping[str, Any]) -> nn.Module:
    """The plain network with the weights a phase has written, in eval mode and frozen.

    Raises:
        CheckpointError: when the file is not the one the record speaks of, or does not fit.
    """
    if file_digest(path) != record["sha256"]:
        raise CheckpointError(f"{path} changed since it was written (sha256 differs); remove it and run again.")
    return load_weights(network, path).eval().requires_grad_(False)
