"""A trainer's data set and collator, looked at before training and walked through as limbeck does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.data.build import build_loader
from limbeck.data.loader import Loader
from limbeck.data.randomness import OwnRandomness
from limbeck.data.sources.split import DatasetSplit
from limbeck.integrations.rows import TextRows

EXAMPLE = 4  # samples of the dry run that sizes projectors
_SEED = 0  # of what a collator draws meanwhile

Collate = Callable[[list[Any]], Any]
Read = Callable[[Any], Batch]


def look(dataset: Any, collate: Collate, read: Read) -> tuple[dict[str, Any], Batch]:
    """The first few samples as a batch, and what names stand in them; nothing is drawn from anybody's randomness.

    Args:
        dataset: Of a trainer, with samples by index or one after the other.
        collate: Puts samples together.
        read: Makes a batch of that.

    Raises:
        DataError: There is no sample.
    """
    with OwnRandomness(_SEED).active():
        sized = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
        items = [dataset[i] for i in range(min(EXAMPLE, len(dataset)))] if sized else list(islice(dataset, EXAMPLE))
        if not items:
            raise DataError("there is no sample to look at", where="train_dataset", found=type(dataset).__name__)
        names = dict(items[0]) if isinstance(items[0], Mapping) else {}
        made = collate(items)
    names |= dict(made) if isinstance(made, Mapping) else {}
    return names, read(made)


def walk(dataset: Any, collate: Collate, read: Read, batch_size: int, task: str) -> Loader:
    """A limbeck loader of the same batches, in order.

    Raises:
        DataError: Samples cannot be asked for by index.
    """
    if isinstance(dataset, TextRows):
        return build_loader(dataset.split, batch_size=batch_size, train=False)
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset):
        raise DataError(
            "this data set's samples cannot be asked for by index", where="train_dataset", found=type(dataset).__name__
        )
    split = DatasetSplit(dataset, lambda items: read(collate(items)), labels=labels_of(dataset), task=task)
    return build_loader(split, batch_size=batch_size, train=False, resident=False, workers=0)


def labels_of(dataset: Any) -> Tensor | None:
    """Integer labels ``[N]`` of a data set of the ``datasets`` library, where a column holds them."""
    for name in ("labels", "label"):
        if name in (getattr(dataset, "column_names", None) or ()):
            feature = dataset.features[name]
            if getattr(feature, "dtype", "").startswith("int"):
                return torch.as_tensor(dataset.with_format(None)[name][:])
    return None
