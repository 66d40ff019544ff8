"""Batches without data: what a scheme that makes its own inputs walks through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.data.augment import Augment
from limbeck.data.loader import IndexedLoader, Loader, Piece, join_pieces


class BlankLoader(IndexedLoader):
    """As many steps and samples a batch as another loader's, but every input is zero and there are no labels.

    A scheme fills them by ``Distiller.made``. Of the other loader's data nothing but the shape of an input, the numbers
    of samples and classes and the normalisation is used: no sample is read after this.

    Args:
        loader: Of images or vectors.
        samples: Of an epoch; default a batch for each of the loader's steps.

    Raises:
        DataError: Inputs are no floating-point tensors.

    >>> from limbeck.data.resident import ResidentLoader
    >>> loader = BlankLoader(ResidentLoader(torch.rand(10, 1, 8, 8), torch.arange(10), batch_size=4))
    >>> [(batch.inputs.abs().sum().item(), batch.labels) for batch in loader.batches()]
    [(0.0, None), (0.0, None)]
    """

    def __init__(self, loader: Loader, samples: int | None = None) -> None:
        inputs = loader.example(1).inputs
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise DataError(
                "only images and vectors can be made from nothing",
                where="data.source",
                found=type(inputs).__name__,
                wanted="floating-point tensors",
            )
        size = loader.batch_size or 1
        super().__init__(
            samples if samples is not None else max(1, loader.steps_per_epoch or 1) * size,
            None,
            batch_size=size,
            shuffle=False,
            drop_last=True,
            augment=Augment(()),
            device=inputs.device,
            seed=loader.seed,
            classes=loader.classes,
            class_names=loader.class_names,
        )
        self.task = loader.task
        self.shape = inputs.shape[1:]
        known = getattr(loader, "augment", None)
        self.normalise = None if known is None else known.normalise

    def read(self, wanted: Sequence[Sequence[Piece]]) -> Iterator[Batch]:
        return (self._batch(pieces) for pieces in wanted)

    def example(self, size: int = 2) -> Batch:
        return self._batch([(torch.arange(min(size, self.samples), device=self.device), 0)])

    def _batch(self, pieces: Sequence[Piece]) -> Batch:
        index, _, view = join_pieces(pieces)
        return Batch(torch.zeros(len(index), *self.shape, device=self.device), None, index, view=view)
