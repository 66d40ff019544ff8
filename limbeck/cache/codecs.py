"""The codecs there are, by name; and the plainest of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.cache.codec import Codec, Layout, kl_name, pieces
from limbeck.cache.top_k import TopKCodec
from limbeck.core.catalogue import check_options, options_of
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError, TensorError, did_you_mean
from limbeck.core.named import read_named

__all__ = ["CODECS", "Codec", "Layout", "Raw", "TopKCodec", "parse_codec"]

_TYPES = ("float32", "float16", "bfloat16", "keep")


@dataclass(frozen=True)
class Raw(Codec):
    """Values as they are.

    Args:
        dtype: ``"float32"``, ``"float16"`` (the default: features and logits lose nothing that matters in it) or
            ``"bfloat16"``, for floating values; ``"keep"``: their own type, also integers and booleans.

    Example:
        >>> codec = Raw("keep")
        >>> codec.decode(codec.encode(torch.tensor([[True], [False]])), [1], torch.bool).tolist()
        [[True], [False]]
    """

    dtype: str = "float16"
    name: ClassVar[str] = "raw"

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise self.option_error("dtype", f"one of {', '.join(_TYPES)}")

    def arrays(self, shape: Sequence[int], dtype: torch.dtype) -> Layout:
        if self.dtype == "keep":
            return {"values": (tuple(shape), dtype)}
        if not dtype.is_floating_point:
            raise TensorError(
                f"only floating values can be stored as {self.dtype}",
                where="values",
                found=str(dtype),
                remedy="store them with {raw: {dtype: keep}}",
            )
        return {"values": (tuple(shape), getattr(torch, self.dtype))}

    @torch.no_grad()
    def encode(self, values: Tensor) -> dict[str, Tensor]:
        (_, kind), = self.arrays(values.shape[1:], values.dtype).values()  # fmt: skip
        stored = values.detach().to(kind).contiguous()
        if kind != values.dtype and (stored.isinf() & values.isfinite()).any():
            flat = values.masked_fill(~values.isfinite(), 0).reshape(len(values), -1).abs()
            place = int(flat.amax(dim=1).argmax())
            raise TensorError(
                f"too large for {self.dtype}",
                where=f"values, position {place}",
                found=f"{float(flat[place].max()):g}",
                wanted=f"at most {torch.finfo(kind).max:g}",
                remedy="store them with {raw: {dtype: bfloat16}} or {raw: {dtype: float32}}",
            )
        return {"values": stored}

    def decode(self, arrays: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.check(arrays, shape, dtype)
        return arrays["values"].to(dtype)

    @torch.no_grad()
    def errors(self, values: Tensor, decoded: Tensor, temperatures: Sequence[float] | None = None) -> dict[str, Tensor]:
        r"""``relative``: :math:`|x - y| / |x|`, over values that are finite; or divergences, see the base class."""
        found: dict[str, list[Tensor]] = {}
        for piece in pieces(values):
            original, stored = values[piece].cpu(), decoded[piece].cpu()
            same = (original == stored) | (original.isnan() & stored.isnan())
            original, stored = original.double(), stored.double()
            for temperature in temperatures or ():
                kl = kl_rows(soften(original, temperature), soften(stored, temperature)).clamp(min=0)
                found.setdefault(kl_name(temperature), []).append(kl)
            if temperatures is None:
                size = _length(original.masked_fill(~original.isfinite(), 0.0))
                gap = _length((original - stored).masked_fill(same, 0.0))
                found.setdefault("relative", []).append(torch.where(gap == 0, 0.0, gap / size))
        return {name: torch.cat(parts) for name, parts in found.items()}


def _length(rows: Tensor) -> Tensor:
    """Of each row ``[P, *]`` as a vector."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).norm(dim=1)


#: Codecs by their names in a recipe.
CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Raw, TopKCodec)}


def parse_codec(spec: Codec | str | Mapping[str, Any], where: str = "codec") -> Codec:
    """Read a codec as a recipe writes it: its name, or ``{name: {option: value}}``.

    Raises:
        ConfigError: There is no such codec or option.

    >>> parse_codec({"top_k": {"k": 20}})
    TopKCodec(k=20, bits=6, temperature=4.0)
    >>> parse_codec("topk")
    Traceback (most recent call last):
    limbeck.core.errors.ConfigError: codec: no such codec; found 'topk'; wanted one of raw, top_k; did you mean 'top_k'?
    """
    if isinstance(spec, Codec):
        return spec
    name, options = read_named(spec, where)
    if name not in CODECS:
        raise ConfigError(
            "no such codec",
            where=where,
            found=repr(name),
            wanted=f"one of {', '.join(CODECS)}",
            remedy=did_you_mean(name, CODECS),
        )
    cls = CODECS[name]
    return cls(**check_options(options_of(cls, name), options, f"{where}.{name}"))
