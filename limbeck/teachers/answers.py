"""What a teacher says: text, and where it is offered the log-probability of every token beside its rivals'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Token(NamedTuple):
    """One token of an answer.

    Args:
        text: As the server writes it; a token that is no whole character has a replacement sign in it.
        logprob: Natural logarithm of its probability; ``None`` for the first token of a scored text, which follows
            nothing.
        top: The likeliest tokens at this place, likeliest first, as many as were asked for.
        data: Its bytes, where the server tells them.
    """

    text: str
    logprob: float | None
    top: tuple[Token, ...] = ()
    data: bytes | None = None


class Usage(NamedTuple):
    """How many tokens the server counted."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Answer:
    """One answer of a teacher.

    Args:
        text: What was generated, or the text that was scored.
        tokens: Its tokens with log-probabilities, or ``None`` where they were not asked for or are not offered.
        finish_reason: Why it ended, in the server's words: ``"stop"``, ``"length"``, ``"content_filter"``.
        usage: Tokens counted by the server, where it does.
        reasoning: What a reasoning model thought first, where the server shows it.
        model: The model's name in the server's words, which may be more exact than the one asked for.
    """

    text: str
    tokens: tuple[Token, ...] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    reasoning: str | None = None
    model: str | None = None


def to_json(answer: Answer) -> dict[str, Any]:
    """An answer as JSON holds it; :func:`from_json` is its inverse.

    >>> to_json(Answer("yes", (Token("yes", -0.25, (Token("yes", -0.25), Token("no", -1.5))),), "stop"))["tokens"]
    [['yes', -0.25, [['yes', -0.25], ['no', -1.5]]]]
    """
    return {
        "text": answer.text,
        "tokens": None if answer.tokens is None else [_token_to_json(t) for t in answer.tokens],
        "finish_reason": answer.finish_reason,
        "usage": None if answer.usage is None else list(answer.usage),
        "reasoning": answer.reasoning,
        "model": answer.model,
    }


def from_json(value: dict[str, Any]) -> Answer:
    """An answer from what :func:`to_json` made of it."""
    tokens, usage = value["tokens"], value["usage"]
    return Answer(
        text=value["text"],
        tokens=None if tokens is None else tuple(_token_from_json(t) for t in tokens),
        finish_reason=value["finish_reason"],
        usage=None if usage is None else Usage(*usage),
        reasoning=value["reasoning"],
        model=value["model"],
    )


def _token_to_json(token: Token) -> list[Any]:
    """Text, log-probability, rivals, bytes; what is missing at the end is left out, and bytes that the text tells."""
    row: list[Any] = [token.text, token.logprob]
    known = token.data is not None
    if token.top or known:
        row.append([_token_to_json(t) for t in token.top])
    if known:
        row.append(None if _plain(token) else token.data.hex())  # type: ignore[union-attr]
    return row


def _token_from_json(row: Sequence[Any]) -> Token:
    text, logprob = row[0], row[1]
    top = tuple(_token_from_json(t) for t in row[2]) if len(row) > 2 else ()
    if len(row) < 4:
        return Token(text, logprob, top)
    return Token(text, logprob, top, text.encode() if row[3] is None else bytes.fromhex(row[3]))


def _plain(token: Token) -> bool:
    try:
        return token.text.encode() == token.data
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
