# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Does it stay forgotten: after a little training, after rounding, with the original's statistics, without adapters."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import CheckpointError
from ..data import MemoryDataset
from ..lora import freeze_norm, load_adapter, merge_lora
from .cost import Meter
from .reference import References
from .scores import Inferer, main_score, score_cases

STEPS = (0, 5, 10, 20, 40)
PRECISIONS = ("bf16", "int8", "int4")
MOST_RELEARNED = 100  # forget cases that a curve scores
Loss = Callable[[Tensor, Tensor], Tensor]


def relearn_curve(
    network: nn.Module,
    taught: MemoryDataset,
    scored: MemoryDataset,
    loss: Loss,
    steps: Sequence[int] = STEPS,
    learning_rate: float = 3e-4,
    batch_size: int = 16,
    patch_size: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    inferer: Inferer | None = None,
    seed: int = 0,
    desc: str = "relearning",
) -> list[dict[str, float]]:
    """How the score on some cases moves while a copy of the network is trained on these or on others.

    AdamW on all weights at a constant rate, random batches drawn by ``seed``; normalisation keeps its statistics.

    Args:
        network: plain; left as it is.
        taught: what the copy is trained on: the forget set (relearning), retained cases (benign fine-tuning) or unseen
            ones (relearning from unrelated data).
        scored: the forget set.
        loss: of logits and labels.
        steps: after how many steps to score.
        learning_rate: of AdamW.
        batch_size: samples of a step.
        patch_size: a random patch of each sample is trained on; None trains on the whole.
        device: where to compute.
        inferer: of the scoring, see :func:`monai_unlearn.audit.score_cases`.
        seed: of the batches.
        desc: name on the progress bar.

    Returns:
        For each number of steps ``steps`` and ``score``, the mean IoU or accuracy.
    """
    student = freeze_norm(copy.deepcopy(network)).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(student.parameters(), learning_rate)
    generator, curve = torch.Generator().manual_seed(seed), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in tqdm(range(max(steps) + 1), desc, leave=False):
            if step in steps:
                rows = score_cases(student, scored, device, inferer=inferer, batch_size=batch_size)
                curve.append({"steps": step, "score": float(rows[main_score(rows)].mean())})
            if step == max(steps):
                break
            number = batch_size if patch_size is not None else min(batch_size, len(taught))
            drawn = torch.randint(len(taught), (number,), generator=generator).tolist()
            samples = [taught[index] for index in drawn]
            image, label = (torch.stack([sample[key] for sample in samples]).to(device) for key in ("image", "label"))
            optimizer.zero_grad()
            if patch_size is not None:
                image, label = _patches(image, label, patch_size, generator)
            loss(student(image), label).backward()
            optimizer.step()
    return curve


def _patches(image: Tensor, label: Tensor, size: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random patch of each row, at the same place in image and label."""
    rows = []
    for one, truth in zip(image, label):
        sides = [min(wanted, there) for wanted, there in zip(size, one.shape[1:])]
        corner = [int(torch.randint(there - side + 1, (), generator=generator))
                  for side, there in zip(sides, one.shape[1:])]  # fmt: skip
        where = (slice(None), *(slice(at, at + side) for at, side in zip(corner, sides)))
        rows.append((one[where], truth[where]))
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def anamnesis_index(unlearned: Sequence[Mapping[str, float]], retrained: Sequence[Mapping[str, float]], level: float
                    ) -> dict[str, float | None]:  # fmt: skip
    """AIN (Chundawat et al., arXiv 2201.05629): steps to ``level`` of the unlearned over those of the retrained model.

    Steps between two scored points are interpolated; a curve that does not reach the level has None steps, and the
    index is None then.
    """
    steps = {name: _steps_to(curve, level) for name, curve in (("unlearned", unlearned), ("retrained", retrained))}
    one, other = steps["unlearned"], steps["retrained"]
    return {**steps, "level": level, "ain": one / other if one is not None and other else None}


def durability_warnings(relearn: Mapping[str, Any], rise: float = 0.04) -> list[str]:
    """What the curves say that the verdict does not: training on other data brings the forget set back.

    Args:
        relearn: kind -> model -> curve, of :func:`relearn_curve`.
        rise: of the forget score, beyond that of the model compared with.
    """
    found = []
    for kind, what in (("benign", "retained"), ("unrelated", "unseen")):
        curves = dict(relearn.get(kind, {}))
        unlearned, other = curves.pop("unlearned", None), next(iter(curves.items()), None)
        if unlearned is None or other is None:
            continue
        risen = [max(at["score"] for at in curve) - curve[0]["score"] for curve in (unlearned, other[1])]
        if risen[0] > risen[1] + rise:
            name = "the retrained model" if other[0] == "retrained" else "a reference"
            found.append(
                f"not judged: {unlearned[-1]['steps']} steps of training on {what} cases bring the forget set up by "
                f"{risen[0]:.3f} ({name}: {risen[1]:.3f}). What was forgotten may come back when training goes on."
            )
    return found


def _steps_to(curve: Sequence[Mapping[str, float]], level: float) -> float | None:
    if curve[0]["score"] >= level:
        return 0.0
    for before, after in itertools.pairwise(curve):
        if after["score"] >= level:
            share = (level - before["score"]) / (after["score"] - before["score"])
            return before["steps"] + share * (after["steps"] - before["steps"])
    return None


@torch.no_grad()
def rounded(network: nn.Module, precision: str) -> nn.Module:
    """A copy whose convolutions and linear layers have rounded weights, as a deployment would round them.

    Args:
        network: left as it is.
        precision: ``bf16``; or ``int8`` and ``int4``, symmetric with one scale for each output channel.

    Raises:
        ValueError: on another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}.")
    copied = copy.deepcopy(network)
    for module in copied.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2 or isinstance(module, nn.Embedding):
            continue
        if precision == "bf16":
            weight.copy_(weight.bfloat16())
            continue
        largest = 2 ** (int(precision[3:]) - 1) - 1
        axis = 1 if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) else 0
        others = [dim for dim in range(weight.ndim) if dim != axis]
        scale = (weight.abs().amax(others, keepdim=True) / largest).clamp_min(torch.finfo(weight.dtype).tiny)
        weight.copy_((weight / scale).round().clamp(-largest, largest) * scale)
    return copied


@torch.no_grad()
def with_statistics_of(network: nn.Module, original: nn.Module) -> nn.Module | None:
    """A copy with the original's buffers, such as running statistics; None where they are the same.

    When the forget score jumps back with them, the weights had forgotten nothing.
    """
    theirs = dict(original.named_buffers())
    if all(torch.equal(value, theirs[name]) for name, value in network.named_buffers()):
        return None
    copied = copy.deepcopy(network)
    for name, value in copied.named_buffers():
        value.copy_(theirs[name])
    return copied


def removable(state_dict: Mapping[str, Any]) -> list[str]:
    """Keys of adapters that can be taken off again; a model with any is suppressed and not unlearned."""
    return sorted(key for key in state_dict if "lora_" in key or "adapter" in key or key.startswith("base_model."))


def relearn_curves(
    models: Mapping[str, nn.Module],
    references: References | None,
    datasets: Mapping[str, MemoryDataset],
    loss: Loss,
    steps: int,
    patch_size: Sequence[int] | None,
    options: Mapping[str, Any],
    seed: int,
    meter: Meter,
) -> dict[str, Any]:
    """Curves of the forget score by what a copy is trained on, of the unlearned model and of one that never saw it."""
    compared = {"unlearned": models["unlearned"]}
    if "retrained" in models:
        compared["retrained"] = models["retrained"]
    elif references is not None:
        compared["judge"] = references.networks[0]
    forget = datasets["forget"]
    chosen = np.random.default_rng(seed).permutation(len(forget))[:MOST_RELEARNED]
    scored = MemoryDataset([forget.data[index] for index in sorted(chosen)], forget.transform, forget.store)
    taught = {"forget": forget, "benign": datasets.get("retain", forget), "unrelated": datasets["holdout"]}
    batch = 16 if patch_size is not None else min(16, options["batch_size"])
    scored_at = sorted({0, steps // 8, steps // 4, steps // 2, steps})
    found: dict[str, Any] = {}
    for kind, dataset in taught.items():
        for name, network in compared.items():
            found.setdefault(kind, {})[name] = relearn_curve(
                network, dataset, scored, loss, scored_at, batch_size=batch, patch_size=patch_size,
                device=options["device"], inferer=options["inferer"], seed=seed, desc=f"{kind}, {name}",
            )  # fmt: skip
            meter.count(3 * steps * batch * _patch_share(forget, patch_size) + len(scored_at) * len(scored))
    return found


def _patch_share(dataset: MemoryDataset, patch_size: Sequence[int] | None) -> float:
    """The share of an image that a patch covers."""
    return 1.0 if patch_size is None else math.prod(patch_size) / math.prod(dataset[0]["image"].shape[1:])


def relearn_index(relearn: Mapping[str, Any] | None, original: float) -> dict[str, Any] | None:
    """Steps until the forget set scores within .02 of the original's again, see :func:`anamnesis_index`."""
    curves = (relearn or {}).get("forget", {})
    other = curves.get("retrained", curves.get("judge"))
    if not other:
        return None
    return anamnesis_index(curves["unlearned"], other, original - 0.02)


def weight_probes(
    models: Mapping[str, nn.Module],
    datasets: Mapping[str, MemoryDataset],
    options: Mapping[str, Any],
    adapter: str | Path | None,
    meter: Meter,
) -> dict[str, Any]:
    """The unlearned model's scores after changes that train nothing."""
    plain_options = {name: value for name, value in options.items() if name != "metrics"}

    def means(network: nn.Module, what: str) -> dict[str, float]:
        found = {}
        for split in ("forget", "holdout"):
            rows = score_cases(network, datasets[split], **plain_options, desc=what)
            meter.count(len(datasets[split]))
            found[split] = float(rows[main_score(rows)].mean())
        return found

    unlearned, original = models["unlearned"], models["original"]
    found: dict[str, Any] = {
        "rounding": {one: means(rounded(unlearned, one), f"rounded to {one}") for one in PRECISIONS},
        "original_statistics": None,
        "adapter": None,
    }
    restored = with_statistics_of(unlearned, original)
    if restored is not None:
        found["original_statistics"] = means(restored, "with the original's statistics")
    if adapter is not None and Path(adapter).is_dir():
        found["adapter"] = {"gives_original_back": _gives_back(original, unlearned, adapter)}
    return found


def _gives_back(original: nn.Module, unlearned: nn.Module, adapter: str | Path) -> bool:
    """Whether a folder's adapter is all that lies between two models: taken off the one, it gives the other."""
    try:
        remade = merge_lora(load_adapter(copy.deepcopy(original), adapter))
    except CheckpointError:  # of another run: made for other weights
        return False
    pairs = zip(remade.parameters(), unlearned.parameters())
    return all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)
