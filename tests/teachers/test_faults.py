"""A served teacher against a server that fails in every way it can: each prompt is answered exactly once."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.teachers.errors import CapReached, EndpointError
from tests.teachers.conftest import Loopback
from tests.teachers.loopback import meets_faults, model

FAULTS = ("429:0.1", "500", "503", "hang", "cut", "half", "truncated", "error200", "429")


def test_every_fault_is_outlived_and_nothing_is_answered_twice(
    loopback: Callable[..., Loopback], tmp_path: Path
) -> None:
    server = loopback(faults=FAULTS, share=0.5, latency=0.01)
    prompts = [f"question {i}" for i in range(60)]
    with server.teacher(tmp_path / "record", concurrency=16, attempts=20) as teacher:
        served = teacher.each(prompts, max_tokens=6, top_logprobs=2)
        answers = dict([next(served) for _ in range(20)])
        server.kill()  # in the middle of its work, and gone for a while
        time.sleep(0.3)
        server.start()
        for place, found in served:
            assert place not in answers
            answers[place] = found
    assert sorted(answers) == list(range(60))
    assert [a.text for i in range(60) for a in answers[i]] == ["".join(model(p, 0, 6)[0]) for p in prompts]
    assert len(server.asked()) > 60 + 15
    # An answer that was sent in the moment of the kill may not have come through, and was asked again.
    twice = sum(count - 1 for count in Counter(server.answered()).values())
    assert twice <= 16
    assert len(teacher.record) == 60


def test_the_servers_wish_to_wait_is_honoured_for_every_question(
    loopback: Callable[..., Loopback], tmp_path: Path
) -> None:
    server = loopback(faults=("429:0.5",), share=0.5, latency=0.05)
    prompts = [f"question {i}" for i in range(40)]
    refused = next(p for p in prompts if meets_faults(p, 0.5))  # on its first two attempts
    others = [p for p in prompts if not meets_faults(p, 0.5)][:12]
    server.teacher(tmp_path / "record", concurrency=2).generate([refused, *others], max_tokens=6)
    times = [e["at"] for e in server.events("asked")]
    assert len(times) == 15
    # The others have work for 0.3 s, and would fill the first wait if they did not wait themselves.
    assert sum(later - earlier > 0.3 for earlier, later in itertools.pairwise(times)) == 2


def test_patience_ends(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    server = loopback()
    patient = server.teacher(tmp_path / "record", attempts=3)
    server.kill()
    with pytest.raises(EndpointError) as caught:
        patient.generate(["a", "b"], max_tokens=6)
    assert "no answer after 3 attempts" in str(caught.value)
    assert "0 of 2 prompts are answered" in str(caught.value)
    impatient = server.teacher(tmp_path / "record", attempts=1000, patience=0.3)
    began = time.monotonic()
    with pytest.raises(EndpointError, match="no answer after"):
        impatient.generate(["a", "b"], max_tokens=6)
    assert time.monotonic() - began < 3
    server.start()
    assert len(impatient.generate(["a", "b"], max_tokens=6)) == 2


def test_a_long_wait_is_not_begun(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    teacher = loopback(faults=("429:3600",)).teacher(tmp_path / "record", patience=60)
    began = time.monotonic()
    with pytest.raises(EndpointError, match="to be asked again in 3600 s"):
        teacher.generate(["a"], max_tokens=6)
    assert time.monotonic() - began < 5


def test_a_server_that_is_down_is_not_stormed(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    server = loopback(faults=("500",))
    with pytest.raises(EndpointError):
        server.teacher(tmp_path / "record", concurrency=3, attempts=2, backoff=(2.0, 2.0)).generate(
            [f"{i}" for i in range(50)], max_tokens=6
        )
    assert len(set(server.asked())) <= 6  # those that fail, and no more than as many that were begun beside them


def test_what_broke_counts_with_its_most(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    server = loopback(faults=("truncated",))  # twice for each prompt; the server may charge for such replies
    prices, most = (100.0, 1000.0), ((1 + 272) * 100 + 40 * 1000) / 1e6
    teacher = server.teacher(tmp_path / "record", prices=prices, cap=3.02 * most, concurrency=4)
    teacher.generate(["a"], max_tokens=40)
    cost = (4 * 100 + 1000 * len(model("a", 0, 40)[0])) / 1e6
    assert teacher.record.lost == pytest.approx(2 * most)
    assert teacher.record.paid == pytest.approx(cost)
    with pytest.raises(CapReached, match="of it at most by broken connections"):
        teacher.generate(["b"], max_tokens=40)
    assert set(server.asked()) == {"a"}


def test_refused_connections_and_server_errors_cost_nothing(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    server = loopback(faults=("500", "429"))
    teacher = server.teacher(tmp_path / "record", prices=(100.0, 1000.0), cap=1.0)
    teacher.generate(["a", "b"], max_tokens=40)
    assert teacher.record.lost == 0
    server.kill()
    with pytest.raises(EndpointError):
        server.teacher(tmp_path / "record", prices=(100.0, 1000.0), cap=1.0, attempts=2).generate(["c"], max_tokens=40)
    server.start()
    assert server.teacher(tmp_path / "record").record.lost == 0
