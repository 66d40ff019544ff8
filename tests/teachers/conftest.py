"""A real server on loopback, which can be killed and started again at its address."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.teachers.served import ServedTeacher

HERE = Path(__file__).parent


class Loopback:
    """The server's process, its address, and what it was asked."""

    def __init__(self, folder: Path, faults: list[str], share: float, latency: float) -> None:
        self.path = folder / "server.jsonl"
        self.script = json.dumps({"faults": faults, "share": share, "latency": latency})
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        command = [sys.executable, "-S", str(HERE / "loopback.py"), str(self.port), str(self.path), self.script]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def events(self, event: str) -> list[dict[str, Any]]:
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def asked(self) -> list[str]:
        return [line["prompt"] for line in self.events("asked")]

    def answered(self) -> list[str]:
        return [line["prompt"] for line in self.events("answered")]

    def wait_for(self, count: int, event: str = "asked") -> None:
        until = time.monotonic() + 60
        while len(self.events(event)) < count:
            assert time.monotonic() < until, f"the server saw {len(self.events(event))} of {count} requests"
            time.sleep(0.01)

    def teacher(self, record: Path, **options: Any) -> ServedTeacher:
        """A teacher with short waits."""
        settings: dict[str, Any] = {"key_env": None, "backoff": (0.02, 0.2), "attempts": 12, "timeout": 0.5}
        return ServedTeacher(self.url, "tiny", record=record, **{**settings, **options})


@pytest.fixture
def loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loopback]]:
    """Makes servers, and ends them."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[Loopback] = []

    def make(faults: tuple[str, ...] = (), share: float = 1.0, latency: float = 0.0) -> Loopback:
        servers.append(Loopback(tmp_path, list(faults), share, latency))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture
def quiet(loopback: Callable[..., Loopback]) -> Loopback:
    """A server on which nothing fails."""
    return loopback()
