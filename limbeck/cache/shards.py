"""Shards: files of consecutive rows that carry their own digest and are read through memory maps."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from limbeck.cache.header import SHARDS
from limbeck.cache.signals import COUNTS
from limbeck.core.errors import CacheError
from limbeck.core.files import write_bytes
from limbeck.core.plain import canonical, digest

PRINTS = "#prints"  # the array beside the signals' that tells what was seen


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / SHARDS / f"{number:06d}.safetensors"


def write_shard(path: Path, arrays: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a shard at once. The same arrays and facts give the same bytes."""
    arrays = {name: array.contiguous() for name, array in arrays.items()}
    # One entry only: safetensors writes several in any order.
    told = canonical({**facts, "digest": _digest(arrays)}).decode()
    write_bytes(path, save(arrays, {"limbeck": told}))


@dataclass
class Shard:
    """A shard's arrays, mapped into memory and read where they are looked at.

    Args:
        path: Its file.
        facts: Which rows it holds, of which header, and the errors of its codecs.
        arrays: Each with a row a row of the cache, or a row a value.
    """

    path: Path
    facts: dict[str, Any]
    arrays: dict[str, Tensor]
    starts: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in self.arrays.items():
            if name.startswith(COUNTS):
                self.starts[name] = array.long().cumsum(0) - array.long()

    def values_of(self, rows: Tensor, counts: str) -> Tensor:
        """Where the values of some rows stand in arrays with a row a value, row after row.

        Args:
            rows: Of the shard.
            counts: The array that tells how many values each row has.
        """
        return places_of(self.starts[counts][rows], self.arrays[counts].long()[rows])


def open_shard(path: Path, *, header: str, number: int, bytes: int | None = None, check: bool = True) -> Shard:
    """Open a shard and look at every bit of it.

    Args:
        path: Its file.
        header: The digest of the header it must be of.
        number: Which shard it must be.
        bytes: How large it must be, where that is known.
        check: Compute the digest of its arrays.

    Raises:
        CacheError: It is missing, cut, changed, or another shard than its name says.
    """
    try:
        if bytes is not None and path.stat().st_size != bytes:
            raise _damaged(path, f"{path.stat().st_size} bytes", f"{bytes} bytes")
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get("limbeck", "")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        facts = json.loads(told)
        own = facts.pop("digest")
        if told.encode() != canonical({**facts, "digest": own}):
            raise ValueError("metadata")
    except FileNotFoundError:
        raise CacheError("a shard is missing", where=str(path), remedy=_REMEDY) from None
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if facts.get("header") != header or facts.get("shard") != number:
        raise CacheError(
            "this shard is not of this cache",
            where=str(path),
            found=f"shard {facts.get('shard')} of {facts.get('header')}",
            wanted=f"shard {number} of {header}",
            remedy=_REMEDY,
        )
    if check and _digest(arrays) != own:
        raise _damaged(path, "other values than were written")
    return Shard(path, facts, arrays)


def places_of(starts: Tensor, counts: Tensor) -> Tensor:
    """The places of runs that begin at ``starts`` and are ``counts`` long, run after run.

    >>> places_of(torch.tensor([7, 2]), torch.tensor([3, 1]))
    tensor([7, 8, 9, 2])
    """
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.arange(int(counts.sum())) - before + starts.repeat_interleave(counts)


_REMEDY = "remove this file and go on with limbeck cache build, which writes it again"


def _damaged(path: Path, found: str, wanted: str | None = None) -> CacheError:
    return CacheError("this shard is damaged", where=str(path), found=found, wanted=wanted, remedy=_REMEDY)


def _digest(arrays: dict[str, Tensor]) -> str:
    parts: list[Any] = []
    for name, array in sorted(arrays.items()):
        parts.append(f"{name} {list(array.shape)} {array.dtype} ".encode())
        parts.append(array.reshape(-1).view(torch.uint8).numpy() if array.numel() else b"")
    return digest(*parts)
