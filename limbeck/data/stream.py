"""Sets read sample by sample by worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import get_start_method
from torch.utils.data import DataLoader, Dataset, default_collate

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError, LimbeckError
from limbeck.core.hashing import key
from limbeck.data.augment import Augment
from limbeck.data.collate import to_batch
from limbeck.data.loader import IndexedLoader
from limbeck.data.randomness import OwnRandomness

_ITEMS = 4  # keeps what a data set draws apart from orders and views


def default_workers() -> int:
    """Worker processes where none are asked for: a core each, at most 8, one left for training.

    None where processes are not forked, since then a data set and its transforms would have to be picklable.
    """
    return max(1, min(8, (os.cpu_count() or 2) - 1)) if get_start_method() == "fork" else 0


class StreamLoader(IndexedLoader):
    """Batches of a map-style data set, read by worker processes and augmented on the device.

    The order is that of (seed, epoch), and steps are skipped without reading. Before each sample the generators of
    ``torch``, ``numpy`` and ``random`` are seeded with (seed, epoch, index), so that what the data set's own
    transforms draw is settled too, whatever the number of workers.

    Args:
        dataset: Has ``len`` and gives a sample by index; what it may give, :func:`~limbeck.data.to_batch` says.
        batch_size: Samples of an optimizer step.
        labels: Of all samples, where known.
        shuffle: Random order, new each epoch.
        drop_last: Leave out an incomplete last batch.
        augment: Views of images ``[C, H, W]``; others are passed on as they are.
        device: Where batches go.
        seed: Of order and randomness.
        workers: Processes; ``None`` chooses (:func:`default_workers`), 0 reads in this one.
        collate_fn: Puts samples together; torch's own by default.
        classes: How many.
        class_names: Their names.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Tensor | None = None,
        *,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = True,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        workers: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        classes: int | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(
            len(dataset),
            labels,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            augment=augment or Augment(),
            device=device,
            seed=seed,
            classes=classes,
            class_names=class_names,
        )
        self.dataset, self.collate_fn = dataset, collate_fn or default_collate
        self.workers = default_workers() if workers is None else workers
        example = self._read(self._items(0, torch.arange(1)))
        images = isinstance(example.inputs, Tensor) and example.inputs.ndim == 4
        self.images = images and (example.inputs.dtype == torch.uint8 or self.augment.active)
        self.augment.check(example.inputs if isinstance(example.inputs, Tensor) else torch.empty(0), example.labels)

    def epoch(
        self, epoch: int, *, start_step: int = 0, rank: int = 0, world: int = 1, parts: int = 1
    ) -> Iterator[list[Batch]]:
        steps = list(self._steps(start_step, rank, world, parts))
        return self._run(epoch, steps, self.order(epoch))

    def example(self, size: int = 2) -> Batch:
        rows = self._rows(torch.arange(min(size, self.samples)), epoch=0)
        return self._finish(self._items(0, rows.flatten()), rows, epoch=0)

    def _run(self, epoch: int, steps: list[list[slice]], order: Tensor) -> Iterator[list[Batch]]:
        rows = [self._rows(order[part], epoch) for step in steps for part in step]
        loader = DataLoader(
            _Seeded(self.dataset, self.seed, epoch),
            batch_sampler=[r.flatten().tolist() for r in rows],
            num_workers=self.workers,
            collate_fn=_Collate(self.collate_fn),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # else a worker's seed is drawn from the training's generator
        )
        read, wanted = iter(loader), iter(rows)
        for step in steps:
            yield [self._finish(next(read), next(wanted), epoch) for _ in step]

    def _rows(self, index: Tensor, epoch: int) -> Tensor:
        return self.augment.reads(index, epoch) if self.images else index.view(1, -1)

    def _items(self, epoch: int, rows: Tensor) -> Any:
        return _Collate(self.collate_fn)(_Seeded(self.dataset, self.seed, epoch).__getitems__(rows.tolist()))

    def _read(self, collated: Any) -> Batch:
        if isinstance(collated, LimbeckError):
            raise collated
        return to_batch(collated)

    def _finish(self, collated: Any, rows: Tensor, epoch: int) -> Batch:
        batch = self._read(collated).to(self.device)
        rows = rows.to(self.device, non_blocking=True)
        if not self.images:
            return batch.replace(inputs=self._plain(batch.inputs), index=rows[0])
        inputs, labels = self.augment(batch.inputs, rows, epoch, batch.labels)
        return batch.replace(inputs=inputs, labels=labels, index=rows[0])


class _Seeded(Dataset[Any]):
    """Gives ``(index, sample)``, each sample drawn with randomness of its own."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.key = dataset, (_ITEMS, seed, epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> list[Any] | LimbeckError:
        items = []
        with OwnRandomness(0).active() as randomness:
            for row in rows:
                randomness.seed(key(*self.key, row))
                try:
                    items.append(self.dataset[row])
                except LimbeckError as error:
                    return error  # raised by the loader: through a worker process it would come out as a traceback
        return items


class _Collate:
    def __init__(self, function: Callable[[list[Any]], Any]) -> None:
        self.function = function

    def __call__(self, items: list[Any] | LimbeckError) -> Any:
        if isinstance(items, LimbeckError):
            return items
        try:
            return self.function(items)
        except (RuntimeError, TypeError) as error:
            return DataError(
                "these samples cannot be put together",
                where="data",
                found=str(error).splitlines()[0],
                remedy="let the data set give tensors of one shape, or give a collate_fn",
            )
