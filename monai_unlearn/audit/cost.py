# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What a run cost: seconds, floating-point operations and image passes, by purpose."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from typing import Any


class Meter:
    """Image passes of the audit; one that only goes forward counts a third of one that trains."""

    def __init__(self, forward: float) -> None:
        self.forward, self.passes = forward, 0.0

    def count(self, cases: float, passes: float = 1.0) -> None:
        """So many cases went forward so many times; a training step is three."""
        self.passes += cases * passes

    def spent(self) -> dict[str, float]:
        """``images`` and ``flops``, as :func:`cost_table` takes them."""
        return {"images": self.passes / 3, "flops": self.passes * self.forward}


def _sum(parts: Sequence[Mapping[str, Any] | None], units: Sequence[str]) -> dict[str, Any] | None:
    """Unit by unit; None where a part is not known."""
    known = [part for part in parts if part is not None]
    return {unit: sum(part[unit] for part in known) for unit in units} if len(known) == len(parts) else None


def cost_table(phases: Mapping[str, Mapping[str, Any]], audit_cost: Mapping[str, float]) -> dict[str, Any]:
    """Seconds, floating-point operations and image passes by purpose; None where a step was not part of this run.

    ``unlearn`` is the sum of ``cache`` (teacher outputs), ``reference`` (training the teaching reference) and
    ``train`` (finding salient weights, strong phase and restoration). ``audit`` holds the scoring and the training of
    the judge. An image that only goes forward counts a third. Of the probes for a suppressed class the seconds are
    counted and nothing else.
    """
    units = ("seconds", "flops", "images")

    def of(name: str) -> Mapping[str, Any] | None:
        return phases[name] if "seconds" in phases.get(name, {}) else None  # weights that were given cost nothing here

    given = of("reference") is None

    parts: dict[str, Mapping[str, Any] | None] = {
        "cache": of("cache"),
        "reference": of("reference") or (dict.fromkeys(units, 0) if given else None),
        "train": _sum([of("unlearn"), *(of(name) for name in ("salience", "restore") if name in phases)], units),
        "retrain": of("retrain"),
    }
    judge = of("judge") or dict.fromkeys(units, 0)
    parts["unlearn"] = _sum([parts[name] for name in ("cache", "reference", "train")], units)
    parts["audit"] = {unit: audit_cost[unit] + judge[unit] for unit in units}
    table: dict[str, Any] = {}
    for name in ("cache", "reference", "train", "unlearn", "audit", "retrain"):
        for unit in units:
            part = parts[name]
            table[f"{name}_{unit}"] = None if part is None else part[unit]
    trained = phases.get("unlearn", {})
    return {
        **table,
        "references_given": given,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trainable_parameters": trained.get("trainable_parameters"),
        "total_parameters": trained.get("total_parameters"),
    }
