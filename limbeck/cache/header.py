"""The header of a cache: everything that says what its rows are, and what a reader must agree with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.cache.signals import Signal, parse_signal
from limbeck.core.errors import CacheError
from limbeck.core.plain import canonical, differences, digest

FORMAT = 1
HEADER, INDEX, SHARDS, CONSTANTS = "header.json", "index.json", "shards", "constants.safetensors"
_PLAIN = ("data", "views", "teacher", "origin", "batch", "shard_rows", "made_with")


@dataclass(frozen=True)
class Header:
    """What a cache is of.

    Row ``view * samples + sample`` holds what the teacher said of that sample in that view.

    Args:
        data: Samples, augmentation, normalisation and content; see :func:`limbeck.cache.prints.describe_views`.
        views: Views of each sample.
        teacher: Who spoke; see :func:`limbeck.cache.prints.describe_teacher`.
        signals: What was said.
        constants: Taps that are the same for all samples, such as ``logits@weight``.
        origin: How a recipe named the teacher, or ``None``.
        batch: Samples the teacher saw at once; rounding depends on it.
        shard_rows: Rows of a shard; the last holds what is left.
        made_with: Versions; for people.
    """

    data: dict[str, Any]
    views: int
    teacher: dict[str, Any]
    signals: tuple[Signal, ...]
    constants: tuple[str, ...]
    origin: dict[str, Any] | None
    batch: int
    shard_rows: int
    made_with: dict[str, str]

    @property
    def samples(self) -> int:
        """In the set."""
        return int(self.data["samples"])

    @property
    def rows(self) -> int:
        """In all shards."""
        return self.samples * self.views

    @property
    def shards(self) -> int:
        """How many."""
        return -(-self.rows // self.shard_rows)

    def shard(self, number: int) -> range:
        """The rows of a shard."""
        return range(number * self.shard_rows, min(self.rows, (number + 1) * self.shard_rows))

    @property
    def taps(self) -> tuple[str, ...]:
        """What it can answer."""
        return tuple(dict.fromkeys([*(s.tap for s in self.signals), *self.constants]))

    def written(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "kind": "teacher cache",
            "format": FORMAT,
            **{name: getattr(self, name) for name in _PLAIN},
            "signals": [s.written() for s in self.signals],
            "constants": list(self.constants),
        }

    @property
    def digest(self) -> str:
        """A hash of it, which every shard carries."""
        return digest(canonical(self.written()))

    def refuse_other(self, wanted: dict[str, Any], what: str) -> None:
        """Raise unless these fields of the header are as a reader or another builder has them.

        Raises:
            CacheError: The message names the first field that differs.
        """
        own = self.written()
        compared = [k for k in wanted if k != "made_with"]  # another version may say the same
        for place, now, was in differences({k: wanted[k] for k in compared}, {k: own.get(k) for k in compared}):
            raise CacheError(
                f"the cache is of another {what}",
                where=place,
                found=f"{was} in the cache",
                wanted=f"{now} as asked for",
                remedy="use it with what it was built from, or build another",
            )


def read_plain(path: Path) -> dict[str, Any]:
    """A JSON file of a cache, whole and unchanged: it holds its own digest, and has one way to be written.

    Raises:
        CacheError: It is missing or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CacheError(
            "this file is missing" if isinstance(error, FileNotFoundError) else f"this file cannot be read: {error}",
            where=str(path),
            remedy="give the folder of a cache, which limbeck cache build makes",
        ) from error
    try:
        value = json.loads(content)
        own = value.pop("digest")
        whole = content == sealed(value) and own == digest(canonical(value))
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise CacheError("this file is damaged", where=str(path), remedy="copy the cache again, or build it anew")
    return dict(value)


def sealed(value: dict[str, Any]) -> bytes:
    """Plain values with their digest, as they are written."""
    return canonical({**value, "digest": digest(canonical(value))})


def read_header(folder: Path) -> Header:
    """The header of a cache's folder.

    Raises:
        CacheError: There is none, or it is damaged or of another format.
    """
    place = folder / HEADER
    plain = read_plain(place)
    if plain.get("kind") != "teacher cache" or plain.get("format") != FORMAT:
        raise CacheError(
            "this is no cache of this format", where=str(place), found=plain.get("format"), wanted=f"format {FORMAT}"
        )
    fields = {name: plain[name] for name in _PLAIN}
    signals = tuple(parse_signal(s) for s in plain["signals"])
    return Header(signals=signals, constants=tuple(plain["constants"]), **fields)
