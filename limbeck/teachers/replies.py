"""Reads what an OpenAI-compatible endpoint replies."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from limbeck.teachers.answers import Answer, Token, Usage
from limbeck.teachers.questions import Question

_LEAST = -9999.0  # what servers themselves write for a probability of 0
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")


class BadReply(Exception):
    """Not an answer: cut short, empty, or in another form."""


class Refusal(Exception):
    """An error in a reply whose status says that all is well."""

    def __init__(self, code: int | None, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


def read_reply(content: bytes, question: Question) -> Answer:
    """The answer in a reply.

    Raises:
        BadReply: There is none.
        Refusal: There is an error instead.
    """
    try:
        reply = json.loads(content)
    except ValueError as error:
        raise BadReply(f"a reply that is no JSON ({len(content)} bytes)") from error
    if not isinstance(reply, dict):
        raise BadReply(f"a reply that is a {type(reply).__name__}")
    choices = reply.get("choices") or []
    if not choices and reply.get("error"):
        problem = reply["error"] if isinstance(reply["error"], dict) else {"message": str(reply["error"])}
        code = problem.get("code")
        raise Refusal(code if isinstance(code, int) else None, str(problem.get("message", problem)))
    try:
        text, tokens, reasoning = _chat(choices[0]) if question.api == "chat" else _completion(choices[0], question)
        return Answer(
            text=text,
            tokens=tokens,
            finish_reason=choices[0].get("finish_reason"),
            usage=_usage(reply.get("usage")),
            reasoning=reasoning,
            model=reply.get("model"),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BadReply(f"a reply in another form ({type(error).__name__}: {error})") from error


def _chat(choice: dict[str, Any]) -> tuple[str, tuple[Token, ...] | None, str | None]:
    message = choice["message"]
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise TypeError("the content is no text")
    rows = (choice.get("logprobs") or {}).get("content")
    tokens = None
    if rows is not None:
        tokens = tuple(_chat_token(row)._replace(top=_sorted(row.get("top_logprobs") or ())) for row in rows)
    return content or "", tokens, message.get("reasoning_content") or message.get("reasoning")


def _chat_token(row: dict[str, Any]) -> Token:
    data = row.get("bytes")
    return Token(row["token"], _number(row["logprob"]), (), None if data is None else bytes(data))


def _sorted(rows: Sequence[dict[str, Any]]) -> tuple[Token, ...]:
    return tuple(sorted((_chat_token(row) for row in rows), key=lambda token: -(token.logprob or 0.0)))


def _completion(choice: dict[str, Any], question: Question) -> tuple[str, tuple[Token, ...] | None, str | None]:
    text, table = choice["text"], choice.get("logprobs")
    if not isinstance(text, str):
        raise TypeError("the text is no text")
    count: int | None = None
    if question.scored is not None:
        if not text.startswith(question.scored) or not table:
            raise Refusal(400, "it does not score given texts (echo with logprobs)")
        text, offsets = question.scored, table.get("text_offset")
        if offsets:  # a token that was generated all the same does not belong to the text
            count = sum(offset < len(text) for offset in offsets)
    if not table or table.get("tokens") is None:
        return text, None, None
    names, logprobs = table["tokens"], table["token_logprobs"]
    if len(names) != len(logprobs):
        raise ValueError("tokens and log-probabilities differ in number")
    tops = table.get("top_logprobs") or [None] * len(names)
    rows = list(zip(names, logprobs, tops, strict=True))[:count]
    return text, tuple(_plain_token(name, value)._replace(top=_table(top)) for name, value, top in rows), None


def _table(top: dict[str, float] | None) -> tuple[Token, ...]:
    rows = [_plain_token(name, value) for name, value in (top or {}).items()]
    return tuple(sorted(rows, key=lambda token: -(token.logprob or 0.0)))


def _plain_token(name: str, logprob: float | None) -> Token:
    """A token of the older endpoint, which writes bytes that are no text as ``bytes:\\xe2\\x80``."""
    found = _BYTES.fullmatch(name)
    data = bytes.fromhex(found[1].replace("\\x", "")) if found else None
    return Token(name, None if logprob is None else _number(logprob), (), data)


def _number(value: float) -> float:
    value = float(value)
    if math.isnan(value):
        raise ValueError("a log-probability is not a number")
    return max(value, _LEAST)


def _usage(value: dict[str, Any] | None) -> Usage | None:
    if not value or not isinstance(value.get("prompt_tokens"), int):
        return None
    return Usage(value["prompt_tokens"], value.get("completion_tokens") or 0)
