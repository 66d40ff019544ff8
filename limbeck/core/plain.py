"""Plain values, as JSON holds them: what they say, and where two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def canonical(value: Any) -> bytes:
    """The one way to write a plain value: sorted keys, no spaces, ASCII, a newline at the end.

    >>> canonical({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}\\n'
    """
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")


def digest(*parts: bytes) -> str:
    """A hash of 128 bits, as 32 hexadecimal digits."""
    sums = hashlib.blake2b(digest_size=16)
    for part in parts:
        sums.update(part)
    return sums.hexdigest()


def file_digest(path: Path) -> str:
    """The same hash of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two plain values differ: the place, dotted, and what stands there in each; ``"nothing"`` for no entry.

    >>> list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}}))
    [('a.b', 1, 3), ('c', 2, 'nothing')]
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        below = [(k, old.get(k, "nothing"), new.get(k, "nothing")) for k in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        below = [(i, o, n) for i, (o, n) in enumerate(zip(old, new, strict=True))]
    else:
        if old != new:
            yield place, old, new
        return
    for key, before, after in below:
        yield from differences(before, after, f"{place}.{key}" if place else str(key))
