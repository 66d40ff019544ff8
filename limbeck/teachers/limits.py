"""How fast, how often and for how much a teacher may be asked."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from limbeck.core.errors import ConfigError
from limbeck.teachers.answers import Usage
from limbeck.teachers.questions import Question


def check_amount(name: str, value: float, above_zero: bool = False) -> None:
    """A number is finite and not negative.

    Raises:
        ConfigError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < float("inf")):
        raise ConfigError("out of range", where=name, found=repr(value), wanted="a number of at least 0")
    if above_zero and value == 0:
        raise ConfigError("out of range", where=name, found=value, wanted="a number above 0")


class Bucket:
    """A token bucket that holds no more than one request: it spaces requests evenly instead of letting them burst.

    A request may go as soon as all that went before is paid off, so within any minute no more goes than the limit and
    the last request.

    Args:
        per_minute: The limit.
        clock: Seconds.

    >>> now = 0.0
    >>> bucket = Bucket(60, clock=lambda: now)
    >>> bucket.take(1)
    >>> bucket.wait()
    1.0
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock, self._paid = 60.0 / per_minute, clock, clock()

    def wait(self) -> float:
        """Seconds until something may go."""
        return max(0.0, self._paid - self._clock())

    def take(self, amount: float) -> None:
        """Count what goes."""
        self._paid = max(self._paid, self._clock()) + amount * self._seconds

    def give(self, amount: float) -> None:
        """Count less than was taken, or more where the amount is negative."""
        self._paid -= amount * self._seconds


class Limits:
    """Requests and tokens a minute, and pauses that the server asks for; for all threads of a teacher together.

    Args:
        requests_per_minute: The server's limit, or ``None``.
        tokens_per_minute: The same for tokens of prompts and answers. A request counts with the most it can have until
            its answer tells.
        clock: Seconds.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, limit in (("requests_per_minute", requests_per_minute), ("tokens_per_minute", tokens_per_minute)):
            if limit is not None:
                check_amount(name, limit, above_zero=True)
        self._requests = None if requests_per_minute is None else Bucket(requests_per_minute, clock)
        self._tokens = None if tokens_per_minute is None else Bucket(tokens_per_minute, clock)
        self._clock, self._lock, self._closed_until = clock, threading.Lock(), clock()

    def take(self, tokens: int) -> float:
        """Let a request go and return 0, or return the seconds until one may."""
        with self._lock:
            waits = [b.wait() for b in (self._requests, self._tokens) if b is not None]
            wait = max(self._closed_until - self._clock(), *waits, 0.0)
            if wait <= 0:
                self._count(1, tokens)
            return max(wait, 0.0)

    def give(self, tokens: int, requests: int = 0) -> None:
        """Count less than was taken."""
        with self._lock:
            self._count(-requests, -tokens)

    def pause(self, seconds: float) -> None:
        """Let nothing go for a while."""
        with self._lock:
            self._closed_until = max(self._closed_until, self._clock() + seconds)

    def _count(self, requests: int, tokens: int) -> None:
        for bucket, amount in ((self._requests, requests), (self._tokens, tokens)):
            if bucket is not None and amount:
                bucket.take(amount) if amount > 0 else bucket.give(-amount)


@dataclass(frozen=True)
class Patience:
    """How often a question is asked again, and when: exponential backoff with full jitter.

    The wait before the next attempt is drawn evenly from 0 to ``min(longest, first * 2**(attempt - 1))``, and comes on
    top of what the server asked for. The draw depends on seed, question and attempt alone, so it is the same for any
    order of threads.

    Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.

    Args:
        attempts: The most attempts for one question.
        seconds: The most seconds from a question's first attempt to its last.
        first: See above.
        longest: See above.
        seed: Of the draws.
    """

    attempts: int = 8
    seconds: float = 900.0
    first: float = 1.0
    longest: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_amount("attempts", self.attempts, above_zero=True)
        for name, value in (("patience", self.seconds), ("backoff", self.first), ("backoff", self.longest)):
            check_amount(name, value)

    def wait(self, key: str, attempt: int, asked: float | None) -> float:
        """Seconds to wait after a failed attempt, the first being 1; ``asked`` is the server's wish."""
        most = min(self.longest, self.first * 2.0 ** min(attempt - 1, 60))
        jitter = random.Random(f"{self.seed}:{key}:{attempt}").uniform(0, most)
        return (asked or 0.0) + jitter


class Money:
    """What questions cost.

    Args:
        prices: For a million tokens of prompts and of answers, in any currency; ``None`` where nothing is charged.
        cap: The most that a record may cost.

    Raises:
        ConfigError: They are no amounts, or the cap lacks prices.
    """

    def __init__(self, prices: tuple[float, float] | None, cap: float | None) -> None:
        if cap is not None:
            check_amount("cap", cap)
            if prices is None:
                wanted = "(price of a million prompt tokens, of a million answer tokens)"
                raise ConfigError("a cap needs prices", where="prices", wanted=wanted)
        if prices is not None:
            if len(prices) != 2:
                raise ConfigError("not two prices", where="prices", found=prices, wanted="(of prompts, of answers)")
            for price in prices:
                check_amount("prices", price)
        self.prices, self.cap = prices or (0.0, 0.0), cap
        self._more = 0  # tokens by which prompts were seen to exceed what they could have at most

    def most(self, question: Question) -> float:
        """The most a question can cost."""
        return self._cost(question.prompt_tokens + self._more, question.max_tokens)

    def cost(self, question: Question, usage: Usage | None) -> float:
        """What its answer cost, or the most it can have cost where the server does not count."""
        if usage is None:
            return self.most(question)
        self._more = max(self._more, usage.prompt - question.prompt_tokens)
        return self._cost(usage.prompt, usage.completion)

    def _cost(self, prompt: int, completion: int) -> float:
        return (prompt * self.prices[0] + completion * self.prices[1]) / 1e6
