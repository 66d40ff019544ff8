"""Where units lie along the dimensions of tensors, where layers stand, and what is chosen together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of all units of an axis along a dimension, each ``width`` numbers wide."""

    axis: str
    width: int


Layout = tuple[Segment, ...]
Layouts = dict[str, dict[int, Layout]]  # of tensors, by name and dimension


@dataclass(frozen=True)
class Stack:
    """Layers one after the other: what the configuration calls their number, where they stand, how many they are."""

    field: str
    prefixes: tuple[str, ...]
    depth: int


@dataclass(frozen=True)
class Group:
    """The heads of one attention, or the units of one feed-forward network: what is chosen together.

    ``reader`` is the module that takes them in: what it is given tells how active they are. Groups of one ``family``
    keep the same units where something that only one layer holds serves them all (relative positions of T5).
    """

    axis: str
    reader: str
    tensors: tuple[str, ...]
    family: str | None = None


def index_of(layout: Layout, kept: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """Which places along a dimension stay, told from which units stay.

    >>> index_of((Segment("heads", 2), Segment("heads", 2)), {"heads": torch.tensor([1])}, {"heads": 3})
    tensor([2, 3, 8, 9])
    """
    parts, start = [], 0
    for segment in layout:
        units = sizes[segment.axis]
        chosen = kept.get(segment.axis, torch.arange(units))
        parts.append(start + (chosen.unsqueeze(1) * segment.width + torch.arange(segment.width)).flatten())
        start += units * segment.width
    return torch.cat(parts)


def owner_of(layout: Layout, axis: str, sizes: Mapping[str, int]) -> Tensor:
    """Of every place along a dimension the unit it belongs to; -1 where that is of another axis.

    >>> owner_of((Segment("heads", 2), Segment("kv_heads", 1)), "heads", {"heads": 2, "kv_heads": 1})
    tensor([ 0,  0,  1,  1, -1])
    """
    numbers = [torch.arange(sizes[s.axis]).repeat_interleave(s.width) for s in layout]
    return torch.cat([n if s.axis == axis else torch.full_like(n, -1) for n, s in zip(numbers, layout, strict=True)])
