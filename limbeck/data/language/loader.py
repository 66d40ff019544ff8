"""Batches of rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.hashing import key
from limbeck.data.augment import Augment
from limbeck.data.language.split import LanguageSplit
from limbeck.data.language.tokens import Tokens
from limbeck.data.loader import IndexedLoader, Piece, join_pieces
from limbeck.data.order import epoch_order

_BATCHES = 5  # keeps the order of batches apart from that of samples


class LanguageLoader(IndexedLoader):
    """Batches for causal language models, as :meth:`~limbeck.data.language.rows.Rows.batch` describes them.

    Every batch is a pure function of data, seed and epoch. Where rows are not packs, batches hold rows of like length
    (``Layout.bucket``): the epoch's random order is taken in stretches of so many batches, each stretch is sorted by
    length, and its batches are shuffled.

    Args:
        split: The rows.
        batch_size: Rows of an optimizer step.
        shuffle: Random order, new each epoch.
        drop_last: Leave out an incomplete last batch.
        augment: Nothing is done to texts; it is refused.
        device: Where batches go.
        seed: Of the order.
        views, per_read: See :class:`~limbeck.data.loader.IndexedLoader`; every view of a text is the same.

    Raises:
        DataError: Augmentation is asked for, or there are fewer rows than a batch has.

    >>> from limbeck.data.language import language_source
    >>> split = language_source(["To be, or not to be"] * 9, tokenizer="bytes", length=8, validation=0).train
    >>> batch = LanguageLoader(split, batch_size=4).example()
    >>> batch.inputs["input_ids"].shape, batch.labels[0, :3].tolist() == batch.inputs["input_ids"][0, 1:4].tolist()
    (torch.Size([2, 8]), True)
    """

    def __init__(
        self,
        split: LanguageSplit,
        *,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = True,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        views: int | None = None,
        per_read: int = 1,
    ) -> None:
        super().__init__(
            len(split),
            None,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            augment=augment or Augment(seed=seed),
            device=device,
            seed=seed,
            classes=split.class_count,
            class_names=split.classes,
            views=views,
            per_read=per_read,
        )
        self.split, self.rows, self.task, self.vocabulary = split, split.rows, split.task, split.vocabulary
        self.augment.check(split.rows.first, None)

    @property
    def tags(self) -> tuple[str, ...]:
        """Names of domains by the numbers in ``batch.extras["tag"]``."""
        return self.split.tags

    @property
    def tokenizers(self) -> tuple[Tokens, Tokens]:
        """The student's and the teacher's; they are one where the teacher has none of its own."""
        return self.split.tokens, self.split.teacher_tokens or self.split.tokens

    def read(self, wanted: Sequence[Sequence[Piece]]) -> Iterator[Batch]:
        return (self._read(pieces) for pieces in wanted)

    def example(self, size: int = 2) -> Batch:
        return self._read([(torch.arange(min(size, self.samples)), 0)])

    def order(self, epoch: int, device: torch.device | str = "cpu") -> Tensor:
        return self.grouped(super().order(epoch, device), epoch)

    def grouped(self, order: Tensor, epoch: int) -> Tensor:
        """An epoch's random order with rows of like length together, as far as its layout asks for that."""
        stretch = self.rows.layout.bucket * self.batch_size
        if not self.shuffle or self.rows.layout.pack or stretch <= self.batch_size:
            return order
        # The incomplete last batch is left out of it: whoever is in it is drawn from all rows alike.
        whole = len(order) // self.batch_size * self.batch_size
        own, rest = order[:whole], order[whole:]
        batch = torch.arange(whole, device=own.device) // stretch
        lengths = self.rows.lengths.to(own.device)[own]
        alike = own[(batch * (int(self.rows.lengths.max()) + 1) + lengths).argsort(stable=True)]
        batches = alike.view(-1, self.batch_size)
        mixed = epoch_order(len(batches), key(_BATCHES, self.seed), epoch, own.device)
        return torch.cat([batches[mixed].flatten(), rest])

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "language": {**self.split.settings, "layout": asdict(self.rows.layout)}}

    def _read(self, pieces: Sequence[Piece]) -> Batch:
        index, _, view = join_pieces([(rows.cpu(), view) for rows, view in pieces])
        batch = self.rows.batch(index)
        batch.view = view
        if self.device.type == "cuda":  # so that the copy does not wait
            batch = _pinned(batch)
        return batch.to(self.device)


def _pinned(batch: Batch) -> Batch:
    moved = {name: map_tensors(value, lambda t: t.pin_memory()) for name, value in vars(batch).items()}
    return Batch(**moved)
