"""What the engine asks of data."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.data.augment import Augment, describe_augment
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
    """

    batch_size: int | None
    samples: int | None
    labels: Tensor | None
    classes: int | None
    class_names: tuple[str, ...] | None
    seed: int
    task: str = "classification"
    vocabulary: int | None = None

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


class IndexedLoader(Loader):
    """A loader of a set whose samples can be asked for by index."""

    kind: str

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
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError("must be a positive whole number", where="batch_size", found=repr(batch_size))
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

    @property
    def steps_per_epoch(self) -> int:
        return steps_in(self.samples, self.batch_size, self.drop_last)

    def order(self, epoch: int, device: torch.device | str = "cpu") -> Tensor:
        """All samples in the order of an epoch: random by (seed, epoch) where shuffled, else ascending."""
        if self.shuffle:
            return epoch_order(self.samples, self.seed, epoch, device)
        return torch.arange(self.samples, device=device)

    def plain(self) -> Iterator[Batch]:
        bare = copy.copy(self)
        bare.shuffle = bare.drop_last = False
        bare.augment = Augment((), normalise=self.augment.normalise, classes=self.classes)
        return bare.batches()

    def describe(self) -> dict[str, Any]:
        stats = self.augment.normalise
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "seed": self.seed,
            "augment": describe_augment(self.augment.transforms),
            "normalise": None if stats is None else {"mean": list(stats.mean), "std": list(stats.std)},
        }

    def _plain(self, inputs: Any) -> Any:
        """Inputs that are no images: feature vectors are normalised, anything else is as it is."""
        vectors = isinstance(inputs, Tensor) and inputs.ndim == 2 and inputs.is_floating_point()
        return self.augment.finish(inputs) if vectors else inputs

    def _steps(self, start_step: int, rank: int, world: int, parts: int) -> Iterator[list[slice]]:
        check_place(start_step, self.steps_per_epoch, rank, world, parts)
        return step_slices(
            self.samples, self.batch_size, self.drop_last, start_step=start_step, rank=rank, world=world, parts=parts
        )
