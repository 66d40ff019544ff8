"""Decodes stored images."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from limbeck.core.errors import ConfigError, DataError

_WORTH_A_THREAD = 100_000  # bytes of a decoded image


class EncodedImages(Protocol):
    """Where the bytes of images are."""

    def read(self, row: int) -> bytes:
        """The image file in a row."""

    def where(self, row: int) -> str:
        """File and row, for messages."""


def image_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Read a size option: one side of a square, or ``(height, width)``.

    >>> image_size(32)
    (32, 32)
    """
    sides = (size, size) if isinstance(size, int) else size
    if sides is None:
        return None
    if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ConfigError("no such size", where="size", found=repr(size), wanted="pixels, or [height, width]")
    return sides[0], sides[1]


def decode(data: bytes, where: str, mode: str = "RGB", size: tuple[int, int] | None = None) -> Tensor:
    """Decode one image file to ``[C, H, W]`` bytes.

    With ``size`` (height, width) the image is resized in proportion to cover that size, and cropped at its middle.
    """
    return torch.from_numpy(np.ascontiguousarray(_pixels(data, where, mode, size).transpose(2, 0, 1)))


def decode_all(images: EncodedImages, rows: Sequence[int], mode: str, size: tuple[int, int] | None) -> Tensor:
    """Decode many images of one size to ``[N, C, H, W]`` bytes."""
    first = _pixels(images.read(rows[0]), images.where(rows[0]), mode, size)
    pixels = np.empty((len(rows), *first.shape), np.uint8)

    def fill(places: range) -> None:
        for place in places:
            row = rows[place]
            image = _pixels(images.read(row), images.where(row), mode, size)
            check_size(image.shape[:2], first.shape[:2], images.where(row))
            pixels[place] = image

    # Pillow lets go of the interpreter while it decodes; on small images, handing it over costs more than that gains
    threads = (os.cpu_count() or 1) if first.size > _WORTH_A_THREAD else 1
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, [range(start, min(start + 64, len(rows))) for start in range(0, len(rows), 64)]))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _pixels(data: bytes, where: str, mode: str, size: tuple[int, int] | None) -> np.ndarray[Any, Any]:
    try:
        with Image.open(io.BytesIO(data)) as file:
            image = file if file.mode == mode else file.convert(mode)
            if size is not None:
                image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
            pixels = np.array(image)
    except Exception as error:  # Pillow raises nearly anything on damaged bytes, and all of it means the same
        raise DataError(
            "this image cannot be read",
            where=where,
            found=f"{type(error).__name__}: {error}",
            remedy="replace or remove it",
        ) from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def check_size(found: Sequence[int], wanted: Sequence[int], where: str) -> None:
    """Raise unless an image is as high and wide as the first one."""
    if tuple(found) != tuple(wanted):
        raise DataError(
            "images of several sizes",
            where=where,
            found=f"{found[0]} x {found[1]} pixels",
            wanted=f"{wanted[0]} x {wanted[1]} as in the first image",
            remedy="give size, to which all are resized",
        )
