# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""One model out of several that started from the same weights: heads exchanged, weights mixed, changes added up.

What comes out is a model like any other and is audited like one: exchanging a head, say, makes the answers forget and
leaves the features as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]
BASE = "base"


@dataclass(frozen=True)
class Rule:
    """What becomes of the weights whose names match; exactly one of the three ways is given.

    Args:
        keys: a glob over the names of weights, such as ``class_layers.*`` or ``*``.
        take: the source they are taken from.
        mix: the share of each source; the base gets the rest: (1 − Σα)·w₀ + Σ α·w.
        add: the weight of each source's change: w₀ + Σ s·(w − w₀), task vectors; a negative one takes it back.

    Raises:
        ValueError: when not exactly one way is given.
    """

    keys: str
    take: str | None = None
    mix: Mapping[str, float] | None = None
    add: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.take, self.mix, self.add)) != 1:
            raise ValueError(f"the rule for {self.keys!r} needs exactly one of take, mix and add.")

    @property
    def weights(self) -> Mapping[str, float]:
        """What each source's difference to the base counts: the three ways are one."""
        return {self.take: 1.0} if self.take is not None else self.mix or self.add or {}


def compose_state_dicts(
    base: State, sources: Mapping[str, State], rules: Sequence[Rule], statistics: str, buffers: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Weights put together from a base and from models with the same weights.

    The first rule whose glob matches a name decides; names that none matches keep the base's value. A value that is
    taken whole is taken bit for bit.

    Args:
        base: w₀.
        sources: by name.
        rules: in order.
        statistics: where buffers (running statistics) come from: ``base`` or a source. No rule touches them, because
            statistics mixed with other weights than theirs are wrong for both.
        buffers: which names are buffers.

    Returns:
        New tensors for all names of the base.

    Raises:
        ValueError: when names, shapes or types differ, a rule matches nothing or names an unknown source, or a weight
            that is not floating-point would be mixed.
    """
    _refuse_misfits(base, sources)
    known = {BASE, *sources}
    asked = {statistics}.union(*(rule.weights for rule in rules))
    if not asked <= known:
        raise ValueError(
            f"there is no source {', '.join(sorted(asked - known))}; there are {', '.join(sorted(known))}."
        )
    hidden, models = set(buffers), {BASE: base, **sources}
    idle = [rule.keys for rule in rules if not any(fnmatchcase(name, rule.keys) for name in base if name not in hidden)]
    if idle:
        raise ValueError(f"no weight is called {', '.join(idle)}.")
    composed = {}
    for name, value in base.items():
        if name in hidden:
            composed[name] = models[statistics][name].clone()
            continue
        weights = next((rule.weights for rule in rules if fnmatchcase(name, rule.keys)), {})
        weights = {source: share for source, share in weights.items() if share != 0 and source != BASE}
        if list(weights.values()) == [1.0]:
            composed[name] = sources[next(iter(weights))][name].clone()
        elif weights and not value.is_floating_point():
            raise ValueError(f"{name} holds whole numbers, which cannot be mixed; take it from one source.")
        else:
            composed[name] = value.clone()
            for source, share in weights.items():
                composed[name] += share * (sources[source][name] - value)
    return composed


def _refuse_misfits(base: State, sources: Mapping[str, State]) -> None:
    for source, state in sources.items():
        odd = sorted(set(base) ^ set(state))
        if odd:
            raise ValueError(f"{source} and the base differ in {len(odd)} weights, such as {', '.join(odd[:3])}.")
        for name, value in base.items():
            if (value.shape, value.dtype) != (state[name].shape, state[name].dtype):
                raise ValueError(
                    f"{name} is {tuple(value.shape)} {value.dtype} in the base and {tuple(state[name].shape)} "
                    f"{state[name].dtype} in {source}."
                )


@torch.no_grad()
def compose_networks(
    base: nn.Module,
    sources: Mapping[str, nn.Module],
    rules: Sequence[Rule | Mapping[str, object]],
    statistics: str,
    image: Tensor | None = None,
) -> nn.Module:
    """A network put together by :func:`compose_state_dicts`, frozen and in eval mode.

    Args:
        base: plain network; left as it is, like the sources.
        sources: networks of the same kind, by name.
        rules: in order; mappings are made rules.
        statistics: where running statistics come from: ``base`` or a source.
        image: a batch that shows whether the result differs from the base.

    Raises:
        ValueError: as :func:`compose_state_dicts`; or when the result says of ``image`` exactly what the base says.
    """
    composed = copy.deepcopy(base).eval().requires_grad_(False)
    made = [rule if isinstance(rule, Rule) else Rule(**rule) for rule in rules]  # type: ignore[arg-type]
    states = {name: network.state_dict() for name, network in sources.items()}
    buffers = [name for name, _ in base.named_buffers()]
    composed.load_state_dict(compose_state_dicts(base.state_dict(), states, made, statistics, buffers))
    if image is not None:
        plain = copy.deepcopy(base).eval()
        if torch.equal(composed(image), plain(image)):
            raise ValueError("the composed network says exactly what the base says; its rules change nothing.")
    return composed
