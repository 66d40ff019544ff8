"""limbeck's data as a data set and a collator, and a user's own with numbers, for trainers of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from limbeck.core.batch import Batch
from limbeck.data.language.rows import Rows
from limbeck.data.language.split import LanguageSplit
from limbeck.integrations.reading import written


@dataclass(frozen=True)
class Row:
    """One row of texts, not yet made."""

    rows: Rows
    index: int


class TextRows(Dataset[Row]):
    """The rows of a language split; :class:`Collator` makes batches of them.

    Args:
        split: Texts that were cut, packed and, for two tokenizers, aligned by ``limbeck.data.language``.
    """

    def __init__(self, split: LanguageSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Row:
        return Row(self.split.rows, int(index))


class Numbered(Dataset[dict[str, Any]]):
    """A user's data set whose samples, dicts, also say which they are."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "index": int(index)}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        many = getattr(self.dataset, "__getitems__", None)
        found = many(indices) if many else [self.dataset[index] for index in indices]
        return [{**sample, "index": int(index)} for sample, index in zip(found, indices, strict=True)]


class Collator:
    """A user's collator that can also put rows of limbeck together, and may itself make a ``Batch``.

    Args:
        collate: The user's; what it has is this one's too.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, features: Sequence[Any]) -> Any:
        if isinstance(features[0], Row):
            return written(features[0].rows.batch(torch.tensor([row.index for row in features])))
        made = self.collate(features)
        return written(made) if isinstance(made, Batch) else made

    def __getattr__(self, name: str) -> Any:
        if name == "collate":  # before it is there, while a copy of this is made
            raise AttributeError(name)
        return getattr(self.collate, name)


def as_rows(dataset: Any) -> Any:
    """Splits of texts as data sets, also in a dict; anything else as it is."""
    if isinstance(dataset, dict):
        return {name: as_rows(part) for name, part in dataset.items()}
    return TextRows(dataset) if isinstance(dataset, LanguageSplit) else dataset


def numbered(dataset: Any) -> Any:
    """A data set whose samples say which they are, in ``index``; one that cannot, or does so already, as it is."""
    if isinstance(dataset, (TextRows, IterableDataset)) or not hasattr(dataset, "__getitem__") or not len(dataset):
        return dataset
    if "index" in dataset[0]:
        return dataset
    plain = hasattr(dataset, "add_column") and dataset.format["type"] != "custom"  # a transform would drop the column
    return dataset.add_column("index", list(range(len(dataset)))) if plain else Numbered(dataset)
