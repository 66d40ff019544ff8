"""Rates, waits and prices, with a clock that stands until it is moved."""

from __future__ import annotations

import random

import pytest

from limbeck.teachers.answers import Usage
from limbeck.teachers.endpoint import retry_after
from limbeck.teachers.limits import Bucket, Limits, Money, Patience
from limbeck.teachers.questions import Asking, Question


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def go(limits: Limits, clock: Clock, tokens: int) -> float:
    """Wait as long as it takes, and say when the request went."""
    while (seconds := limits.take(tokens)) > 0:
        clock.now += seconds
    return clock.now


@pytest.mark.parametrize("per_minute", [7, 60, 500])
def test_no_minute_has_more_requests_than_the_limit(per_minute: int) -> None:
    clock, dice = Clock(), random.Random(0)
    limits = Limits(requests_per_minute=per_minute, clock=clock)
    times = []
    for _ in range(3 * per_minute):
        clock.now += dice.choice([0.0, 0.0, 0.01, 3.0 * 60 / per_minute])
        times.append(go(limits, clock, 1))
    assert max(sum(t <= u < t + 60 - 1e-6 for u in times) for t in times) <= per_minute


def test_no_minute_has_more_tokens_than_the_limit_and_one_request() -> None:
    clock, dice = Clock(), random.Random(0)
    limits = Limits(tokens_per_minute=10_000, clock=clock)
    sent = []
    for _ in range(200):
        tokens = dice.randint(1, 900)
        sent.append((go(limits, clock, tokens), tokens))
    for start, _ in sent:
        minute = [tokens for at, tokens in sent if start <= at < start + 60 - 1e-6]
        assert sum(minute[:-1]) <= 10_000 + 1e-6
    assert sum(tokens for _, tokens in sent[:-1]) == pytest.approx((clock.now - 1000) / 60 * 10_000)


def test_tokens_that_were_not_used_are_given_back() -> None:
    clock = Clock()
    limits = Limits(tokens_per_minute=600, clock=clock)
    assert limits.take(300) == 0
    assert limits.take(1) == pytest.approx(30)
    limits.give(290)
    assert limits.take(1) == pytest.approx(1)


def test_a_pause_holds_for_all() -> None:
    clock = Clock()
    limits = Limits(clock=clock)
    assert limits.take(5) == 0
    limits.pause(4)
    limits.pause(2)
    assert limits.take(5) == 4
    clock.now += 4
    assert limits.take(5) == 0


def test_a_bucket_does_not_save_up() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    clock.now += 100
    bucket.take(1)
    assert bucket.wait() == 1


def test_waits_double_have_full_jitter_and_are_the_same_again() -> None:
    patience = Patience(first=1.0, longest=60.0, seed=4)
    for attempt, most in [(1, 1), (2, 2), (4, 8), (7, 60), (400, 60)]:
        waits = [patience.wait(f"key{i}", attempt, None) for i in range(2000)]
        assert 0 <= min(waits) < most / 100
        assert most * 0.99 < max(waits) <= most
        assert sum(waits) / 2000 == pytest.approx(most / 2, rel=0.05)
        assert waits == [patience.wait(f"key{i}", attempt, None) for i in range(2000)]
    assert patience.wait("key", 1, None) != Patience(seed=5).wait("key", 1, None)
    assert 7 <= patience.wait("key", 1, 7.0) <= 8


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:30 GMT"}, 0.0),
        ({"retry-after": "-4"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_the_wish_to_wait_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=60.0) == seconds


def question(prompt: str = "a") -> Question:
    (found,) = Asking("m", "chat").questions(
        prompt, n=1, max_tokens=100, temperature=1, top_p=1, stop=None, top_logprobs=None, seed=None, extra=None
    )
    return found


def test_costs() -> None:
    money = Money((2.0, 10.0), cap=1.0)
    asked = question()
    most = ((1 + 256 + 16) * 2 + 100 * 10) / 1e6
    assert money.most(asked) == pytest.approx(most)
    assert money.cost(asked, Usage(20, 30)) == pytest.approx((20 * 2 + 30 * 10) / 1e6)
    assert money.cost(asked, None) == pytest.approx(most)
    assert Money(None, None).most(asked) == 0


def test_a_prompt_longer_than_thought_teaches_the_next() -> None:
    money, asked = Money((1.0, 0.0), cap=1.0), question()
    before = money.most(asked)
    money.cost(asked, Usage(273 + 50, 1))
    assert money.most(asked) == pytest.approx(before + 50e-6)


def test_the_size_of_a_prompt_is_no_less_than_its_tokens() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    plain = Asking("m", "completions")
    chat = Asking("m", "chat")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())  # bytes, nothing merged: the worst there is
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    for text in ("", "hello", "né 漢字 🙂", "\n\t x" * 50):
        count = len(tokenizer.encode(text).ids)
        assert count >= len(text.encode())
        assert plain.size(text) >= count
        assert chat.size([{"role": "user", "content": text}]) >= count + 256
    assert Asking("m", "chat", count_tokens=lambda prompt: 7).size("anything") == 7
