"""Small sets, held on the device as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch, batch_size_of, map_tensors
from limbeck.data.augment import Augment
from limbeck.data.loader import IndexedLoader, Piece, join_pieces


class ResidentLoader(IndexedLoader):
    """Batches gathered, augmented and normalised on the device, each by a few operations on all of its samples.

    Args:
        inputs: ``[N, C, H, W]`` images as bytes or floats, or any tensors (or dict or tuple of them) with a row a
            sample; only images are augmented, only images and feature vectors ``[N, D]`` normalised.
        labels: ``[N, ...]``.
        batch_size: Samples of an optimizer step.
        shuffle: Random order, new each epoch.
        drop_last: Leave out an incomplete last batch.
        augment: Views; see :class:`~limbeck.data.Augment`.
        device: Where everything lies.
        seed: Of the order.
        classes: How many.
        class_names: Their names.
        views, per_read: See :class:`~limbeck.data.loader.IndexedLoader`.

    Example:
        >>> loader = ResidentLoader(torch.zeros(10, 3), torch.arange(10), batch_size=4)
        >>> len(loader), [b.size for b in next(loader.epoch(0, parts=2))]
        (2, [2, 2])
    """

    def __init__(
        self,
        inputs: Any,
        labels: Tensor | None = None,
        *,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = True,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        classes: int | None = None,
        class_names: tuple[str, ...] | None = None,
        views: int | None = None,
        per_read: int = 1,
    ) -> None:
        super().__init__(
            batch_size_of(inputs),
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
        self.inputs = map_tensors(inputs, lambda t: t.to(self.device))
        self._labels = None if labels is None else labels.to(self.device)
        self.images = isinstance(inputs, Tensor) and inputs.ndim == 4
        self.augment.check(inputs if isinstance(inputs, Tensor) else torch.empty(0), labels)

    def read(self, wanted: Sequence[Sequence[Piece]]) -> Iterator[Batch]:
        return (self._batch(pieces) for pieces in wanted)

    def example(self, size: int = 2) -> Batch:
        return self._batch([(torch.arange(min(size, self.samples), device=self.device), 0)])

    def _batch(self, pieces: Sequence[Piece]) -> Batch:
        index, shown, view = join_pieces(pieces)
        if not self.images:
            labels = None if self._labels is None else self._labels[index]
            inputs = self._plain(map_tensors(self.inputs, lambda t: t.index_select(0, index)))
            return Batch(inputs, labels, index, view=view)
        rows = self.augment.reads(index, shown)
        read = rows.flatten()
        labels = None if self._labels is None else self._labels[read]
        inputs, labels = self.augment(self.inputs.index_select(0, read), rows, shown, labels)
        return Batch(inputs, labels, index, view=view)
