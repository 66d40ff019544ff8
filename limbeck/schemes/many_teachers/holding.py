"""Samples held out of the training set, for schemes that judge their own steps."""

from __future__ import annotations

import torch

from limbeck.core.errors import ConfigError
from limbeck.core.hashing import draw_bits, key, key_tensor
from limbeck.data.loader import IndexedLoader, Loader


def held_out(train: Loader | None, share: float, draw: int, size: int, who: str) -> tuple[Loader, Loader]:
    """The training set without some samples, and these, in order and without augmentation.

    Which they are is told by a hash of their ids, so they are the same in every run.

    Args:
        train: What is learned from.
        share: Of the samples, held out; one at least.
        draw: Keeps this draw apart from others.
        size: Of a batch of those held out, at most.
        who: Asks, for the error.

    Raises:
        ConfigError: The samples of this data have no ids.

    >>> from limbeck.data.resident import ResidentLoader
    >>> rest, held = held_out(ResidentLoader(torch.zeros(20, 3), batch_size=4), 0.2, 1, 3, "doctest")
    >>> [len(batch.index) for batch in held.batches()], sum(len(batch.index) for batch in rest.batches())
    ([3, 1], 16)
    """
    if not isinstance(train, IndexedLoader):
        raise ConfigError(
            "this scheme holds samples out of the training set, and these data have no ids",
            where=f"scheme {who}",
            found=type(train).__name__,
            remedy="give tensors, a Dataset or a source",
        )
    rows = torch.arange(train.samples) if train.only is None else train.only
    bits = draw_bits(key_tensor([key(draw)]), rows).squeeze(1)
    held = torch.zeros(len(rows), dtype=torch.bool)
    held[bits.argsort(stable=True)[: max(1, round(share * len(rows)))]] = True
    judges = train.bare().chosen(rows[held])
    judges.batch_size = min(size, int(held.sum()))
    return train.chosen(rows[~held]), judges
