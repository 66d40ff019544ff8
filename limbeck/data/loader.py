"""What the engine asks of data."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.data.augment import Augment, Shown, describe_augment
from limbeck.data.order import check_place, epoch_order, step_slices, steps_in


class Loader(ABC):
    """Batches, step by step.

    ``batch_size`` is always the number of samples one optimizer step sees, over all ranks and accumulated
    micro-batches; how they are cut among these changes nothing else. ``len(loader)`` is the number of steps of an
    epoch.

    Attributes:
        batch_size: Samples of a step; ``None`` where the user's own batches are passed through and do not tell.
        samples: In the set, ``None`` where unknown. Indices run from 0 to ``samples - 1``.
        labels: All labels by index, or ``None``.
        classes: Number of classes, or ``None``.
        class_names: Their names, or ``None``.
        seed: Of order and augmentation.
        task: What the labels mean; see :data:`limbeck.data.TASKS`.
        vocabulary: Number of token ids, where samples are texts.
        split: What it was built of, where it was built of a split.
    """

    batch_size: int | None
    samples: int | None
    labels: Tensor | None
    classes: int | None
    class_names: tuple[str, ...] | None
    seed: int
    task: str = "classification"
    vocabulary: int | None = None
    split: Any = None

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; ``None`` where only walking through the data can tell."""

    @abstractmethod
    def epoch(
        self, epoch: int, *, start_step: int = 0, rank: int = 0, world: int = 1, parts: int = 1
    ) -> Iterator[list[Batch]]:
        """One rank's micro-batches of each step, in order.

        Over all ranks and parts the micro-batches of a step are exactly its batch, whatever ``world`` and ``parts``
        are; they differ by one sample at most, and empty ones are left out. A batch is on the device and ready for
        the model; ``totals`` and ``progress`` are left to the engine.

        Args:
            epoch: Order and views are a pure function of the seed and this number.
            start_step: Where to begin; steps before it are skipped.
            rank: Of this process.
            world: How many processes.
            parts: Micro-batches a rank makes of its share.
        """

    @abstractmethod
    def example(self, size: int = 2) -> Batch:
        """A small fixed batch for dry runs; nothing random is touched by asking for it."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values that, with the data, settle what an epoch gives; a resumed run must find the same."""

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, uncut: for a loop of one's own, and for evaluation."""
        for parts in self.epoch(epoch):
            yield from parts

    def plain(self) -> Iterator[Batch]:
        """The set once, as it is: in order and without augmentation, where the loader can do so."""
        return self.batches()

    def __len__(self) -> int:
        steps = self.steps_per_epoch
        if steps is None:
            raise DataError(
                "the length of this data is not known",
                where="data",
                found=type(self).__name__,
                remedy="say how many steps an epoch has",
            )
        return steps


Piece = tuple[Tensor, int]  # samples, and the view of them that is wanted


def join_pieces(pieces: Sequence[Piece]) -> tuple[Tensor, Shown, int | Tensor]:
    """A batch's samples ``[B]``, their views as an augmentation takes them, and as a batch tells them.

    >>> join_pieces([(torch.tensor([5, 2]), 0), (torch.tensor([5]), 3)])
    (tensor([5, 2, 5]), [(0, 2), (3, 1)], tensor([0, 0, 3]))
    """
    if len(pieces) == 1:
        return pieces[0][0], pieces[0][1], pieces[0][1]
    index = torch.cat([index for index, _ in pieces])
    shown = [(view, len(own)) for own, view in pieces]
    return index, shown, torch.tensor([view for view, count in shown for _ in range(count)], device=index.device)


class IndexedLoader(Loader):
    """A loader of a set whose samples can be asked for by index.

    Epoch ``e`` shows view ``e`` of every sample. With ``views`` it shows view ``e % views``, so that a sample has so
    many views and no more. With ``per_read`` K a batch holds K views of each of its samples, read once: the samples of
    one pass come in K epochs, and after these every sample has been seen in the same K views as with K of 1.

    Args:
        views: How many views a sample has; ``None``: a new one each epoch.
        per_read: How many views of a sample stand in one batch.
    """

    views: int | None
    per_read: int
    only: Tensor | None = None  # the samples that an epoch shows, where these are not all

    def __init__(
        self,
        samples: int,
        labels: Tensor | None,
        *,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        augment: Augment,
        device: torch.device | str,
        seed: int,
        classes: int | None,
        class_names: tuple[str, ...] | None,
        views: int | None = None,
        per_read: int = 1,
    ) -> None:
        for name, value in {"batch_size": batch_size, "per_read": per_read, "views": views}.items():
            if not (value is None and name == "views") and (not isinstance(value, int) or value < 1):
                raise ConfigError("must be a positive whole number", where=name, found=repr(value))
        if batch_size % per_read or (views is not None and views % per_read):
            raise ConfigError(
                "does not divide the batch, or the views that there are",
                where="per_read",
                found=f"{per_read} with batch_size {batch_size} and views {views}",
            )
        if drop_last and samples < batch_size:
            raise DataError(
                "the set is smaller than one batch",
                where="batch_size",
                found=f"{batch_size} of {samples} samples",
                remedy=f"at most {samples}, or keep the incomplete batch with drop_last: false",
            )
        self.batch_size: int = batch_size
        self.samples: int = samples
        self.labels, self.classes, self.class_names = labels, classes, class_names
        self.shuffle, self.drop_last, self.augment, self.seed = shuffle, drop_last, augment, seed
        self.device = torch.device(device)
        self.views, self.per_read = views, per_read

    @property
    def shown(self) -> int:
        """Views that one epoch shows, over all samples; a few are left out where ``per_read`` does not divide them."""
        count = self.samples if self.only is None else len(self.only)
        return count // self.per_read * self.per_read

    @property
    def steps_per_epoch(self) -> int:
        return steps_in(self.shown, self.batch_size, self.drop_last)

    @abstractmethod
    def read(self, wanted: Sequence[Sequence[Piece]]) -> Iterator[Batch]:
        """Batches of these samples in these views, for whoever wants others than an epoch's.

        Args:
            wanted: For each batch its pieces, which follow each other in it.
        """

    def epoch(
        self, epoch: int, *, start_step: int = 0, rank: int = 0, world: int = 1, parts: int = 1
    ) -> Iterator[list[Batch]]:
        check_place(start_step, self.steps_per_epoch, rank, world, parts)
        steps = list(
            step_slices(
                self.shown, self.batch_size, self.drop_last, start_step=start_step, rank=rank, world=world, parts=parts
            )
        )
        return self._run(epoch, steps)

    def _run(self, epoch: int, steps: list[list[slice]]) -> Iterator[list[Batch]]:
        order = self.order(epoch // self.per_read, self.device)
        chunk = self.shown // self.per_read
        order = order[epoch % self.per_read * chunk :][: chunk if self.per_read > 1 else None]
        read = self.read([self._pieces(order, part, epoch) for step in steps for part in step])
        for step in steps:
            yield [next(read) for _ in step]

    def _pieces(self, order: Tensor, part: slice, epoch: int) -> list[Piece]:
        """What stands at some of an epoch's places: place ``p`` holds view ``p % K`` of sample ``p // K``."""
        count, first = self.per_read, epoch // self.per_read * self.per_read
        pieces = []
        for turn in range(count):
            rows = order[(part.start - turn + count - 1) // count : (part.stop - turn + count - 1) // count]
            if len(rows):
                pieces.append((rows, self.view_of(first + turn)))
        return pieces

    def view_of(self, number: int) -> int:
        """The view shown in the place of an endless row's ``number``-th."""
        return number if self.views is None else number % self.views

    def order(self, epoch: int, device: torch.device | str = "cpu") -> Tensor:
        """All samples in the order of an epoch: random by (seed, epoch) where shuffled, else ascending."""
        count = self.samples if self.only is None else len(self.only)
        places = epoch_order(count, self.seed, epoch, device) if self.shuffle else torch.arange(count, device=device)
        return places if self.only is None else self.only.to(device)[places]

    def chosen(self, rows: Tensor) -> Self:
        """The same loader with epochs of these samples alone: of a client, a specialist's classes, an active choice.

        Samples keep their ids, so that caches and memories by id stay right; ``samples`` and ``labels`` are still those
        of the whole set.

        Args:
            rows: Ids ``[R]``; one that stands twice is shown twice.

        Raises:
            DataError: No ids of samples, or fewer than a batch.
            ConfigError: Augmentations mix samples with any others of the set.

        >>> from limbeck.data.resident import ResidentLoader
        >>> loader = ResidentLoader(torch.zeros(10, 3), batch_size=2).chosen(torch.tensor([1, 4, 7, 9]))
        >>> torch.cat([batch.index for batch in loader.batches()]).sort().values
        tensor([1, 4, 7, 9])
        """
        inside = len(rows) == 0 or (int(rows.min()) >= 0 and int(rows.max()) < self.samples)
        if rows.ndim != 1 or rows.is_floating_point() or not inside:
            raise DataError("these are no ids of samples", where="rows", wanted=f"whole numbers below {self.samples}")
        if len(rows) < (self.batch_size if self.drop_last else 1):
            raise DataError(
                "fewer samples are chosen than stand in a batch",
                where="rows",
                found=len(rows),
                wanted=f"{self.batch_size} or more",
                remedy="take smaller batches, or keep the incomplete one with drop_last: false",
            )
        if self.augment.mixes:
            raise ConfigError(
                "samples would be mixed with others than those that are chosen",
                where="data.augment",
                remedy="leave mixup and cutmix out",
            )
        found = copy.copy(self)
        found.only = rows.to("cpu")
        return found

    def bare(self) -> IndexedLoader:
        """The same samples in order and without augmentation."""
        bare = copy.copy(self)
        bare.shuffle = bare.drop_last = False
        bare.augment = Augment((), normalise=self.augment.normalise, classes=self.classes)
        bare.views = bare.per_read = 1
        return bare

    def plain(self) -> Iterator[Batch]:
        return self.bare().batches()

    def describe(self) -> dict[str, Any]:
        stats = self.augment.normalise
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "seed": self.seed,
            "augment": describe_augment(self.augment.transforms),
            "view_seed": self.augment.seed,
            "views": self.views,
            "per_read": self.per_read,
            "normalise": None if stats is None else {"mean": list(stats.mean), "std": list(stats.std)},
            **({} if self.only is None else {"rows": _digest(self.only)}),
        }

    def _plain(self, inputs: Any) -> Any:
        """Inputs that are no images: feature vectors are normalised, anything else is as it is."""
        vectors = isinstance(inputs, Tensor) and inputs.ndim == 2 and inputs.is_floating_point()
        return self.augment.finish(inputs) if vectors else inputs


def _digest(rows: Tensor) -> str:
    return f"{len(rows)} {hashlib.blake2b(rows.long().contiguous().numpy().tobytes(), digest_size=8).hexdigest()}"
