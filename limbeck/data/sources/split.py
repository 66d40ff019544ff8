"""Splits: sets of samples that can be counted, loaded whole, read one by one, or only walked through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from limbeck.core.batch import batch_size_of, map_tensors
from limbeck.core.errors import DataError
from limbeck.data.collate import class_names_of, labels_of, tensors_in
from limbeck.data.normalise import Normalisation
from limbeck.data.sources.images import EncodedImages, check_size, decode, decode_all
from limbeck.data.tasks import task_of

MEASURED = 512  # samples of a batch where nothing is learned, at most


@dataclass(eq=False)
class Split(ABC):
    """Some samples of a source. A sample's index is its place in the split, 0 to ``len - 1``, the same in every run.

    Args:
        labels: By index, where they are known as a whole.
        classes: Names of the classes.
        normalise: The normalisation used where none is asked for: of :data:`limbeck.data.NORMALISATIONS`, or its own.
        task: What the labels mean; see :data:`limbeck.data.TASKS`.
    """

    labels: Tensor | None = field(default=None, kw_only=True)
    classes: tuple[str, ...] | None = field(default=None, kw_only=True)
    normalise: str | Normalisation = field(default="none", kw_only=True)
    task: str = field(default="classification", kw_only=True)

    def __post_init__(self) -> None:
        wanted = task_of(self.task).labels
        if self.labels is not None and self.task != "classification":
            fits = self.labels.ndim > 1 and self.labels.is_floating_point()
            if not fits or (self.task == "multilabel" and bool(self.labels.max() > 1)):
                found = f"{list(self.labels.shape)} {self.labels.dtype}, at most {self.labels.max():g}"
                raise DataError(f"these are no labels of {self.task}", where="labels", found=found, wanted=wanted)
        if self.labels is not None and self.classes is not None:
            check_labels(self.labels, len(self.classes), "labels")

    @property
    def samples(self) -> int | None:
        """How many samples, or ``None`` where only walking through them can tell."""
        return len(self)

    @property
    def class_count(self) -> int | None:
        """Number of classes: the names', else one more than the greatest label, or a label's entries if multi-label."""
        if self.classes is not None:
            return len(self.classes)
        if self.labels is not None and self.task == "multilabel":
            return self.labels.shape[-1]
        if self.labels is None or self.labels.ndim != 1 or self.labels.is_floating_point() or not len(self.labels):
            return None
        return int(self.labels.max()) + 1 or None

    @property
    def vocabulary(self) -> int | None:
        """How many token ids there are, where samples are texts."""
        return None

    @property
    def nbytes(self) -> int | None:
        """Size of all inputs as they would lie on a device; ``None`` where they cannot be loaded whole."""
        return None

    @property
    def measured(self) -> int:
        """Samples of a batch where models are only looked at."""
        return MEASURED

    def load(self) -> Any:
        """All inputs at once: a tensor, or a dict or tuple of tensors, with one row a sample."""
        raise DataError(
            "this split cannot be loaded whole", where="data", found=type(self).__name__, remedy="resident: false"
        )

    def dataset(self) -> Dataset[Any]:
        """The samples one by one, as a map-style data set of inputs or ``(inputs, label)``."""
        raise DataError("this split has no order of its own", where="data", found=type(self).__name__)

    def subset(self, rows: Tensor) -> Split:
        """The samples ``rows``, numbered anew from 0."""
        raise DataError("samples cannot be chosen from this split", where="data", found=type(self).__name__)

    @abstractmethod
    def __len__(self) -> int: ...

    def _labels_at(self, rows: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[rows]


@dataclass(eq=False)
class TensorSplit(Split):
    """Samples held in tensors: images as bytes, features, tokens; a dict or tuple of tensors is allowed."""

    inputs: Any

    def __post_init__(self) -> None:
        count = len(self)
        if not count:
            raise DataError("there are no samples", where="inputs")
        held = tensors_in(self.inputs) + ([] if self.labels is None else [self.labels])
        rows = [t.shape[0] if t.ndim else 0 for t in held]
        if set(rows) != {count}:
            raise DataError(
                "inputs and labels differ in length", where="labels", found=f"{rows} rows", wanted="one row a sample"
            )
        super().__post_init__()

    def __len__(self) -> int:
        return batch_size_of(self.inputs)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in tensors_in(self.inputs))

    def load(self) -> Any:
        return self.inputs

    def dataset(self) -> Dataset[Any]:
        return _Rows(self.inputs, self.labels)

    def subset(self, rows: Tensor) -> TensorSplit:
        return replace(self, inputs=map_tensors(self.inputs, lambda t: t[rows]), labels=self._labels_at(rows))


@dataclass(eq=False)
class ImageSplit(Split):
    """Encoded images (JPEG, PNG ...), decoded when they are wanted.

    Args:
        images: Where the bytes are.
        rows: Which of them.
        mode: Of Pillow: ``"RGB"`` or ``"L"``.
        size: ``(height, width)`` to resize and crop to; ``None`` where all have one size.
    """

    images: EncodedImages
    rows: Tensor
    mode: str = "RGB"
    size: tuple[int, int] | None = None
    _pixels: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise DataError("there are no images", where=getattr(self.images, "name", "data"))
        super().__post_init__()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Tensor:
        """One image as ``[C, H, W]`` bytes."""
        row = int(self.rows[index])
        return decode(self.images.read(row), self.images.where(row), self.mode, self.size)

    @property
    def nbytes(self) -> int:
        return len(self) * self.read(0).numel()

    def load(self) -> Tensor:
        if self._pixels is None:  # kept: a comparison makes many loaders of one split
            self._pixels = decode_all(self.images, self.rows.tolist(), self.mode, self.size)
        return self._pixels

    def dataset(self) -> Dataset[Any]:
        return _Images(self)

    def subset(self, rows: Tensor) -> ImageSplit:
        return replace(self, rows=self.rows[rows], labels=self._labels_at(rows), _pixels=None)


@dataclass(eq=False)
class DatasetSplit(Split):
    """A map-style data set of the user's own, read one by one by worker processes."""

    data: Any
    collate_fn: Any = None

    def __post_init__(self) -> None:
        if self.labels is None:
            self.labels = labels_of(self.data)
        if self.classes is None:
            self.classes = class_names_of(self.data)
        if not len(self):
            raise DataError("there are no samples", where="data", found=type(self.data).__name__)
        super().__post_init__()

    def __len__(self) -> int:
        return len(self.data)

    def dataset(self) -> Dataset[Any]:
        return self.data

    def subset(self, rows: Tensor) -> DatasetSplit:
        chosen = torch.utils.data.Subset(self.data, rows.tolist())
        return replace(self, data=chosen, labels=self._labels_at(rows))


@dataclass(eq=False)
class StreamSplit(Split):
    """Batches of the user's own: a DataLoader, an iterable data set, or anything that can be walked through again."""

    batches: Iterable[Any]

    def __post_init__(self) -> None:
        data = getattr(self.batches, "dataset", None)
        if self.labels is None and self.samples is not None:
            self.labels = labels_of(data)
        if self.classes is None:
            self.classes = class_names_of(data)
        super().__post_init__()

    @property
    def samples(self) -> int | None:
        data: Any = getattr(self.batches, "dataset", None)  # only a DataLoader's set has samples by index
        return len(data) if hasattr(data, "__getitem__") and hasattr(data, "__len__") else None

    def __len__(self) -> int:
        count = self.samples
        if count is None:
            raise DataError("the number of samples is not known", where="data", found=type(self.batches).__name__)
        return count


class _Rows(Dataset[Any]):
    def __init__(self, inputs: Any, labels: Tensor | None) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return batch_size_of(self.inputs)

    def __getitem__(self, index: int) -> Any:
        inputs = map_tensors(self.inputs, lambda t: t[index])
        if self.labels is None:
            return {"inputs": inputs}
        return {"inputs": inputs, "labels": self.labels[index]}


class _Images(Dataset[Any]):
    def __init__(self, split: ImageSplit) -> None:
        self.split, self.size = split, tuple(split.read(0).shape[1:])

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Any:
        split, image = self.split, self.split.read(index)
        check_size(image.shape[1:], self.size, split.images.where(int(split.rows[index])))
        return {"inputs": image} if split.labels is None else {"inputs": image, "labels": split.labels[index]}


def check_labels(labels: Tensor, classes: int, where: str) -> None:
    """Raise where integer labels are no classes; -1 means that a sample has none."""
    if labels.is_floating_point() or not labels.numel():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= classes:
        row = int(((labels < -1) | (labels >= classes)).flatten().nonzero()[0])
        raise DataError(
            "a label is out of range",
            where=where,
            found=f"{int(labels.flatten()[row])} in row {row}",
            wanted=f"0 to {classes - 1}, or -1 for none",
            remedy="mend the labels, or name all classes",
        )
