"""Trainings that take turns in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from limbeck.core.batch import Batch
from limbeck.data.loader import IndexedLoader, Loader
from limbeck.engine import Stage, fit

#: Settings of glibc's allocator under which threads share one heap that keeps what it has: otherwise a step takes some
#: percent longer in one thread than in another, by which of its tensors are given back to the system and fetched anew.
ONE_HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}
WARM = 2  # turns of each side that are not counted
Turn = Callable[[], None]
Turns = dict[str, list[tuple[float, float]]]  # wall and processor seconds of each side's turns


def in_one_heap() -> None:
    """Start this script anew with the allocator's settings, unless it was started with them."""
    if any(os.environ.get(name) != value for name, value in ONE_HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_HEAP})


class Stop(BaseException):
    """Ends a training that has been measured."""


class InTurns(Loader):
    """A loader that waits before each batch until it is asked for the next turn."""

    def __init__(self, inner: IndexedLoader) -> None:
        self.inner, self.go, self.done, self.stopped = inner, threading.Semaphore(0), threading.Semaphore(0), False
        self.batch_size, self.samples, self.labels = inner.batch_size, inner.samples, inner.labels
        self.classes, self.class_names, self.seed = inner.classes, inner.class_names, inner.seed

    @property
    def steps_per_epoch(self) -> int:
        return self.inner.steps_per_epoch

    def example(self, size: int = 2) -> Batch:
        return self.inner.example(size)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()

    def epoch(self, epoch: int, **place: Any) -> Iterator[list[Batch]]:
        for parts in self.inner.epoch(epoch, **place):
            self.done.release()
            self.go.acquire()
            if self.stopped:
                raise Stop
            yield parts


class Training:
    """``fit`` in a thread: each call is a turn, from a batch that is there to the next one."""

    def __init__(self, stage: Stage, data: IndexedLoader, out: Path) -> None:
        self.data = InTurns(data)
        self.error: BaseException | None = None

        def run() -> None:
            try:
                fit([stage], self.data, out=out, quiet=True)
            except Stop:
                pass
            except BaseException as error:
                self.error = error
            self.data.done.release()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        self._wait()

    def _wait(self) -> None:
        self.data.done.acquire()
        if self.error is not None:
            raise self.error

    def __call__(self) -> None:
        self.data.go.release()
        self._wait()

    def close(self) -> None:
        self.data.stopped = True
        self.data.go.release()
        self.thread.join()


def in_turns(sides: dict[str, Turn], steps: int) -> Turns:
    """Wall and processor seconds of each side's turns, one turn of each a round."""
    found: Turns = {name: [] for name in sides}
    chance = random.Random(0)
    for _ in range(steps + WARM):
        for name in chance.sample(list(sides), len(sides)):
            wall, spent = time.perf_counter(), time.process_time()
            sides[name]()
            found[name].append((time.perf_counter() - wall, time.process_time() - spent))
    for side in sides.values():
        if isinstance(side, Training):
            side.close()
    return {name: times[WARM:] for name, times in found.items()}
