"""Replies as servers write them, good and bad."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from limbeck.teachers.answers import Answer, Token, Usage
from limbeck.teachers.questions import Asking, Question
from limbeck.teachers.replies import BadReply, Refusal, read_reply

CHAT = Question("chat", {"body": {}}, 1, 1)
TEXT = Question("completions", {"body": {}}, 1, 1)


def read(reply: Any, question: Question = CHAT) -> Answer:
    return read_reply(json.dumps(reply).encode(), question)


def chat(message: dict[str, Any], **choice: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": "stop", **choice}]}


def test_a_reply_with_the_least_there_can_be() -> None:
    assert read(chat({"content": "hi"})) == Answer("hi", finish_reason="stop")


def test_reasoning_is_kept_under_either_name() -> None:
    assert read(chat({"content": "4", "reasoning_content": "2+2"})).reasoning == "2+2"
    assert read(chat({"content": "4", "reasoning": "2+2"})).reasoning == "2+2"


def test_an_answer_without_content_is_empty() -> None:
    assert read(chat({"content": None}, finish_reason="content_filter")) == Answer("", finish_reason="content_filter")


def test_rivals_are_sorted_and_probability_0_is_a_number() -> None:
    row = {"token": "a", "logprob": -1.0, "bytes": None}
    rivals = [{"token": "c", "logprob": -math.inf}, {"token": "b", "logprob": -0.5, "bytes": [98]}, row]
    answer = read(chat({"content": "a"}, logprobs={"content": [{**row, "top_logprobs": rivals}]}))
    assert answer.tokens == (Token("a", -1.0, (Token("b", -0.5, (), b"b"), Token("a", -1.0), Token("c", -9999.0))),)


def test_bytes_of_the_older_endpoint_are_read() -> None:
    table = {"tokens": ["a", r"bytes:\xe2\x80"], "token_logprobs": [-1.0, -2.0], "top_logprobs": None}
    answer = read({"choices": [{"text": "a", "logprobs": table}], "usage": {"prompt_tokens": 4}}, TEXT)
    assert answer.tokens == (Token("a", -1.0), Token(r"bytes:\xe2\x80", -2.0, (), b"\xe2\x80"))
    assert answer.usage == Usage(4, 0)


@pytest.mark.parametrize(
    "reply",
    [
        {},
        [],
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": {"content": 4}}]},
        {"choices": [{"message": None}]},
        chat({"content": "a"}, logprobs={"content": [{"token": "a", "logprob": math.nan}]}),
        chat({"content": "a"}, logprobs={"content": [{"token": "a"}]}),
    ],
)
def test_what_is_no_answer_is_refused(reply: Any) -> None:
    with pytest.raises(BadReply):
        read(reply)


@pytest.mark.parametrize("content", [b"", b"<html>", b'{"choices": [{"message": {"content": "h', b"\xff\xfe"])
def test_what_is_no_json_is_refused(content: bytes) -> None:
    with pytest.raises(BadReply, match="no JSON"):
        read_reply(content, CHAT)


def test_an_error_in_a_good_reply_is_an_error() -> None:
    with pytest.raises(Refusal, match="no such model") as caught:
        read({"error": {"code": 404, "message": "no such model"}})
    assert caught.value.code == 404
    with pytest.raises(Refusal, match="busy") as caught:
        read({"error": "busy"})
    assert caught.value.code is None


def test_a_server_that_does_not_score_is_found_out() -> None:
    question = Asking("m", "completions").scoring("given", 0)
    for choice in ({"text": " more"}, {"text": "given"}, {"text": "given", "logprobs": None}):
        with pytest.raises(Refusal, match="does not score"):
            read({"choices": [choice]}, question)
