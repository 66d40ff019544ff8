"""Which samples each step, rank and micro-batch sees: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.core.hashing import draw_bits, key, key_tensor

_ORDER, _SPLIT = 2, 3  # keep the draws of orders and of held-out samples apart from those of views


def epoch_order(samples: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The samples in an epoch's random order ``[N]``: sorted by the hash of (seed, epoch, sample).

    No generator is asked, so the order is the same on every device, rank and version of PyTorch.
    """
    return _shuffled(samples, key(_ORDER, seed, epoch), device)


def _shuffled(samples: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    bits = draw_bits(key_tensor([key], device), torch.arange(samples, device=device))
    return bits.squeeze(1).argsort(stable=True)


def cut(size: int, rank: int, world: int, parts: int) -> list[slice]:
    """Where a step's batch is cut for one rank: at most ``parts`` slices, none of them empty.

    Over all ranks the ``world * parts`` slices follow each other, differ by one sample at most, and cover the batch.

    >>> cut(10, rank=1, world=2, parts=2)
    [slice(6, 8, None), slice(8, 10, None)]
    """
    short, longer = divmod(size, world * parts)
    starts = [piece * short + min(piece, longer) for piece in range(rank * parts, (rank + 1) * parts + 1)]
    return [slice(a, b) for a, b in pairwise(starts) if b > a]


def steps_in(samples: int, batch_size: int, drop_last: bool) -> int:
    """Optimizer steps of one epoch."""
    return samples // batch_size if drop_last else -(-samples // batch_size)


def step_slices(
    samples: int, batch_size: int, drop_last: bool, *, start_step: int, rank: int, world: int, parts: int
) -> Iterator[list[slice]]:
    """For each step from ``start_step`` on, the places in the epoch's order of one rank's micro-batches."""
    for step in range(start_step, steps_in(samples, batch_size, drop_last)):
        first = step * batch_size
        size = min(batch_size, samples - first)
        yield [slice(first + s.start, first + s.stop) for s in cut(size, rank, world, parts)]


def check_place(start_step: int, steps: int | None, rank: int, world: int, parts: int) -> None:
    """Raise where an epoch is asked for with numbers that cannot be."""
    if not 0 <= rank < world:
        raise ConfigError("no such rank", where="loader.epoch", found=f"rank {rank} of {world}")
    if parts < 1:
        raise ConfigError("a step has at least one part", where="loader.epoch", found=f"parts={parts}")
    if start_step < 0 or (steps is not None and start_step > steps):
        raise ConfigError(
            "no such step", where="loader.epoch", found=f"start_step={start_step}", wanted=f"0 to {steps}"
        )


def hold_out(labels: Tensor | int, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Choose samples to set aside: a fixed fraction of every class, by a hash of (seed, sample).

    Args:
        labels: ``[N]`` classes, or the number of samples where there are no classes to keep in balance.
        fraction: Of each class, rounded; a class keeps at least one sample.
        seed: Another seed holds out others.

    Returns:
        The samples that stay and those held out, each in ascending order. At least one is held out.

    Example:
        >>> stay, held = hold_out(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.25)
        >>> len(stay), len(held)
        (6, 2)
    """
    if isinstance(labels, int):
        labels = torch.zeros(labels, dtype=torch.long)
    count = len(labels)
    if not 0 < fraction < 1 or count < 2:
        raise ConfigError(
            "no samples can be held out",
            where="validation",
            found=f"fraction {fraction} of {count} samples",
            wanted="a fraction between 0 and 1 of at least 2 samples",
        )
    shuffled = _shuffled(count, key(_SPLIT, seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    _, sizes = labels[by_class].unique_consecutive(return_counts=True)
    place = torch.arange(count) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    quota = (sizes * fraction).round().long().minimum(sizes - 1)
    held = by_class[place < quota.repeat_interleave(sizes)]
    if not len(held):  # every class is too small for its share
        held = shuffled[: max(1, round(count * fraction))]
    stays = torch.ones(count, dtype=torch.bool)
    stays[held] = False
    return stays.nonzero().flatten(), held.sort().values
