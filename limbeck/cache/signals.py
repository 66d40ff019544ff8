"""What a cache holds of each tap: its codec, its shape, and whether it has a value a sample or a value a position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.cache.codecs import Codec, parse_codec
from limbeck.core.errors import CacheError, TensorError
from limbeck.core.top_k import TopK
from limbeck.core.trace import Trace

Value = Tensor | TopK
_TEMPERATURES = (1.0, 4.0)  # at which students read logits: as they are, and as images' teachers are usually softened
COUNTS = "#counts"  # the array of how many values each row has


@dataclass(frozen=True)
class Signal:
    """One tensor that a teacher says of each sample.

    Args:
        tap: What it is asked for by.
        part: Its place in the list, where the tap is a list of tensors.
        codec: How it is stored.
        inner: Dimensions between the sample's and the value's that are the same for all, such as ``[T]`` tokens.
        shape: Of one value: ``[C]`` of logits.
        dtype: Of the original.
        masked: A sample has as many values as its mask has positions that count.
        text: A sample's value is a text; its values here are the bytes of its UTF-8.
    """

    tap: str
    part: int | None
    codec: Codec
    inner: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    masked: bool
    text: bool = False

    @property
    def name(self) -> str:
        """By which its arrays stand in a shard."""
        return self.tap if self.part is None else f"{self.tap}[{self.part}]"

    @property
    def values(self) -> int:
        """Values of a sample, where all have as many."""
        return int(torch.Size(self.inner).numel())

    @property
    def counts(self) -> str | None:
        """The array that tells how many values each sample has; ``None`` where all have as many."""
        return f"{COUNTS}:{self.name}" if self.text else COUNTS if self.masked else None

    def of(self, trace: Trace) -> Any:
        """Its value in what a teacher said."""
        value = trace[self.tap] if self.part is None else trace[self.tap][self.part]
        return value.detach() if isinstance(value, Tensor) else value

    def count(self, value: Any, mask: Tensor | None) -> Tensor | None:
        """How many values each sample has, ``[B]``; ``None`` where all have as many."""
        if self.text:
            return torch.tensor([len(text.encode()) for text in value], dtype=torch.int32)
        return mask.sum(1).int().cpu() if self.masked and mask is not None else None

    def flatten(self, value: Any, mask: Tensor | None) -> Tensor:
        """``[B, *inner, *shape]`` as ``[P, *shape]``, sample after sample; texts as their bytes.

        Raises:
            TensorError: Its shape is not that of the first batch.
        """
        if self.text:
            return torch.frombuffer(bytearray("".join(value).encode() or b"\0"), dtype=torch.uint8)[: _bytes(value)]
        if self.masked:
            assert mask is not None
            found, wanted = value.shape[2:], self.shape
            rows = value[mask] if found == wanted else value
        else:
            found, wanted = value.shape[1:], (*self.inner, *self.shape)
            rows = value.reshape(-1, *self.shape) if found == wanted else value
        if tuple(found) != tuple(wanted):
            raise TensorError(
                "not every batch gives a tensor of one shape",
                where=self.name,
                found=list(found),
                wanted=list(wanted),
                remedy="cache data whose samples are alike, or give the batch a mask of the positions that count",
            )
        return rows

    def restore(self, value: Value, counts: Tensor | None, samples: int, mask: Tensor | None) -> Value | list[str]:
        """The inverse of :meth:`flatten`; positions that do not count are zero."""
        if self.text:
            assert isinstance(value, Tensor) and counts is not None  # noqa: PT018
            return [bytes(part.tolist()).decode() for part in value.split(counts.tolist())]
        if isinstance(value, TopK):
            ids, log_probs, tail = (self._restore(part, samples, mask, part.shape[1:]) for part in value[:3])
            return TopK(ids, log_probs, tail, value.classes)
        return self._restore(value, samples, mask, value.shape[1:])

    def _restore(self, rows: Tensor, samples: int, mask: Tensor | None, shape: torch.Size) -> Tensor:
        if not self.masked:
            return rows.view(samples, *self.inner, *shape)
        assert mask is not None
        full = rows.new_zeros(*mask.shape, *shape)
        full[mask] = rows
        return full

    def lost(self, values: Tensor, decoded: Value) -> dict[str, Tensor]:
        """What the codec lost of each value, by measure: of logits divergences in nats at temperatures of 1 and 4."""
        if self.text:
            return {}
        return self.codec.errors(values, decoded, _TEMPERATURES if self.tap == "logits" else None)

    def written(self) -> dict[str, Any]:
        """As plain values, which :func:`parse_signal` reads back."""
        return {
            "tap": self.tap,
            "part": self.part,
            "codec": self.codec.written(),
            "inner": list(self.inner),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "masked": self.masked,
            "text": self.text,
        }


def parse_signal(plain: Mapping[str, Any]) -> Signal:
    """Read a signal from a header.

    Raises:
        CacheError: It is none.
    """
    try:
        dtype = getattr(torch, plain["dtype"])
        codec = parse_codec(plain["codec"])
        inner, shape = tuple(plain["inner"]), tuple(plain["shape"])
        return Signal(plain["tap"], plain["part"], codec, inner, shape, dtype, plain["masked"], plain["text"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"this is no signal: {error}", where="header.signals", found=dict(plain)) from error


def signals_of(tap: str, value: Any, codec: Codec, mask: Tensor | None) -> list[Signal]:
    """The signals that a tap's value is stored as: one, or one for each tensor of a list; a text for each sample."""
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        return [Signal(tap, None, parse_codec({"raw": {"dtype": "keep"}}), (), (), torch.uint8, False, True)]
    if isinstance(value, (list, tuple)):
        return [_signal(tap, i, part, codec, mask) for i, part in enumerate(value)]
    return [_signal(tap, None, value, codec, mask)]


def _signal(tap: str, part: int | None, value: Any, codec: Codec, mask: Tensor | None) -> Signal:
    if not isinstance(value, Tensor):
        raise CacheError("only tensors and texts can be stored", where=tap, found=type(value).__name__)
    masked = mask is not None and mask.ndim == 2 and value.shape[:2] == mask.shape
    outer = 2 if masked else value.ndim - 1 if codec.rows_only else 1
    inner = () if masked else tuple(value.shape[1:outer])
    return Signal(tap, part, codec, inner, tuple(value.shape[outer:]), value.dtype, masked)


def _bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)
