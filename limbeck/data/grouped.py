"""Batches of one group each: of one task, one domain or one client at a time, in a random order of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import draw_bits, key, key_tensor
from limbeck.data.loader import IndexedLoader, Piece
from limbeck.data.order import epoch_order

_GROUPS = 14  # keeps these draws apart from others


class GroupedLoader(IndexedLoader):
    """The samples of a loader in batches that hold one group each; groups come as often as they are large.

    The last batch of a group is filled up with the first samples of its order.

    Args:
        inner: Whose samples; its batch size, views and augmentation are kept.
        group: ``[N]`` the group of each sample by id, negative where a sample is left out.

    Raises:
        ConfigError: The loader mixes samples, or shows several views of one in a batch.
        DataError: No group has a sample, or samples are not grouped as a whole.

    >>> from limbeck.data.resident import ResidentLoader
    >>> loader = ResidentLoader(torch.zeros(7, 3), batch_size=2, shuffle=True)
    >>> group = torch.tensor([0, 1, 0, 1, 1, 1, -1])
    >>> [group[batch.index].tolist() for batch in GroupedLoader(loader, group).batches()]
    [[1, 1], [1, 1], [0, 0]]
    """

    def __init__(self, inner: IndexedLoader, group: Tensor) -> None:
        vars(self).update(vars(inner))
        if inner.augment.mixes or inner.per_read > 1:
            raise ConfigError(
                "a batch of one group holds each of its samples once, and mixes none with others",
                where="data",
                found="mixing augmentations" if inner.augment.mixes else f"per_read {inner.per_read}",
            )
        rows = torch.arange(inner.samples) if inner.only is None else inner.only
        if group.shape != (inner.samples,):
            raise DataError("one group a sample", where="group", found=list(group.shape), wanted=[inner.samples])
        self.inner, self.group, own = inner, group, group.cpu()[rows]
        self.groups: Sequence[Tensor] = [rows[own == number] for number in own[own >= 0].unique()]
        if not self.groups:
            raise DataError("no sample is of a group", where="group", found="none")

    @property
    def shown(self) -> int:
        size = self.batch_size
        return sum(-(-len(rows) // size) * size for rows in self.groups)

    def order(self, epoch: int, device: torch.device | str = "cpu") -> Tensor:
        """The samples of an epoch: whole batches of one group, these in random order."""
        size, batches = self.batch_size, list[Tensor]()
        for number, rows in enumerate(self.groups):
            own = epoch_order(len(rows), key(_GROUPS, self.seed, number), epoch) if self.shuffle else slice(None)
            row = rows[own]
            count = -(-len(row) // size) * size
            batches.append(row.repeat(-(-count // len(row)))[:count].view(-1, size))
        found = torch.cat(batches)
        if self.shuffle:
            bits = draw_bits(key_tensor([key(_GROUPS, self.seed, epoch)]), torch.arange(len(found))).squeeze(1)
            found = found[bits.argsort(stable=True)]
        return found.flatten().to(device)

    def chosen(self, rows: Tensor) -> GroupedLoader:
        return GroupedLoader(self.inner.chosen(rows), self.group)

    def bare(self) -> IndexedLoader:
        return self.inner.bare()

    def read(self, wanted: Sequence[Sequence[Piece]]) -> Iterator[Batch]:
        return self.inner.read(wanted)

    def example(self, size: int = 2) -> Batch:
        return self.inner.example(size)

    def describe(self) -> dict[str, Any]:
        return {**self.inner.describe(), "groups": [len(rows) for rows in self.groups]}
