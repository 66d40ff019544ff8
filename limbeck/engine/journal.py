"""A run's folder, and the lines it writes while it goes: ``metrics.jsonl`` and ``run.json``."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from limbeck.core.files import write_json


class Journal:
    """Metrics as one JSON object a line, and what is known about the run.

    Args:
        folder: The run's folder; ``None`` keeps the lines in memory only.
        facts: What ``run.json`` says beside status, environment and times.
    """

    def __init__(self, folder: Path | None, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self.lines: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._began = time.time()
        self._mark = time.perf_counter()

    @property
    def path(self) -> Path | None:
        """Where the lines go."""
        return None if self.folder is None else self.folder / "metrics.jsonl"

    def open(self, length: int = 0, seconds: float = 0.0) -> bool:
        """Begin, or go on after the first ``length`` bytes; says whether they were all there."""
        self.seconds, self._mark = seconds, time.perf_counter()
        if self.path is None:
            return True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            whole = file.tell() >= length
            file.truncate(min(length, file.tell()))
            file.seek(0)
            self.lines = [line for raw in file.read().splitlines() if (line := _parse(raw)) is not None]
        return whole

    def elapsed(self) -> float:
        """Seconds since the run began, those before a resume counted in."""
        return self.seconds + time.perf_counter() - self._mark

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        line = _finite(line)
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def sync(self) -> int:
        """Flush the lines to the disk; returns how many bytes there are."""
        if self.path is None or not self.path.exists():
            return 0
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def status(self, status: str, **facts: Any) -> None:
        """Write ``run.json``."""
        if self.folder is None:
            return
        write_json(
            self.folder / "run.json",
            {"status": status, **self.facts, **facts, "started": self._began, "seconds": round(self.elapsed(), 3)},
        )


def environment() -> dict[str, str]:
    """Versions and machine, for ``run.json``."""
    packages = {p: _version(p) for p in ("limbeck", "torch", "accelerate", "numpy")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {**packages, "python": sys.version.split()[0], "platform": platform.platform(), "device": device}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "not installed"


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None  # cut by a crash
    return line if isinstance(line, dict) else None


def _finite(value: Any) -> Any:
    """JSON knows no NaN: what is no number becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
