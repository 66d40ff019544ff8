"""Codecs: values of positions as arrays with a fixed number of bytes a position, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, did_you_mean


class Codec(ABC):
    """Turns values ``[P, *shape]`` into arrays of P rows and back."""

    name: ClassVar[str]
    rows_only: ClassVar[bool] = False

    @abstractmethod
    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """Arrays with a row a position."""

    @abstractmethod
    def decode(self, arrays: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """The values again."""

    @abstractmethod
    def errors(self, values: Tensor, decoded: Any) -> dict[str, Tensor]:
        """What was lost, by measure, ``[P]`` each."""

    def written(self) -> dict[str, Any]:
        """As plain values."""
        return {self.name: asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Raw(Codec):
    """Values as they are, in a floating type."""

    dtype: str = "float16"
    name: ClassVar[str] = "raw"

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """One array."""
        return {"values": values.to(getattr(torch, self.dtype))}

    def decode(self, arrays: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """In the original's type."""
        return arrays["values"].to(dtype)

    def errors(self, values: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        """Relative error of each row."""
        a, b = values.flatten(1).double(), decoded.flatten(1).double()
        return {"relative": (a - b).norm(dim=1) / a.norm(dim=1).clamp(min=1e-300)}


CODECS: dict[str, type[Codec]] = {c.name: c for c in (Raw,)}


def parse_codec(spec: Codec | str | Mapping[str, Any]) -> Codec:
    """Read a codec as a recipe writes it."""
    if isinstance(spec, Codec):
        return spec
    name, options = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()))
    if name not in CODECS:
        raise ConfigError("no such codec", where="codec", found=repr(name), remedy=did_you_mean(name, CODECS))
    return CODECS[name](**(options or {}))
