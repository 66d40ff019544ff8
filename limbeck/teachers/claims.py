"""Who is asking what right now: several processes share a record, and none asks what another one is asking.

A process that asks holds ``<id>.lock`` for as long as it lives, and writes what it takes and gives back into
``<id>.claims``, with the most that each question may cost. A process whose lock is free is dead: what it held
unanswered counts as lost, since the server may have charged for it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from filelock import FileLock, Timeout

from limbeck.teachers.journal import Reader, Writer, pack


class Holder:
    """What one process holds, as others read it.

    Args:
        folder: The record's folder.
        name: The process's id within it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.held = name, dict[str, float]()
        self._lock, self._path = folder / f"{name}.lock", folder / f"{name}.claims"
        self._reader = Reader(self._path)

    def look(self) -> None:
        """Read what it took and gave back since the last look."""
        for line in self._reader.news():
            key, cost = line.head["key"], line.head["cost"]
            if cost is None:
                self.held.pop(key, None)
            else:
                self.held[key] = cost

    def dead(self) -> bool:
        """It lives no more; its lock is ours in passing. Ask only under the record's own lock."""
        lock = FileLock(self._lock, timeout=0, thread_local=False)
        try:
            with lock:
                return True
        except Timeout:
            return False

    def bury(self) -> None:
        """Remove its files; its answers stay."""
        for path in (self._path, self._lock):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


class Own:
    """What this process holds.

    Args:
        folder: The record's folder.
    """

    def __init__(self, folder: Path) -> None:
        # Names sort by age, so that every reader meets the answers in the same order.
        self.name = f"{time.time_ns():016x}-{secrets.token_hex(4)}"
        self.pid, self.held = os.getpid(), dict[str, float]()
        self._lock = FileLock(folder / f"{self.name}.lock", thread_local=False)
        self._lock.acquire(timeout=0)
        self._path = folder / f"{self.name}.claims"
        self._writer = Writer(self._path)

    def take(self, key: str, cost: float, safe: bool) -> None:
        """Hold a question that may cost so much; where ``safe`` is set, a power cut does not make us forget it."""
        self.held[key] = cost
        self._writer.add(pack({"key": key, "cost": cost}, None))
        if safe:
            self._writer.sync()

    def free(self, key: str) -> None:
        """Hold it no more."""
        if self.held.pop(key, None) is not None:
            self._writer.add(pack({"key": key, "cost": None}, None))

    def close(self) -> None:
        """Hold nothing any more, and leave no file. Only under the record's own lock."""
        self._writer.close()
        self.held.clear()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        self._lock.release()
        with contextlib.suppress(OSError):
            (self._path.parent / f"{self.name}.lock").unlink(missing_ok=True)
