"""Long tails: how often each class is seen, and sets cut so that few classes are frequent."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, DataError
from limbeck.data.loader import IndexedLoader
from limbeck.data.order import epoch_order


def tail_counts(most: int, classes: int, factor: float) -> Tensor:
    r"""Samples of each class of a long tail, :math:`n_c = \lfloor n_0\, r^{-c / (C - 1)} \rfloor`, at least 1.

    Args:
        most: :math:`n_0`, of the first class.
        classes: C.
        factor: r, how many times as often the first class is seen as the last.

    Source: Cui et al., Class-Balanced Loss, 2019, arXiv 1901.05555, as in everybody's CIFAR-LT.

    >>> tail_counts(500, 100, 100.0)[[0, 1, 50, 99]].tolist()
    [500, 477, 48, 5]
    """
    exponent = torch.arange(classes, dtype=torch.float64) / max(classes - 1, 1)
    # The small part keeps 500 / 100 at 5 where the power is a digit short.
    return (most * float(factor) ** -exponent + 1e-6).floor().long().clamp(min=1)


def class_counts(loader: IndexedLoader, who: str) -> Tensor:
    """How many samples of each class an epoch shows, ``[C]``.

    Raises:
        DataError: Not one class a sample.
    """
    labels, classes = loader.labels, loader.classes
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or classes is None:
        raise DataError(
            f"{who} counts the samples of each class",
            where="data.labels",
            found="none" if labels is None else f"{list(labels.shape)} {labels.dtype}, {classes} classes",
            wanted="[N] integers, of a known number of classes",
        )
    shown = labels.cpu() if loader.only is None else labels.cpu()[loader.only]
    return shown[shown >= 0].bincount(minlength=classes)


def long_tailed(loader: IndexedLoader, factor: float, who: str = "a long tail") -> IndexedLoader:
    """The same loader with epochs of a long tail: ever fewer samples of every further class.

    Classes are in the order of their numbers. Which samples stay is told by a hash of seed and id.

    Args:
        loader: Of a set with classes.
        factor: How many times as often the first class is seen as the last; a class that has not enough stays whole.
        who: Asks, for errors.

    Raises:
        ConfigError: A factor below 1.

    >>> from limbeck.data.resident import ResidentLoader
    >>> loader = ResidentLoader(torch.zeros(60, 2), torch.arange(60) % 3, batch_size=4, classes=3)
    >>> class_counts(long_tailed(loader, 4.0), "doctest").tolist()
    [20, 10, 5]
    """
    if not factor >= 1:
        raise ConfigError("the first class is the most frequent", where="imbalance", found=factor, wanted="1 or more")
    there = class_counts(loader, who)
    assert loader.labels is not None
    wanted = tail_counts(int(there.sum()) // len(there), len(there), factor)
    rows = torch.arange(loader.samples) if loader.only is None else loader.only
    rows = rows[epoch_order(len(rows), loader.seed, 0)]
    labels = loader.labels.cpu()[rows]
    kept = [rows[labels == c][: int(count)] for c, count in enumerate(wanted)]
    return loader.chosen(torch.cat(kept).sort().values)
