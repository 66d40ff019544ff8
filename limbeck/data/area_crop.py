"""Crops of a random part of the image's area: the strong crops of Inception."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.core.hashing import below, uniform
from limbeck.data.transforms import Geometric, check_number


@dataclass(frozen=True)
class AreaCrop(Geometric):
    """A part of the image, its area and shape drawn at random, stretched to the old size.

    The area is uniform between ``least`` and ``most`` of the image's, the ratio of width to height log-uniform between
    ``1 / stretch`` and ``stretch``; sides beyond the image's are cut to it, and the place is uniform. Szegedy et al.,
    "Going Deeper with Convolutions", 2014 (arXiv 1409.4842): 8 to 100 percent and 4/3; big_vision draws from 5. Pixels
    are taken from the nearest place, since a chain of geometric transforms is one gather.

    Args:
        least, most: Bounds of the area, parts of the image's.
        stretch: Bound of the ratio of sides.

    >>> rows, columns = torch.arange(4).expand(1, -1), torch.arange(4).expand(1, -1)
    >>> AreaCrop(0.25, 0.25, 1.0).coordinates(rows, columns, (4, 4), torch.zeros(1, 4, dtype=torch.long))
    (tensor([[0, 0, 1, 1]]), tensor([[0, 0, 1, 1]]))
    """

    least: float = 0.05
    most: float = 1.0
    stretch: float = 4 / 3
    name: ClassVar[str] = "area_crop"
    draws: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_number(self, "least", self.least, low=0, high=1, open_low=True)
        check_number(self, "most", self.most, low=0, high=1, open_low=True)
        check_number(self, "stretch", self.stretch, low=1)
        if self.least > self.most:
            raise ConfigError("the least area is above the most", where="area_crop.least", found=self.least)

    def coordinates(self, rows: Tensor, columns: Tensor, size: tuple[int, int], bits: Tensor) -> tuple[Tensor, Tensor]:
        """Read from the crop that ``bits [B, 4]`` draw: area, shape, row, column."""
        area = self.least + (self.most - self.least) * uniform(bits[:, :1])
        half = 0.5 * math.log(self.stretch) * (2 * uniform(bits[:, 1:2]) - 1)
        tall = _side((area.sqrt() * (-half).exp()), size[0])
        wide = _side((area.sqrt() * half.exp()), size[1])
        top, left = below(bits[:, 2:3], size[0] - tall + 1), below(bits[:, 3:4], size[1] - wide + 1)
        return _read(rows, top, tall, size[0]), _read(columns, left, wide, size[1])


def _side(share: Tensor, size: int) -> Tensor:
    return (share * size).round().long().clamp(1, size)


def _read(places: Tensor, first: Tensor, length: Tensor, size: int) -> Tensor:
    """Nearest places of the crop; what lies outside of the image already stays outside."""
    outside = (places < 0) | (places >= size)
    read = first + torch.div((2 * places + 1) * length, 2 * size, rounding_mode="floor")
    return torch.where(outside, places, read)
