"""Batches of the user's own: a DataLoader, an iterable data set, or any iterable of batches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.core.hashing import key
from limbeck.data.augment import Augment, describe_augment
from limbeck.data.collate import part_of, to_batch
from limbeck.data.loader import Loader
from limbeck.data.order import check_place, cut
from limbeck.data.randomness import OwnRandomness

_WALK = 5  # keeps what a user's loader draws apart from orders, views and items


class WrappedLoader(Loader):
    """Walks through the user's own batches; each of them is the batch of one optimizer step.

    The order is the user's. While it is walked through, the generators of ``torch``, ``numpy`` and ``random`` are the
    loader's own, seeded with (seed, epoch), and a generator given to the DataLoader is seeded anew for each epoch: so a
    shuffling DataLoader gives the same epoch again, and neither disturbs the training nor is disturbed by it. Worker
    processes kept from one epoch to the next (``persistent_workers``) are outside of that.

    Every rank walks through all batches and takes its part of each. Resuming within an epoch walks through what was
    done.

    Sample ids: those the batches carry; else a DataLoader of a map-style data set is asked which samples it took;
    else, for an iterable data set, the samples' running number in the epoch, which is an id only if their order is
    always the same; else ``None``.

    Args:
        batches: Can be walked through again for each epoch.
        samples: How many there are, where known.
        labels: Of all samples, where known.
        augment: Only normalises bytes, and augments images where each can be done alone (no mixing of iterables).
        device: Where batches go.
        seed: Of the randomness.
        classes: How many.
        class_names: Their names.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        labels: Tensor | None = None,
        *,
        samples: int | None = None,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        classes: int | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        self.source, self.device, self.seed = batches, torch.device(device), seed
        self.augment = augment or Augment()
        if self.augment.mixes:
            raise DataError(
                "a DataLoader's batches cannot be mixed with samples outside of them",
                where="augment",
                remedy="leave out mixup and cutmix, or pass the data set itself",
            )
        self.samples, self.labels, self.classes, self.class_names = samples, labels, classes, class_names
        batcher = getattr(batches, "batch_sampler", None)
        self.batch_size = getattr(batches, "batch_size", None) or getattr(batcher, "batch_size", None)
        self._numbers = _is_plain(batches) and not isinstance(batches.dataset, IterableDataset)
        self._walked = _with_index(batches) if self._numbers else batches  # type: ignore[arg-type]
        samplers = (batches, getattr(batches, "sampler", None), batcher)
        self._generators = [
            (g, g.initial_seed()) for g in {getattr(s, "generator", None) for s in samplers} if g is not None
        ]

    @property
    def steps_per_epoch(self) -> int | None:
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return None

    def epoch(
        self, epoch: int, *, start_step: int = 0, rank: int = 0, world: int = 1, parts: int = 1
    ) -> Iterator[list[Batch]]:
        check_place(start_step, self.steps_per_epoch, rank, world, parts)
        sampler = getattr(self.source, "sampler", None)
        if world > 1 and isinstance(sampler, DistributedSampler):
            raise DataError(
                "this DataLoader already gives each rank other samples",
                where="data",
                found="a DistributedSampler",
                remedy="leave it out: every batch is cut over the ranks",
            )
        return self._run(epoch, start_step, rank, world, parts)

    def _run(self, epoch: int, start_step: int, rank: int, world: int, parts: int) -> Iterator[list[Batch]]:
        for step, batch in enumerate(self._walk(epoch)):
            if step >= start_step:
                yield [self._finish(part_of(batch, part), epoch) for part in cut(batch.size, rank, world, parts)]

    def _walk(self, epoch: int) -> Iterator[Batch]:
        for generator, initial in self._generators:
            generator.manual_seed(key(_WALK, initial, epoch))
        for owner in ("sampler", "batch_sampler", "dataset"):
            set_epoch = getattr(getattr(self.source, owner, None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        randomness, done, seen = OwnRandomness(key(_WALK, self.seed, epoch)), object(), 0
        numbered = isinstance(getattr(self.source, "dataset", None), IterableDataset)
        with randomness.active():
            iterator: Iterator[Any] = iter(self._walked)
        while True:
            with randomness.active():
                item: Any = next(iterator, done)
            if item is done:
                return
            index, item = item if self._numbers else (None, item)
            batch = to_batch(item)
            if numbered:
                index = torch.arange(seen, seen + batch.size)
                seen += batch.size
            yield batch if batch.index is not None else batch.replace(index=index)

    def _finish(self, batch: Batch, epoch: int) -> Batch:
        batch = batch.to(self.device)
        inputs = batch.inputs
        images = isinstance(inputs, Tensor) and inputs.ndim == 4
        if not images or not (self.augment.active or inputs.dtype == torch.uint8):
            return batch
        self.augment.check(inputs)
        if not self.augment.transforms:
            return batch.replace(inputs=self.augment.finish(inputs))
        index = batch.require("index").view(1, -1)
        return batch.replace(inputs=self.augment(inputs, index, epoch)[0])

    def example(self, size: int = 2) -> Batch:
        with OwnRandomness(key(_WALK, self.seed, 0)).active():
            item, index = self._first(size)
        batch = to_batch(item)
        if batch.index is None:
            batch = batch.replace(index=index)
        return self._finish(part_of(batch, slice(0, min(size, batch.size))), epoch=0)

    def _first(self, size: int) -> tuple[Any, Tensor | None]:
        source = self.source
        if _is_plain(source):
            dataset: Any = source.dataset
            if isinstance(dataset, IterableDataset):
                items = list(islice(dataset, size))
            else:
                items = [dataset[i] for i in range(min(size, len(dataset)))]
            if items:
                return source.collate_fn(items), torch.arange(len(items))
        for item in source:
            return item, None
        raise DataError("there are no batches", where="data", found=type(source).__name__)

    def describe(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "steps": self.steps_per_epoch,
            "seed": self.seed,
            "augment": describe_augment(self.augment.transforms),
        }


def _is_plain(batches: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether this is a DataLoader that puts batches together by itself, as torch's does."""
    if not isinstance(batches, DataLoader) or type(batches).__iter__ is not DataLoader.__iter__:
        return False
    return batches.batch_sampler is not None


class _WithIndex:
    """A data set that gives each sample with its index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[Any]) -> list[tuple[Any, Any]]:
        many = getattr(self.dataset, "__getitems__", None)
        return list(zip(rows, many(rows) if many else [self.dataset[row] for row in rows], strict=True))


class _CollateWithIndex:
    def __init__(self, function: Callable[[list[Any]], Any]) -> None:
        self.function = function

    def __call__(self, items: list[tuple[Any, Any]]) -> tuple[Tensor | None, Any]:
        collated = self.function([item for _, item in items])
        try:
            return torch.tensor([operator.index(row) for row, _ in items]), collated
        except TypeError:  # a sampler of the user's own may ask for samples by something else than numbers
            return None, collated


def _with_index(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same DataLoader, its batches saying which samples they are of."""
    return DataLoader(
        _WithIndex(loader.dataset),  # type: ignore[arg-type]
        batch_sampler=loader.batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=_CollateWithIndex(loader.collate_fn),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
