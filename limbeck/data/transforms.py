"""Augmentations of one image: pad and crop, flip, cutout.

Each takes images and the random bits of every sample, and works on the whole batch at once. The geometric ones say
where each output pixel is read from; a chain of them is then one gather (see :mod:`limbeck.data.augment`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.core.hashing import below, uniform


class Transform:
    """One augmentation; ``draws`` is how many random words it needs for a sample."""

    name: ClassVar[str]
    draws: ClassVar[int]


class Geometric(Transform):
    """A transform that moves pixels: row ``r`` of the output is row ``coordinates(...)[0][r]`` of the input."""

    def coordinates(self, rows: Tensor, columns: Tensor, size: tuple[int, int], bits: Tensor) -> tuple[Tensor, Tensor]:
        """Where to read: ``rows [B, H]`` and ``columns [B, W]`` of the output, mapped to those of the input.

        What lies outside of ``size`` (height, width) is zero.
        """
        raise TypeError(f"{type(self).__name__} must define coordinates")  # pragma: no cover


class Masking(Transform):
    """A transform that changes normalised pixels where they are."""

    def __call__(self, images: Tensor, bits: Tensor) -> Tensor:
        """Change ``[B, C, H, W]`` by ``bits [B, draws]``."""
        raise TypeError(f"{type(self).__name__} must define __call__")  # pragma: no cover


@dataclass(frozen=True)
class PadCrop(Geometric):
    """Pad every side with black, then crop the old size at a random place.

    Offsets are uniform in ``0 .. 2 * padding``, for rows and columns apart. He et al., "Deep Residual Learning", 2015,
    section 4.2, which pads CIFAR images by 4 (the default).

    Args:
        padding: Pixels added to every side.
    """

    padding: int = 4
    name: ClassVar[str] = "pad_crop"
    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_number(self, "padding", self.padding, whole=True, low=0)

    def coordinates(self, rows: Tensor, columns: Tensor, size: tuple[int, int], bits: Tensor) -> tuple[Tensor, Tensor]:
        """Shift by the crop's offset."""
        offset = below(bits, 2 * self.padding + 1) - self.padding
        return rows + offset[:, :1], columns + offset[:, 1:]


@dataclass(frozen=True)
class Flip(Geometric):
    """Mirror left and right with a probability (default 0.5)."""

    probability: float = 0.5
    name: ClassVar[str] = "flip"
    draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_number(self, "probability", self.probability, low=0, high=1)

    def coordinates(self, rows: Tensor, columns: Tensor, size: tuple[int, int], bits: Tensor) -> tuple[Tensor, Tensor]:
        """Read the columns from the right where flipped."""
        return rows, torch.where(uniform(bits) < self.probability, size[1] - 1 - columns, columns)


@dataclass(frozen=True)
class Cutout(Masking):
    """Set a square to zero, after normalisation: to the mean colour.

    The square's centre is uniform over the image and what hangs over the border is lost. DeVries and Taylor,
    "Improved Regularization of Convolutional Neural Networks with Cutout", 2017 (arXiv 1708.04552); 16 is their size
    for CIFAR-10.

    Args:
        size: Side of the square in pixels.
    """

    size: int = 16
    name: ClassVar[str] = "cutout"
    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_number(self, "size", self.size, whole=True, low=1)

    def __call__(self, images: Tensor, bits: Tensor) -> Tensor:
        """Cut ``[B, C, H, W]`` with ``bits [B, 2]``."""
        height, width = images.shape[-2:]
        top = below(bits[:, 0], height) - self.size // 2
        left = below(bits[:, 1], width) - self.size // 2
        inside = rectangle(top, top + self.size, left, left + self.size, height, width)
        return images.masked_fill(inside.unsqueeze(1), 0)


def rectangle(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Masks ``[B, H, W]``, True inside of each sample's rectangle; ``bottom`` and ``right`` lie outside."""
    row, column = torch.arange(height, device=top.device), torch.arange(width, device=top.device)
    rows = (row >= top[:, None]) & (row < bottom[:, None])
    columns = (column >= left[:, None]) & (column < right[:, None])
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def check_number(
    owner: Transform,
    field: str,
    value: object,
    *,
    whole: bool = False,
    low: float,
    high: float | None = None,
    open_low: bool = False,
) -> None:
    """Raise unless a transform's option is a number in its range."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, kinds) and not isinstance(value, bool):
        enough = value > low if open_low else value >= low
        if enough and (high is None or value <= high):
            return
    bounds = f"above {low}" if open_low else f"of at least {low}"
    raise ConfigError(
        "wrong option",
        where=f"augment.{owner.name}.{field}",
        found=repr(value),
        wanted=f"a {'whole ' if whole else ''}number {bounds}" + ("" if high is None else f" and at most {high}"),
    )
