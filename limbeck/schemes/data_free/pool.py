"""Inputs that were made in rounds and are kept: a student learns from all of them, again and again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo
from limbeck.core.ranks import as_on_first
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.blank import BlankLoader
from limbeck.data.normalise import Normalisation
from limbeck.schemes.data_free.inversion import Inverted, weights_held
from limbeck.schemes.data_free.made import Made
from limbeck.schemes.scheme import Cast


class Pool(nn.Module):
    """A ring of inputs. Images whose normalisation is known are kept as bytes, as image files would; others as floats.

    Args:
        capacity: How many at most; the oldest go first.
        shape: Of one.
        normalise: How the model sees its data.

    >>> pool = Pool(4, (1, 2, 2), Normalisation((0.5,), (0.5,)))
    >>> pool.add(torch.ones(3, 1, 2, 2)); pool.draw(2).flatten(1).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    """

    kept: Tensor
    added: Tensor

    def __init__(self, capacity: int, shape: tuple[int, ...], normalise: Normalisation | None) -> None:
        super().__init__()
        self.normalise = normalise if len(shape) == 3 else None
        dtype = torch.float32 if self.normalise is None else torch.uint8
        self.register_buffer("kept", torch.zeros(capacity, *shape, dtype=dtype))
        self.register_buffer("added", torch.zeros((), dtype=torch.long))

    @property
    def size(self) -> int:
        """How many there are."""
        return min(int(self.added), len(self.kept))

    def add(self, inputs: Tensor) -> None:
        """Keep some more."""
        inputs = inputs.detach()[-len(self.kept) :]
        places = (self.added + torch.arange(len(inputs), device=self.kept.device)) % len(self.kept)
        self.kept[places] = self.packed(inputs)
        self.added += len(inputs)

    def packed(self, inputs: Tensor) -> Tensor:
        """Inputs as they are kept."""
        if self.normalise is not None:
            mean, deviation = (_statistic(v, inputs) for v in (self.normalise.mean, self.normalise.std))
            inputs = ((inputs * deviation + mean) * 255).round().clamp(0, 255)
        return inputs.to(self.kept.dtype)

    def draw(self, number: int) -> Tensor:
        """Some of them by chance, with replacement, normalised."""
        rows = self.kept[torch.randint(self.size, (number,), device=self.kept.device)]
        return rows if self.normalise is None else self.normalise(rows)


def _statistic(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def bounds(normalise: Normalisation, like: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised values of black and white, ``[C, 1, 1]`` each.

    >>> [value.flatten().tolist() for value in bounds(Normalisation((0.5,), (0.25,)), torch.zeros(1))]
    [[-2.0], [2.0]]
    """
    mean, deviation = (_statistic(v, like) for v in (normalise.mean, normalise.std))
    return (0 - mean) / deviation, (1 - mean) / deviation


def shifted(images: Tensor, padding: int, black: Tensor | float = 0.0, *, flip: bool = True) -> Tensor:
    """Each image padded with black and cropped at a random place, and mirrored by chance; gradients pass.

    >>> shifted(torch.ones(2, 1, 4, 4), 1).shape
    torch.Size([2, 1, 4, 4])
    """
    size, _, height, width = images.shape
    padded = F.pad(images - black, [padding] * 4) + black
    device = images.device
    top, left = (torch.randint(2 * padding + 1, (size, 1), device=device) for _ in range(2))
    rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
    if flip:
        columns = torch.where(torch.rand(size, 1, device=device) < 0.5, columns.flip(1), columns)
    which = torch.arange(size, device=device).view(-1, 1, 1)
    return padded[which, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


@contextlib.contextmanager
def at_rest(student: nn.Module) -> Iterator[None]:
    """A student that is asked and does not learn: evaluation mode, no gradients in its weights."""
    modes = {module: module.training for module in student.modules()}
    student.eval()
    as_on_first(student.buffers())  # of several processes each saw other batches, and has statistics of its own
    try:
        with weights_held(student), torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def capacity_of(cast: Cast, loader: BlankLoader, every: int, size: int, most: int | None) -> int:
    """How many inputs all rounds of a training make, or ``most``, where that is fewer."""
    rounds = math.ceil(cast.config.total_steps(loader.steps_per_epoch) / every)
    return rounds * size if most is None else min(most, rounds * size)


class Remembering(Made):
    """Before every so many steps some inputs are made, and kept; the student learns from the pool of all.

    A subclass says by ``synthesise`` how they are made. Of several processes each makes all, alike.
    """

    pool: Pool | None
    _inverted: tuple[Inverted, ...] = ()

    def plan(
        self, scheme: Any, loader: BlankLoader, *, seed: int = 0, capacity: int = 1, statistics: bool = True
    ) -> None:
        """Take the settings; of the scheme ``every``, ``size``, ``padding`` and ``flip``."""
        super().plan(scheme, loader, seed=seed)
        if self.classes is None:
            raise ConfigError("nobody says how many classes there are", where=f"scheme {self.who}", found="none")
        self.pool, self._capacity, self._statistics = None, capacity, statistics

    @property
    def inverted(self) -> Inverted:
        """The teacher, with gradients to what it is asked."""
        return self._inverted[0]

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Remembering:
        super().setup(batch, data)
        inputs = batch.inputs
        assert isinstance(self.teacher, FrozenTeacher)
        where = f"scheme {self.who}"
        self._inverted = (Inverted(self.teacher, inputs, statistics=self._statistics, where=where),)
        if self.pool is None:
            self.pool = Pool(self._capacity, tuple(inputs.shape[1:]), self.normalise).to(inputs.device)
        self.learns_in_rounds("pool.")
        return self

    def learns_in_rounds(self, *parts: str) -> None:
        """What is the same on all processes already, and so is not sent around in every step.

        Args:
            parts: Beginnings of names of parameters and buffers.
        """
        names = [name for name, _ in (*self.named_parameters(), *self.named_buffers()) if name.startswith(parts)]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def targets(self, device: torch.device) -> Tensor:
        """A class for each of a round's inputs, each class as often as any other."""
        assert self.classes is not None
        return torch.arange(self.scheme.size, device=device) % self.classes

    def synthesise(self, like: Tensor) -> Tensor:
        """A round: new inputs ``[size, ...]``."""
        raise TypeError(f"{type(self).__name__} must define synthesise")  # pragma: no cover

    def make(self, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.pool is not None
        if int(self.moves) % self.scheme.every == 0:
            with at_rest(self.student):
                self.pool.add(self.synthesise(like))
        return self.seen(self.pool.draw(len(like))), {}

    def seen(self, images: Tensor) -> Tensor:
        """How images are shown: shifted and mirrored by chance."""
        if images.ndim != 4:
            return images
        padding = images.shape[-1] // 8 if self.scheme.padding is None else self.scheme.padding
        black = 0.0 if self.normalise is None else bounds(self.normalise, images)[0]
        return shifted(images, padding, black, flip=self.scheme.flip)

    def close(self) -> None:
        super().close()
        for inverted in self._inverted:
            inverted.close()
