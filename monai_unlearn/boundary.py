# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Towards the class across the decision boundary: walk from a sample until the model changes its mind.

Boundary unlearning with perturbed sign gradients (arXiv 2505.21872). The original model is searched once and never
trained; what is trained on afterwards is the clean sample with its new label.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ASCENTS = ("margin", "cross_entropy")
NOISES = ("normal", "uniform", "laplace", "cauchy")
# How a sample came to its label: within ε; within a larger ε; the runner-up of the clean sample; no label, left out of
# the forget loss; and a sample that the model takes for another class already.
ROUTES = ("crossed", "grown", "runner_up", "dropped", "misclassified")
LEFT_OUT = -1.0  # fills the label of a sample that no forget loss is to read
Channels = float | tuple[float, ...]


class Bounds(NamedTuple):
    """Where a search may go, each broadcasting against an image ``(B, C, *spatial)``.

    Attributes:
        low: the smallest input.
        high: the largest input.
        unit: what one unit of ε is worth in the input; 0 where the input must stay as it is.
    """

    low: Tensor
    high: Tensor
    unit: Tensor


@dataclass(frozen=True)
class InputDomain:
    """What a network's input means: which values there are, and how large a unit of intensity is.

    The input is (v − mean) / std for an intensity v in [low, high]; ε and steps are in units of v. With ``quantiles``
    the values of a sample itself set its limits instead, and the unit is its standard deviation in each channel.

    Args:
        mean: subtracted from the intensity, one number or one for each channel.
        std: divides it, likewise; positive.
        low: smallest intensity.
        high: largest intensity.
        quantiles: the lower and the upper one of a sample's own values, such as (.005, .995).
        nonzero: with ``quantiles``, look at voxels that are not 0 only, and never change the others.

    Raises:
        ValueError: when a std is not positive, low is not below high, or the quantiles are not in order; in use, when
            the number of channels does not fit.

    Example:
        >>> InputDomain.normalised((0.5,), (0.5,)).bounds(torch.zeros(1, 1, 2, 2)).low.min().item()
        -1.0
    """

    mean: Channels = 0.0
    std: Channels = 1.0
    low: float = 0.0
    high: float = 1.0
    quantiles: tuple[float, float] | None = None
    nonzero: bool = False

    def __post_init__(self) -> None:
        if min(_numbers(self.std)) <= 0 or not self.low < self.high:
            raise ValueError(f"std must be positive and low below high, got {self.std}, {self.low} and {self.high}.")
        if self.quantiles is not None and not 0 <= self.quantiles[0] < self.quantiles[1] <= 1:
            raise ValueError(f"quantiles must be in order within [0, 1], got {self.quantiles}.")

    @classmethod
    def unit(cls) -> InputDomain:
        """Intensities in [0, 1], as they are."""
        return cls()

    @classmethod
    def normalised(cls, mean: Sequence[float], std: Sequence[float]) -> InputDomain:
        """Intensities in [0, 1], normalised in each channel; ImageNet's numbers are the best-known."""
        return cls(tuple(mean), tuple(std))

    @classmethod
    def window(cls, low: float, high: float) -> InputDomain:
        """A CT window in Hounsfield units, scaled to [0, 1]; ε is in Hounsfield units."""
        return cls(low, high - low, low, high)

    @classmethod
    def sample(cls, quantiles: tuple[float, float] = (0.005, 0.995), nonzero: bool = True) -> InputDomain:
        """No intensity means the same in two samples (MR): limits and unit come from each sample; ε is in its σ."""
        return cls(low=-math.inf, high=math.inf, quantiles=quantiles, nonzero=nonzero)

    @classmethod
    def unbounded(cls) -> InputDomain:
        """Any input, in its own units."""
        return cls(low=-math.inf, high=math.inf)

    @property
    def default_epsilon(self) -> float:
        """A tenth of the range; half a unit (a σ, where samples set their own limits) without one."""
        span = self.high - self.low
        return 0.1 * span if math.isfinite(span) else 0.5

    def bounds(self, image: Tensor) -> Bounds:
        """The limits for these samples. An input that lies beyond a limit may stay where it is."""
        shape = (1, -1) + (1,) * (image.ndim - 2)

        def spread(values: Channels) -> Tensor:
            numbers = image.new_tensor(_numbers(values))
            if len(numbers) not in (1, image.shape[1]):
                raise ValueError(f"the domain has {len(numbers)} channels and the image {image.shape[1]}.")
            return numbers.view(shape)

        if self.quantiles is None:
            mean, std = spread(self.mean), spread(self.std)
            low, high, unit = (self.low - mean) / std, (self.high - mean) / std, 1 / std
        else:
            facts = np.zeros((3, image.shape[0] * image.shape[1]), np.float32)
            for place, values in enumerate(image.flatten(2).flatten(0, 1).cpu().numpy()):
                values = values[values != 0] if self.nonzero else values
                if len(values):  # torch's quantile takes no more than 16 million values
                    facts[:, place] = *np.quantile(values, self.quantiles), values.std()
            low, high, unit = torch.from_numpy(facts).to(image).view(3, *image.shape[:2], *shape[2:])
            unit = unit * (image != 0) if self.nonzero else unit
        return Bounds(torch.minimum(low, image), torch.maximum(high, image), unit)


def _numbers(values: Channels) -> tuple[float, ...]:
    return values if isinstance(values, tuple) else (values,)


class Crossings(NamedTuple):
    """What a search found, a row for each sample.

    Attributes:
        label: the class across the boundary ``(B,)``, never the own one; −1 where the sample is left out.
        route: index into ``ROUTES`` ``(B,)``.
        steps: that were made ``(B,)``.
        distance: ‖δ‖∞ in units of intensity ``(B,)``.
        logits: of the model at the label's point ``(B, K)``: where it crossed, else the clean sample.
        point: that point ``(B, C, *spatial)``.
    """

    label: Tensor
    route: Tensor
    steps: Tensor
    distance: Tensor
    logits: Tensor
    point: Tensor


class DenseCrossings(NamedTuple):
    """What a search found for every voxel of a region.

    Attributes:
        label: the class across the boundary ``(B, *spatial)``, never the own one; −1 outside the region.
        steps: after which the voxel changed; 0 where it was another class already, one more than were made for its
            image where it never did, −1 outside the region.
        crossed: the share of each region that changed ``(B,)``; 1 for an empty region.
    """

    label: Tensor
    steps: Tensor
    crossed: Tensor


class PerturbedSignGradient:
    """Walk from a sample until the model names another class: x ← x + η·sign(ĝ − λ·δ/ε + γ·z), within ‖δ‖∞ ≤ ε.

    ĝ is the gradient of what is ascended, for each sample by itself and divided by its largest entry, so γ is relative
    to it and nothing depends on the batch; z is noise fixed by (seed, sample, step). A sample stops as soon as it has
    crossed. One that has not after the ⌈ε/η⌉ steps that use ε up gets twice the ε at once, up to ``epsilon_max``; then
    it takes the runner-up of the clean sample, or is left out. It never gets its own class back.

    Follows the search of arXiv 2505.21872 with the sign of its closeness term and the scale of its noise put right; one
    step of size ε without noise is Boundary Shrink's (:meth:`boundary_shrink`). Gradients go to the input only; the
    network's weights, buffers, gradients and modes are as before, and no global random state is used.

    Args:
        network: the model to search, gives logits ``(B, K)``, or ``(B, K, *spatial)`` for :meth:`dense`; one channel
            counts as background and foreground there. Searched in eval mode, in float32.
        domain: what its input means.
        epsilon: ε in the domain's units; by default a tenth of its range, or half a σ.
        epsilon_max: the largest ε, by default 4ε; ε itself switches growing off.
        step: η, by default ε/8.
        max_steps: at one ε; 0 makes every sample take its runner-up.
        ascent: ``margin``, max over other classes of z_c − z_y, which is 0 at the boundary; or ``cross_entropy`` of the
            own class.
        noise: γ.
        noise_kind: ``normal``, ``uniform`` in [−1, 1], ``laplace`` or ``cauchy``.
        closeness: λ, pulls back towards the sample.
        targets: the only classes a sample may go to; None allows all.
        misclassified: for a sample that the model takes for another class: ``keep`` that class, ``drop`` the sample, or
            ``search`` for a third class.
        residue: for a sample that does not cross: ``runner_up`` or ``drop``.
        bisection: halvings of the last step, to lie closer to the boundary.
        fraction: for :meth:`dense`, the share of a region that has to cross.
        seed: of the noise.
        batch_size: samples at a time; those that have crossed make room for others.

    Attributes:
        forwards: samples that went through the network since it was made.
        backwards: samples for which a gradient was computed.

    Raises:
        ValueError: on unknown names, an ε, step or fraction out of range; in use, when a class is out of range or a
            sample has no class to go to.
    """

    def __init__(
        self,
        network: nn.Module,
        domain: InputDomain | None = None,
        epsilon: float | None = None,
        epsilon_max: float | None = None,
        step: float | None = None,
        max_steps: int = 16,
        ascent: str = "margin",
        noise: float = 0.05,
        noise_kind: str = "normal",
        closeness: float = 0.0,
        targets: Sequence[int] | None = None,
        misclassified: str = "keep",
        residue: str = "runner_up",
        bisection: int = 0,
        fraction: float = 0.9,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        for name, value, known in (
            ("ascent", ascent, ASCENTS),
            ("noise_kind", noise_kind, NOISES),
            ("misclassified", misclassified, ("keep", "drop", "search")),
            ("residue", residue, ("runner_up", "drop")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}.")
        self.network, self.domain = network, domain or InputDomain.unit()
        self.epsilon = self.domain.default_epsilon if epsilon is None else float(epsilon)
        self.epsilon_max = 4 * self.epsilon if epsilon_max is None else float(epsilon_max)
        self.step = self.epsilon / 8 if step is None else float(step)
        if not 0 < self.epsilon <= self.epsilon_max or self.step <= 0 or not 0 < fraction <= 1:
            raise ValueError(
                f"0 < epsilon <= epsilon_max, step > 0 and 0 < fraction <= 1 are needed, got {self.epsilon}, "
                f"{self.epsilon_max}, {self.step} and {fraction}."
            )
        if min(max_steps, noise, closeness, bisection) < 0 or batch_size < 1:
            raise ValueError(
                "max_steps, noise, closeness and bisection must not be negative and batch_size positive, got "
                f"{max_steps}, {noise}, {closeness}, {bisection} and {batch_size}."
            )
        self.max_steps, self.ascent, self.noise, self.noise_kind = max_steps, ascent, noise, noise_kind
        self.closeness, self.targets, self.misclassified, self.residue = closeness, targets, misclassified, residue
        self.bisection, self.fraction, self.seed, self.batch_size = bisection, fraction, seed, batch_size
        self.forwards = self.backwards = 0

    @classmethod
    def boundary_shrink(
        cls, network: nn.Module, domain: InputDomain | None = None, epsilon: float | None = None, **options: Any
    ) -> PerturbedSignGradient:
        """One step of size ε along the sign of the cross-entropy's gradient: Boundary Shrink's search (CVPR 2023)."""
        search = cls(network, domain, epsilon, **options)
        search.epsilon_max = search.step = search.epsilon
        search.max_steps, search.ascent, search.noise, search.closeness = 1, "cross_entropy", 0.0, 0.0
        return search

    def describe(self) -> dict[str, Any]:
        """Everything that decides its labels beside the network and the samples, ready for JSON."""
        named = ("epsilon", "epsilon_max", "step", "max_steps", "ascent", "noise", "noise_kind", "closeness",
                 "misclassified", "residue", "bisection", "fraction", "seed")  # fmt: skip
        targets = None if self.targets is None else list(self.targets)
        return {"domain": repr(self.domain), "targets": targets, **{name: getattr(self, name) for name in named}}

    def __call__(self, image: Tensor, label: Tensor, ids: Sequence[str] | None = None) -> Crossings:
        """Search from each sample.

        Args:
            image: ``(B, C, *spatial)``.
            label: class probabilities ``(B, K)``; the most probable class is the own one.
            ids: what fixes each sample's noise; by default its content.
        """
        image = image.detach().float()
        own = label.to(image.device).argmax(1)
        allowed = self._allowed(own, label.shape[1], torch.ones_like(own, dtype=torch.bool))
        walk = _Walk(self, image, ids)
        new, source, route = own.clone(), own.clone(), torch.full_like(own, ROUTES.index("runner_up"))
        logits = image.new_zeros(len(image), label.shape[1])  # of the clean sample until it crosses
        queue = torch.arange(len(image), device=image.device)
        rows = queue[:0]
        with searching(self.network):
            while len(rows) or len(queue):
                room = self.batch_size - len(rows)
                rows, queue = torch.cat([rows, queue[:room]]), queue[room:]
                point = walk.at[rows].requires_grad_()
                said = self._logits(point, label.shape[1])
                seen, start = said.detach(), walk.steps[rows] == 0
                logits[rows[start]] = seen[start]
                named = _named(seen, allowed[rows], source[rows])
                crossed = named != source[rows]
                if self.misclassified == "search" and (wrong := crossed & start).any():
                    source[rows[wrong]] = named[wrong]
                    allowed[rows[wrong], named[wrong]] = False
                    crossed &= ~wrong
                hit = rows[crossed]
                new[hit], logits[hit], route[hit] = named[crossed], seen[crossed], walk.routes(hit)
                going = ~(crossed | walk.spent(rows)) & allowed[rows].any(1)
                if going.any():
                    climb = self._climb(said[going], source[rows[going]], allowed[rows[going]])
                    gradient = torch.autograd.grad(climb.sum(), point)[0][going]
                    self.backwards += len(rows)
                    walk.advance(rows[going], gradient)
                rows = rows[going]
            if self.bisection and (across := (route <= 1) & (walk.steps > 0)).any():
                self._bisect(walk, across, source, allowed, new, logits)
        stayed = route == ROUTES.index("runner_up")
        walk.at[stayed] = image[stayed]
        new[stayed] = logits.masked_fill(~allowed, -torch.inf).argmax(1)[stayed]
        wrong = route == ROUTES.index("misclassified")
        out = ~allowed.any(1) | (stayed & (self.residue == "drop")) | (wrong & (self.misclassified == "drop"))
        new[out], route[out] = -1, ROUTES.index("dropped")
        return Crossings(new, route, walk.steps, walk.distance(), logits, walk.at)

    def _bisect(
        self, walk: _Walk, crossed: Tensor, source: Tensor, allowed: Tensor, new: Tensor, logits: Tensor
    ) -> None:
        """Halve the last step of those that crossed; the far end stays across the boundary."""
        for rows in crossed.nonzero().flatten().split(self.batch_size):
            for _ in range(self.bisection):
                middle = (walk.before[rows] + walk.at[rows]) / 2
                with torch.no_grad():
                    seen = self._logits(middle, logits.shape[1])
                named = _named(seen, allowed[rows], source[rows])
                far = named != source[rows]
                walk.at[rows[far]], walk.before[rows[~far]] = middle[far], middle[~far]
                new[rows[far]], logits[rows[far]] = named[far], seen[far]

    def dense(self, image: Tensor, own: Tensor, region: Tensor, ids: Sequence[str] | None = None) -> DenseCrossings:
        """Search from each image for all voxels of a region at once, until ``fraction`` of them has crossed.

        Each image has one δ. The voxels that have not crossed yet pull it, each alike; a voxel keeps the class it
        first changed to. Those that never change take the runner-up of the clean image.

        Args:
            image: ``(B, C, *spatial)``.
            own: the class of each voxel ``(B, *spatial)``.
            region: where to search, boolean ``(B, *spatial)``; images without a voxel are left out of the search.
            ids: what fixes each image's noise; by default its content.
        """
        image = image.detach().float()
        region = region.to(image.device).bool()
        own = torch.where(region, own.to(image.device).long(), 0)  # elsewhere it may hold anything, such as 255
        walk = _Walk(self, image, ids)
        new, steps = torch.where(region, own, -1), torch.full_like(own, -1)
        share = torch.ones(len(image), device=image.device)
        live = region.clone()
        rows = region.flatten(1).any(1).nonzero().flatten()
        runner_up = torch.empty_like(own)
        allowed = None
        with searching(self.network):
            queue, rows = rows, rows[:0]
            while len(rows) or len(queue):
                room = self.batch_size - len(rows)
                rows, queue = torch.cat([rows, queue[:room]]), queue[room:]
                point = walk.at[rows].requires_grad_()
                said = _two_channels(self._logits(point))
                seen, start = said.detach(), walk.steps[rows] == 0
                if allowed is None:  # the number of classes is known from here on
                    allowed = self._allowed(own, said.shape[1], region)
                runner_up[rows[start]] = seen[start].masked_fill(~allowed[rows[start]], -torch.inf).argmax(1)
                named = _named(seen, allowed[rows], own[rows])
                crossed = live[rows] & (named != own[rows])
                new[rows] = torch.where(crossed, named, new[rows])
                made = walk.steps[rows].view(-1, *[1] * (own.ndim - 1)).expand_as(crossed)
                steps[rows] = torch.where(crossed, made, steps[rows])
                live[rows] &= ~crossed
                share[rows] = 1 - live[rows].flatten(1).sum(1) / region[rows].flatten(1).sum(1)
                going = ~((share[rows] >= self.fraction) | walk.spent(rows))
                if going.any():
                    climb = self._climb(said[going], own[rows[going]], allowed[rows[going]])
                    weight = live[rows[going]] / live[rows[going]].flatten(1).sum(1).view(-1, *[1] * (own.ndim - 1))
                    gradient = torch.autograd.grad((climb * weight).sum(), point)[0][going]
                    self.backwards += len(rows)
                    walk.advance(rows[going], gradient)
                rows = rows[going]
        never = walk.steps.view(-1, *[1] * (own.ndim - 1)).expand_as(own) + 1
        return DenseCrossings(torch.where(live, runner_up, new), torch.where(live, never, steps), share)

    def _allowed(self, own: Tensor, number: int, region: Tensor) -> Tensor:
        """The classes that a sample or voxel may go to, boolean, classes in dimension 1; checked within the region."""
        chosen = range(number) if self.targets is None else self.targets
        if not set(chosen) <= set(range(number)) or own.min() < 0 or own.max() >= number:
            raise ValueError(f"own classes and targets must lie in [0, {number}); targets are {self.targets}.")
        classes = torch.arange(number, device=own.device).view(1, number, *[1] * (own.ndim - 1))
        may = torch.isin(classes, torch.tensor(list(chosen), device=own.device)) & (classes != own.unsqueeze(1))
        if not may.any(1)[region].all():
            raise ValueError(f"with the targets {self.targets} some samples have no class to go to but their own.")
        return may

    def _climb(self, said: Tensor, source: Tensor, allowed: Tensor) -> Tensor:
        """What is ascended, for each sample or voxel."""
        if self.ascent == "cross_entropy":
            return F.cross_entropy(said, source, reduction="none")
        other = said.masked_fill(~allowed, -torch.inf).amax(1)
        return other - said.gather(1, source.unsqueeze(1)).squeeze(1)

    def _logits(self, point: Tensor, number: int | None = None) -> Tensor:
        self.forwards += len(point)
        output = self.network(point)
        output = output[0] if isinstance(output, (list, tuple)) else output
        if number is not None and output.shape[1:] != (number,):
            raise ValueError(f"the network's output {tuple(output.shape)} and {number} classes do not go together.")
        return output


class _Walk:
    """Where each sample of a search stands, its ε, and how many steps it has made."""

    def __init__(self, search: PerturbedSignGradient, image: Tensor, ids: Sequence[str] | None) -> None:
        self.search, self.image = search, image
        self.bounds = Bounds(*(one.expand_as(image) for one in search.domain.bounds(image)))
        self.ids = ids if ids is not None or not search.noise else [content_id(one) for one in image]
        self.at = image.clone()
        self.before = image[: len(image) if search.bisection else 0].clone()  # the last step
        self.steps = torch.zeros(len(image), dtype=torch.long, device=image.device)
        self.made = self.steps.clone()  # at the present ε
        self.radius = image.new_full((len(image),), search.epsilon)
        self.used = torch.zeros_like(self.radius)  # the ε that was used up before

    def routes(self, rows: Tensor) -> Tensor:
        """How samples that have just crossed did so."""
        grown = (self.radius[rows] > self.search.epsilon).long()
        return torch.where(self.steps[rows] == 0, ROUTES.index("misclassified"), grown)

    def spent(self, rows: Tensor) -> Tensor:
        """Which samples have no step left; those that may get a larger ε are given it."""
        most = self.search.max_steps
        if most == 0:
            return torch.ones_like(rows, dtype=torch.bool)
        limit = torch.ceil((self.radius[rows] - self.used[rows]) / self.search.step - 1e-4).clamp(max=most)
        last = self.radius[rows] >= self.search.epsilon_max
        done = self.made[rows] >= torch.where(last, most, limit)
        growing = rows[done & ~last]
        self.used[growing], self.made[growing] = self.radius[growing], 0
        self.radius[growing] = (2 * self.radius[growing]).clamp(max=self.search.epsilon_max)
        return done & last

    def advance(self, rows: Tensor, gradient: Tensor) -> None:
        """One step of each sample along the sign of its own gradient."""
        search, shape = self.search, (-1,) + (1,) * (self.image.ndim - 1)
        low, high, unit = (one[rows] for one in self.bounds)
        largest = gradient.flatten(1).abs().amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        image, at, direction = self.image[rows], self.at[rows], gradient / largest.view(shape)
        if search.closeness:
            direction = direction - search.closeness * (at - image) / (search.epsilon * unit).clamp_min(1e-12)
        if search.noise:
            direction = direction + search.noise * self._noise(rows)
        if search.bisection:
            self.before[rows] = at
        reach = self.radius[rows].view(shape) * unit
        delta = torch.clamp(at - image + search.step * unit * direction.sign(), -reach, reach)
        self.at[rows] = torch.clamp(image + delta, low, high)
        self.steps[rows] += 1
        self.made[rows] += 1

    def _noise(self, rows: Tensor) -> Tensor:
        """Drawn for each sample by itself, on the processor, so that every device and batch sees the same."""
        assert self.ids is not None
        draws = []
        for row, step in zip(rows.tolist(), self.steps[rows].tolist()):
            digest = hashlib.sha256(f"{self.search.seed}:{self.ids[row]}:{step}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            draws.append(draw_noise(self.search.noise_kind, self.image.shape[1:], generator))
        return torch.stack(draws).to(self.image)

    def distance(self) -> Tensor:
        """‖δ‖∞ in units of intensity."""
        unit = self.bounds.unit
        delta = (self.at - self.image).abs()
        return torch.where(unit > 0, delta / unit.clamp_min(1e-12), 0).flatten(1).amax(1)


def draw_noise(kind: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Noise of scale 1: ``normal``, ``uniform`` in [−1, 1], ``laplace`` or ``cauchy``."""
    if kind == "normal":
        return torch.randn(tuple(shape), generator=generator)
    if kind == "cauchy":
        return torch.empty(tuple(shape)).cauchy_(generator=generator)
    centred = 2 * torch.rand(tuple(shape), generator=generator) - 1
    if kind == "uniform":
        return centred
    return -centred.sign() * torch.log1p(-centred.abs())


def content_id(image: Tensor) -> str:
    """sha256 of a sample's values."""
    return hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _named(said: Tensor, allowed: Tensor, source: Tensor) -> Tensor:
    """The class with the largest logit, of the allowed ones and the one the sample comes from."""
    own = torch.zeros_like(allowed).scatter_(1, source.unsqueeze(1), True)
    return said.masked_fill(~(allowed | own), -torch.inf).argmax(1)


def _two_channels(foreground: Tensor, background: Tensor | None = None) -> Tensor:
    """Background and foreground of one channel: a logit, whose background is 0, or a mask with its background."""
    if foreground.shape[1] > 1:
        return foreground
    return torch.cat([torch.zeros_like(foreground) if background is None else background, foreground], 1)


@contextmanager
def searching(network: nn.Module) -> Iterator[None]:
    """Eval mode, gradients for the input alone and float32, also within ``no_grad`` or autocast; all is put back."""
    modes = [(module, module.training) for module in network.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    kind = wanted[0][0].device.type if wanted else "cpu"
    try:
        network.eval().requires_grad_(False)
        with torch.enable_grad(), torch.autocast(kind, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


class BoundaryRelabel:
    """The class across the decision boundary, as label of a sample to forget.

    Args:
        search: finds it in the original model.
        soft: give the original's probabilities at the point across the boundary, its own class left out, in place of
            the one class.
        temperature: T of the soft label.
        least_crossed: a smaller share of samples that crossed is warned about.

    Attributes:
        batch_size: samples it is best given at a time: ten batches of the search, which it keeps full.

    Raises:
        ValueError: when T is not positive.
    """

    def __init__(
        self, search: PerturbedSignGradient, soft: bool = False, temperature: float = 2.0, least_crossed: float = 0.8
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.search, self.soft, self.temperature, self.least_crossed = search, soft, temperature, least_crossed
        self.batch_size = 10 * search.batch_size
        self.routes: Counter[str] = Counter()
        self.destinations: Counter[int] = Counter()
        self.steps = self.distance = 0.0

    def __call__(self, image: Tensor, label: Tensor) -> Tensor:
        found = self.search(image, label)
        kept = found.label >= 0
        if self.soft:
            own = torch.zeros_like(label, dtype=torch.bool).scatter_(1, label.argmax(1, keepdim=True), True)
            if self.search.targets is not None:
                own[:, [c for c in range(label.shape[1]) if c not in self.search.targets]] = True
            new = (found.logits.masked_fill(own, -torch.inf) / self.temperature).softmax(1)
        else:
            new = F.one_hot(found.label.clamp_min(0), label.shape[1])
        new = new.to(label)
        new[~kept] = LEFT_OUT
        self.routes.update(ROUTES[route] for route in found.route.tolist())
        self.destinations.update(found.label[kept].tolist())
        self.steps += float(found.steps.sum())
        self.distance += float(found.distance[found.route <= 1].sum())
        return new

    def describe(self) -> dict[str, Any]:
        """Everything that decides its labels beside the network and the samples, ready for JSON."""
        return {"soft": self.soft, "temperature": self.temperature, **self.search.describe()}

    def report(self) -> dict[str, Any]:
        """What became of the samples so far: how many took which route and went to which class, the mean steps of all
        and the mean distance of those that crossed, and how often a sample went through the network, either way."""
        number, crossed = sum(self.routes.values()), self.routes["crossed"] + self.routes["grown"]
        searched = number - self.routes["misclassified"]
        if searched and crossed < self.least_crossed * searched:
            logger.warning("only %d of %d samples crossed the boundary; raise epsilon or max_steps.", crossed, searched)
        return {
            "routes": {route: self.routes[route] for route in ROUTES},
            "destinations": {str(c): count for c, count in sorted(self.destinations.items())},
            "mean_steps": self.steps / number if number else None,
            "mean_distance": self.distance / crossed if crossed else None,
            "passes": self.search.forwards + self.search.backwards,
        }


class LegacyBoundary:
    """The search as the authors of arXiv 2505.21872 released it, for comparison only.

    One step of ε on the 8-bit picture from the gradient of the batch's mean cross-entropy; the noise is not scaled to
    it, the closeness term compares the normalised with the unnormalised picture, and a sample that does not cross is
    taught its own class again. Depends on the batch, and draws its noise from torch's random state.

    Args:
        network: the original.
        mean: of the normalisation that the input is taken to have.
        std: likewise.
        epsilon: of intensities in [0, 1].
        noise: γ.
        closeness: λ.
    """

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], epsilon: float = 0.1,
        noise: float = 1e-4, closeness: float = 0.0,
    ) -> None:  # fmt: skip
        self.network, self.epsilon, self.noise, self.closeness = network, epsilon, noise, closeness
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, image: Tensor, label: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (image.ndim - 2)
        mean, std = (image.new_tensor(one).view(shape) for one in (self.mean, self.std))
        with searching(self.network):
            normalised = image.detach().clone().requires_grad_()
            loss = F.cross_entropy(self.network(normalised), label.argmax(1))
            gradient = torch.autograd.grad(loss, normalised)[0]
            picture = image * std + mean
            noise = self.noise * torch.randn_like(image)
            direction = (gradient + self.closeness * (image - picture) + noise).sign()
            moved = (picture + self.epsilon * direction).clamp(0, 1)
            with torch.no_grad():
                said = self.network(((moved * 255).round() / 255 - mean) / std)
        return F.one_hot(said.argmax(1), label.shape[1]).to(label)


class DenseBoundaryRelabel:
    """What stands across the boundary for the voxels to forget, and the original without the class everywhere else.

    Args:
        search: in the original model.
        classes: the classes to forget; their voxels are the region. One channel has class 1 alone.
        fill: what the region gets: ``boundary``, or for comparison ``background`` or a ``random`` other class for each
            voxel, drawn from the image's content.
        majority: side of a cube in which the most frequent label of the region's voxels wins, odd; 1 keeps each
            voxel's own.

    Raises:
        ValueError: on an unknown fill, or a side that is even or not positive; in use, when a class is out of range.
    """

    def __init__(
        self, search: PerturbedSignGradient, classes: Sequence[int], fill: str = "boundary", majority: int = 1
    ) -> None:
        if fill not in ("boundary", "background", "random"):
            raise ValueError(f"fill must be boundary, background or random, got {fill!r}.")
        if majority < 1 or majority % 2 == 0:
            raise ValueError(f"majority must be odd and positive, got {majority}.")
        self.search, self.classes, self.fill = search, [int(one) for one in classes], fill
        self.majority = majority
        self.batch_size = search.batch_size
        self.images, self.crossed = 0, 0.0
        self.destinations: Counter[int] = Counter()

    def __call__(self, image: Tensor, label: Tensor) -> Tensor:
        number = max(2, label.shape[1])
        own = _two_channels(label, 1 - label).argmax(1)
        region = torch.isin(own, torch.tensor(self.classes, device=own.device))
        across = F.one_hot(self._across(image, own, region, number), number).movedim(-1, 1).to(label)
        across = across * region.unsqueeze(1)
        if self.majority > 1:
            pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[image.ndim - 2]
            votes = pool(across, self.majority, stride=1, padding=self.majority // 2)
            votes[:, self.classes] = -1
            across = F.one_hot(votes.argmax(1), number).movedim(-1, 1).to(label) * region.unsqueeze(1)
        with searching(self.search.network), torch.no_grad():
            said = _two_channels(self.search._logits(image.float()))
        said[:, self.classes] = -torch.inf
        new = torch.where(region.unsqueeze(1), across, said.softmax(1).to(label))
        self.destinations.update(across.argmax(1)[region].tolist())
        return new if label.shape[1] > 1 else new[:, 1:]

    def _across(self, image: Tensor, own: Tensor, region: Tensor, number: int) -> Tensor:
        """The class each voxel of the region goes to."""
        self.images += len(image)
        if self.fill == "boundary":
            found = self.search.dense(image, own, region)
            self.crossed += float(found.crossed.sum())
            return found.label.clamp_min(0)
        if self.fill == "background":
            return torch.zeros_like(own)
        allowed = torch.tensor([c for c in range(number) if c not in self.classes])
        draws = []
        for one in image:
            seed = int(content_id(one)[:14], 16) + self.search.seed
            drawn = torch.randint(len(allowed), own.shape[1:], generator=torch.Generator().manual_seed(seed))
            draws.append(allowed[drawn])
        return torch.stack(draws).to(own)

    def describe(self) -> dict[str, Any]:
        """Everything that decides its labels beside the network and the samples, ready for JSON."""
        return {"classes": self.classes, "fill": self.fill, "majority": self.majority, **self.search.describe()}

    def report(self) -> dict[str, Any]:
        """What became of the voxels so far: the mean share that crossed, and how many went to which class."""
        searched = self.images and self.fill == "boundary"
        return {
            "mean_crossed": self.crossed / self.images if searched else None,
            "destinations": {str(c): count for c, count in sorted(self.destinations.items())},
            "passes": self.search.forwards + self.search.backwards,
        }


class BoundaryMargin:
    """How far each voxel of a binary mask is from becoming background, for weighting the loss that forgets it.

    Steps to cross divided by the most that any voxel of the image took, in [0, 1], ``(B, 1, *spatial)``; a voxel that
    never crossed counts one step more than were made, and ``outside`` stands outside the mask. The search never moves
    the background: it ascends over the mask alone.

    Args:
        search: in the original model, whose output has one channel.
        outside: weight of the voxels outside the mask.

    Raises:
        ValueError: when ``outside`` is negative.
    """

    def __init__(self, search: PerturbedSignGradient, outside: float = 0.0) -> None:
        if outside < 0:
            raise ValueError(f"outside must not be negative, got {outside}.")
        self.search, self.outside, self.batch_size = search, outside, search.batch_size

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        region = mask[:, 0] > 0.5
        steps = self.search.dense(image, region.long(), region).steps.clamp_min(0).to(image)
        most = steps.flatten(1).amax(1).clamp_min(1).view(-1, *[1] * (steps.ndim - 1))
        return torch.where(region, steps / most, self.outside).unsqueeze(1)

    def report(self) -> dict[str, Any]:
        """How often a sample went through the network, either way."""
        return {"passes": self.search.forwards + self.search.backwards}
