# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Several processes as one: the same batches, the same loss and the same weights as a single process would have.

``num_retain``, ``num_forget`` and ``batch_size`` are those of the whole batch, whatever the number of processes: each
computes its share of the samples, every process sees the loss of all of them, and gradients are added up. Without
``torch.distributed`` everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.utils import evenly_divisible_all_gather
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

T = TypeVar("T")


def num_processes() -> int:
    """How many processes work on this run; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """The number of this process, 0 for the one that writes files and shows progress."""
    return dist.get_rank() if num_processes() > 1 else 0


def wait_for_all() -> None:
    """Return once every process has come here."""
    if num_processes() > 1:
        dist.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Within, the first process is alone; the others follow when it is through: what it made, they find."""
    if process_rank() > 0:
        wait_for_all()
        yield
        return
    try:
        yield
    finally:
        wait_for_all()


def own_share(items: Sequence[T]) -> list[T]:
    """The items that this process is to work on; all processes' shares together are the items, none twice."""
    return list(items[process_rank() :: num_processes()])


def all_shares(mine: Sequence[T]) -> list[T]:
    """What the processes made of their :func:`own_share`, in the order of the items and the same on each."""
    if num_processes() == 1:
        return list(mine)
    shares: list[Any] = [None] * num_processes()
    dist.all_gather_object(shares, list(mine))
    return [shares[place % len(shares)][place // len(shares)] for place in range(sum(map(len, shares)))]


class GatheredLoss(nn.Module):
    """A loss of the samples of all processes, the same value on each; its gradient reaches this process's own samples.

    The predictions of the other processes enter as constants, so that the sum over processes of the gradients is the
    gradient of the whole batch, for any loss: means over unequal groups and Dice over the batch included. Rows whose
    label is −1 throughout stand in where a batch is not a multiple of the number of processes, and are left out.

    Args:
        loss: of prediction ``(B, C, *spatial)`` or ``(B, C)`` and target: a label, or a tuple of tensors and None such
            as :class:`monai_unlearn.losses.Target` whose first entry is the label.
    """

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Tensor, target: Any) -> Tensor:
        """The loss of the whole batch."""
        parts: tuple[Any, ...] = target if isinstance(target, tuple) else (target,)
        predicted = _gather(input)
        whole: list[Any] = [None if one is None else _gather(one) for one in parts]
        real = (whole[0] != -1).flatten(1).any(1)
        chosen: list[Any] = [None if one is None else one[real] for one in whole]
        return self.loss(predicted[real], type(target)(*chosen) if isinstance(target, tuple) else chosen[0])


def _gather(mine: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks; those of the others are constants."""
    plain = mine.detach()
    found = evenly_divisible_all_gather(plain.to(torch.uint8) if plain.dtype == torch.bool else plain, concat=False)
    rows = [one.to(mine) for one in found]
    rows[process_rank()] = mine
    return torch.cat(rows)


class AcrossProcesses:
    """Make a MONAI trainer one of several that train the same network; with one process it does nothing.

    When training starts the trainer's loss becomes a :class:`GatheredLoss`; after each backward pass the gradients of
    all processes are added up in one message. Running statistics that training changes are averaged. Attach it before
    handlers that read or change gradients.

    Args:
        network: that trains; on each process with the same weights.

    Raises:
        RuntimeError: when training starts and the processes' weights differ.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Listen to a MONAI trainer."""
        from monai.engines import IterationEvents

        if num_processes() == 1:
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._add_up)

    def _start(self, engine: Engine) -> None:
        trainer: Any = engine
        if not isinstance(trainer.loss_function, GatheredLoss):
            trainer.loss_function = GatheredLoss(trainer.loss_function)
        low = torch.cat([value.detach().reshape(-1).double() for value in self.network.state_dict().values()])
        high = low.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise RuntimeError("the processes start from different weights; give all of them the same seed and files.")

    @torch.no_grad()
    def _add_up(self, engine: Engine) -> None:
        trained = [one for one in self.network.parameters() if one.requires_grad]
        for one in trained:
            if one.grad is None:  # its samples were all on other processes
                one.grad = torch.zeros_like(one)
        _all_reduce([one.grad for one in trained if one.grad is not None])
        changing = [
            buffer
            for module in self.network.modules()
            if isinstance(module, _NormBase) and module.training
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        _all_reduce(changing, 1 / num_processes())


def _all_reduce(tensors: Sequence[Tensor], scale: float = 1.0) -> None:
    """Sum over the processes, times ``scale``, in place and in one message."""
    if not tensors:
        return
    flat = torch.cat([one.detach().reshape(-1).float() for one in tensors])
    dist.all_reduce(flat)
    for one, value in zip(tensors, (flat * scale).split([one.numel() for one in tensors])):
        one.copy_(value.reshape(one.shape))
