# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""When to stop, and what keeps a run safe while it lasts."""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.handlers import LrScheduleHandler
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import CheckpointError, atomic_path, weights_digest
from .distributed import num_processes, process_rank
from .lora import limit_drift
from .losses import UnlearningLoss
from .trunk import KeepTrunk

logger = logging.getLogger(__name__)


class NotFiniteError(ArithmeticError):
    """The loss stopped being a number; the weights are those before the step that would have used it."""


class Terminated(SystemExit):
    """Training ended because the process was asked to end; what it had reached is kept."""


@contextmanager
def ends_when_asked(trainer: Engine) -> Iterator[None]:
    """Let SIGTERM and SIGINT end training after the running iteration instead of within it.

    The last epoch's state stays on disk, so that the same command goes on from there. A second signal ends at once.

    Raises:
        Terminated: after SIGTERM, with the exit code 143.
        KeyboardInterrupt: after SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach the main one only
        yield
        return
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    def end(engine: Engine) -> None:
        if received:
            print(
                f"\nended in epoch {engine.state.epoch}; the same command goes on from the last whole one.", flush=True
            )
            if received[0] == signal.SIGINT:
                raise KeyboardInterrupt
            raise Terminated(128 + received[0])

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    added = trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
    try:
        yield
    finally:
        added.remove()
        for number, handler in before.items():
            signal.signal(number, handler)


class StopWhenNotFinite:
    """Stop at once when the loss is NaN or infinite, before the backward pass can spoil the weights.

    Normalisation can keep the loss finite over weights or running statistics that are not, so these are looked at when
    an epoch ends.

    Raises:
        NotFiniteError: while training, naming epoch and iteration.
    """

    def attach(self, engine: Engine) -> None:
        """Listen to a MONAI trainer."""
        from monai.engines import IterationEvents

        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._look_at_weights)

    def _look_at_weights(self, engine: Engine) -> None:
        trainer: Any = engine
        broken = [name for name, value in trainer.network.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise NotFiniteError(
                f"after epoch {engine.state.epoch} values of {', '.join(broken[:3])} are not finite; lower "
                "learning_rate."
            )

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output["loss"]  # type: ignore[index,call-overload]
        if not torch.isfinite(torch.as_tensor(loss)).all():
            batch: Any = engine.state.batch
            images = torch.stack([one["image"] for one in batch]) if isinstance(batch, list) else batch["image"]
            broken = int((~images.flatten(1).isfinite().all(1)).sum())
            remedy = f"{broken} of its {len(images)} images hold such values" if broken else "lower learning_rate"
            raise NotFiniteError(
                f"the loss is {float(torch.as_tensor(loss).detach().sum())} in epoch {engine.state.epoch}, iteration "
                f"{engine.state.iteration}: {remedy}. The weights before this step are kept."
            )


class ReseedEachEpoch:
    """Seed torch, numpy and random from (seed, epoch) when an epoch starts: a resumed run equals an undisturbed one.

    Of several processes each has its own seed.

    A batch sampler or sampler with ``set_epoch`` is told the epoch, and a dataset with ``set_random_state`` gets the
    seed for its random transforms.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        of_process = f":{process_rank()}" if process_rank() else ""
        digest = hashlib.sha256(f"{self.seed}:{engine.state.epoch}{of_process}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        loader = engine.state.dataloader
        for name in ("batch_sampler", "sampler"):
            set_epoch = getattr(getattr(loader, name, None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(engine.state.epoch)
        set_random_state = getattr(getattr(loader, "dataset", None), "set_random_state", None)
        if set_random_state is not None:
            set_random_state(seed % 2**32)


class PhaseProgress:
    """One progress bar for a whole phase, with the loss.

    Args:
        desc: the phase's name.
    """

    def __init__(self, desc: str) -> None:
        self.desc = desc
        self.bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        for event in (Events.COMPLETED, Events.EXCEPTION_RAISED):
            engine.add_event_handler(event, self._close)

    def _open(self, engine: Engine) -> None:
        if self.bar is None:
            length = engine.state.epoch_length or 0
            self.bar = tqdm(
                total=length * (engine.state.max_epochs or 0), initial=length * (engine.state.epoch - 1),
                desc=self.desc, disable=process_rank() > 0,
            )  # fmt: skip

    def __call__(self, engine: Engine) -> None:
        assert self.bar is not None
        self.bar.update(1)
        if engine.state.iteration % 10 == 0:
            output: Any = engine.state.output  # a list of items where the trainer decollates
            loss = torch.as_tensor((output[0] if isinstance(output, list) else output)["loss"]).detach().mean()
            self.bar.set_postfix(epoch=f"{engine.state.epoch}/{engine.state.max_epochs}", loss=f"{float(loss):.3f}")

    def _close(self, engine: Engine, error: BaseException | None = None) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if error is not None:
            raise error


class TeacherGuard:
    """Refuse a run that changes its teacher: weights and buffers are compared bit by bit, before and after.

    Args:
        teacher: a frozen network, or a mapping of name to tensor (cached logits).

    Raises:
        RuntimeError: when training is over and the teacher differs.
    """

    def __init__(self, teacher: nn.Module | Mapping[Any, Tensor]) -> None:
        self.teacher = teacher

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.STARTED, self._remember)
        engine.add_event_handler(Events.COMPLETED, self)

    def _digest(self) -> str:
        state = self.teacher.state_dict() if isinstance(self.teacher, nn.Module) else self.teacher
        return weights_digest({str(name): value for name, value in state.items()})

    def _remember(self, engine: Engine) -> None:
        self.before = self._digest()

    def __call__(self, engine: Engine) -> None:
        if self._digest() != self.before:
            raise RuntimeError(
                "the teacher changed while the student was trained; it must be a frozen copy in eval mode."
            )


class StopAtReference:
    """Forget no further than a model that never saw the samples would score, and keep the epoch that comes closest.

    When an epoch ends the evaluator scores the forget set (and a sample of the retain set). With a ``softness`` the
    forget term pulls with its full weight above the reference; over the last ``softness`` above it the weight falls to
    0 in proportion, so that training towards a target that is wrong by far settles at the reference instead of running
    through it. At the end the network gets the weights of the epoch with the smallest distance, among the epochs
    whose retain score is within budget; of distances in the same step of ``resolution`` the one with the best retain
    score counts as smallest. Where a later epoch puts the kept one out of budget, that epoch takes its place.

    Args:
        evaluator: anything with ``run()`` that leaves the scores in ``state.metrics``, higher is better: a MONAI
            evaluator, or :class:`monai_unlearn.audit.SplitEvaluator`. Its ``cases`` and ``case_flops()`` count towards
            the cost of the phase, where it has them.
        reference: the expected-unseen score (audit: q̂). None takes the score before training: a monitor that keeps
            the epoch with the best retain score among those whose forget score has not rebounded; it has no budget.
        network: the network that trains; the best weights are kept in host memory.
        loss: its ``forget_weight`` is the one that is turned down; None only watches and keeps the best epoch.
        forget_metric: key of the score on the forget set.
        retain_metric: key of the score on retained samples; None sets no budget.
        retain_budget: how far the retain score may lie below the best of the run, its value before training included.
        softness: width above the reference over which the pull fades; None leaves the weight as it is, for targets
            that are themselves what a model says that never saw the samples.
        resolution: distances to the reference that differ by less are noise.
        tolerance: a best epoch further below the reference than this is reported as overshoot.

    Raises:
        ValueError: when the reference is not a finite number or a width is not positive.
    """

    def __init__(
        self,
        evaluator: Any,
        reference: float | None,
        network: nn.Module,
        loss: UnlearningLoss | None = None,
        forget_metric: str = "forget",
        retain_metric: str | None = "retain",
        retain_budget: float = 0.05,
        softness: float | None = 0.05,
        resolution: float = 0.01,
        tolerance: float = 0.02,
    ) -> None:
        if reference is not None and not np.isfinite(reference):
            raise ValueError(f"the reference must be a finite number, got {reference}.")
        if min(retain_budget, resolution, tolerance, 1.0 if softness is None else softness) <= 0:
            raise ValueError(
                f"budget, softness, resolution and tolerance must be positive, got {retain_budget}, {softness}, "
                f"{resolution}, {tolerance}."
            )
        self.evaluator, self.network, self.loss = evaluator, network, loss
        self.reference = None if reference is None else float(reference)
        self.forget_metric, self.retain_metric = forget_metric, retain_metric
        self.retain_budget = float("inf") if reference is None else retain_budget
        self.softness, self.resolution, self.tolerance = softness, resolution, tolerance
        self.full_weight = loss.forget_weight if loss is not None else 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] | None = None
        self.best_epoch = -1
        self.scored = 0

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _score(self, epoch: int) -> None:
        self.evaluator.run()
        self.scored += getattr(self.evaluator, "cases", 0)
        metrics = self.evaluator.state.metrics
        entry = {"epoch": float(epoch), "forget": float(metrics[self.forget_metric])}
        if self.retain_metric is not None:
            entry["retain"] = float(metrics[self.retain_metric])
        if not all(np.isfinite(value) for value in entry.values()):
            raise NotFiniteError(f"a score is not finite after epoch {epoch}: {entry}.")
        self.history.append(entry)
        if self.reference is None:
            self.reference = entry["forget"]
        kept = next((other for other in self.history if other["epoch"] == self.best_epoch), None)
        if kept is None or self._rank(entry) < self._rank(kept):
            self.best_epoch = epoch
            self.best = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
        if self.loss is not None and self.softness is not None:
            pull = (entry["forget"] - self.reference) / self.softness
            self.loss.forget_weight = self.full_weight * min(1.0, max(0.0, pull))

    def _rank(self, entry: Mapping[str, float]) -> tuple[float, float, float]:
        """Smaller is better: within budget first, then the distance to the reference, then the retain score."""
        floor = max(other.get("retain", 0.0) for other in self.history) - self.retain_budget
        steps = abs(entry["forget"] - (self.reference or 0.0)) // self.resolution
        return float(entry.get("retain", 1.0) < floor), steps, -entry.get("retain", 0.0)

    def _start(self, engine: Engine) -> None:
        if not self.history:  # a resumed run has been scored before
            self._score(0)

    def __call__(self, engine: Engine) -> None:
        self._score(engine.state.epoch)

    def _finish(self, engine: Engine) -> None:
        assert self.best is not None
        self.network.load_state_dict(self.best)
        if self.report()["overshoot"]:
            logger.warning("forgot further than the reference: see the report's overshoot.")

    def flops(self) -> int:
        """What scoring took, over all attempts."""
        return self.scored * self.evaluator.case_flops() if self.scored else 0

    def report(self) -> dict[str, Any]:
        """What happened, ready for JSON: reference, history, best epoch, whether it lies below the reference."""
        best = next((entry for entry in self.history if entry["epoch"] == self.best_epoch), None)
        reference = self.reference or 0.0
        return {
            "reference": self.reference,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "overshoot": bool(best and best["forget"] < reference - self.tolerance),
            "reached": bool(best and best["forget"] <= reference + self.tolerance),
            "retain_within_budget": bool(best and self._rank(best)[0] == 0.0),
        }

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        weight = self.loss.forget_weight if self.loss is not None else 0.0
        return {
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "forget_weight": weight,
            "scored": self.scored,
            "reference": self.reference,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.history, self.best, self.best_epoch = list(state["history"]), state["best"], state["best_epoch"]
        self.scored, self.reference = state["scored"], state["reference"]
        if self.loss is not None:
            self.loss.forget_weight = state["forget_weight"]


class DriftCap:
    """Let no adapted layer move further from its weights than a share of their norm: ‖ΔW‖ / ‖W‖ ≤ cap, after each step.

    A layer beyond the cap has its factor B scaled back, which keeps the direction of its change.

    Args:
        network: with adapters.
        cap: the largest relative change (Frobenius).

    Raises:
        ValueError: when the cap is not positive.
    """

    def __init__(self, network: nn.Module, cap: float) -> None:
        if cap <= 0:
            raise ValueError(f"the cap on the drift must be positive, got {cap}.")
        self.network, self.cap = network, cap

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        limit_drift(self.network, self.cap)


class MaskedUpdate:
    """Let only masked weights move freely: the others make a share of each step, whatever the optimizer does.

    With ``outside`` 0 they stay as they are bit for bit, weight decay and momentum included (SalUn, arXiv 2310.12508);
    with .1 it is the second half of masked small gradients.

    Args:
        network: that trains.
        mask: booleans by the name of the parameter; a parameter without one is outside.
        outside: the share, in [0, 1].

    Raises:
        ValueError: when the share lies outside of [0, 1] or the mask names a parameter that the network lacks.
    """

    def __init__(self, network: nn.Module, mask: Mapping[str, Tensor], outside: float = 0.0) -> None:
        if not 0 <= outside <= 1:
            raise ValueError(f"outside must lie in [0, 1], got {outside}.")
        self.parameters = dict(network.named_parameters())
        unknown = sorted(set(mask) - set(self.parameters))
        if unknown:
            raise ValueError(f"the mask names parameters that the network lacks: {', '.join(unknown[:3])}.")
        self.mask, self.outside = dict(mask), outside
        self.before: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._remember)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _remember(self, engine: Engine) -> None:
        self.before = {name: value.detach().clone() for name, value in self.parameters.items() if value.requires_grad}

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        for name, before in self.before.items():
            value = self.parameters[name]
            kept = before + self.outside * (value - before) if self.outside else before
            mask = self.mask.get(name)
            value.copy_(kept if mask is None else torch.where(mask.to(value.device), value, kept))


class SparsityPenalty:
    """Add γ‖θ‖₁ to the loss, γ falling linearly to 0 over the run: sparse models forget better.

    Jia et al., arXiv 2304.04934, equation 3 with its linearly decreasing γ. The gradient γ·sign θ is added after the
    backward pass.

    Args:
        network: whose trainable weights are penalised.
        weight: γ at the start, not negative.

    Raises:
        ValueError: when γ is negative.
    """

    def __init__(self, network: nn.Module, weight: float) -> None:
        if weight < 0:
            raise ValueError(f"the weight of the penalty must not be negative, got {weight}.")
        self.network, self.weight = network, weight

    def attach(self, engine: Engine) -> None:
        """Listen to a MONAI trainer."""
        from monai.engines import IterationEvents

        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        total = (engine.state.epoch_length or 1) * (engine.state.max_epochs or 1)
        trainer: Any = engine
        scale = trainer.scaler.get_scale() if trainer.amp else 1.0  # gradients are those of the scaled loss then
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(
                    parameter.sign(), alpha=scale * self.weight * (1 - (engine.state.iteration - 1) / total)
                )


class ClipGradients:
    """Scale a step's gradients down to a norm of at most ``max_norm``, all weights taken together.

    Args:
        network: whose trainable weights are meant.
        max_norm: positive.

    Raises:
        ValueError: when the norm is not positive.
    """

    def __init__(self, network: nn.Module, max_norm: float = 1.0) -> None:
        if max_norm <= 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}.")
        self.network, self.max_norm = network, max_norm

    def attach(self, engine: Engine) -> None:
        """Listen to a MONAI trainer."""
        from monai.engines import IterationEvents

        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        trainer: Any = engine
        if trainer.amp:
            trainer.scaler.unscale_(trainer.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class ForgetUntil:
    """Drop the forget term after some epochs: SCRUB's max-steps (arXiv 2302.09880), which end before its min-steps do.

    Args:
        loss: whose ``forget_weight`` becomes 0.
        epochs: with the forget term.
    """

    def __init__(self, loss: UnlearningLoss, epochs: int) -> None:
        self.loss, self.epochs, self.full_weight = loss, epochs, loss.forget_weight

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        self.loss.forget_weight = self.full_weight if engine.state.epoch <= self.epochs else 0.0


class ResumeEachEpoch:
    """Write a phase's state when an epoch ends, and continue from it when training starts; the epoch is the unit.

    The file begins with the sha256 of the rest, is written atomically and read without unpickling. A state of another
    phase (``key``) or one that fails its digest is not used, and that is said.

    Args:
        path: the one file; readable by its owner only.
        key: what the state belongs to.
        every_seconds: an epoch that ends sooner than this after the last write is not written; a killed run repeats it.
        objects: with ``state_dict`` and ``load_state_dict``, beside the trainer's network and optimizer, the schedule
            of a ``LrScheduleHandler`` and a :class:`StopAtReference`, which are found by themselves.
    """

    def __init__(
        self, path: str | Path, key: str, every_seconds: float = 5.0, objects: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.key, self.every_seconds = Path(path), key, every_seconds
        self.written = time.perf_counter()
        self.objects: dict[str, Any] = dict(objects or {})
        self.reporters: dict[str, Any] = {}
        self.seconds_before, self.images, self.started = 0.0, 0, 0.0

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer; attach it last, so that it saves what the other handlers have done."""
        trainer: Any = engine
        self.objects.update(network=trainer.network, optimizer=trainer.optimizer)
        for handlers in engine._event_handlers.values():
            for handler, _, _ in handlers:
                owner = getattr(handler, "__self__", handler)
                if isinstance(owner, LrScheduleHandler):
                    self.objects["lr_scheduler"] = owner.lr_scheduler
                if isinstance(owner, StopAtReference):
                    self.objects["stop_at_reference"] = self.reporters["stop_at_reference"] = owner
                if isinstance(owner, KeepTrunk):
                    self.reporters["trunk"] = owner
        engine.add_event_handler(Events.STARTED, self._load)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    @property
    def scored(self) -> int:
        """Forward passes that the phase's handlers made beside the training steps."""
        return sum(handler.scored for handler in self.reporters.values())

    def scored_flops(self) -> int:
        """What those passes took; whole cases, where training sees patches of them."""
        return sum(handler.flops() for handler in self.reporters.values())

    def reports(self) -> dict[str, Any]:
        """What the phase's handlers have to say, ready for JSON."""
        return {name: handler.report() for name, handler in self.reporters.items()}

    def remove(self) -> None:
        """Delete the file: the phase is complete."""
        self.path.unlink(missing_ok=True)

    def _count(self, engine: Engine) -> None:
        batch: Any = engine.state.batch  # a list of items where the trainer decollates
        self.images += num_processes() * (len(batch) if isinstance(batch, list) else len(batch["image"]))

    def _save(self, engine: Engine) -> None:
        if process_rank() > 0 or time.perf_counter() - self.written < self.every_seconds:
            return
        state = {
            "key": self.key,
            "epoch": engine.state.epoch,
            "images": self.images,
            "seconds": self.seconds_before + time.perf_counter() - self.started,
            "objects": {name: one.state_dict() for name, one in self.objects.items()},
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        with atomic_path(self.path, mode=0o600) as temporary:
            temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + content)
        self.written = time.perf_counter()

    def _read(self) -> dict[str, Any] | None:
        if not self.path.is_file():
            return None
        content = self.path.read_bytes()
        if hashlib.sha256(content[64:]).hexdigest().encode() != content[:64]:
            logger.warning("%s is damaged (its digest differs); the phase starts again.", self.path.name)
            return None
        state = torch.load(io.BytesIO(content[64:]), map_location="cpu", weights_only=True)
        return state if state["key"] == self.key else None

    def _load(self, engine: Engine) -> None:
        self.started = time.perf_counter()
        state = self._read()
        if state is None:
            return
        if set(state["objects"]) != set(self.objects):
            raise CheckpointError(
                f"{self.path} holds the state of {sorted(state['objects'])}; remove it and run again."
            )
        for name, one in self.objects.items():
            one.load_state_dict(copy.deepcopy(state["objects"][name]))
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * (engine.state.epoch_length or 0)
        self.images, self.seconds_before = state["images"], state["seconds"]
        logger.info("continuing after epoch %d of %s.", state["epoch"], engine.state.max_epochs)
