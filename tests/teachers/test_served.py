"""A served teacher against a real server on which nothing fails: answers, record, order, cap, refusals."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.core.errors import ConfigError, LimbeckError, MissingExtra
from limbeck.teachers.answers import Usage
from limbeck.teachers.desk import Progress
from limbeck.teachers.errors import CapReached, EndpointError, Stopped
from limbeck.teachers.served import ServedTeacher
from tests.teachers.conftest import Loopback
from tests.teachers.loopback import model

PROMPTS = [f"prompt number {i}" for i in range(12)]


def test_answers_are_the_models_and_in_order(quiet: Loopback, tmp_path: Path) -> None:
    with quiet.teacher(tmp_path / "record") as teacher:
        answers = teacher.generate(PROMPTS, max_tokens=6, top_logprobs=3, seed=5)
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        tokens, tops = model(prompt, 5, 6)
        assert answer.text == "".join(tokens)
        assert answer.finish_reason == "stop"
        assert answer.model == "tiny-exact"
        assert answer.usage == Usage(6, len(tokens))
        assert answer.tokens is not None
        assert [t.text for t in answer.tokens] == tokens
        assert [t.data for t in answer.tokens] == [t.encode() for t in tokens]
        assert [[(c.text, c.logprob) for c in t.top] for t in answer.tokens] == [top[:3] for top in tops]
    assert (teacher.asked, teacher.reused) == (12, 0)


def test_samples_have_seeds_of_their_own(quiet: Loopback, tmp_path: Path) -> None:
    teacher = quiet.teacher(tmp_path / "record")
    (answers,) = teacher.generate(["once"], max_tokens=8, n=3, seed=10)
    assert [a.text for a in answers] == ["".join(model("once", 10 + i, 8)[0]) for i in range(3)]
    (more,) = teacher.generate(["once"], max_tokens=8, n=5, seed=10)  # only the two new ones are asked
    assert more[:3] == answers
    assert (teacher.asked, teacher.reused) == (5, 3)


def test_a_replay_makes_no_request(quiet: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quiet.teacher(tmp_path / "record", key_env=None)
    answers = first.generate(PROMPTS, max_tokens=6, top_logprobs=2)
    first.close()
    quiet.kill()
    quiet.start()
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "record").iterdir())
    # Another address, no key, no openai package: the record needs none of them.
    again = ServedTeacher("https://elsewhere.test/v1", "tiny", record=tmp_path / "record", key_env="NO_SUCH_KEY")
    assert again.generate(PROMPTS, max_tokens=6, top_logprobs=2) == answers
    assert (again.asked, again.reused) == (0, 12)
    assert len(quiet.asked()) == 12
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "record").iterdir()) == before
    with pytest.raises(MissingExtra, match=r"limbeck\[served\]"):
        again.generate(["new"], max_tokens=6)


@pytest.mark.parametrize(
    "change",
    [
        *({"max_tokens": 7}, {"temperature": 0.5}, {"top_p": 0.9}, {"stop": "x"}, {"top_logprobs": 1}, {"seed": 1}),
        *({"extra": {"top_k": 5}}, {"revision": "b"}, {"model": "other"}, {"prompt": "b"}),
    ],
)
def test_all_that_determines_an_answer_is_in_its_key(
    quiet: Loopback, tmp_path: Path, change: dict[str, object]
) -> None:
    def keys(prompt: str = "a", revision: str = "", model: str = "tiny", **settings: object) -> set[str]:
        teacher = ServedTeacher(quiet.url, model, record=tmp_path, revision=revision, key_env=None)
        questions = teacher._asking.questions(
            prompt,
            **{
                **{"n": 2, "max_tokens": 6, "temperature": 1, "top_p": 1, "stop": None},
                **{"top_logprobs": None, "seed": None, "extra": None},
                **settings,
            },
        )
        return {q.key for q in questions}

    assert len(keys() | keys(**change)) == 4  # type: ignore[arg-type]
    assert keys() == keys(temperature=1.0)


def test_equal_prompts_are_asked_once(quiet: Loopback, tmp_path: Path) -> None:
    teacher = quiet.teacher(tmp_path / "record")
    one, other, same = teacher.generate(["a", "b", "a"], max_tokens=6)
    assert one == same != other
    assert sorted(quiet.asked()) == ["a", "b"]


def test_equal_prompts_of_two_threads_are_asked_once(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    server = loopback(latency=0.05)
    teacher = server.teacher(tmp_path / "record", concurrency=4)
    results: list[list[object]] = []
    threads = [
        threading.Thread(target=lambda: results.append(list(teacher.generate(PROMPTS, max_tokens=6)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert results[0] == results[1] == results[2]
    assert sorted(server.asked()) == sorted(PROMPTS)


def test_answers_come_as_they_are_ready(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    said: list[Progress] = []
    teacher = loopback(latency=0.05).teacher(tmp_path / "record", concurrency=2, progress=said.append)
    endless = teacher.each((f"endless {i}" for i in itertools.count()), max_tokens=6)
    first = [next(endless) for _ in range(5)]
    endless.close()
    assert teacher.asked <= 8  # not many more than were taken
    for place, (answer,) in first:
        assert answer.text == "".join(model(f"endless {place}", 0, 6)[0])
    # What was under way when the iterator was closed is kept as well.
    assert len(teacher.record) == teacher.asked >= 5
    assert [p.done for p in said[:5]] == [1, 2, 3, 4, 5]
    assert said[0].total is None


def test_concurrency_is_used_and_not_exceeded(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    server = loopback(latency=0.1)
    server.teacher(tmp_path / "record", concurrency=4).generate(PROMPTS, max_tokens=6)
    events = [(e["at"], 1) for e in server.events("asked")] + [(e["at"], -1) for e in server.events("answered")]
    # A request is noted when it is read and its answer when it is sent, which may be after the client has it.
    width = max(itertools.accumulate(step for _, step in sorted(events)))
    assert 3 <= width <= 5


def test_texts_are_completed(quiet: Loopback, tmp_path: Path) -> None:
    teacher = quiet.teacher(tmp_path / "record", api="completions")
    (answer,) = teacher.generate(["go on"], max_tokens=5, top_logprobs=2)[0]
    tokens, tops = model("go on", 0, 5)
    assert answer.text == "".join(tokens)
    assert answer.tokens is not None
    assert [(t.text, t.logprob) for t in answer.tokens] == [(t, top[0][1]) for t, top in zip(tokens, tops, strict=True)]
    assert [[(c.text, c.logprob) for c in t.top] for t in answer.tokens] == [top[:2] for top in tops]
    (plain,) = teacher.generate(["go on"], max_tokens=5)[0]
    assert plain.tokens is None
    with pytest.raises(ConfigError, match="messages cannot be completed"):
        teacher.generate([[{"role": "user", "content": "hello"}]], max_tokens=5)


def test_given_texts_are_scored(quiet: Loopback, tmp_path: Path) -> None:
    teacher = quiet.teacher(tmp_path / "record")
    answers = teacher.score(["abc", "de"], top_logprobs=2)
    assert [a.text for a in answers] == ["abc", "de"]
    assert answers[0].tokens is not None
    # The server generates one token more, which does not belong to the text.
    assert [(t.text, t.logprob) for t in answers[0].tokens] == [("a", None), ("b", -0.51), ("c", -0.52)]
    assert [[c.text for c in t.top] for t in answers[0].tokens] == [[], ["b", "~"], ["c", "~"]]
    assert teacher.score(["de", "abc"], top_logprobs=2) == answers[::-1]
    assert teacher.asked == 2


def test_messages_are_handed_on(quiet: Loopback, tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the talk"}]
    (answer,) = quiet.teacher(tmp_path / "record").generate([talk], max_tokens=6)[0]
    assert answer.text == "".join(model("the talk", 0, 6)[0])
    ((request, kept),) = ServedTeacher(quiet.url, "tiny", record=tmp_path / "record").record.rows()
    assert request["body"]["messages"] == talk
    assert kept == answer


def test_a_refusal_ends_the_call_and_keeps_the_rest(
    quiet: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_KEY", "secret-of-ours")
    teacher = quiet.teacher(tmp_path / "record", key_env="TINY_KEY", concurrency=1)
    with pytest.raises(EndpointError) as caught:
        teacher.generate([*PROMPTS[:3], "refuse me", *PROMPTS[3:]], max_tokens=6)
    message = str(caught.value)
    assert "HTTP 400: scripted 400" in message
    assert "prompt 3, http://127.0.0.1" in message
    assert "3 of 13 prompts are answered and kept" in message
    assert "secret-of-ours" not in message
    assert quiet.asked() == [*PROMPTS[:3], "refuse me"]
    assert "secret-of-ours" not in repr(teacher)
    assert not any(b"secret-of-ours" in path.read_bytes() for path in (tmp_path / "record").iterdir())
    # The refused prompt left out, the same call goes on.
    assert len(teacher.generate(PROMPTS, max_tokens=6)) == 12
    assert sorted(quiet.answered()) == sorted(PROMPTS)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_cap_is_never_exceeded(quiet: Loopback, tmp_path: Path, concurrency: int) -> None:
    # A prompt may cost up to (17 bytes + 272) * 100 + 40 * 1000, and costs 6 * 100 + (4 to 7) * 1000 millionths.
    prompts = [f"priced prompt {i:03}" for i in range(24)]

    def teacher(cap: float) -> ServedTeacher:
        return quiet.teacher(tmp_path / "record", prices=(100.0, 1000.0), cap=cap, concurrency=concurrency)

    most, cost = 0.0689, {p: (6 * 100 + 1000 * len(model(p, 0, 40)[0])) / 1e6 for p in prompts}
    with teacher(0.13) as first, pytest.raises(CapReached) as caught:
        first.generate(prompts, max_tokens=40)
    answered = quiet.answered()
    assert 0.13 - most <= sum(cost[p] for p in answered) <= 0.13
    assert first.spent == pytest.approx(sum(cost[p] for p in answered))
    message = str(caught.value)
    assert f"{first.spent:.6g} spent" in message
    assert f"{len(answered)} of 24 prompts are answered and kept" in message
    assert "nothing is asked twice" in message
    with teacher(0.13) as same, pytest.raises(CapReached):  # the cap is the record's, not the run's
        same.generate(prompts, max_tokens=40)
    assert quiet.answered() == answered
    with teacher(sum(cost.values()) + most) as second:
        second.generate(prompts, max_tokens=40)
    assert sorted(quiet.asked()) == sorted(prompts)
    assert second.spent == pytest.approx(sum(cost.values()))
    assert (second.asked, second.reused) == (24 - len(answered), len(answered))


def test_a_small_cap_with_much_concurrency_waits_for_what_is_under_way(
    loopback: Callable[..., Loopback], tmp_path: Path
) -> None:
    # Only one question fits under the cap at its most, but what it costs in truth is far less.
    teacher = loopback(latency=0.02).teacher(tmp_path / "record", prices=(100.0, 1000.0), cap=0.15, concurrency=8)
    assert len(teacher.generate(PROMPTS[:8], max_tokens=40)) == 8


def test_stop_ends_calls_of_other_threads(loopback: Callable[..., Loopback], tmp_path: Path) -> None:
    server = loopback(latency=0.1)
    teacher = server.teacher(tmp_path / "record", concurrency=2)
    caught: list[LimbeckError] = []

    def work() -> None:
        try:
            teacher.generate(PROMPTS, max_tokens=6)
        except LimbeckError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    server.wait_for(3)
    teacher.stop()
    thread.join(10)
    assert isinstance(caught[0], Stopped)
    assert len(teacher.record) == len(server.asked()) < 12
    assert f"{len(teacher.record)} of 12 prompts are answered and kept" in str(caught[0])


def test_a_request_rate_is_kept(quiet: Loopback, tmp_path: Path) -> None:
    quiet.teacher(tmp_path / "record", requests_per_minute=1200).generate(PROMPTS[:6], max_tokens=6)
    times = [e["at"] for e in quiet.events("asked")]
    assert max(times) - min(times) > 5 * 0.05 * 0.8  # the first may be read late, which shortens what is seen


def test_a_key_that_is_not_set_is_named(quiet: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set.*key_env=None"):
        quiet.teacher(tmp_path / "record", key_env="NO_SUCH_KEY").generate(["a"], max_tokens=6)
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cap": 1.0}, "prices: a cap needs prices"),
        ({"prices": (1.0,)}, "prices: not two prices"),
        ({"prices": (1.0, -1.0)}, "prices: out of range"),
        ({"requests_per_minute": 0}, "requests_per_minute: out of range"),
        ({"tokens_per_minute": -1}, "tokens_per_minute: out of range"),
        ({"concurrency": 0}, "concurrency: out of range"),
        ({"attempts": 0}, "attempts: out of range"),
        ({"timeout": float("nan")}, "timeout: out of range"),
        ({"api": "responses"}, "api: no such endpoint"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ServedTeacher("http://localhost/v1", "tiny", record=tmp_path / "record", **options)  # type: ignore[arg-type]


def test_an_address_without_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base_url: not an address"):
        ServedTeacher("localhost:8000/v1", "tiny", record=tmp_path)


def test_an_address_is_shown_without_its_password(tmp_path: Path) -> None:
    teacher = ServedTeacher("http://user:pass@localhost:8000/v1?token=abc", "tiny", record=tmp_path)
    assert repr(teacher).startswith("ServedTeacher('http://localhost:8000/v1', 'tiny'")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_tokens": 0}, "max_tokens: out of range.*at least 1"),
        ({"max_tokens": 2.5}, "max_tokens: out of range.*a whole number"),
        ({"temperature": -1}, "temperature: out of range"),
        ({"temperature": float("inf")}, "temperature: out of range"),
        ({"top_p": 1.5}, "top_p: out of range.*at most 1"),
        ({"n": 0}, "n: out of range"),
        ({"seed": "x"}, "seed: out of range"),
        ({"extra": {"n": 2}}, "extra.n: this option is not an extra one"),
        ({"extra": {"x": object()}}, "extra: JSON cannot hold this"),
        ({"prompts": "just one"}, "prompts: not a list of prompts"),
        ({"prompts": ["a", "\ud800"]}, r"prompts\[1\]: a text that cannot be sent"),
        ({"prompts": [[{"role": "user", "content": "\ud800"}]]}, r"prompts\[0\]: a text that cannot be sent"),
        ({"prompts": [7]}, r"prompts\[0\]: not a prompt"),
        ({"prompts": [[{"content": "no role"}]]}, r"prompts\[0\]: not a prompt"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    teacher = ServedTeacher("http://localhost/v1", "tiny", record=tmp_path / "record", key_env=None)
    arguments = {"prompts": ["a"], "max_tokens": 4, **settings}
    with pytest.raises(ConfigError, match=said):
        teacher.generate(arguments.pop("prompts"), **arguments)  # type: ignore[arg-type]


def test_nothing_is_left_open(quiet: Loopback, tmp_path: Path) -> None:
    with quiet.teacher(tmp_path / "record") as teacher:
        teacher.generate(PROMPTS[:2], max_tokens=6)
        time.sleep(0.02)
    assert not [t for t in threading.enumerate() if t.name.startswith("limbeck")]
    assert {p.suffix for p in (tmp_path / "record").iterdir()} == {".jsonl", ".lock"}
    assert [p.name for p in (tmp_path / "record").glob("*.lock")] == ["record.lock"]
