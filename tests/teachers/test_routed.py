"""Several teachers by tag: the right one, all at once, and an end for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.core.errors import ConfigError, DataError
from limbeck.teachers.errors import EndpointError
from limbeck.teachers.routed import RoutedTeacher, TextTeacher
from limbeck.teachers.served import ServedTeacher
from tests.teachers.conftest import Loopback
from tests.teachers.loopback import model

PROMPTS = [f"task {i}" for i in range(12)]
TAGS = [("math", "code", "talk")[i % 3] for i in range(12)]


def test_each_prompt_goes_to_the_teacher_of_its_tag(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    server = loopback(latency=0.05)
    teachers = {tag: server.teacher(tmp_path / tag, concurrency=1) for tag in ("math", "code")}
    assert all(isinstance(teacher, TextTeacher) for teacher in teachers.values())
    routed = RoutedTeacher(teachers, default="code")
    answers = routed.generate(PROMPTS, TAGS, max_tokens=6, seed=1)
    assert [a.text for (a,) in answers] == ["".join(model(p, 1, 6)[0]) for p in PROMPTS]
    assert (teachers["math"].asked, teachers["code"].asked) == (4, 8)
    # Both worked at the same time: of the first four requests, no teacher made more than two or three.
    first = {int(p.split()[1]) % 3 == 0 for p in server.asked()[:4]}
    assert first == {True, False}


def test_a_refusal_ends_all_and_keeps_what_is_under_way(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    server = loopback(latency=0.05)
    teachers = {tag: server.teacher(tmp_path / tag, concurrency=2) for tag in ("math", "code")}
    prompts, tags = [*PROMPTS, "refuse it"], [*["code"] * 12, "math"]
    with pytest.raises(EndpointError, match="HTTP 400"):
        RoutedTeacher(teachers).generate(prompts, tags, max_tokens=6)
    assert len(server.asked()) < 13
    assert len(teachers["code"].record) == len(server.answered())


def test_taking_only_some_answers_ends_all(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    server = loopback(latency=0.05)
    teachers = {tag: server.teacher(tmp_path / tag, concurrency=2) for tag in ("math", "code")}
    some = RoutedTeacher(teachers, default="math").each(PROMPTS, TAGS, max_tokens=6)
    next(some)
    some.close()  # type: ignore[attr-defined]
    assert sum(len(t.record) for t in teachers.values()) == len(server.answered()) < 12


def test_a_wrong_tag_or_teacher_is_named(tmp_path: Path) -> None:
    teacher = ServedTeacher("http://localhost/v1", "tiny", record=tmp_path, key_env=None)
    routed = RoutedTeacher({"math": teacher})
    with pytest.raises(DataError, match=r"tags\[1\]: no teacher has this tag; found 'maths'.*did you mean 'math'"):
        routed.generate(["a", "b"], ["math", "maths"], max_tokens=4)
    with pytest.raises(DataError, match=r"tags\[0\]: no teacher.*name a default"):
        routed.generate(["a"], [None], max_tokens=4)
    with pytest.raises(DataError, match="every prompt needs a tag"):
        routed.generate(["a", "b"], ["math"], max_tokens=4)
    with pytest.raises(ConfigError, match="default: no such teacher"):
        RoutedTeacher({"math": teacher}, default="code")
    with pytest.raises(ConfigError, match=r"teachers\['math'\]: not a teacher"):
        RoutedTeacher({"math": object()})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="there are no teachers"):
        RoutedTeacher({})
