"""Entities: how answers are read, names compared, and questions chosen."""

from __future__ import annotations

import json

import pytest
import torch

from limbeck.data.language import LibraryTokens
from limbeck.data.language.chat import template_turns
from limbeck.data.language.entities import (
    IE_AS_QA,
    SYSTEM,
    Annotated,
    absent,
    by_type,
    conversation,
    frequencies,
    ner_f1,
    questions,
    read_list,
    read_tuples,
)

ROME = Annotated("Rome and Bonn lie by rivers.", (("Rome", "city"), ("Bonn", "City"), ("rivers", "water")))


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ('[("a b", "x"), ("c", "y")]', [("a b", "x"), ("c", "y")]),
        ("Sure!\n[('it\\'s', 'x')]", [("it's", "x")]),
        ('[["a", "x"], ["a", "x"]]', [("a", "x")]),
        ("[ ]", []),
        ("[(a, b)]", None),
        ("none", None),
        ('[("a", ""), ("b", "y")', [("b", "y")]),
    ],
)
def test_tuples(answer: str, wanted: list[tuple[str, str]] | None) -> None:
    assert read_tuples(answer) == wanted


def test_lists() -> None:
    assert read_list('text ["B", "the B"]') == ["b"]
    assert read_list('text ["A cat", "the cat"] and ["dog"]') == ["cat"]
    assert read_list('["a [b] c"]') == ["b c"]
    for broken in ("", "[", '["a"', "[a]", "none"):
        assert read_list(broken) == []


def test_f1() -> None:
    assert ner_f1([["a"], ["b", "c"]], [["a"], ["c", "b"]])["f1"] == 1
    assert ner_f1([["a"]], [["b"]]) == {"precision": 0, "recall": 0, "f1": 0}
    assert ner_f1([["a", "b"], []], [["a"], []]) == {"precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3)}


def test_types_that_are_not_there_are_drawn_by_their_frequency() -> None:
    weights, present = torch.tensor([8.0, 4.0, 2.0, 2.0, 0.0]), torch.tensor([False, True, False, False, False])
    drawn = torch.cat([absent(weights, present, 1, seed) for seed in range(3000)]).bincount(minlength=5).double()
    wanted = torch.tensor([8.0, 0.0, 2.0, 2.0, 0.0]).double() / 12 * 3000
    chi = float(((drawn - wanted) ** 2 / wanted.clamp(min=1))[wanted > 0].sum())
    assert drawn[1] == drawn[4] == 0
    assert chi < 13.8  # two degrees of freedom, one in a thousand
    assert sorted(absent(weights, present, 9, 0).tolist()) == [0, 2, 3]


def test_questions_are_about_all_own_types_and_some_others() -> None:
    known = {"City": 9, "person": 5, "water": 2, "date": 1}
    found = questions(ROME, known, seed=3)
    assert dict(found)["city"] == ["Rome", "Bonn"]
    others = {kind for kind, names in found if not names}
    assert others == {"person", "date"}
    assert questions(ROME, known, seed=3) == found
    assert {tuple(kind for kind, _ in questions(ROME, known, seed=s)) for s in range(20)} > {tuple(k for k, _ in found)}
    assert len(questions(ROME, known, most=1)) == 3
    assert len(questions(ROME, known, negatives="none")) == 2
    even = [questions(ROME, known, negatives="uniform", most=1, seed=s) for s in range(400)]
    dates = sum(any(kind == "date" for kind, _ in asked) for asked in even)
    assert 160 < dates < 240
    assert frequencies([ROME, ROME]) == {"city": 4, "water": 2}
    assert by_type(ROME.entities) == {"city": ["Rome", "Bonn"], "water": ["rivers"]}


def test_the_papers_form(bpe: LibraryTokens) -> None:
    messages = conversation("Rome.", [("city", ["Rome"]), ("sea", [])], dataset="maps")
    place = ("x", "row", 0)
    turns = template_turns(IE_AS_QA, messages, 3, place, named={"eos_token": "</s>"}, specials=["</s>"])
    assert "".join(turn.text for turn in turns) == (
        f"{SYSTEM} USER: Dataset: maps\nText: Rome. ASSISTANT: I've read this text.</s>"
        'USER: What describes city in the text? ASSISTANT: ["Rome"]</s>'
        "USER: What describes sea in the text? ASSISTANT: []</s>"
    )
    assert [turn.text for turn in turns if turn.learned] == ['["Rome"]</s>', "[]</s>"]
    assert json.loads(messages[-1]["content"]) == []
