# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""In which weights: low-rank adapters in weight space, and normalisation that stays as it is.

An adapted layer forms W' = W + s·(B·A) first and then runs its own operation once with W'. One class covers Linear,
Conv and ConvTranspose with any groups, stride, dilation and padding mode; merging adds the very same tensor, so merged
and unmerged outputs are equal bit for bit. The layers are peft ``LoraLayer``, and adapters are stored in peft's format.
Everything that touches peft's private names lies in this module. LoRA: arXiv 2106.09685.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from .checkpoint import CheckpointError, read_safetensors, weights_digest, write_json, write_safetensors

logger = logging.getLogger(__name__)

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PASSED_OVER = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
PREFIX = "base_model.model."  # in front of every key of an adapter file that peft writes
ADAPTER = "default"

# Class name of a MONAI network -> (decoder, head), as regular expressions over full module names. The "decoder" of a
# classifier is its last stage.
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "UNet": (r"model\.(1\.submodule\.)*2\..*", r"model\.2(\.1\.conv\.unit0)?\.conv"),
    "BasicUNet": (r"upcat_\d+\..*|final_conv", r"final_conv"),
    "AttentionUnet": (r"(.*\.)?(attention|upconv|merge)\..*|model\.2\..*", r"model\.2\.conv"),
    "SegResNet": (r"up_(layers|samples)\..*|conv_final\..*", r"conv_final\.2\.conv"),
    "DynUNet": (r"upsamples\..*|output_block\..*|deep_supervision_heads\..*", r"output_block\..*"),
    "UNETR": (r"decoder\d+\..*|out\..*", r"out\.conv\.conv"),
    "SwinUNETR": (r"decoder\d+\..*|out\..*", r"out\.conv\.conv"),
    "FlexibleUNet": (r"decoder\..*|segmentation_head\..*", r"segmentation_head\.0"),
    **dict.fromkeys(
        ("DenseNet", "DenseNet121", "DenseNet169", "DenseNet201", "DenseNet264"),
        (r"features\.denseblock4\..*|class_layers\.out", r"class_layers\.out"),
    ),
    "ResNet": (r"layer4\..*|fc", r"fc"),
    "VNet": (r"up_tr\d+\..*|out_tr\..*", r"out_tr\..*"),
}


class StudentError(ValueError):
    """A student cannot be made as it was asked for; the message says what can."""


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


class _Factor(nn.Module):
    """One of the two factors, where peft expects a layer with a ``weight``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class WeightLora(nn.Module, LoraLayer):
    """A layer whose weight is W + s·(B·A), formed before the layer's own operation runs.

    For weights ``(C_out, C_in, *k)`` A is ``(r, C_in, *k)`` and B ``(C_out, r, 1, ...)``; transposed convolutions store
    ``(C_in, C_out, *k)``, and their A is ``(C_in, r, *k)``. A starts Kaiming-uniform and B at zero, so the layer starts
    as the base layer.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1,
                 **kwargs: Any) -> None:  # fmt: skip
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; called by peft."""
        weight = _weight(self.base_layer)
        spatial = weight.shape[2:]
        transposed = isinstance(self.base_layer, TRANSPOSED)
        a_shape = (weight.shape[0], r, *spatial) if transposed else (r, *weight.shape[1:])
        out = weight.shape[1] if transposed else weight.shape[0]
        a = weight.new_empty(a_shape)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_A[adapter_name] = _Factor(a)
        self.lora_B[adapter_name] = _Factor(weight.new_zeros((out, r, *(1 for _ in spatial))))
        self.lora_dropout[adapter_name] = nn.Identity()
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.use_dora[adapter_name] = self.use_rslora[adapter_name] = self.lora_bias[adapter_name] = False
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delta(self, name: str) -> Tensor:
        """s·(B·A), in the shape of the base layer's weight."""
        a, b = _weight(self.lora_A[name]), _weight(self.lora_B[name]).flatten(1)
        if isinstance(self.base_layer, TRANSPOSED):
            return self.scaling[name] * torch.einsum("ir...,or->io...", a, b)
        return self.scaling[name] * (b @ a.flatten(1)).view_as(_weight(self.base_layer))

    def adapted_weight(self) -> Tensor:
        """The weight the layer works with: the base's plus that of every active adapter."""
        weight = _weight(self.base_layer)
        for name in self.active_adapters:
            if name in self.lora_A:
                weight = weight + self.delta(name)
        return weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        return functional_call(self.base_layer, {"weight": self.adapted_weight()}, (x, *args), kwargs)


def adapted_layers(network: nn.Module) -> dict[str, WeightLora]:
    """The adapted layers by the full names they have in the plain network."""
    return {name: module for name, module in network.named_modules() if isinstance(module, WeightLora)}


def scope_pattern(network: nn.Module, scope: str) -> str:
    """The regular expression over full module names behind ``all``, ``decoder``, ``head`` or an expression itself.

    Raises:
        ValueError: when decoder or head is asked of an architecture that is not known.
    """
    if scope == "all":
        return ".*"
    if scope not in ("decoder", "head"):
        return scope
    known = ARCHITECTURES.get(type(network).__name__)
    if known is None:
        top = [name for name, _ in network.named_children()]
        raise StudentError(
            f"which part of {type(network).__name__} is the {scope} is not known; give lora_scope as a regular "
            f"expression over module names. Its parts are {', '.join(top)}."
        )
    return known[0 if scope == "decoder" else 1]


def _rank(layer: nn.Module, rank: int) -> int:
    """The largest rank up to ``rank`` whose adapter is no larger than the layer's weight; 0 where there is none."""
    weight = _weight(layer)
    transposed = isinstance(layer, TRANSPOSED)
    out = weight.shape[1] if transposed else weight.shape[0]
    per_rank = weight.numel() // out + out
    return min(rank, weight.numel() // per_rank)


def inject_lora(
    network: nn.Module, rank: int = 8, alpha: float | None = None, scope: str = "all", seed: int = 0
) -> nn.Module:
    """Put adapters into a network, in place, and leave nothing else trainable.

    Load the weights first: adapters change the names of the keys. A layer for which even the full ``rank`` would be
    larger than its own weight gets a smaller one (same scale); a layer smaller than any adapter is left as it is and
    logged, unless the scope names no other, which then get rank 1.

    Args:
        network: a plain network.
        rank: r of every adapter.
        alpha: the scale is ``alpha / rank``; None takes ``alpha = rank``.
        scope: ``all``, ``decoder``, ``head``, or a regular expression that whole module names have to match.
        seed: draws the factors A.

    Returns:
        ``network``.

    Raises:
        ValueError: when the network has adapters already, the scope matches no layer that an adapter fits in, or (for
            an expression) matches weights that cannot be adapted; nothing has been changed then. Normalisation and
            activation layers are passed over.
    """
    if rank < 1:
        raise StudentError(f"rank must be at least 1, got {rank}.")
    if adapted_layers(network):
        raise StudentError("the network has adapters already; merge or drop them first.")
    pattern = re.compile(scope_pattern(network, scope))
    matched = {name: module for name, module in network.named_modules() if name and pattern.fullmatch(name)}
    leaves = {name: module for name, module in matched.items() if isinstance(module, ADAPTABLE)}
    strange = [
        f"{name} ({type(module).__name__})"
        for name, module in matched.items()
        if not isinstance(module, (*ADAPTABLE, *PASSED_OVER)) and any(True for _ in module.parameters(recurse=False))
    ]
    if strange and scope not in ("all", "decoder", "head"):
        raise StudentError(f"scope {scope!r} asks for layers that cannot be adapted: {', '.join(strange)}.")
    ranks = {name: _rank(module, rank) for name, module in leaves.items()}
    if scope != "all" and not any(ranks.values()):  # only layers smaller than any adapter were asked for
        ranks = dict.fromkeys(ranks, 1)
    chosen = [name for name, r in ranks.items() if r > 0]
    if not chosen:
        raise StudentError(f"scope {scope!r} matches no layer of {type(network).__name__} that an adapter fits in.")
    left_out = [name for name in leaves if name not in chosen] + strange
    if left_out:
        logger.info("left without adapter, smaller than any or of another kind: %s", ", ".join(left_out))
    alpha = rank if alpha is None else alpha
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft only divides it
        target_modules="|".join(re.escape(name) for name in chosen),
        rank_pattern={f"^{re.escape(name)}$": ranks[name] for name in chosen if ranks[name] != rank},
        alpha_pattern={f"^{re.escape(name)}$": alpha * ranks[name] / rank for name in chosen if ranks[name] != rank},
    )
    _inject(network, config, chosen, seed)
    return network


def _inject(network: nn.Module, config: LoraConfig, chosen: list[str], seed: int) -> None:
    config._register_custom_module(dict.fromkeys(ADAPTABLE, WeightLora))
    mode = network.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # peft's words for the layers that are ours
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    network.train(mode)  # new modules start in train mode
    missing = sorted(set(chosen) - set(adapted_layers(network)))
    if missing:
        raise RuntimeError(f"adapters were asked for in {len(chosen)} layers but are missing in {', '.join(missing)}.")


def make_student(
    original: nn.Module,
    scope: str = "all",
    rank: int = 8,
    alpha: float | None = None,
    seed: int = 0,
    freeze_statistics: bool = True,
) -> nn.Module:
    """A copy of the original that is ready to unlearn: normalisation frozen, and only the chosen weights trainable.

    Args:
        original: plain network with its weights; left as it is.
        scope: of the adapters, see :func:`inject_lora`; ``full`` trains all weights and injects none.
        rank: of the adapters.
        alpha: see :func:`inject_lora`.
        seed: of the adapters.
        freeze_statistics: False lets the running statistics of normalisation layers drift under frozen weights, as the
            released code of Erase to Retain does.
    """
    student = copy.deepcopy(original)
    if freeze_statistics:
        freeze_norm(student)
    if scope == "full":
        return student.requires_grad_(True)
    return inject_lora(student, rank, alpha, scope, seed)


def shrink(original: nn.Module, fresh: nn.Module, keep: float) -> nn.Module:
    """θ ← a·original + (1 − a)·fresh, in every weight and running statistic; all weights of the result train.

    With a = 0 nothing of the original's weights is left, and what the student knows it is taught anew.

    Args:
        original: plain network with its weights; left as it is.
        fresh: the same network as it is initialised.
        keep: a, in [0, 1].

    Raises:
        ValueError: when a lies outside, or the networks differ.
    """
    if not 0 <= keep <= 1:
        raise StudentError(f"shrink must lie in [0, 1], got {keep}.")
    student, new = copy.deepcopy(original), fresh.state_dict()
    if set(new) != set(student.state_dict()):
        raise ValueError("the fresh network has other weights than the original.")
    with torch.no_grad():
        for name, value in student.state_dict().items():
            if value.is_floating_point():
                value.mul_(keep).add_(new[name], alpha=1 - keep)
            else:
                value.copy_(new[name])
    return student.requires_grad_(True)


def hold_part(student: nn.Module, original: nn.Module, scope: str | None) -> nn.Module:
    """Take a part of a student out of what unlearns: it is the original's and stays so, statistics included.

    The first levels of an encoder say little about single cases and cost most: held, they need no backward pass, and
    what they give is computed once for each sample.

    Args:
        student: without adapters where a scope is given; left as it is.
        original: the same network, plain.
        scope: a regular expression that whole module names have to match, see :func:`inject_lora`; None or the empty
            text holds nothing.

    Returns:
        A copy with the part held, or the student itself without a scope.

    Raises:
        ValueError: when the student has adapters, the scope matches no weights, or nothing is left to train.
    """
    if not scope:
        return student
    if adapted_layers(student):
        raise StudentError("frozen_scope is for students whose own weights train; adapters take lora_scope.")
    pattern = re.compile(scope_pattern(student, scope))
    held, given = copy.deepcopy(student), dict(original.named_modules())
    parts = {name: module for name, module in held.named_modules() if name and pattern.fullmatch(name)}
    for name, part in parts.items():
        part.load_state_dict(given[name].state_dict())
        freeze_norm(part).requires_grad_(False)
    if not any(True for part in parts.values() for _ in part.parameters()):
        top = ", ".join(name for name, _ in student.named_children())
        raise StudentError(
            f"frozen_scope {scope!r} matches no weights of {type(student).__name__} (its parts: {top}). Name a part of "
            "it, or hold nothing: --frozen_scope ''."
        )
    if not any(parameter.requires_grad for parameter in held.parameters()):
        raise StudentError(f"frozen_scope {scope!r} leaves nothing of {type(student).__name__} to train.")
    return held


def make_restorable(unlearned: nn.Module, scope: str = "head", fresh: nn.Module | None = None) -> nn.Module:
    """A copy of a network in which only a part trains: Erase to Retain's gentle restoration of the head (2511.16574).

    Adapters, where there are any, are merged and frozen with the rest; normalisation keeps its statistics. Of an
    original with its last layers as the part it is the start of CF-k, with ``fresh`` that of EU-k (Goel et al., arXiv
    2201.06640).

    Args:
        unlearned: left as it is.
        scope: ``head``, ``decoder`` or a regular expression over module names: what may train, weights and biases.
        fresh: the same network as it is initialised: the part starts from its weights, and its normalisation learns
            its statistics anew.

    Raises:
        ValueError: when the scope matches nothing that trains, or ``head`` is asked of an unknown architecture.
    """
    pattern = re.compile(scope_pattern(unlearned, scope))
    network = freeze_norm(merge_lora(unlearned)).requires_grad_(False)
    parts = [module for name, module in network.named_modules() if name and pattern.fullmatch(name)]
    for parameter in chain.from_iterable(part.parameters() for part in parts):
        parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise StudentError(f"scope {scope!r} matches nothing in {type(network).__name__} that could be restored.")
    if fresh is not None:
        new = dict(fresh.named_modules())
        for name, part in network.named_modules():
            if name and pattern.fullmatch(name):
                part.load_state_dict(new[name].state_dict())
                unfreeze_norm(part)
    return network


def mask_logits(network: nn.Module, classes: Iterable[int], by: float = 1e4) -> nn.Module:
    """A copy that never names some classes, because their bias in the head is lowered: nothing else changes.

    The control of class suppression: the answers look right and every feature of the class is still there.

    Args:
        network: plain, with a linear head (see :func:`inject_lora`); left as it is.
        classes: in [0, C).
        by: what is taken from the bias.

    Raises:
        ValueError: when the head is not known or has no bias.
    """
    masked = copy.deepcopy(network)
    pattern = re.compile(scope_pattern(masked, "head"))
    heads = [module for name, module in masked.named_modules() if pattern.fullmatch(name)]
    if len(heads) != 1 or getattr(heads[0], "bias", None) is None:
        raise ValueError(f"{type(network).__name__} has no single head with a bias to mask logits in.")
    with torch.no_grad():
        cast(Tensor, heads[0].bias)[list(classes)] -= by
    return masked.requires_grad_(True)


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """Within the block the network computes what it did before it was adapted; gradients' flags stay as they are."""
    layers = list(adapted_layers(network).values())
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before):
            layer._disable_adapters = value


def merge_lora(network: nn.Module) -> nn.Module:
    """A plain copy of an adapted network, with the original keys and W + s·(B·A) as weights.

    Args:
        network: left as it is; a network without adapters is copied.

    Returns:
        A network whose outputs equal the adapted one's bit for bit.
    """
    plain = copy.deepcopy(network)
    for name, layer in adapted_layers(plain).items():
        base = layer.base_layer
        with torch.no_grad():
            _weight(base).copy_(layer.adapted_weight())
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, base)
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    return plain


def drift(network: nn.Module) -> dict[str, float]:
    """How far each adapted layer has moved: ‖ΔW‖ / ‖W‖ (Frobenius)."""
    moved = {}
    for name, layer in adapted_layers(network).items():
        base = _weight(layer.base_layer).detach()
        change = layer.adapted_weight().detach() - base
        moved[name] = (change.norm() / base.norm().clamp_min(torch.finfo(base.dtype).tiny)).item()
    return moved


@torch.no_grad()
def limit_drift(network: nn.Module, cap: float) -> None:
    """Scale every adapter back whose layer moved by more than ``cap`` of its norm, in place; see :func:`drift`."""
    moved = drift(network)
    for name, layer in adapted_layers(network).items():
        if moved[name] > cap:
            for factor in layer.lora_B.values():
                _weight(factor).mul_(cap / moved[name])


def _base_state(network: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer.", "."): value
        for name, value in network.state_dict().items()
        if ".lora_A." not in name and ".lora_B." not in name
    }


def save_adapter(network: nn.Module, folder: str | Path) -> None:
    """Write the adapters in peft's format, bound to the sha256 of the weights beneath them.

    ``PeftModel.from_pretrained`` loads the folder into the plain network as long as peft supports all adapted layers.

    Raises:
        ValueError: when the network has no adapters.
    """
    if not adapted_layers(network):
        raise ValueError("the network has no adapters to save.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {PREFIX + name: value.contiguous() for name, value in get_peft_model_state_dict(network).items()}
    configs: Any = network.peft_config
    config = configs[ADAPTER].to_dict()
    kept = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.items()
        if not name.startswith("_") and isinstance(value, (str, int, float, bool, list, dict, set, type(None)))
    }
    kept["inference_mode"] = True
    write_safetensors(
        state, folder / "adapter_model.safetensors", {"base_sha256": weights_digest(_base_state(network))}
    )
    write_json(kept, folder / "adapter_config.json")


_CONFIG_KEYS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")


def _check_adapter_config(values: Mapping[str, Any]) -> None:
    for key, kinds in (
        ("r", int),
        ("lora_alpha", (int, float)),
        ("rank_pattern", int),
        ("alpha_pattern", (int, float)),
    ):
        found = values[key]
        numbers = list(found.values()) if key.endswith("pattern") and isinstance(found, dict) else [found]
        if not all(isinstance(one, kinds) and not isinstance(one, bool) and 0 < one <= 2**16 for one in numbers):
            raise ValueError(f"{key} is {found!r}, and must be positive and at most 65536")


def load_adapter(network: nn.Module, folder: str | Path) -> nn.Module:
    """Put stored adapters into the plain network they were made for, in place.

    The configuration is read as data: nothing in it is imported or evaluated.

    Raises:
        CheckpointError: when files are missing or damaged, the network's weights are not those the adapters were made
            for, or keys do not match one to one.
    """
    folder = Path(folder)
    try:
        config: Mapping[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        values = {key: config[key] for key in _CONFIG_KEYS}
        _check_adapter_config(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: adapter_config.json cannot be read: {error}.") from error
    state, metadata = read_safetensors(folder / "adapter_model.safetensors")
    digest = weights_digest(network.state_dict())
    if metadata.get("base_sha256") not in (None, digest):
        raise CheckpointError(
            f"{folder}: the adapters belong to weights with sha256 {metadata['base_sha256'][:12]}, the network holds "
            f"{digest[:12]}; load the original model first."
        )
    names = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in state}
    leaves = {name for name, module in network.named_modules() if isinstance(module, ADAPTABLE)}
    if not names or names - leaves:
        raise CheckpointError(f"{folder}: adapters for layers the network does not have: {sorted(names - leaves)[:5]}.")
    values["target_modules"] = "|".join(re.escape(name) for name in sorted(names))
    _inject(network, LoraConfig(**values), sorted(names), seed=0)
    own = get_peft_model_state_dict(network)
    given = {key.removeprefix(PREFIX): value for key, value in state.items()}
    wrong = sorted(set(own) ^ set(given)) or [key for key in own if own[key].shape != given[key].shape]
    if wrong:
        raise CheckpointError(f"{folder}: keys that do not fit the network: {', '.join(wrong[:5])}.")
    set_peft_model_state_dict(network, given)
    return network


def _keep_statistics(module: nn.Module, args: Any) -> None:
    module.eval()


def freeze_norm(network: nn.Module) -> nn.Module:
    """Keep every normalisation layer with running statistics in eval mode for good, in place.

    MONAI's ``SupervisedTrainer`` calls ``network.train()`` in every iteration with no event before the forward pass;
    a hook on each layer puts it back. Survives deep copies and pickling. Weights are untouched, and so is whether they
    train.

    Returns:
        ``network``.
    """
    for module in network.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            module.eval()
            if _keep_statistics not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_keep_statistics)
    return network


def unfreeze_norm(network: nn.Module) -> nn.Module:
    """Undo :func:`freeze_norm`, in place."""
    for module in network.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _keep_statistics]:
            del hooks[key]
    return network
