"""Every answer that was ever paid for, on disk."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from limbeck.core.errors import ConfigError
from limbeck.teachers.answers import Answer, from_json, to_json
from limbeck.teachers.claims import Holder, Own
from limbeck.teachers.journal import Reader, Writer, body_of, damaged, pack

logger = logging.getLogger(__name__)
_SLACK = 1e-9  # sums of floats are held against the cap with so much patience


class Claim(enum.Enum):
    """What came of the wish to ask something."""

    MINE = "ask it"
    KNOWN = "the record has the answer"
    BUSY = "it is being asked elsewhere"
    DEAR = "too dear while other questions hold their most"
    OVER = "too dear for what is left of the cap"


class Place(NamedTuple):
    """Where an answer stands."""

    path: Path
    offset: int
    length: int


class Record:
    """A folder of answers, each under the key of its question; read by anybody, added to by many processes.

    ``answers-<id>.jsonl`` is one process's answers. A line is flushed to the disk before its answer is handed out. A
    last line that was cut by a kill is dropped (``torn`` names it) and its question asked again; any other damage is an
    error that names file and line. Nothing is ever changed or removed but the files of claims (see ``claims``).

    On one machine, or a network folder whose locks work, no question is asked by two processes at once, and none
    again that has its answer here. The one case in which a question is asked twice: its process died, or its
    connection broke, after the server began and before the answer was written.

    Args:
        folder: Where it is or shall be; it is made with the first claim.

    Raises:
        DataError: A line is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError("not a folder", where="record", found=str(self.folder), wanted="a folder, or a new name")
        self.paid = self.lost = 0.0
        self.torn: list[str] = []
        self._answers: dict[str, Place] = {}
        self._readers: dict[Path, Reader] = {}
        self._ended: set[Path] = set()
        self._holders: dict[str, Holder] = {}
        self._mutex = threading.RLock()
        self._own: Own | None = None
        self._writer: Writer | None = None
        weakref.finalize(self, _close_at_exit, weakref.ref(self))
        self.refresh()

    def __del__(self) -> None:
        if getattr(self, "_own", None) is not None:
            self.close()

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    @property
    def spent(self) -> float:
        """What all answers here cost, and the most that broken connections may have cost."""
        return self.paid + self.lost

    def refresh(self) -> None:
        """Read what other processes have added."""
        with self._mutex:
            if not self.folder.is_dir():
                return
            # In this order: a process has its lock before it has answers, so one without a lock has ended.
            found = sorted(self.folder.glob("answers-*.jsonl"))
            alive = {f"answers-{path.stem}" for path in self.folder.glob("*.lock")}
            for path in found:
                if path not in self._ended:
                    self._read(path, ended=path.stem not in alive)

    def read(self, key: str) -> Answer | None:
        """The answer to a question, or ``None`` where it has not been asked."""
        place = self._answers.get(key)
        if place is None:
            return None
        return from_json(_body(place)["answer"])

    def rows(self) -> Iterator[tuple[dict[str, Any], Answer]]:
        """All questions with their answers, oldest file first: the record as a data set."""
        for place in list(self._answers.values()):
            body = _body(place)
            yield body["request"], from_json(body["answer"])

    def claim(self, key: str, most: float = 0.0, cap: float | None = None) -> Claim:
        """Take a question in order to ask it; ``MINE`` has to end in ``write``, ``lose`` or ``free``.

        Args:
            key: The question's.
            most: The most it may cost.
            cap: What all of the record may cost: what is spent, what all processes hold, and this question.
        """
        with self._mutex:
            own = self._mine()
            return self._claim(own, key, most, cap)

    def _claim(self, own: Own, key: str, most: float, cap: float | None) -> Claim:
        with self._alone():
            self._look_around(own)
            self.refresh()  # after the look: who gives a question back has written its answer before
            if key in self._answers:
                return Claim.KNOWN
            holders = list(self._holders.values())
            if key in own.held or any(key in h.held for h in holders):
                return Claim.BUSY
            held = sum(own.held.values()) + sum(sum(h.held.values()) for h in holders)
            if cap is not None and self.spent + held + most > cap + _SLACK:
                return Claim.DEAR if held else Claim.OVER
            own.take(key, most, safe=cap is not None)
            return Claim.MINE

    def write(self, key: str, request: dict[str, Any], answer: Answer, cost: float) -> None:
        """Keep the answer to a claimed question; when this returns it is on the disk."""
        raw = pack({"kind": "answer", "key": key, "cost": cost}, {"request": request, "answer": to_json(answer)})
        with self._mutex:
            writer, offset = self._add(raw)
        writer.sync()  # other threads go on meanwhile
        with self._mutex:
            path = writer.path
            self._answers.setdefault(key, Place(path, offset, len(raw)))
            self.paid += cost
            self._give_back(key)

    def lose(self, key: str, cost: float) -> None:
        """Give a claimed question back whose asking broke, and count what it may have cost."""
        with self._mutex:
            if cost:
                self._note_loss(key, cost)
            self._give_back(key)

    def free(self, key: str) -> None:
        """Give a claimed question back."""
        with self._mutex:
            self._give_back(key)

    def close(self) -> None:
        """Give back all claims and let go of the folder; asking again opens it again."""
        with self._mutex:
            own, self._own = self._own, None
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if own is not None and own.pid == os.getpid():
                with contextlib.suppress(OSError), self._alone():
                    own.close()

    def _mine(self) -> Own:
        """This process's claims; they begin with the first one."""
        if self._own is not None and self._own.pid != os.getpid():
            raise ConfigError(
                "this record was opened by another process, of which this one is a fork",
                where=f"record {self.folder}",
                remedy="make the teacher in the process that uses it",
            )
        if self._own is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._own = Own(self.folder)
        return self._own

    def _give_back(self, key: str) -> None:
        if self._own is not None:
            self._own.free(key)

    def _alone(self) -> FileLock:
        """The folder's lock, held for moments; under it no process comes, goes or claims."""
        return FileLock(self.folder / "record.lock", poll_interval=0.005)

    def _add(self, raw: bytes) -> tuple[Writer, int]:
        own = self._mine()
        if self._writer is None:
            self._writer = Writer(self.folder / f"answers-{own.name}.jsonl")
        writer = self._writer
        reader = self._readers.setdefault(writer.path, Reader(writer.path))
        offset = writer.add(raw)
        reader.offset, reader.lines = offset + len(raw), reader.lines + 1
        return writer, offset

    def _note_loss(self, key: str, cost: float) -> None:
        self._add(pack({"kind": "lost", "key": key, "cost": cost}, None))[0].sync()
        self.lost += cost

    def _read(self, path: Path, ended: bool) -> None:
        reader = self._readers.setdefault(path, Reader(path))
        for line in reader.news(last=ended):
            if line.head["kind"] == "answer":
                self._answers.setdefault(line.head["key"], Place(path, line.offset, line.length))
                self.paid += line.head["cost"]
            else:
                self.lost += line.head["cost"]
        if ended:
            self._ended.add(path)
            if reader.torn():
                self.torn.append(f"{path}, line {reader.lines + 1}")
                logger.warning("%s was cut while it was written: it is dropped, and asked again", self.torn[-1])

    def _look_around(self, own: Own) -> None:
        """Read what other processes hold, and take over from the dead."""
        here = {p.stem for p in self.folder.glob("*.lock")} - {"record", own.name}
        self._holders = {n: self._holders.get(n) or Holder(self.folder, n) for n in here}
        for name, holder in list(self._holders.items()):
            holder.look()
            if not holder.dead():
                continue
            self.refresh()
            for key, cost in holder.held.items():
                if cost and key not in self._answers:
                    self._note_loss(key, cost)
            holder.bury()
            del self._holders[name]


def _body(place: Place) -> Any:
    with place.path.open("rb") as file:
        file.seek(place.offset)
        raw = file.read(place.length)
    try:
        return body_of(raw)
    except ValueError as error:
        raise damaged(place.path, f"the one at byte {place.offset}") from error


def _close_at_exit(record: weakref.ref[Record]) -> None:
    found = record()
    if found is not None:
        found.close()
