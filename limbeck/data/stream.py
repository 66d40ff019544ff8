"""Sets read sample by sample by worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import get_start_method
from torch.utils.data import DataLoader, Dataset, default_collate

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError, LimbeckError
from limbeck.core.hashing import key
from limbeck.data.augment import Augment, Shown
from limbeck.data.collate import part_of, to_batch
from limbeck.data.loader import IndexedLoader, Piece, join_pieces
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
    ``torch``, ``numpy`` and ``random`` are seeded with (seed, view, index), so that what the data set's own
    transforms draw is settled too, whatever the number of workers. With ``per_read`` they draw once for all views of a
    sample that a batch holds.

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
        views, per_read: See :class:`~limbeck.data.loader.IndexedLoader`.
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
        views: int | None = None,
        per_read: int = 1,
    ) -> None:
        super().__init__(
            len(dataset),
            labels,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            augment=augment or Augment(seed=seed),
            device=device,
            seed=seed,
            classes=classes,
            class_names=class_names,
            views=views,
            per_read=per_read,
        )
        self.dataset, self.collate_fn = dataset, collate_fn or default_collate
        self.workers = default_workers() if workers is None else workers
        example = self._read(self._items([(0, 0)]))
        images = isinstance(example.inputs, Tensor) and example.inputs.ndim == 4
        self.images = images and (example.inputs.dtype == torch.uint8 or self.augment.active)
        self.augment.check(example.inputs if isinstance(example.inputs, Tensor) else torch.empty(0), example.labels)

    def example(self, size: int = 2) -> Batch:
        asked = self._asked([(torch.arange(min(size, self.samples)), 0)])
        return self._finish(self._items(asked.items), asked)

    def read(self, wanted: Sequence[Sequence[Piece]]) -> Iterator[Batch]:
        asked = [self._asked(pieces) for pieces in wanted]
        loader = DataLoader(
            _Seeded(self.dataset, self.augment.seed),
            batch_sampler=[each.items for each in asked],
            num_workers=self.workers,
            collate_fn=_Collate(self.collate_fn),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # else a worker's seed is drawn from the training's generator
        )
        return (self._finish(items, each) for items, each in zip(loader, asked, strict=True))

    def _asked(self, pieces: Sequence[Piece]) -> _Asked:
        """What is read for a batch; with several views of a sample in it each image is read once."""
        index, shown, view = join_pieces([(own.cpu(), view) for own, view in pieces])
        rows = self.augment.reads(index, shown) if self.images else index.view(1, -1)
        flat, places = rows.flatten(), None
        if len(pieces) > 1:
            flat, places = flat.unique(return_inverse=True)
        return _Asked([(pieces[0][1], row) for row in flat.tolist()], rows, shown, view, places)

    def _items(self, items: list[tuple[int, int]]) -> Any:
        return _Collate(self.collate_fn)(_Seeded(self.dataset, self.augment.seed).__getitems__(items))

    def _read(self, collated: Any) -> Batch:
        if isinstance(collated, LimbeckError):
            raise collated
        return to_batch(collated)

    def _finish(self, collated: Any, asked: _Asked) -> Batch:
        batch = self._read(collated).to(self.device)
        if asked.places is not None:
            batch = part_of(batch, asked.places.to(self.device))
        rows = asked.rows.to(self.device, non_blocking=True)
        view = asked.view if isinstance(asked.view, int) else asked.view.to(self.device, non_blocking=True)
        if not self.images:
            return batch.replace(inputs=self._plain(batch.inputs), index=rows[0], view=view)
        inputs, labels = self.augment(batch.inputs, rows, asked.shown, batch.labels)
        return batch.replace(inputs=inputs, labels=labels, index=rows[0], view=view)


@dataclass
class _Asked:
    """What is read for one batch.

    Args:
        items: For each sample that is read the view whose randomness it is read with, and its row.
        rows: What enters the batch's views, ``[2**mixes, B]``.
        shown: The views, as the augmentation takes them.
        view: The same, as a batch tells them.
        places: Where the rows stand among the items; ``None``: they are the items.
    """

    items: list[tuple[int, int]]
    rows: Tensor
    shown: Shown
    view: int | Tensor
    places: Tensor | None


class _Seeded(Dataset[Any]):
    """Gives ``(index, sample)``, each sample drawn with randomness of its own."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[tuple[int, int]]) -> list[Any] | LimbeckError:
        items = []
        with OwnRandomness.kept():
            for view, row in rows:
                OwnRandomness.seed(key(_ITEMS, self.seed, view, row))
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
