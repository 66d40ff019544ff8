"""What all calls of a served teacher share, and what they tell."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

from limbeck.teachers.endpoint import Endpoint
from limbeck.teachers.limits import Limits, Money, Patience
from limbeck.teachers.record import Record


@dataclass(frozen=True)
class Progress:
    """How far a call is.

    Args:
        done: Prompts that are answered.
        total: Prompts of the call, where that is known.
        asked: Answers that the server gave, by this teacher.
        reused: Answers that came from the record, by this teacher.
        spent: What the record has cost so far.
    """

    done: int
    total: int | None
    asked: int
    reused: int
    spent: float


@dataclass
class Counts:
    """What a teacher has done; its calls in several threads count together."""

    asked: int = 0
    reused: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Desk:
    """What all calls of one teacher share."""

    endpoint: Endpoint
    record: Record
    limits: Limits
    money: Money
    patience: Patience
    concurrency: int
    counts: Counts
    progress: Callable[[Progress], object] | None


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the main thread as Ctrl-C does, by an exception, so that what is under way is awaited."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        if ours and signal.getsignal(signal.SIGTERM) is _leave:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
