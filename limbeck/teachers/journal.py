"""Files of lines that are only ever added to: each line carries the checksum of all that follows it.

A line is ``{"sum":"<16 hex digits>","head":{...},"body":{...}}``. The sum is the start of the SHA-256 of every byte
between it and the line's end, so a line is checked without being parsed, and any flipped byte shows. The head is small:
a reader that only wants to know what is there never parses the bodies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.core.errors import DataError

_OPEN, _DIGITS = b'{"sum":"', 16
_REST = len(_OPEN) + _DIGITS
_HEAD, _BODY = b'","head":', b',"body":'


class Line(NamedTuple):
    """Where a line stands in its file, and its head."""

    offset: int
    length: int
    head: dict[str, Any]


def pack(head: dict[str, Any], body: Any) -> bytes:
    """A line, its newline with it.

    >>> pack({"key": "a"}, {"text": "b"})
    b'{"sum":"4b581d35c6bd33aa","head":{"key":"a"},"body":{"text":"b"}}\\n'
    """
    rest = _HEAD + _compact(head) + _BODY + _compact(body) + b"}"
    return _OPEN + _digest(rest) + rest + b"\n"


def head_of(raw: bytes) -> dict[str, Any]:
    """The head of a line that is whole; ``ValueError`` for any other."""
    rest = raw[_REST:].removesuffix(b"\n")
    if not raw.startswith(_OPEN) or raw[len(_OPEN) : _REST] != _digest(rest):
        raise ValueError("the checksum does not fit")
    return json.loads(rest[len(_HEAD) : rest.index(_BODY)])


def body_of(raw: bytes) -> Any:
    """The body of a line that is whole; ``ValueError`` for any other."""
    head_of(raw)
    rest = raw[_REST:].removesuffix(b"\n")
    return json.loads(rest[rest.index(_BODY) + len(_BODY) : -1])


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _digest(rest: bytes) -> bytes:
    return hashlib.sha256(rest).hexdigest()[:_DIGITS].encode()


class Reader:
    """Reads what was added to a file since it last looked.

    Args:
        path: The file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.lines = path, 0, 0

    def news(self, last: bool = False) -> Iterator[Line]:
        """The heads of the lines that were added; a line without its end is left for the next look.

        Args:
            last: Nobody writes any more, so a line without its end is taken if it is whole but for its newline.

        Raises:
            DataError: A line is damaged.
        """
        try:
            if os.stat(self.path).st_size == self.offset:
                return
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self.offset)
            for raw in file:
                whole = raw.endswith(b"\n")
                if not whole and not last:
                    return
                try:
                    head = head_of(raw)
                except ValueError as error:
                    if not whole:
                        return
                    raise damaged(self.path, self.lines + 1) from error
                line = Line(self.offset, len(raw), head)
                self.offset, self.lines = self.offset + len(raw), self.lines + 1
                yield line

    def torn(self) -> bool:
        """Something stands after the last whole line."""
        return self.path.exists() and os.stat(self.path).st_size > self.offset


def damaged(path: Path, line: int | str) -> DataError:
    """The error for a line that is not what was written."""
    return DataError(
        "this line is not what was once written there",
        where=f"{path}, line {line}",
        wanted="the text that its checksum belongs to",
        remedy="put the file back from a copy, or delete the line: only what it held is asked again",
    )


class Writer:
    """Adds lines to a file of its own.

    Args:
        path: The file; it is made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def add(self, raw: bytes) -> int:
        """Add a line and say where it begins.

        Raises:
            DataError: The disk does not take it. What was written of it is taken back.
        """
        with _told(self.path):
            if self._handle is None:
                self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
                _sync_folder(self.path.parent)
            start = os.fstat(self._handle).st_size
            left = memoryview(raw)
            try:
                while left:
                    left = left[os.write(self._handle, left) :]
            except OSError:
                self._take_back(start)
                raise
            return start

    def sync(self) -> None:
        """When this returns, a power cut cannot take what was added."""
        with _told(self.path):
            if self._handle is not None:
                os.fsync(self._handle)

    def _take_back(self, start: int) -> None:
        assert self._handle is not None
        try:
            os.ftruncate(self._handle, start)  # nobody has read it: a line counts when its end is there
        except OSError:
            self.close()  # no line may follow a torn one, and the file is not opened again

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            "the record cannot be written",
            where=str(path),
            found=error.strerror or str(error),
            remedy="make room on the disk and call again: what was answered before is kept",
        ) from error


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be flushed
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
