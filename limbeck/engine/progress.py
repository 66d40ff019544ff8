"""What a user sees while it trains: a bar on stderr, with throughput and time left."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A progress bar; nothing where stderr is no terminal or quiet is wished.

    Args:
        quiet: Show nothing but messages.
        active: This process may show anything at all; in distributed runs one does.
    """

    def __init__(self, quiet: bool = False, active: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not active, highlight=False, soft_wrap=True)
        self._on = active and not quiet and self.console.is_terminal
        self._progress: Progress | None = None
        self._next = 0.0

    def start(self, name: str, done: int, total: int) -> None:
        """Begin a stage."""
        self.stop()
        if self._on:
            columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn())
            self._progress = Progress(
                *columns,
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._progress.add_task(name, total=total, completed=done, facts="")

    def update(self, done: int, samples_per_s: float | None = None, **facts: float | None) -> None:
        """Show how far it is; at most ten times a second."""
        if self._progress is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 0.1
        texts = [f"{k} {v:.4g}" for k, v in facts.items() if v is not None]
        if samples_per_s:
            texts.append(f"{samples_per_s:.0f} samples/s")
        known = {"facts": "  ".join(texts)} if texts else {}
        self._progress.update(self._progress.task_ids[0], completed=done, **known)  # type: ignore[arg-type]

    def stop(self) -> None:
        """End the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, message: str) -> None:
        """A message on stderr, bar or not."""
        self.console.print(message, markup=False)
