"""Which samples of a pool without labels look like what a teacher knows; chosen anew in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.data.loader import IndexedLoader, Loader


def class_thresholds(counts: Tensor, cutoff: float = 0.95) -> Tensor:
    r"""How sure one must be of each class, :math:`\tau_c = \tau \frac{n_c}{2 - n_c}`, :math:`n_c` its share of the most
    frequent class's count: a class that is seldom predicted is believed sooner.

    Args:
        counts: ``[C]``: how often each class is predicted.
        cutoff: :math:`\tau`, of the most frequent.

    >>> class_thresholds(torch.tensor([10, 5, 0]))
    tensor([0.9500, 0.3167, 0.0000])
    """
    share = counts / counts.max().clamp(min=1)
    return cutoff * share / (2 - share)


def confident(logits: Tensor, cutoff: float = 0.95, least: int = 1) -> Tensor:
    """The rows whose likeliest class is likelier than its threshold.

    Args:
        logits: ``[N, C]``.
        cutoff: See :func:`class_thresholds`.
        least: Where fewer pass, so many that come nearest to passing.

    >>> confident(torch.tensor([[9.0, 0.0], [8.0, 0.0], [0.1, 0.0], [0.0, 0.1]]))
    tensor([0, 1, 3])
    """
    sure, named = logits.float().softmax(dim=1).max(dim=1)
    counts = torch.bincount(named, minlength=logits.shape[1])
    above = sure - class_thresholds(counts, cutoff)[named]
    rows = (above > 0).nonzero().flatten()
    return rows if len(rows) >= least else above.topk(min(least, len(above))).indices.sort().values


class Reselecting(Loader):
    """A pool of which each epoch shows those samples that are chosen when it begins.

    Epochs so differ in their numbers of steps; how many steps a training has is counted as if all were shown.

    Args:
        pool: All samples.
        choose: Gives the ids of an epoch that begins.
        chosen: Gives those of an epoch that goes on.

    >>> from limbeck.data.resident import ResidentLoader
    >>> pool = ResidentLoader(torch.zeros(8, 3), batch_size=2)
    >>> rows = torch.tensor([1, 3, 5, 6])
    >>> loader = Reselecting(pool, lambda: rows, lambda: rows)
    >>> torch.cat([batch.index for batch in loader.batches()]).sort().values
    tensor([1, 3, 5, 6])
    """

    def __init__(self, pool: IndexedLoader, choose: Callable[[], Tensor], chosen: Callable[[], Tensor]) -> None:
        self.pool, self._choose, self._chosen = pool, choose, chosen
        self.batch_size, self.samples, self.seed, self.task = pool.batch_size, pool.samples, pool.seed, pool.task
        self.labels, self.classes, self.class_names = None, pool.classes, pool.class_names

    @property
    def steps_per_epoch(self) -> int:
        return self.pool.steps_per_epoch

    def epoch(
        self, epoch: int, *, start_step: int = 0, rank: int = 0, world: int = 1, parts: int = 1
    ) -> Iterator[list[Batch]]:
        rows = self._chosen() if start_step else self._choose()
        return self.pool.chosen(rows).epoch(epoch, start_step=start_step, rank=rank, world=world, parts=parts)

    def example(self, size: int = 2) -> Batch:
        return self.pool.example(size)

    def describe(self) -> dict[str, Any]:
        return self.pool.describe()

    def plain(self) -> Iterator[Batch]:
        return self.pool.plain()
