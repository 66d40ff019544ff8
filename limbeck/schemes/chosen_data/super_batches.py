"""Batches of which a part is learned from: some of their samples, those of all ranks, and each rank's part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.ranks import Rows, mean_over_ranks
from limbeck.data.order import cut


def picked(batch: Batch, rows: Tensor) -> Batch:
    """Some samples of a batch.

    >>> picked(Batch(torch.arange(3)), torch.tensor([2, 0])).inputs
    tensor([2, 0])
    """
    return _each(batch, lambda value: value[rows])


def gathered(batch: Batch, rows: Rows) -> Batch:
    """The batch of all ranks.

    Args:
        batch: This rank's.
        rows: How many samples each has.

    Raises:
        DataError: Samples are of another size elsewhere.

    >>> gathered(Batch(torch.zeros(2, 3)), Rows((2,))).size
    2
    """
    if len(rows.sizes) == 1:
        return batch

    def all_of(value: Tensor) -> Tensor:
        size = torch.tensor(value.shape[1:], dtype=torch.float32, device=value.device)
        if not torch.equal(mean_over_ranks(size), size):
            found, remedy = list(value.shape), "give samples of one size, such as texts filled up to one length"
            raise DataError("a batch of all ranks cannot be put together", where="data", found=found, remedy=remedy)
        return rows.gather(value)

    return _each(batch, all_of)


def dealt(count: int, rows: Rows) -> slice:
    """Which of so many samples that were picked from the batch of all ranks are this one's.

    Raises:
        DataError: There is none for it.

    >>> dealt(5, Rows((8, 8), 1))
    slice(3, 5, None)
    """
    own = cut(count, rows.rank, len(rows.sizes), 1)
    if not own:
        raise DataError(
            "fewer samples are picked of a batch than there are processes",
            where="data.batch_size",
            found=f"{count} picked for {len(rows.sizes)} processes",
            remedy="take larger batches, or leave fewer out",
        )
    return own[0]


def device_of(batch: Batch) -> torch.device:
    """Where a batch's inputs are."""
    found: list[Tensor] = []
    map_tensors(batch.inputs, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    if not found:
        raise ConfigError("the inputs hold no tensor", where="batch.inputs")
    return found[0].device


def _each(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """A batch, of whose every tensor with a row a sample something is made."""
    size = batch.size

    def made(value: Tensor) -> Tensor:
        return function(value) if value.ndim and len(value) == size else value

    names = ("inputs", "labels", "index", "mask", "teacher_inputs", "extras", "view")
    return batch.replace(**{name: map_tensors(getattr(batch, name), made) for name in names})
