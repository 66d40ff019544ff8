"""Who owns which samples."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import key
from limbeck.data.loader import IndexedLoader, Loader

_SPLIT = 61  # keeps these draws apart from others
_TRIES = 2000


def dirichlet_rows(
    labels: Tensor | None, rows: Tensor, clients: int, alpha: float | None, seed: int, least: int = 10
) -> list[Tensor]:
    r"""Split samples among owners, unlike in their classes.

    .. math:: q_c \sim \mathrm{Dir}(\alpha, \dots, \alpha) \quad\text{for each class } c

    Owner k gets the share :math:`q_{c,k}` of class c. All is drawn again until everybody has ``least`` samples.

    Args:
        labels: Of the whole set, by id ``[N]``.
        rows: The ids that are split ``[R]``.
        clients: Owners.
        alpha: 0.1: most have a few classes; 100: all are alike. ``None``: equal parts, whatever the labels.
        seed: Of the draw.
        least: Samples of everybody.

    Raises:
        DataError: There are no class labels, or no draw gives everybody so many.

    Source: Yurochkin et al., arXiv 1905.12022, and Li et al., arXiv 2102.02079, who also draw until each has 10.

    >>> parts = dirichlet_rows(torch.arange(60) % 3, torch.arange(60), 4, 1.0, seed=0, least=2)
    >>> sorted(torch.cat(parts).tolist()) == list(range(60))
    True
    """
    dice = np.random.Generator(np.random.PCG64(key(_SPLIT, seed)))
    if clients * least > len(rows):
        raise DataError(
            "there are not enough samples for all clients",
            where="scheme.count",
            found=f"{len(rows)} samples for {clients} clients",
            wanted=f"{least} for each",
            remedy="lower count, least or public",
        )
    if alpha is None:
        return [
            part.sort().values for part in rows[torch.from_numpy(dice.permutation(len(rows)))].tensor_split(clients)
        ]
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        raise DataError(
            "a Dirichlet split goes by classes, and these data have none",
            where="scheme.alpha",
            found=alpha,
            remedy="set alpha: null for equal parts",
        )
    own = labels[rows].numpy()
    for _ in range(_TRIES):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for c in np.unique(own):
            places = dice.permutation(np.flatnonzero(own == c))
            cuts = (np.cumsum(dice.dirichlet(np.full(clients, alpha)))[:-1] * len(places)).astype(int)
            for part, piece in zip(parts, np.split(places, cuts), strict=True):
                part.append(piece)
        if min(sum(map(len, part)) for part in parts) >= least:
            return [rows[torch.from_numpy(np.sort(np.concatenate(part)))] for part in parts]
    raise DataError(
        "no draw gives every client enough samples",
        where="scheme.alpha",
        found=f"alpha {alpha}, {clients} clients, {len(rows)} samples",
        wanted=f"{least} for each",
        remedy="raise alpha, or lower least or count",
    )


def indexed(train: Loader | None, who: str) -> IndexedLoader:
    """The training data, or an error where their samples have no ids."""
    if not isinstance(train, IndexedLoader):
        raise ConfigError(
            "this scheme splits the training set among owners, and these data have no ids",
            where=f"scheme {who}",
            found=type(train).__name__,
            remedy="give tensors, a Dataset or a source",
        )
    return train


def owned(train: IndexedLoader, rows: Tensor, least: int | None = None) -> IndexedLoader:
    """Epochs of some samples alone; who has less than a batch has a batch of all there is.

    Args:
        train: Of the whole set.
        rows: Whose.
        least: Batches are of so many samples at most, in the place of the loader's size.
    """
    loose = copy.copy(train)
    loose.drop_last = False
    found = loose.chosen(rows)
    size = train.batch_size if least is None else least
    found.batch_size = min(size, found.shown)
    found.drop_last = train.drop_last
    return found
