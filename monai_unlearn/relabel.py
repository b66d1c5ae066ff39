# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Towards what: new labels for the samples to forget, as callables ``(image, label) -> label``.

A label has the prediction's shape, ``(B, C, *spatial)`` or ``(B, C)``, and holds probabilities: masks, one-hot,
uniform and soft labels are one type. A relabel returns a new tensor and leaves its arguments as they are. A label of −1
throughout says that the sample gets none and is left out of the forget loss.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from monai.data import MetaTensor
from monai.transforms import Compose, InvertibleTransform, Randomizable
from torch import Tensor, nn
from torch.utils.data import Dataset

from .checkpoint import CheckpointError, read_safetensors, weights_digest, write_safetensors, write_volume
from .request import RequestError, item_id, pseudonym

Relabel = Callable[[Tensor, Tensor], Tensor]
logger = logging.getLogger(__name__)
LARGEST_SCALE = 64  # by which a reference's logits may be too small


def keep_label(image: Tensor, label: Tensor) -> Tensor:
    """The label as it is: for samples whose new label was computed beforehand, and for controls."""
    return label.clone()


def to_background(image: Tensor, label: Tensor) -> Tensor:
    """Nothing is there: zeros for one channel (sigmoid), else all probability on channel 0.

    The target of Erase to Retain's segmentation experiments (arXiv 2511.16574).

    Example:
        >>> to_background(torch.rand(1, 3, 2, 2), torch.ones(1, 1, 2, 2)).sum().item()
        0.0
    """
    background = torch.zeros_like(label)
    if label.shape[1] > 1:
        background[:, 0] = 1
    return background


def to_uniform(image: Tensor, label: Tensor) -> Tensor:
    """Every class alike: 1/C, and one half for one channel.

    The target of Erase to Retain's classification experiment (arXiv 2511.16574).
    """
    return torch.full_like(label, 1 / max(2, label.shape[1]))


def random_labels(items: Sequence[Mapping[str, Any]], num_classes: int, class_key: str, seed: int = 0) -> list[int]:
    """A wrong class for each item, uniform over the others, drawn once and fixed by the item's id.

    The draw does not depend on the order or number of the items.

    Args:
        items: data-list items.
        num_classes: C; the items' own classes lie in [0, C).
        class_key: the item key of the own class.
        seed: fixes the draw.

    Returns:
        The classes.

    Raises:
        ValueError: with fewer than two classes, or a class out of range.
    """
    if num_classes < 2:
        raise ValueError(f"a random wrong label needs at least two classes, got {num_classes}.")
    wrong = []
    for item in items:
        own = int(item[class_key])
        if not 0 <= own < num_classes:
            raise ValueError(f"the class must lie in [0, {num_classes}), got {own}.")
        shift = torch.randint(1, num_classes, (), generator=_generator(seed, item)).item()
        wrong.append((own + int(shift)) % num_classes)
    return wrong


def to_random_class(items: Sequence[Mapping[str, Any]], num_classes: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Each forget item with a wrong class for its label, drawn once; see :func:`random_labels`.

    Args:
        items: the forget items, whose ``label`` is a class number.
        num_classes: C.
        seed: fixes the draw.

    Returns:
        The relabelled item of each item's id, for the ``relabel`` of :func:`monai_unlearn.unlearning_targets`.
    """
    wrong = random_labels(items, num_classes, "label", seed)
    return {item_id(item): {**item, "label": label} for item, label in zip(items, wrong)}


def to_random_label(
    items: Sequence[Mapping[str, Any]], donors: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, Mapping[str, Any]]:
    """A retained item for each forget item, whose mask becomes its label; drawn once, fixed by the item's id.

    Random labels for segmentation: the mask of another patient (methods/baselines of Golatkar et al., SalUn).

    Args:
        items: the forget items.
        donors: retained items.
        seed: fixes the draw.

    Returns:
        The donor of each item's id, for the ``relabel`` of :func:`monai_unlearn.unlearning_targets`.

    Raises:
        ValueError: without donors.
    """
    if not donors:
        raise ValueError("random labels for segmentation are masks of retained items, and there are none.")
    ordered = sorted(donors, key=item_id)
    return {
        item_id(item): ordered[int(torch.randint(len(ordered), (), generator=_generator(seed, item)).item())]
        for item in items
    }


def _generator(seed: int, item: Mapping[str, Any]) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{item_id(item)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class without_class:
    """What a network says when it may not name some classes: their logits are masked out, the others share the rest.

    The target of DELETE (decoupled distillation, arXiv 2503.23751) with the original as ``network``: each forget sample
    keeps what the original knew about the other classes.

    Args:
        network: the frozen original, gives logits ``(B, C)`` or ``(B, C, *spatial)``; used in eval mode.
        classes: the classes to leave out, in [0, C).

    Raises:
        ValueError: in use, when no class is left or one is out of range.
    """

    def __init__(self, network: nn.Module, classes: Sequence[int]) -> None:
        self.network, self.classes = network.eval(), [int(one) for one in classes]

    @torch.no_grad()
    def __call__(self, image: Tensor, label: Tensor) -> Tensor:
        logits = self.network(image)
        number = logits.shape[1]
        if not set(self.classes) < set(range(number)):
            raise ValueError(f"classes to leave out must be some, not all, of 0 to {number - 1}; got {self.classes}.")
        logits[:, self.classes] = -torch.inf
        return logits.softmax(1).to(label)


class Calibration(NamedTuple):
    """A map of logits, z ↦ scale·z + bias: what a short or small training got wrong about its own certainty.

    Attributes:
        scale: one number for all channels, not negative.
        bias: one for each channel, ``(C,)``.
    """

    scale: float
    bias: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits ``(B, C, *spatial)`` or ``(B, C)``, mapped."""
        return self.scale * logits + self.bias.to(logits).reshape(1, -1, *[1] * (logits.ndim - 2))


def fit_calibration(logits: Tensor, towards: Tensor, match: str = "probabilities", most: int = 2**18) -> Calibration:
    """The map of one model's logits that brings its probabilities closest to another model's, or its certainty to it.

    A reference that was trained briefly, on a part of the data, is less certain than a fully trained model would be,
    and leans to other classes. Fitted on cases that neither model was trained on, towards the original, the map takes
    that out and leaves what the reference knows: temperature scaling with a bias (Guo et al., arXiv 1706.04599, matched
    to a model instead of to labels). With ``match="probabilities"`` it minimises the cross-entropy, a convex problem;
    where the two models disagree the answers come out hedged. ``"certainty"`` fits the scale alone, so that the mean
    entropy is the other model's: for cases that differ from those of the fit in which classes they show.

    Args:
        logits: of the reference, ``(B, C, *spatial)`` or ``(B, C)``.
        towards: of the original, the same shape.
        match: ``"probabilities"`` or ``"certainty"``.
        most: voxels used; those beyond are left out at even steps.

    Raises:
        ValueError: when the shapes differ, or on another ``match``.

    Example:
        >>> z = torch.linspace(-3, 3, 50).reshape(50, 1)
        >>> map = fit_calibration(z, 2 * z - 1)
        >>> round(map.scale, 2), round(map.bias.item(), 2)
        (2.0, -1.0)
        >>> round(fit_calibration(z, -2 * z, match="certainty").scale, 2)
        2.0
    """
    if logits.shape != towards.shape:
        raise ValueError(f"the two models differ in shape: {tuple(logits.shape)} and {tuple(towards.shape)}.")
    if match not in ("probabilities", "certainty"):
        raise ValueError(f"a calibration matches probabilities or certainty, got {match!r}.")
    channels = logits.shape[1]
    z, target = (one.movedim(1, -1).reshape(-1, channels) for one in (logits, probabilities(towards)))
    step = -(-len(z) // most)
    z, target = z[::step].double(), target[::step].double()
    if match == "certainty":
        return Calibration(_scale_of_entropy(z, _entropy(target)), torch.zeros(channels))
    scale = torch.ones((), dtype=torch.double, device=z.device, requires_grad=True)
    bias = torch.zeros(channels, dtype=torch.double, device=z.device, requires_grad=True)

    def fit(parameters: list[Tensor]) -> None:
        optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def loss() -> Tensor:
            optimizer.zero_grad()
            mapped = scale * z + bias
            if channels == 1:
                value = nn.functional.binary_cross_entropy_with_logits(mapped, target)
            else:
                value = -(target * mapped.log_softmax(1)).sum(1).mean()
            value = value + 1e-6 * (bias**2).sum()  # a class that neither names has no bias of its own
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    with torch.enable_grad():
        fit([scale, bias])
        if scale <= 0:
            logger.warning("the reference says nothing about cases unseen by it and the original; train it longer.")
            scale = torch.zeros_like(scale)
            fit([bias])
    return Calibration(float(scale), bias.detach().float())


def _entropy(p: Tensor) -> float:
    """The mean entropy in nats of probabilities ``(N, C)``, of both outcomes where there is one channel."""
    both = torch.cat([p, 1 - p], 1) if p.shape[1] == 1 else p
    return float(torch.special.entr(both).sum(1).mean())


def _scale_of_entropy(z: Tensor, wanted: float) -> float:
    """The scale at which logits ``(N, C)`` have a mean entropy, by bisection; entropy falls as the scale grows.

    0, and a warning, where only an enormous scale would do: it would make certain answers of nothing.
    """
    low, high = 0.0, 1.0
    while _entropy(probabilities(high * z)) > wanted:
        low, high = high, 2 * high
        if high > LARGEST_SCALE:
            logger.warning(
                "the reference says next to nothing about cases unseen by it and the original; train it longer."
            )
            return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(probabilities(middle * z)) > wanted else (low, middle)
    return (low + high) / 2


class to_reference:
    """What models that never saw the sample say about it: the mean of their probabilities.

    With ``views`` they are asked about the sample mirrored or shifted, and their answers are mapped back. A network
    that was trained without such views remembers its training cases far less in them; so the network that is to forget
    can itself stand in for a reference, and none has to be trained. What the views still remember can be taken off by
    going ``beyond`` them, away from what the network says of the sample as it is::

        z = z_views + beyond · (z_views − z_sample)

    in logits: the step from the sample to its views is the memory that they lack, and some of it is left in them.

    Args:
        references: frozen networks that give logits ``(B, C, *spatial)`` or ``(B, C)``; used in eval mode.
        temperature: divides the logits; above 1 softens.
        inferer: such as MONAI's ``SlidingWindowInferer``; None calls the networks.
        original: the network that is to forget; with ``unseen`` each reference is calibrated towards it, see
            :func:`fit_calibration`.
        unseen: cases of which neither the original nor a reference has seen any, with an item ``image``; no label of
            theirs is read.
        limit: so many of the unseen cases, at even steps.
        match: see :func:`fit_calibration`.
        views: MONAI's invertible spatial array transforms without randomness, such as ``Flip(0)`` or
            ``Affine(translate_params=(0, 3, 0))``; without any the sample is shown as it is. They are shown the
            samples of a batch as channels of one, so they must treat channels alike.
        pool: what is averaged over the views, ``"probabilities"`` or ``"logits"``, their geometric mean. The second
            stays more certain where views differ.
        beyond: see above, 0 or more; only for a network that was trained on the sample.

    Raises:
        ValueError: without a reference, with a temperature that is not positive, with one of ``original`` and
            ``unseen`` only, with a view that cannot be mapped back or is drawn at random, with another ``pool``, or
            with a ``beyond`` that is negative or has no views.

    Example:
        >>> from monai.transforms import Flip
        >>> network = torch.nn.Conv2d(1, 1, 1)
        >>> image = torch.rand(1, 1, 4, 4)  # a convolution of one voxel answers a mirrored view alike
        >>> mirrored = to_reference(network, views=[Flip(0), Flip(1)])
        >>> torch.allclose(mirrored(image, image), to_reference(network)(image, image))
        True
    """

    def __init__(
        self,
        references: nn.Module | Sequence[nn.Module],
        temperature: float = 1.0,
        inferer: Callable[[Tensor, nn.Module], Tensor] | None = None,
        original: nn.Module | None = None,
        unseen: Dataset | None = None,
        limit: int = 64,
        match: str = "probabilities",
        views: Sequence[InvertibleTransform] = (),
        pool: Literal["probabilities", "logits"] = "probabilities",
        beyond: float = 0.0,
    ) -> None:
        self.references = [references] if isinstance(references, nn.Module) else list(references)
        if not self.references:
            raise ValueError("to_reference needs at least one reference network.")
        for view in views:
            if not isinstance(view, InvertibleTransform):
                raise ValueError(f"a view must be a transform that can be inverted, which {view!r} cannot.")
            if any(isinstance(part, Randomizable) for part in Compose(view).flatten().transforms):
                raise ValueError(f"a view must be the same each time, and {view!r} is drawn at random.")
        if pool not in ("probabilities", "logits"):
            raise ValueError(f"views are pooled by probabilities or logits, got {pool!r}.")
        if not 0 <= beyond < math.inf or (beyond and not views):
            raise ValueError(f"beyond is a number from 0 on, and 0 without views; got {beyond}.")
        self.views, self.pool, self.beyond = list(views), pool, beyond
        self._asked = len(self.views) + bool(beyond) if self.views else 1  # forward passes for an answer
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if (original is None) != (unseen is None):
            raise ValueError("to calibrate, to_reference needs both: the original and cases unseen by all.")
        self.temperature, self.inferer, self.passes = temperature, inferer, 0
        self.calibrations: list[Calibration] = []
        for reference in self.references:
            reference.eval().requires_grad_(False)
        if original is not None and unseen is not None:
            self.calibrations = self._calibrate(original.eval(), unseen, limit, match)

    @torch.no_grad()
    def _calibrate(self, original: nn.Module, unseen: Any, limit: int, match: str) -> list[Calibration]:
        if not len(unseen):
            raise ValueError("to_reference cannot calibrate: there are no cases that neither model has seen.")
        device = next(original.parameters()).device
        said = []
        for index in range(0, len(unseen), -(-len(unseen) // limit)):
            image = torch.as_tensor(unseen[index]["image"])[None].to(device)
            logits = torch.cat([self._logits(image, original), *(self._answer(image, one) for one in self.references)])
            voxels = logits.reshape(*logits.shape[:2], -1)
            said.append(voxels[..., :: -(-voxels.shape[2] // 2**14)].cpu())  # so that large volumes fit into memory
        self.passes += len(said) * (1 + len(self.references) * self._asked)
        of_original, *others = torch.cat(said, -1).split(1)
        return [fit_calibration(one, of_original, match) for one in others]

    def _logits(self, image: Tensor, network: nn.Module) -> Tensor:
        return network(image) if self.inferer is None else self.inferer(image, network)

    def _answer(self, image: Tensor, network: nn.Module) -> Tensor:
        """A reference's logits in the sample's place, pooled over the views and taken beyond them."""
        if not self.views:
            return self._logits(image, network)
        said = []
        for view in self.views:
            seen = view(MetaTensor(image.flatten(0, 1)))
            logits = self._logits(seen.as_tensor().unflatten(0, image.shape[:2]), network)
            if logits.ndim == image.ndim:  # a class has no place
                back = MetaTensor(logits.flatten(0, 1), meta=seen.meta, applied_operations=seen.applied_operations)
                logits = view.inverse(back).as_tensor().unflatten(0, logits.shape[:2])
            said.append(probabilities(logits))
        if self.pool == "logits":
            pooled = torch.stack([_as_logits(one) for one in said]).mean(0)
        else:
            pooled = _as_logits(torch.stack(said).mean(0))
        if self.beyond:
            pooled = pooled + self.beyond * (pooled - _as_logits(probabilities(self._logits(image, network))))
        return pooled

    @torch.no_grad()
    def __call__(self, image: Tensor, label: Tensor) -> Tensor:
        outputs = [self._answer(image, one) for one in self.references]
        self.passes += len(image) * len(outputs) * self._asked
        outputs = [calibration(one) for calibration, one in zip(self.calibrations, outputs)] or outputs
        return torch.stack([probabilities(one / self.temperature) for one in outputs]).mean(0).to(label)

    def report(self) -> dict[str, Any]:
        """Forward passes of one sample so far, and the calibrations."""
        calibrations = [{"scale": one.scale, "bias": one.bias.tolist()} for one in self.calibrations]
        return {"passes": self.passes} | ({"calibration": calibrations} if calibrations else {})


class to_out_of_fold:
    """What each sample's own out-of-fold model says: the cross-validation model that was not trained on its fold.

    These models exist already where cross-validation was done, were trained by the full recipe on most of the data, and
    are not calibrated. They taught then, and cannot judge.

    Args:
        networks: by the fold that each was not trained on; frozen.
        temperature: see :class:`to_reference`.
        inferer: see :class:`to_reference`.
    """

    def __init__(
        self,
        networks: Mapping[Any, nn.Module],
        temperature: float = 1.0,
        inferer: Callable[[Tensor, nn.Module], Tensor] | None = None,
    ) -> None:
        self.folds = {str(fold): to_reference(one, temperature, inferer) for fold, one in networks.items()}

    def of(self, item: Mapping[str, Any]) -> to_reference:
        """The relabel for an item of its ``fold``.

        Raises:
            RequestError: when the item has no fold, or one that no model belongs to.
        """
        fold = str(item.get("fold", "unknown"))
        if fold not in self.folds:
            raise RequestError(f"no model was given that never saw fold {fold}, and a forget case lies in it.")
        return self.folds[fold]

    def report(self) -> dict[str, Any]:
        """Forward passes of one sample so far."""
        return {"passes": sum(one.passes for one in self.folds.values())}


class to_blend:
    """What several relabels say together: the weighted mean of their labels as logits, a weighted geometric mean.

    Models that never saw the sample know what was to be learned without it, but were trained otherwise than the network
    that is to forget; its own views (see :class:`to_reference`) say what it would, and remember some of the sample.

    Args:
        relabels: each gives every sample a label; those that have an ``of`` are asked for the item's own.
        weights: one for each relabel, positive, with sum 1.

    Raises:
        ValueError: when the weights are not so, or, in use, when a relabel leaves a sample out.

    Example:
        >>> sure, unsure = (lambda image, label, p=p: torch.full_like(label, p) for p in (0.9, 0.5))
        >>> round(to_blend([sure, unsure], [0.5, 0.5])(torch.ones(1, 1), torch.ones(1, 1)).item(), 4)  # odds of 9 and 1
        0.75
    """

    def __init__(self, relabels: Sequence[Relabel], weights: Sequence[float]) -> None:
        if len(relabels) != len(weights) or not all(weight > 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
            raise ValueError(f"a blend of {len(relabels)} needs as many positive weights with sum 1, got {weights}.")
        self.relabels, self.weights = list(relabels), list(weights)
        self._of: dict[tuple[int, ...], to_blend] = {}

    def of(self, item: Mapping[str, Any]) -> to_blend:
        """The relabel for an item, where one of the relabels differs from item to item."""
        parts = [one.of(item) if hasattr(one, "of") else one for one in self.relabels]
        return self._of.setdefault(tuple(map(id, parts)), to_blend(parts, self.weights))

    def __call__(self, image: Tensor, label: Tensor) -> Tensor:
        blended = torch.zeros_like(label)
        for relabel, weight in zip(self.relabels, self.weights):
            said = relabel(image, label)
            if (said < 0).any():
                raise ValueError("a relabel that leaves samples out cannot be blended with another.")
            blended = blended + weight * _as_logits(said)
        return probabilities(blended)

    def report(self) -> dict[str, Any]:
        """What the relabels report: forward passes in all, and the calibrations."""
        said = [one.report() for one in self.relabels if hasattr(one, "report")]
        calibrations = [one for part in said for one in part.get("calibration", [])]
        passes = sum(part["passes"] for part in said)
        return {"passes": passes} | ({"calibration": calibrations} if calibrations else {})


def _as_logits(p: Tensor) -> Tensor:
    """Logits, finite, that give these probabilities."""
    return p.logit(1e-6) if p.shape[1] == 1 else p.clamp_min(1e-6).log()


def probabilities(logits: Tensor) -> Tensor:
    """Sigmoid of one channel, softmax over dimension 1 of several.

    Example:
        >>> probabilities(torch.zeros(1, 4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


class LabelStore:
    """New labels on disk, for a search that is made once: one file for each network, search and set of samples.

    Samples stand in it under their pseudonyms, and what they looked like under a keyed hash, so without the site's key
    nobody can tell whose labels these are.

    Args:
        folder: should be readable by its owner only, such as ``private/labels``.
        key: the site's, see :func:`monai_unlearn.site_key`.
    """

    def __init__(self, folder: str | Path, key: bytes) -> None:
        self.folder, self.key = Path(folder), key

    def describe(
        self, network: nn.Module, search: Mapping[str, Any], samples: Sequence[tuple[Mapping[str, Any], str]]
    ) -> dict[str, Any]:
        """What labels belong to.

        Args:
            network: the original that is searched.
            search: everything that decides the labels beside it.
            samples: each item with the sha256 of what the search sees of it.
        """
        images = {
            pseudonym(self.key, item_id(item)): hmac.new(self.key, seen.encode(), hashlib.sha256).hexdigest()
            for item, seen in samples
        }
        return {"network": weights_digest(network.state_dict()), "search": dict(search), "images": images}

    def path(self, description: Mapping[str, Any]) -> Path:
        """The file for these labels."""
        text = json.dumps(description, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"

    def load(
        self, description: Mapping[str, Any], items: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Tensor], dict[str, Any]] | None:
        """The labels of the items in their order, and what was said of the search; None where nothing is stored.

        Raises:
            CheckpointError: when the file is damaged or holds the labels of something else.
        """
        path = self.path(description)
        if not path.is_file():
            return None
        state, metadata = read_safetensors(path)
        if metadata.get("description") != json.dumps(description, sort_keys=True):
            raise CheckpointError(f"{path} holds labels of another network, search or data; remove it and run again.")
        if metadata.get("sha256") != weights_digest(state):
            raise CheckpointError(f"{path} changed since it was written (sha256 differs); remove it and run again.")
        return [state[pseudonym(self.key, item_id(item))] for item in items], json.loads(metadata["report"])

    def save(
        self,
        description: Mapping[str, Any],
        items: Sequence[Mapping[str, Any]],
        labels: Sequence[Tensor],
        report: Mapping[str, Any],
        affines: Sequence[Tensor] = (),
    ) -> None:
        """Write the labels of the items, and what is to be said of the search.

        With the volumes' ``affines`` the most probable class of each voxel is written as NIfTI too, one file a volume
        in a folder beside the labels, for people to look at.
        """
        state = {pseudonym(self.key, item_id(item)): label.contiguous() for item, label in zip(items, labels)}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        metadata = {"description": json.dumps(description, sort_keys=True), "report": json.dumps(report),
                    "sha256": weights_digest(state)}  # fmt: skip
        write_safetensors(state, self.path(description), metadata, mode=0o600)
        for item, label, affine in zip(items, labels, affines):
            path = self.path(description).with_suffix("") / f"{pseudonym(self.key, item_id(item))}.nii.gz"
            write_volume(label.argmax(0).to(torch.uint8), affine, path, mode=0o600)
