# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""A small search for settings of a method, whose goal is the model that never saw the data and not the lowest score.

Every trial unlearns anew and is judged by how far its forget score lies from the one expected of an unseen case, and by
its loss on unseen cases that were set apart for this and that no audit sees again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .audit.reference import References
from .audit.scores import Inferer, main_score, score_cases
from .bundle import content, expected_score, fingerprint, plain_errors, running_parser, variant
from .checkpoint import write_json
from .data import MemoryDataset
from .engines import load_phase, run_phase
from .request import RequestError, Resolution

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)


@plain_errors
def tune(
    config_id: str,
    space: Mapping[str, Sequence[Any]],
    resolution: Resolution,
    transform: Callable[[Any], Any],
    original: nn.Module,
    reference: nn.Module | References,
    factory: Callable[[], nn.Module],
    output_dir: str | Path,
    trials: int = 8,
    seed: int = 0,
    store: dict[Any, Any] | None = None,
    device: str | torch.device = "cpu",
    inferer: Inferer | None = None,
    shared: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Search settings of an unlearning phase of the running configuration; the first trial has the present ones.

    The objective is |forget score - expected| + the mean loss on the cases set apart (nats), to be small. Trials are
    drawn by optuna's tree-structured Parzen estimator. A stopped search goes on where it was: finished trials are
    replayed from ``tuning.json``. The weights of a trial are removed once it has been judged.

    Args:
        config_id: of the trainer, such as ``unlearn_phase#trainer``.
        space: by key of the configuration the smallest and the largest multiple of its present value, such as
            ``[0.1, 10]``; multiples are drawn on a log scale, whole numbers stay whole and at least 1.
        resolution: who is forgotten, and who is set apart (``tuning``).
        transform: deterministic preprocessing.
        original: frozen.
        reference: what says which forget score to come close to; the models that teach, so that the audit's judge has
            had no part in the search.
        factory: makes a plain network.
        output_dir: ``tuning.json`` is written here.
        trials: how many; the same for every method that is to be compared.
        seed: of the search.
        store: of decoded items, shared with the run.
        device: where to compute.
        inferer: such as MONAI's ``SlidingWindowInferer``; None calls the network.
        shared: what does not differ between trials and is computed once, by its id in the configuration.

    Returns:
        What ``tuning.json`` holds: ``objective`` in words, ``expected``, ``trials`` (each with ``settings``,
        ``forget``, ``unseen_loss``, ``objective``, ``seconds``, ``flops``), ``best`` (one of them), and ``options`` for
        the command line.

    Raises:
        RequestError: for a suppressed class, without cases set apart, on a setting that the configuration lacks or a
            range that is none, or where optuna is not installed.
    """
    if resolution.request.job == "suppression":
        raise RequestError("tuning needs a score to come close to, which a suppressed class does not have.")
    if not resolution.tuning:
        raise RequestError(
            "tuning needs unseen cases that the audit does not see again: --tuning_share 0.3 sets three tenths of the "
            "unseen groups apart. Give the same share to the run with the settings found."
        )
    if trials < 1:
        raise RequestError(f"tuning_trials must be at least 1, got {trials}.")
    splits = resolution.splits
    forget, unseen, apart = (
        MemoryDataset(items, transform, store)
        for items in (splits["forget"], splits[resolution.unseen_other], resolution.tuning)
    )
    start = {key: _present(key) for key in space}
    study = _study(seed)
    ranges = {key: _multiples(key, bounds) for key, bounds in space.items()}
    study.enqueue_trial(dict.fromkeys(space, 1.0))
    expected, _ = expected_score(original, reference, forget, unseen, device=device, inferer=inferer)
    identity = [fingerprint(config_id), dict(space), start, seed, expected, resolution.digest, apart.digest()]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    path, weights = Path(output_dir) / "tuning.json", Path(output_dir) / "private" / "tuning" / "models" / "trial.pt"
    finished, rows = _finished(path, key), []
    for number in range(trials):
        trial = study.ask(ranges)
        settings = {name: _times(start[name], multiple) for name, multiple in trial.params.items()}
        if number < len(finished) and finished[number]["settings"] == settings:
            row = finished[number]
        else:
            named = ", ".join(f"{name} {value:.4g}" for name, value in settings.items())
            print(f"trial {number + 1} of {trials}: {named}")
            trainer = variant(config_id, **(shared or {}), **settings)
            record = run_phase(trainer, weights, f"{key}:{json.dumps(settings)}")
            network = load_phase(factory(), weights, record).to(device)
            of_forget = score_cases(network, forget, device, inferer=inferer)
            score = float(of_forget[main_score(of_forget)].mean())
            loss = float(score_cases(network, apart, device, inferer=inferer)["loss"].mean())
            row = {"settings": settings, "forget": score, "unseen_loss": loss,
                   "objective": abs(score - expected) + loss,
                   "seconds": record["seconds"], "flops": record["flops"]}  # fmt: skip
        study.tell(trial, row["objective"])
        rows.append(row)
        best = min(rows, key=lambda one: one["objective"])
        found = {
            "key": key,
            "objective": "|forget score - expected| + mean loss on the unseen cases set apart; small is good",
            "expected": expected,
            "trials": rows,
            "best": best,
            "options": " ".join(f"--{name}={value!r}" for name, value in best["settings"].items()),
        }
        write_json(found, path)
        for file in (weights, weights.with_suffix(".json")):
            file.unlink(missing_ok=True)
    print(f"best of {trials} trials, for the run itself: {found['options']}\nall of them: {path}")
    return found


def _present(key: str) -> float:
    value = content(key) if key in running_parser() else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"tuning_space: the configuration has no number {key!r} to tune.")
    return value


def _study(seed: int) -> optuna.Study:
    try:
        import optuna
    except ImportError as error:
        raise RequestError("tuning needs optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    return optuna.create_study(sampler=sampler, direction="minimize")


def _times(value: float, multiple: float) -> float:
    return max(1, round(value * multiple)) if isinstance(value, int) else value * multiple


def _multiples(key: str, bounds: Any) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import FloatDistribution

    pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2
    if not pair or not all(isinstance(one, (int, float)) for one in bounds) or not 0 < bounds[0] <= 1 <= bounds[1]:
        raise RequestError(
            f"tuning_space: {key} takes the smallest and the largest multiple of its present value, such as [0.5, 2], "
            f"got {bounds!r}."
        )
    return FloatDistribution(bounds[0], bounds[1], log=True)


def _finished(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        logger.warning("%s cannot be read; the search starts anew.", path.name)
        return []
    return content["trials"] if content.get("key") == key else []
