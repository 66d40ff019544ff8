"""Records: their forms, their columns, and what is told of broken ones."""

from __future__ import annotations

import pytest

from limbeck.core.errors import ConfigError, DataError
from limbeck.data.language.records import Fields, Record
from tests.data.language.texts import CHAT

PLACE = ("a.jsonl", "line", 7)


def read(row: dict, **fields) -> Record:
    return Fields(**fields).form(list(row), "a.jsonl")(row, PLACE)


def test_forms_are_told_by_their_columns() -> None:
    assert read({"text": "a"}).pieces == (("a", True),)
    assert read({"prompt": "a", "completion": "b", "id": 3}).pieces == (("a", False), ("b", True))
    assert read({"messages": list(CHAT)}).messages == CHAT
    pair = read({"prompt": list(CHAT[:2]), "completion": [CHAT[2]]})
    assert (pair.messages, pair.first) == (CHAT[:3], 2)
    assert read({"prompt": list(CHAT[:2]), "completion": "The daughter."}).messages == CHAT[:3]
    chat = read({"prompt": "a", "completion": "b"}, chat=True)
    assert [(m["role"], m["content"]) for m in chat.messages] == [("user", "a"), ("assistant", "b")]


def test_columns_can_have_other_names() -> None:
    row = {"question": "a {b}", "answer": "c", "kind": 3}
    record = read(row, prompt="question", completion="answer", tag="kind")
    assert record.pieces == (("a {b}", False), ("c", True))
    assert record.tag == "3"
    assert read(row, text="Q: {question} A: {answer}").pieces == (("Q: a {b} A: c", True),)
    assert read({"a{b}": "x"}, text="a{b}").pieces == (("x", True),)  # a column may be called so
    assert read({"a": "x", "b": None}, text="{a}{b}").pieces == (("x", True),)
    assert read({"text": "a", "tag": None}).tag is None


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"body": "a"}, {}, r"a.jsonl: these are no records of text; found columns body; .*say|name the column"),
        ({"text": "a", "messages": []}, {}, "several ways"),
        ({"body": "a"}, {"text": "bdy"}, r"no such column; found body; wanted 'bdy'; did you mean 'body'"),
        ({"prompt": "a"}, {"prompt": "prompt"}, "wanted 'completion'"),
        ({"text": 3}, {}, r"a.jsonl, line 7, field 'text': this is no text; found int"),
        ({"text": None}, {}, "found nothing"),
        ({"text": "\ud83d"}, {}, "half of a surrogate pair"),
        ({"prompt": "a", "completion": ["b"]}, {}, r"field 'completion': this is no text; found list"),
        ({"prompt": list(CHAT[:2]), "completion": 3}, {}, r"field 'completion': this is no conversation; found int"),
        ({"messages": []}, {}, r"line 7, field 'messages': this is no conversation; found an empty list"),
        ({"messages": "hi"}, {}, "no conversation; found str"),
        ({"messages": ["hi"]}, {}, r"message 1: this is no message; found str"),
        (
            {"messages": [{"from": "a", "content": "b"}]},
            {},
            r"message 1: a message has a role; found keys from",
        ),
        ({"messages": [CHAT[1], {"role": "assistant", "content": 2}]}, {}, r"messages\[1\].content.*found int"),
        ({"messages": [CHAT[1]]}, {}, "nobody answers; found roles user"),
        ({"a": "x"}, {"text": "{a.b}"}, "braces hold the name of a column"),
        ({"a": "x"}, {"text": "{a"}, "cannot be read"),
        ({"a": "x"}, {"text": "{a!r}"}, "braces hold"),
        ({"a": 3}, {"text": "{a}!"}, r"field 'a': this is no text; found int"),
        ({"text": "a"}, {"text": "text", "messages": "text"}, "records are text or messages"),
    ],
)
def test_what_is_wrong_is_told(row: dict, fields: dict, message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        read(row, **fields)


def test_a_later_row_may_lack_a_field() -> None:
    form = Fields().form(["text"], "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl, line 9: there is no such field; found txt; wanted 'text'; did you"):
        form({"txt": "a"}, ("a.jsonl", "line", 9))
