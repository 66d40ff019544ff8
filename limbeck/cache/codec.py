"""What a codec is: values of positions as arrays with a fixed number of bytes a position, and back.

A position is what has one value: a sample, a token. A codec turns the values of P positions into arrays of P rows, and
any rows of these into the values again. A row's bytes depend on that row alone, never on the batch it came in, so that
a cache does not depend on how its builder cut the work (on the CPU; other devices may add up a row's tail in an order
that the batch's size decides).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.core.errors import CacheError, ConfigError

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

_PIECE = 1 << 21  # values worked on at a time: a few caches full; other devices want more to do
_PIECE_ELSEWHERE = 1 << 26


class Codec(ABC):
    """A way to store values ``[P, *shape]``.

    ``rows_only``: it stores values of one dimension, such as the logits ``[C]`` of a position.
    """

    name: ClassVar[str]
    rows_only: ClassVar[bool] = False

    @abstractmethod
    def arrays(self, shape: Sequence[int], dtype: torch.dtype) -> Layout:
        """What is stored of values of this shape and type: each array's name, the shape of its rows, and its type.

        Raises:
            ConfigError, TensorError: Such values cannot be stored.
        """

    @abstractmethod
    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """The arrays of values ``[P, *shape]``, on their device; on the CPU each row's bits depend on that row alone.

        Raises:
            TensorError: A value that cannot be stored, with its position.
        """

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Any:
        """The values again, for any rows of the arrays, on their device.

        Args:
            arrays: As :meth:`encode` gave them, or rows of them.
            shape: Of a value.
            dtype: Of the values that were encoded.

        Raises:
            CacheError: These are not such arrays.
        """

    @abstractmethod
    def errors(self, values: Tensor, decoded: Any, temperatures: Sequence[float] | None = None) -> dict[str, Tensor]:
        """What was lost, by measure, ``[P]`` float64 each: divergences in nats, or the relative error.

        Args:
            values: ``[P, *shape]`` that were encoded.
            decoded: What became of them.
            temperatures: Where given, values are logits, and ``kl`` is the divergence of what was stored from the
                original at a temperature of 1, ``kl_t4`` the one at 4, and so on.
        """

    def bytes_a_position(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """How many bytes a value takes.

        >>> from limbeck.cache.codecs import TopKCodec
        >>> TopKCodec().bytes_a_position([128_256])
        125
        """
        rows = self.arrays(shape, dtype).values()
        return sum(math.prod(row) * kind.itemsize for row, kind in rows)

    def written(self) -> dict[str, dict[str, Any]]:
        """As plain values, every option written out, which :func:`limbeck.cache.codecs.parse_codec` reads back.

        >>> from limbeck.cache.codecs import TopKCodec
        >>> TopKCodec().written()
        {'top_k': {'k': 50, 'bits': 6, 'temperature': 4.0}}
        """
        return {self.name: asdict(self)}  # type: ignore[call-overload]

    def option_error(self, option: str, wanted: str) -> ConfigError:
        return ConfigError(
            "wrong option", where=f"{self.name}.{option}", found=repr(getattr(self, option)), wanted=wanted
        )

    def check(self, arrays: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
        """Refuse arrays that :meth:`encode` would not give."""
        layout = self.arrays(shape, dtype)
        rows = {len(array) for array in arrays.values() if array.ndim}
        found = {name: (tuple(array.shape[1:]), array.dtype) for name, array in arrays.items()}
        if found != layout or len(rows) > 1:
            raise CacheError(
                f"these arrays are not those of {self.name}",
                where=self.name,
                found={name: f"{list(array.shape)} {array.dtype}" for name, array in arrays.items()},
                wanted={name: f"[P, {str(list(row))[1:]} {kind}" for name, (row, kind) in layout.items()},
            )


def kl_name(temperature: float) -> str:
    """The name of a divergence at a temperature."""
    return "kl" if temperature == 1 else f"kl_t{temperature:g}"


def pieces(values: Tensor) -> Iterator[slice]:
    """Consecutive rows, as many at a time as make a piece."""
    rows = max(1, (_PIECE if values.device.type == "cpu" else _PIECE_ELSEWHERE) // max(1, values[:1].numel()))
    for start in range(0, len(values), rows):
        yield slice(start, min(start + rows, len(values)))
