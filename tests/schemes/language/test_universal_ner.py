"""UniversalNER: what is asked, what is believed, what is learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.errors import ConfigError, DataError, LimbeckError
from limbeck.data import load_source
from limbeck.data.language.entities import ner_f1
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, perform
from limbeck.schemes.language.authors import ModelAuthor
from limbeck.schemes.language.universal_ner import UniversalNER, find_entities
from limbeck.teachers.answers import Answer
from tests.schemes.tiny import cast, llama

PLACES = ["Rome is old.", "Bonn lies by the Rhine.", "Nobody knows."]
SAYS = {
    PLACES[0]: '[("Rome", "city")]',
    PLACES[1]: '[("Bonn", "city"), ("Rhine", "river"), ("Mars", "planet")]',
    PLACES[2]: "I cannot.",
}


class Lists:
    """Lists the entities that it is told to."""

    def __init__(self, says: Callable[[str], str]) -> None:
        self.says, self.asked = says, list[str]()

    def generate(self, prompts: Sequence[str], *, n: int = 1, **_: Any) -> list[list[Answer]]:
        self.asked += prompts
        return [[Answer(self.says(prompt[1:-1])) for _ in range(n)] for prompt in prompts]

    def each(self, prompts: Sequence[str], **settings: Any) -> Any:
        yield from enumerate(self.generate(prompts, **settings))

    def stop(self) -> None: ...


def scene(texts: Sequence[str] = PLACES, **changes: Any) -> Cast:
    data = load_source(list(texts), tokenizer="bytes", validation=0).train
    return cast(CrossEntropy(), data=data, teacher=None, batch_size=2, **changes)


def scheme(says: Callable[[str], str] = SAYS.__getitem__, **options: Any) -> UniversalNER:
    return UniversalNER(**{"template": "<{passage}>", "writer": Lists(says), "system": "", **options})


def loader_of(given: Cast, way: UniversalNER) -> Any:
    (training,) = way.trainings(given)
    assert callable(training.train)
    assert not training.judged
    return training.train()


def rows(split: Any) -> list[tuple[str, str]]:
    """Each row, and what of it is learned."""
    found = []
    for row in range(len(split)):
        batch = split.rows.batch(torch.tensor([row]))
        ids = batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0] > 0].tolist()
        found.append((split.tokens.decode(ids), split.tokens.decode(batch.labels[0][batch.mask[0]].tolist())))
    return found


def test_answers_alone_are_learned(tmp_path: Path) -> None:
    given = replace(scene(), folder=tmp_path)
    split = loader_of(given, scheme(negatives="none")).split
    first, second = rows(split)
    assert first[0] == (
        "user: Text: Rome is old.assistant: I've read this text.user: What describes city in the text?"
        'assistant: ["Rome"]'
    )
    assert first[1] == '["Rome"]'
    assert second[1] in ('["Bonn"]["Rhine"]', '["Rhine"]["Bonn"]')
    assert int(split.rows.batch(torch.tensor([0])).mask.sum()) == len('["Rome"]') + 1  # and the end of it
    facts = json.loads((tmp_path / "written" / "summary.json").read_text())
    assert facts == {
        "asked": 3, "unreadable": 1, "entities": 4, "not_there": 1, "questions": 3, "negatives": 0, "rows": 2,
        "gold": 0, "types": 2,
    }  # fmt: skip


def test_what_is_not_there_may_be_asked_for_and_kept() -> None:
    split = loader_of(scene(), scheme(verify=False)).split
    first, second = rows(split)
    assert "What describes city" in first[0]
    assert first[0].count("What describes") == 2  # as many others as own ones
    assert "[]" in first[1]
    assert '["Mars"]' in second[1]
    assert second[0].count("What describes") == 3  # there are no others


def test_people_may_have_labelled_some() -> None:
    gold = [{"text": "Oslo", "entities": [["Oslo", "place"]], "dataset": "maps"}]
    split = loader_of(scene(), scheme(gold=gold, negatives="none", system="Hear:")).split
    assert rows(split)[-1][0].startswith("system: Hear:user: Dataset: maps\nText: Osloassistant: ")


def test_a_student_learns_to_list() -> None:
    given = scene(["Rome is old."] * 2, steps=70, config={"lr": 0.01, "optimizer": "adamw"})
    given.student = llama(width=32, seed=1)
    tokens = given.train.split.tokens  # type: ignore[union-attr]
    before = find_entities(ModelAuthor(given.student, tokens), "Rome is old.", ["city"], tokens=9, system="")
    given.student.train()
    way = scheme(lambda _: '[("Rome", "city")]', negatives="none")
    student = perform(way, given, quiet=True).student
    after = find_entities(ModelAuthor(student, tokens), "Rome is old.", ["city"], tokens=9, system="")
    assert ner_f1(list(before.values()), [["rome"]])["f1"] == 0
    assert ner_f1(list(after.values()), [["rome"]])["f1"] == 1


def test_what_cannot_be_is_said() -> None:
    for options, word in (
        ({"kind": "x"}, "kind"),
        ({"negatives": "x"}, "negatives"),
        ({"template": "x"}, "template"),
        ({"most": -1}, "most"),
        ({"length": 1}, "length"),
        ({"gold": [{"text": "a"}]}, "no labelled passage"),
    ):
        with pytest.raises((ConfigError, DataError), match=word):
            UniversalNER(**options)
    with pytest.raises(DataError, match="no entity was named"):
        loader_of(scene(), scheme(lambda _: "[]"))
    with pytest.raises(LimbeckError, match="annotated by"):
        loader_of(scene(), UniversalNER())
    assert "definition" in UniversalNER(kind="definition").asks("x")
