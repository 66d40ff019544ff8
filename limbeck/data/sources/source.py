"""A source of data: up to three splits, and how they came about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from limbeck.core.errors import DataError
from limbeck.data.order import hold_out
from limbeck.data.sources.split import Split, StreamSplit

SPLITS = ("train", "validation", "test")
VALIDATION = 0.1  # the fraction of the training samples held out where a source has no validation split

_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}


def split_name(name: str) -> str | None:
    """The split that a file, folder or key called so holds, or ``None``.

    >>> split_name("val"), split_name("train"), split_name("labels")
    ('validation', 'train', None)
    """
    name = _ALIASES.get(name.lower(), name.lower())
    return name if name in SPLITS else None


@dataclass(frozen=True, eq=False)
class DataSource:
    """Splits of one task.

    Args:
        name: For reports.
        train: What is learned from.
        validation: What decisions are made on, such as which checkpoint is best.
        test: What is reported, and nothing is decided on.
        note: How the splits were made, where that was not by the source itself.
    """

    name: str
    train: Split
    validation: Split | None = None
    test: Split | None = None
    note: str = ""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes; numbers where they have no names."""
        count = self.train.class_count
        return self.train.classes or (None if count is None else tuple(str(c) for c in range(count)))

    @property
    def task(self) -> str:
        """What the labels mean; see :data:`limbeck.data.TASKS`."""
        return self.train.task

    @property
    def samples(self) -> dict[str, int | None]:
        """Samples in each split there is; ``None`` where they cannot be counted beforehand."""
        return {name: split.samples for name in SPLITS if (split := getattr(self, name)) is not None}

    def split(self, name: str) -> Split:
        """A split by name, or an error that says which there are."""
        split = getattr(self, name) if name in SPLITS else None
        if split is None:
            raise DataError(
                "there is no such split", where=self.name, found=repr(name), wanted=f"one of {', '.join(self.samples)}"
            )
        return split

    def describe(self) -> dict[str, Any]:
        """Plain facts for a report or a checkpoint."""
        return {"name": self.name, "samples": self.samples, "classes": self.classes, "note": self.note}


def complete(
    name: str,
    splits: dict[str, Split],
    *,
    test: float = 0.0,
    validation: float = VALIDATION,
    seed: int = 0,
    note: str = "",
) -> DataSource:
    """Make a source of what was found, and hold out test and validation splits from train where none were.

    Args:
        name: Of the source.
        splits: By name; ``train`` must be there.
        test: Fraction of every class to hold out for test; 0 holds out nothing.
        validation: Fraction of every class of the rest to hold out for validation.
        seed: Of the choice.
        note: How the splits were made so far.
    """
    if "train" not in splits:
        raise DataError("there is no training split", where=name, found=", ".join(splits) or "nothing", wanted="train")
    notes = [note] if note else []
    for split, fraction in (("test", test), ("validation", validation)):
        train = splits["train"]
        if split in splits or not fraction or isinstance(train, StreamSplit):
            continue
        labels = train.labels
        by_class = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
        stay, held = hold_out(labels if labels is not None and by_class else len(train), fraction, seed)
        splits = {**splits, "train": train.subset(stay), split: train.subset(held)}
        notes.append(f"{split}: {fraction:.0%} of train held out, seed {seed}")
    note = "; ".join(notes)
    return DataSource(name, splits["train"], splits.get("validation"), splits.get("test"), note)
