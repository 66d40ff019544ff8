"""Makes the loader that suits the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset

from limbeck.core.errors import ConfigError, DataError
from limbeck.data.augment import Augment, AugmentSpec
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.split import LanguageSplit
from limbeck.data.loader import Loader
from limbeck.data.normalise import Normalisation
from limbeck.data.resident import ResidentLoader
from limbeck.data.sources.load import as_split, load_source
from limbeck.data.sources.source import DataSource
from limbeck.data.sources.split import DatasetSplit, Split, StreamSplit
from limbeck.data.stream import StreamLoader, default_workers
from limbeck.data.wrapped import WrappedLoader

Resident = bool | Literal["auto"]

HOST_LIMIT = 2 << 30  # bytes of a set that "auto" still holds in main memory
DEVICE_SHARE = 0.25  # of an accelerator's free memory that "auto" gives to a set


def build_loader(
    split: Split,
    *,
    batch_size: int,
    train: bool,
    augment: AugmentSpec | None = None,
    normalise: str | Normalisation | Mapping[str, Sequence[float]] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    resident: Resident = "auto",
    workers: int | None = None,
    shuffle: bool | None = None,
    drop_last: bool | None = None,
    task: str | None = None,
    views: int | None = None,
    view_seed: int | None = None,
    per_read: int = 1,
) -> Loader:
    """The loader of one split.

    Args:
        split: Of a source, see :func:`~limbeck.data.load_source`.
        batch_size: Samples of an optimizer step, over all ranks and micro-batches. A DataLoader keeps its own.
        train: Shuffled, and without an incomplete last batch; else in order and complete.
        augment: Chain of augmentations, see :func:`~limbeck.data.parse_augment`.
        normalise: Of images; by default the split's own: its set's statistics, ``imagenet`` for other coloured images.
        device: Where batches are wanted.
        seed: Of order and views.
        resident: Hold the whole set on the device. ``"auto"`` does where it takes at most 2 GiB of main memory, or a
            quarter of an accelerator's free memory, and is not a data set of the user's own, which may draw at random.
        workers: Reading processes where it is not resident; ``None`` chooses.
        shuffle: Overrides ``train`` as to the order.
        drop_last: Overrides ``train`` as to the last batch.
        task: Overrides what the split says of its labels; see :data:`~limbeck.data.TASKS`.
        views: How many views a sample has: epoch ``e`` shows view ``e % views``; ``None``: a new one each epoch.
        view_seed: Of the views, where that is not ``seed``.
        per_read: How many views of a sample stand in one batch; it is read and decoded once for all of them.

    Example:
        >>> loader = build_loader(load_source("digits").train, batch_size=64, train=True, augment=["pad_crop"])
        >>> len(loader), loader.example().inputs.shape
        (19, torch.Size([2, 1, 8, 8]))
    """
    if task is not None:
        split = replace(split, task=task)
    transform = Augment(
        augment,
        normalise=split.normalise if normalise is None and split.normalise != "none" else normalise,
        seed=seed if view_seed is None else view_seed,
        samples=split.samples,
        classes=split.class_count,
    )
    known: dict[str, Any] = {
        "augment": transform,
        "device": device,
        "seed": seed,
        "classes": split.class_count,
        "class_names": split.classes,
    }
    drop = train if drop_last is None else drop_last
    loader: Loader
    if isinstance(split, StreamSplit):
        if views is not None or per_read != 1:
            raise DataError(
                "samples that are only walked through cannot be asked for again",
                where="views",
                found=f"views {views}, per_read {per_read}",
                remedy="pass the data set itself, not a DataLoader or an iterable",
            )
        batches: Iterable[Any] = split.batches
        if isinstance(batches, IterableDataset):
            batches = DataLoader(batches, batch_size, num_workers=workers or 0, drop_last=drop)
        loader = WrappedLoader(batches, split.labels, samples=split.samples, **known)
    else:
        known |= {"batch_size": batch_size, "shuffle": train if shuffle is None else shuffle, "drop_last": drop}
        known |= {"views": views, "per_read": per_read}
        if isinstance(split, LanguageSplit):
            del known["classes"], known["class_names"]
            loader = LanguageLoader(split, **known)
        elif _holds(split, torch.device(device), resident):
            loader = ResidentLoader(split.load(), split.labels, **known)
        else:
            collate = split.collate_fn if isinstance(split, DatasetSplit) else None
            workers = default_workers() if workers is None else workers
            loader = StreamLoader(split.dataset(), split.labels, workers=workers, collate_fn=collate, **known)
    loader.task, loader.vocabulary, loader.split = split.task, split.vocabulary, split
    return loader


def as_loader(data: Any, *, batch_size: int = 128, train: bool = False, part: str = "train", **options: Any) -> Loader:
    """A loader of whatever a user has in hand.

    Args:
        data: A loader (returned as it is), a split, ``(inputs, labels)`` tensors, a Dataset, a DataLoader, an
            iterable of batches; or a source or the name of one, of which ``part`` is taken. Nothing is held out of
            the former.
        batch_size: Samples of an optimizer step; a DataLoader keeps its own.
        train: As for :func:`build_loader`.
        part: ``"train"``, ``"validation"`` or ``"test"`` of a source.
        options: Of :func:`build_loader`.

    Example:
        >>> as_loader((torch.zeros(10, 3), torch.arange(10)), batch_size=4).samples
        10
    """
    if isinstance(data, Loader):
        return data
    if isinstance(data, (str, Path, DataSource, Mapping)):
        split = load_source(data).split(part)
    else:
        split = as_split(data)
    return build_loader(split, batch_size=batch_size, train=train, **options)


def _holds(split: Split, device: torch.device, resident: Resident) -> bool:
    if resident not in (True, False, "auto"):
        raise ConfigError("cannot be read", where="resident", found=repr(resident), wanted="true, false or 'auto'")
    if resident != "auto":
        return bool(resident)
    size, limit = split.nbytes, HOST_LIMIT
    if device.type == "cuda":
        limit = int(torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE)
    return size is not None and size <= limit
