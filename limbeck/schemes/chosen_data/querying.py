"""Which samples are worth a label: by what a model says and feels of them, beside those that have one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.data.loader import IndexedLoader, Loader, Piece
from limbeck.data.order import check_place, cut, epoch_order


def k_center_greedy(points: Tensor, centres: Tensor, budget: int) -> Tensor:
    r"""Again and again the point that is farthest from all centres, which is one from then on.

    .. math:: x^* = \arg\max_{x} \min_{s \in S} \| x - s \|_2

    Args:
        points: ``[N, D]``.
        centres: ``[M, D]``: S in the beginning; none: the first point is the one farthest from the mean.
        budget: How many are taken, all at most.

    Returns:
        Rows in the order in which they were taken.

    Source: Sener and Savarese, "Active Learning for Convolutional Neural Networks", 2018, arXiv 1708.00489.

    >>> k_center_greedy(torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]]), torch.tensor([[1.0, 0.0]]), 2)
    tensor([2, 1])
    """
    points = points.float()
    if not len(centres):
        centres = points.mean(dim=0, keepdim=True)
    near = torch.cat([torch.cdist(part, centres.float()).amin(dim=1) for part in points.split(4096)])
    return farthest(lambda row: (points - points[row]).norm(dim=1), near, budget)


def farthest(distances: Callable[[Tensor], Tensor], near: Tensor, budget: int) -> Tensor:
    """The greedy choice itself.

    Args:
        distances: Of all points to the one in this row, ``[N]``.
        near: Of each point to the nearest centre in the beginning, ``[N]``.
        budget: How many are taken, all at most.
    """
    taken = torch.zeros(len(near), dtype=torch.bool, device=near.device)
    rows = []
    for _ in range(min(budget, len(near))):
        row = near.masked_fill(taken, -torch.inf).argmax()
        taken[row] = True
        rows.append(row)
        near = torch.minimum(near, distances(row))
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.long)


def badge(probabilities: Tensor, features: Tensor, budget: int) -> Tensor:
    r"""Samples whose gradients of the last layer, :math:`(\hat y - p) \otimes h`, are far apart by their angles; the
    longest first. The products are not made: :math:`\langle a \otimes h, b \otimes g \rangle = (a \cdot b)(h \cdot g)`.

    Args:
        probabilities: ``[N, C]``.
        features: ``[N, D]``, what enters the last layer.
        budget: How many.

    >>> badge(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.45, 0.55]]), torch.ones(3, 2), 1)
    tensor([2])
    """
    error = F.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]) - probabilities
    length = error.norm(dim=1) * features.norm(dim=1)
    error, feature = F.normalize(error, dim=1), F.normalize(features, dim=1)

    def apart(row: Tensor) -> Tensor:
        return 1 - (error @ error[row]) * (feature @ feature[row])

    first = length.argmax()
    near = apart(first).index_fill(0, first, torch.inf)
    return farthest(apart, near, budget)


def balanced(named: Tensor, known: Tensor, order: Tensor, budget: int) -> Tensor:
    r"""Samples of the classes that few labels are of, as predicted: shares go by :math:`1 / (n_c + 1)`.

    Args:
        named: ``[N]`` predicted classes.
        known: ``[C]``, how many labels of each class there are.
        order: Of the samples, at random; the first of a class are taken.
        budget: How many.

    >>> balanced(torch.tensor([0, 0, 1, 1]), torch.tensor([3, 0]), torch.arange(4), 2)
    tensor([2, 3])
    """
    there = torch.bincount(named, minlength=len(known)) > 0
    weight = there / (known + 1.0)
    quota = (budget * weight / weight.sum()).floor().long()
    rest = budget - int(quota.sum())
    quota[weight.argsort(descending=True, stable=True)[: min(rest, int(there.sum()))]] += 1
    of = named[order]
    place = (F.one_hot(of, len(known)).cumsum(dim=0) - 1).gather(1, of.unsqueeze(1)).squeeze(1)
    first = place >= quota[of]  # False sorts before True: those within their quota, then all others
    return order[first.int().argsort(stable=True)][:budget]


class Halves(Loader):
    """Steps of which one half have labels and the other have none, whichever samples are shown them.

    Args:
        whole: All samples.
        labelled: Ids of those whose label is told; all others' are hidden.

    >>> from limbeck.data.resident import ResidentLoader
    >>> whole = ResidentLoader(torch.zeros(12, 3), torch.arange(12) % 3, batch_size=4)
    >>> [sorted(batch.labels.tolist()) for batch in Halves(whole, torch.tensor([1, 5])).batches()]
    [[-1, -1, 1, 2], [-1, -1, 1, 2], [-1, -1, 1, 2]]
    """

    def __init__(self, whole: IndexedLoader, labelled: Tensor) -> None:
        self.whole, self.labelled = whole, labelled.cpu()
        known = torch.zeros(whole.samples, dtype=torch.bool)
        known[self.labelled] = True
        pool = torch.arange(whole.samples) if whole.only is None else whole.only
        assert whole.labels is not None
        self.rest = pool[~known[pool]]
        self.labels = whole.labels.cpu().masked_fill(~known, -1)
        self._known = self.labels.to(whole.device)
        self.batch_size, self.samples, self.seed = whole.batch_size, whole.samples, whole.seed
        self.classes, self.class_names, self.task = whole.classes, whole.class_names, whole.task

    @property
    def steps_per_epoch(self) -> int:
        return self.whole.steps_per_epoch

    def epoch(
        self, epoch: int, *, start_step: int = 0, rank: int = 0, world: int = 1, parts: int = 1
    ) -> Iterator[list[Batch]]:
        check_place(start_step, self.steps_per_epoch, rank, world, parts)
        first = epoch * self.steps_per_epoch
        steps = range(first + start_step, first + self.steps_per_epoch)
        wanted = [[p for p in self._pieces(step, rank, world, parts) if p] for step in steps]
        read = self.whole.read([self._there(pieces) for step in wanted for pieces in step])
        for step in wanted:
            yield [self._hidden(next(read)) for _ in step]

    def _pieces(self, step: int, rank: int, world: int, parts: int) -> list[list[Piece]]:
        """What stands in each part of a step."""
        size = self.whole.batch_size or 1
        many = size if not len(self.rest) else size - size // 2
        found: list[list[Piece]] = [[] for _ in range(parts)]
        for rows, number in ((self.labelled, many), (self.rest, size - many)):
            for own, part in zip(found, cut(number, rank, world, parts), strict=False):
                own += endless(rows, self.seed, step * number + part.start, step * number + part.stop)
        return found

    def _there(self, pieces: list[Piece]) -> list[Piece]:
        return [(rows.to(self.whole.device), self.whole.view_of(view)) for rows, view in pieces]

    def _hidden(self, batch: Batch) -> Batch:
        return batch.replace(labels=self._known[batch.require("index").to(self._known.device)])

    def example(self, size: int = 2) -> Batch:
        return self._hidden(self.whole.example(size))

    def plain(self) -> Iterator[Batch]:
        return (self._hidden(batch) for batch in self.whole.plain())

    def describe(self) -> dict[str, Any]:
        digest = hashlib.blake2b(self.labelled.long().contiguous().numpy().tobytes(), digest_size=8).hexdigest()
        return {**self.whole.describe(), "labelled": f"{len(self.labelled)} {digest}"}


def endless(rows: Tensor, seed: int, start: int, stop: int) -> list[Piece]:
    """Places of an endless row in which all of these follow one another in ever new orders, pass after pass.

    >>> (first, view), (second, later) = endless(torch.tensor([4, 8]), 0, 1, 3)
    >>> len(first), view, len(second), later
    (1, 0, 1, 1)
    """
    count, found = len(rows), []
    while start < stop:
        number, at = divmod(start, count)
        last = min(stop - start + at, count)
        found.append((rows[epoch_order(count, seed, number)[at:last]], number))
        start += last - at
    return found
