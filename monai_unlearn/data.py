# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Which samples meet in a batch, and what is computed once instead of in every epoch."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import DataLoader, Dataset
from monai.transforms import MapTransform, Randomizable
from torch import Tensor, nn
from torch.utils.data import Sampler, Subset
from tqdm import tqdm

from .checkpoint import weights_digest
from .distributed import all_shares, num_processes, own_share, process_rank
from .request import item_id

logger = logging.getLogger(__name__)
ORDERS = ("mixed", "alternate", "sequential")


class ForgetRetainSampler(Sampler[list[int]]):
    """Batches of samples to forget and of samples to keep, for a loader's ``batch_sampler``.

    ``mixed`` puts both into every batch; the smaller group starts over, in a new order, as often as the larger one
    needs. ``alternate`` gives pure batches in turn, likewise. ``sequential`` gives all pure batches to keep and then
    all to forget, each sample once: the order of Erase to Retain (arXiv 2511.16574). No order drops a sample of the
    group that sets the length of the epoch, and no batch holds a sample twice.

    Every epoch has its own order, fixed by ``(seed, epoch)``: after :meth:`set_epoch` a resumed run continues exactly.
    Several ranks share the batches that one would have had, sample by sample and each group by itself, so that all make
    equally many forward passes. Where a group of a batch is not a multiple of the number of ranks, a stand-in takes a
    place: ``~index``, a negative number, for which :class:`MemoryDataset` gives the sample with a label of −1.

    Args:
        forget: for each item of the dataset, whether it is to be forgotten; bools or 0 and 1.
        num_forget: samples to forget in each (mixed or forget) batch of all ranks together; 0 leaves them out.
        num_retain: samples to keep in each (mixed or retain) batch of all ranks together; 0 leaves them out.
        order: ``mixed``, ``alternate`` or ``sequential``.
        retain_per_forget: samples to keep that an epoch shows for each sample to forget; None shows all of them. It
            makes the cost of an epoch independent of the training set's size. The next epoch goes on with others, and
            all have been shown before one is again. A mixed batch holds no more of them either, so that none has to be
            shown again to fill it.
        seed: fixes the order of the whole run.
        rank: of this process; None asks ``torch.distributed``.
        num_ranks: of processes; None asks ``torch.distributed``.

    Raises:
        ValueError: on an unknown order, numbers below zero, no samples asked for, a group that the batches need but
            that is empty, or a rank out of range.

    Example:
        >>> sampler = ForgetRetainSampler([True, False, False, False], num_forget=1, num_retain=2)
        >>> [len(batch) for batch in sampler]
        [3, 2]
    """

    def __init__(
        self,
        forget: Sequence[bool] | Tensor,
        num_forget: int,
        num_retain: int,
        order: str = "mixed",
        retain_per_forget: float | None = None,
        seed: int = 0,
        rank: int | None = None,
        num_ranks: int | None = None,
    ) -> None:
        rank = process_rank() if rank is None else rank
        num_ranks = num_processes() if num_ranks is None else num_ranks
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {order!r}.")
        if min(num_forget, num_retain) < 0 or num_forget + num_retain == 0:
            raise ValueError(
                f"num_forget and num_retain must not be negative nor both 0, got {num_forget}, {num_retain}."
            )
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must lie in [0, {num_ranks}), got {rank}.")
        flags = torch.as_tensor(forget).bool()
        if retain_per_forget is not None and order == "mixed" and num_forget:
            num_retain = min(num_retain, max(1, round(retain_per_forget * num_forget)))
        self.groups = [
            (name, indices, number)
            for name, indices, number in (
                ("num_retain", (~flags).nonzero().flatten(), num_retain),
                ("num_forget", flags.nonzero().flatten(), num_forget),
            )
            if number > 0
        ]
        for name, indices, number in self.groups:
            if not len(indices):
                raise ValueError(f"{name} is {number}, but the dataset has 0 such samples.")
        self.order, self.seed, self.epoch, self.rank, self.num_ranks = order, seed, 0, rank, num_ranks
        self.retain_limit = None if retain_per_forget is None else max(1, round(retain_per_forget * int(flags.sum())))

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; without it the sampler counts by itself."""
        self.epoch = epoch

    def _sizes(self) -> list[tuple[int, int]]:
        """For each group the samples an epoch shows, and those of a batch."""
        sizes = []
        for name, indices, number in self.groups:
            count = len(indices) if name == "num_forget" or self.retain_limit is None else self.retain_limit
            sizes.append((min(count, len(indices)), min(number, len(indices))))
        return sizes

    def shown(self, epochs: int, rank: int | None = None) -> list[int]:
        """The samples that the epochs 1 to ``epochs`` of a trainer show, ascending; nothing is used up.

        What is computed once for each sample need be computed for these only. A trainer with ``ReseedEachEpoch`` counts
        its epochs from 1.

        Args:
            epochs: how many.
            rank: whose samples; None asks for those of all ranks.
        """
        probe = copy.copy(self)
        probe.rank, probe.num_ranks = (0, 1) if rank is None else (rank, self.num_ranks)
        seen: set[int] = set()
        for epoch in range(1, epochs + 1):
            probe.set_epoch(epoch)
            seen.update(index if index >= 0 else ~index for batch in probe for index in batch)
        return sorted(seen)

    def size(self) -> int:
        """How many samples an epoch shows on all ranks, each as often as it is shown."""
        probe = copy.copy(self)
        probe.rank, probe.num_ranks = 0, 1
        return sum(map(len, probe))

    def __len__(self) -> int:
        batches = [-(-count // number) for count, number in self._sizes()]
        return max(batches) if self.order == "mixed" else sum(batches) if self.order == "sequential" else (
            max(batches) * len(batches)
        )  # fmt: skip

    def __iter__(self) -> Iterator[list[int]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        sizes = self._sizes()
        rounds = max(-(-count // number) for count, number in sizes)
        streams = []
        for (_, indices, _), (count, number) in zip(self.groups, sizes, strict=True):
            needed = count if self.order == "sequential" else max(count, rounds * number)
            whole = self.order == "sequential" or -(-count // number) == rounds
            chosen = self._of_epoch(indices, count, epoch)
            streams.append(self._batches(chosen, count if whole else needed, number, generator))
        if self.order == "mixed":
            yield from (sum(map(self._mine, parts), []) for parts in zip(*streams, strict=True))
        elif self.order == "alternate":
            for parts in zip(*streams, strict=True):
                yield from map(self._mine, parts)
        else:
            for stream in streams:
                yield from map(self._mine, stream)

    def _mine(self, batch: list[int]) -> list[int]:
        """This rank's share of some samples; where they cannot be shared out evenly, a stand-in takes a place."""
        return [*batch, *[~batch[0]] * (-len(batch) % self.num_ranks)][self.rank :: self.num_ranks]

    def _of_epoch(self, indices: Tensor, count: int, epoch: int) -> Tensor:
        """The samples of an epoch that shows ``count`` of them: it goes on where the one before has stopped."""
        order = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(self.seed))]
        return order[(epoch * count + torch.arange(count)) % len(order)] if count < len(indices) else indices

    @staticmethod
    def _batches(indices: Tensor, needed: int, number: int, generator: torch.Generator) -> list[list[int]]:
        """``needed`` samples in batches of ``number``; no sample twice in a batch."""
        dealt: list[int] = []
        while len(dealt) < needed:
            order = indices[torch.randperm(len(indices), generator=generator)].tolist()
            tail = set(dealt[len(dealt) // number * number :])  # the batch under way
            dealt += [one for one in order if one not in tail] + [one for one in order if one in tail]
        return [dealt[start : min(start + number, needed)] for start in range(0, needed, number)]


class MarkForgetd(MapTransform):
    """Give an item its ``forget`` flag, from the item itself or from the ids to forget.

    A flag that the item carries stands. Otherwise the stem of the image's file name is looked up among ``ids``, so
    lists that hold nothing but image and label work too.

    Args:
        keys: the item's image, a path; must run before the image is loaded.
        ids: the ids to forget, compared as text.
        forget_key: where the flag goes.
    """

    def __init__(self, keys: KeysCollection = "image", ids: Iterable[Any] = (), forget_key: str = "forget") -> None:
        super().__init__(keys)
        self.ids = frozenset(str(one) for one in ids)
        self.forget_key = forget_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.forget_key not in d:
            item = {str(key): value for key, value in d.items()}
            d[self.forget_key] = item_id({**item, "image": d[self.first_key(d)]}) in self.ids
        return d


class CheckMaskd(MapTransform):
    """Refuse a mask that does not fit its image, by the file's name; see :func:`monai_unlearn.datasets.check_mask`.

    Args:
        keys: the mask, ``(1, *spatial)``, just loaded.
        image_key: the photograph, ``(C, *spatial)``.
    """

    def __init__(self, keys: KeysCollection = "label", image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        from .datasets import DataError, check_mask

        d = dict(data)
        for key in self.key_iterator(d):
            try:
                check_mask(np.asarray(d[key])[0] > 0, d[self.image_key].shape[1:])
            except DataError as error:
                name = getattr(d[key], "meta", {}).get("filename_or_obj", key)
                raise DataError(f"{str(name).rsplit('/', 1)[-1]}: {error}") from error
        return d


class FieldOfViewd(MapTransform):
    """Say where a fundus photograph shows the eye: the new item ``region``, see
    :func:`monai_unlearn.datasets.field_of_view`.

    Args:
        keys: the photograph, ``(3, H, W)``, 0 for black.
        region_key: where the boolean region ``(1, H, W)`` goes.
    """

    def __init__(self, keys: KeysCollection = "image", region_key: str = "region") -> None:
        super().__init__(keys)
        self.region_key = region_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        from .datasets import field_of_view

        d = dict(data)
        image = np.moveaxis(np.asarray(d[self.first_key(d)]), 0, -1)
        d[self.region_key] = torch.from_numpy(field_of_view(image))[None]
        return d


class KeepAffined(MapTransform):
    """Where a volume lies, as an item of its own: ``affine`` ``(4, 4)``, voxels to millimetres.

    Args:
        keys: the volume with MONAI's metadata; place it after the last transform that moves or pads it.
        affine_key: where the matrix goes.
    """

    def __init__(self, keys: KeysCollection = "image", affine_key: str = "affine") -> None:
        super().__init__(keys)
        self.affine_key = affine_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        d[self.affine_key] = torch.as_tensor(d[self.first_key(d)].affine).clone()
        return d


class OneHotd(MapTransform):
    """A class number becomes class probabilities ``(K,)``, 1 for that class.

    Args:
        keys: ints in [0, number).
        number: K.

    Raises:
        ValueError: in use, when a class is out of range.
    """

    def __init__(self, keys: KeysCollection = "label", number: int = 2) -> None:
        super().__init__(keys)
        self.number = number

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            if not 0 <= int(d[key]) < self.number:
                raise ValueError(f"the class {d[key]!r} does not lie in [0, {self.number}).")
            d[key] = torch.eye(self.number)[int(d[key])]
        return d


class SampleStore(dict[Any, dict[str, Tensor]]):
    """Decoded samples in memory, up to a budget: one more is not kept, and is decoded again whenever it is asked for.

    Args:
        budget: GiB.
    """

    def __init__(self, budget: float) -> None:
        super().__init__()
        self.left = budget * 2**30

    def __setitem__(self, key: Any, sample: dict[str, Tensor]) -> None:
        size = sum(value.numel() * value.element_size() for value in sample.values())
        if size <= self.left:
            self.left -= size
            super().__setitem__(key, sample)
        elif self.left > 0:
            logger.warning("%d decoded samples fill cache_gib; the others are decoded whenever needed.", len(self))
            self.left = 0


class MemoryDataset(Dataset):
    """A dataset whose deterministic transform runs once per item, however many datasets share the item.

    A negative index ``~i`` gives item i with labels of −1: a stand-in that no loss reads, see
    :class:`ForgetRetainSampler`.

    Args:
        data: data-list items.
        transform: deterministic preprocessing; its result is kept as plain tensors.
        store: where results are kept, keyed by image and label path; give the same dict to every dataset of a run so
            that each file is decoded once. It holds images and must not be written to disk.
        extra: item keys handed on beside the transform's own, such as ``forget``; they are not stored.
        targets: further tensors by item, such as a teacher's logits, under the name of the item key.
        random_transform: applied last and anew each time, to the item with its extra keys and targets; a crop has to
            name the targets' keys too. It may return a list of items (patches).
        views: draw so many random views of each item once, and give one of them at random each time: what is computed
            of a view can then be kept, as :attr:`features`. Loaders with workers draw them in each worker.

    Attributes:
        features: tensors by item key and :meth:`feature_key`, handed on with the sample that they were computed of.

    Raises:
        ValueError: with views and nothing random to draw them by, or fewer than one.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable[[Any], Any],
        store: MutableMapping[Any, dict[str, Tensor]] | None = None,
        extra: Sequence[str] = (),
        targets: Mapping[str, Mapping[Any, Tensor]] | None = None,
        random_transform: Callable[[Any], Any] | None = None,
        views: int | None = None,
    ) -> None:
        if views is not None and (views < 1 or random_transform is None):
            raise ValueError(f"views of an item need a random transform and a number above 0, got {views}.")
        super().__init__(data, transform)
        self.random_transform, self.views = random_transform, views
        self.features: dict[str, Mapping[Any, Tensor]] = {}
        self._drawn: dict[Any, Any] = {}
        self._choice = np.random.RandomState(0)
        self.store = {} if store is None else store
        self.extra = tuple(extra)
        self.targets = {} if targets is None else targets

    def __getitem__(self, index: Any) -> Any:
        if index < 0:
            return _stand_in(self[~index])
        view = 0 if self.views is None else int(self._choice.randint(self.views))
        found = self.view(index, view)
        for patch, sample in enumerate(found if isinstance(found, list) else [found]):
            sample |= {name: values[self.feature_key(index, view, patch)] for name, values in self.features.items()}
        return found

    def view(self, index: int, view: int = 0) -> Any:
        """An item, or one of its random views; a list of items where the random transform makes patches.

        Without :attr:`views` there is one view, drawn anew each time where the transform is random.
        """
        key = (store_key(self.data[index]), view)
        if self.views is None:
            return self._with_targets(index)
        if key not in self._drawn:
            digest = hashlib.sha256(f"{item_id(self.data[index])}:{view}".encode()).digest()
            if isinstance(self.random_transform, Randomizable):
                self.random_transform.set_random_state(int.from_bytes(digest[:4], "big"))
            self._drawn[key] = self._with_targets(index)
        found = self._drawn[key]
        return [dict(one) for one in found] if isinstance(found, list) else dict(found)

    def feature_key(self, index: int, view: int, patch: int) -> Any:
        """What :attr:`features` of a sample are found by."""
        return (*store_key(self.data[index]), view, patch)

    def _with_targets(self, index: int) -> Any:
        item = self.data[index]
        key = store_key(item)
        stored = self.store.get(key)
        if stored is None:
            result = self.transform(dict(item))
            stored = {name: value for name, value in _plain(result).items() if isinstance(value, Tensor)}
            self.store[key] = stored
        sample = {**stored, **{name: item[name] for name in self.extra if name in item}}
        for name, values in self.targets.items():
            if key in values:
                sample[name] = values[key]
            else:  # rows of a batch hold the same keys; whoever reads this one gets a loss that is not a number
                sample[name] = torch.full_like(next(iter(values.values())), torch.nan)
        if self.random_transform is None:
            return sample
        result = self.random_transform(sample)
        return [_plain(one) for one in result] if isinstance(result, list) else _plain(result)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> MemoryDataset:
        """Fix the random draws from here on; MONAI's loaders and ``ReseedEachEpoch`` call it."""
        self._choice = np.random.RandomState(seed)
        if isinstance(self.random_transform, Randomizable):
            self.random_transform.set_random_state(seed, state)
        return self

    def digest(self) -> str:
        """sha256 over what an epoch can see: each item's content, flags and targets, in order."""
        digest = hashlib.sha256()
        for item in self.data:
            key = store_key(item)
            content = [item.get("sha256", key[0]), item.get("label_sha256", key[1])]
            digest.update(repr(content + [item.get(name) for name in self.extra]).encode())
            for name, values in sorted(self.targets.items()):
                if key in values:
                    digest.update(weights_digest({name: values[key]}).encode())
        return digest.hexdigest()

    @property
    def forget(self) -> list[bool]:
        """The items' flags, for the sampler."""
        return [bool(item.get("forget", False)) for item in self.data]


def _stand_in(sample: Any) -> Any:
    """The same sample, or list of samples, with labels of −1."""
    if isinstance(sample, list):
        return [_stand_in(one) for one in sample]
    blank = {name: torch.full_like(sample[name], -1) for name in ("label", "forget_label") if name in sample}
    return {**sample, **blank}


def _plain(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The same item without MONAI's metadata on its tensors."""
    return {name: value.as_tensor() if hasattr(value, "as_tensor") else value for name, value in sample.items()}


def store_key(item: Mapping[str, Any]) -> tuple[str, str]:
    """What identifies an item's content in a store: the paths of its image and its label."""
    return str(item["image"]), str(item.get("label", ""))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards each module is in the mode it was in."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def cache_outputs(
    network: nn.Module,
    dataset: MemoryDataset,
    device: str | torch.device = "cpu",
    batch_size: int = 16,
    post: Callable[[Tensor], Tensor] | None = None,
    desc: str = "teacher outputs",
    inferer: Callable[[Tensor, nn.Module], Tensor] | None = None,
) -> dict[tuple[str, str], Tensor]:
    """What a frozen network says about each item, computed once on the deterministic view.

    The network runs in eval mode and is left in the mode it was in. Several processes share the items out, and each
    gets the outputs of all.

    Args:
        network: gives logits ``(B, C, *spatial)`` or ``(B, C)``.
        dataset: its items hold ``image``.
        device: where to compute; the result lies in host memory.
        batch_size: images at a time.
        post: applied to each batch of logits, such as ``torch.sigmoid``.
        desc: name on the progress bar.
        inferer: such as MONAI's ``SlidingWindowInferer``; None calls the network.

    Returns:
        The output of each item, keyed as in :class:`MemoryDataset`, for its ``targets``.
    """
    outputs: list[Tensor] = []
    mine = Subset(dataset, own_share(range(len(dataset))))
    loader = DataLoader(mine, batch_size=batch_size, num_workers=0)
    with evaluating(network):
        for batch in tqdm(loader, desc, leave=False, disable=process_rank() > 0):
            image = batch["image"].to(device)
            logits = network(image) if inferer is None else inferer(image, network)
            outputs += [value.clone() for value in (logits if post is None else post(logits)).cpu()]
    return dict(zip(map(store_key, dataset.data), all_shares(outputs)))
