"""Client processes that are killed, interrupted and several at a time: nothing in the record is asked again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from limbeck.teachers.record import Record
from tests.teachers.conftest import HERE, Loopback
from tests.teachers.loopback import model

COUNT, CONCURRENCY, PRICES = 48, 4, (100.0, 1000.0)
TEXTS = ["".join(model(f"question {i}", 0, 6)[0]) for i in range(COUNT)]


class Client:
    """A client's process."""

    def __init__(self, nursery: subprocess.Popen[str], server: Loopback, record: Path, **options: Any) -> None:
        self.nursery, number = nursery, len(list(record.parent.glob("client-*.out")))
        self.out, self.err = (record.parent / f"client-{number}.{kind}" for kind in ("out", "err"))
        arguments = {"url": server.url, "record": str(record), "count": COUNT, "concurrency": CONCURRENCY, **options}
        self.pid = self.tell({"arguments": arguments, "out": str(self.out), "err": str(self.err)})
        self.out.touch()

    def tell(self, command: dict[str, Any]) -> int:
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write(json.dumps(command) + "\n")
        self.nursery.stdin.flush()
        return int(self.nursery.stdout.readline())

    def end(self, number: signal.Signals) -> int:
        os.kill(self.pid, number)
        return self.tell({"wait": self.pid})

    def result(self) -> dict[str, Any]:
        assert self.tell({"wait": self.pid}) == 0, self.err.read_text()
        assert self.err.read_text() == ""
        return json.loads(self.out.read_text())

    def failure(self) -> str:
        assert self.tell({"wait": self.pid}) == 1
        return self.err.read_text()


Start = Callable[..., Client]


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, str(HERE / "client_run.py")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


@pytest.fixture
def start(nursery: subprocess.Popen[str]) -> Start:
    return partial(Client, nursery)


def recorded(record: Path) -> set[str]:
    return {request["body"]["messages"][0]["content"] for request, _ in Record(record).rows()}


def test_what_is_recorded_is_never_asked_again_after_sigkill(
    loopback: Callable[..., Loopback], tmp_path: Path, start: Start
) -> None:
    server, record, dice = loopback(latency=0.03), tmp_path / "record", random.Random(7)
    kills = 3
    for _ in range(kills):
        process = start(server, record)
        known, before = recorded(record), len(server.asked())
        server.wait_for(before + dice.randint(2, 9))
        assert process.end(signal.SIGKILL) == -signal.SIGKILL
        assert not known & set(server.asked()[before:])
    known, before = recorded(record), len(server.asked())
    assert 0 < len(known) < COUNT
    result = start(server, record).result()
    assert result["texts"] == TEXTS
    assert result["reused"] == len(known)
    assert not known & set(server.asked()[before:])
    # The one case in which a prompt is asked again: it was under way when its client was killed.
    assert COUNT <= len(server.asked()) <= COUNT + kills * CONCURRENCY
    assert max(Counter(server.asked()).values()) <= 1 + kills
    assert not list(record.glob("*.claims"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_answers_under_way_are_kept_when_a_client_is_told_to_end(
    loopback: Callable[..., Loopback], tmp_path: Path, start: Start, number: signal.Signals, code: int
) -> None:
    server, record = loopback(latency=1.0), tmp_path / "record"
    process = start(server, record)
    server.wait_for(CONCURRENCY + 1)
    assert process.end(number) == code
    asked = server.asked()
    assert len(asked) < COUNT
    assert sorted(asked) == sorted(server.answered()) == sorted(recorded(record))
    assert [p.name for p in record.iterdir() if p.suffix != ".jsonl"] == ["record.lock"]


def test_two_processes_share_a_record(loopback: Callable[..., Loopback], tmp_path: Path, start: Start) -> None:
    server, record = loopback(latency=0.05), tmp_path / "record"
    processes = [start(server, record) for _ in range(2)]
    results = [process.result() for process in processes]
    assert [r["texts"] for r in results] == [TEXTS, TEXTS]
    assert sorted(server.asked()) == sorted(f"question {i}" for i in range(COUNT))
    assert sum(r["asked"] for r in results) == COUNT
    assert all(r["asked"] > 0 for r in results)
    assert all(r["asked"] + r["reused"] == COUNT for r in results)


def test_two_processes_share_a_cap(loopback: Callable[..., Loopback], tmp_path: Path, start: Start) -> None:
    # A question may cost up to (11 + 272) * 100 + 6 * 1000 = 0.0343 and costs 0.0045 to 0.0065.
    server, record, cap = loopback(latency=0.02), tmp_path / "record", 0.12
    processes = [start(server, record, prices=PRICES, cap=cap) for _ in range(2)]
    errors = [process.failure() for process in processes]
    assert all("CapReached: cap: the spending cap is reached" in error for error in errors)
    spent = sum((5 * 100 + 1000 * min(6, len(model(p, 0, 6)[0]))) / 1e6 for p in server.asked())
    assert cap - 0.0344 < spent <= cap
    assert Record(record).spent == pytest.approx(spent)


def test_what_a_killed_process_had_under_way_counts_as_lost(
    loopback: Callable[..., Loopback], tmp_path: Path, start: Start
) -> None:
    server, record = loopback(latency=0.5), tmp_path / "record"
    process = start(server, record, prices=PRICES, cap=10.0)
    server.wait_for(CONCURRENCY)
    process.end(signal.SIGKILL)
    assert Record(record).spent == 0
    with server.teacher(record, prices=PRICES, cap=0.2, timeout=5) as teacher:
        teacher.generate(["question 0"], max_tokens=1)  # its key is another one
    lost = sum((len(p) + 272) * 100 + 6 * 1000 for p in server.asked()[:CONCURRENCY]) / 1e6
    assert teacher.record.lost == pytest.approx(lost)
    assert Record(record).lost == pytest.approx(lost)
