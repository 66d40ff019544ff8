"""A tagger of passages that a language model has annotated."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.analysis.extraction import assess_pairs, extract, scores
from limbeck.core.errors import ConfigError, DataError, LimbeckError
from limbeck.core.objective import Terms
from limbeck.data.language import LanguageLoader
from limbeck.data.language.anchored import Passage, anchored_source
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, perform
from limbeck.schemes.language.ade_llm_distill import ADELLMDistill
from limbeck.schemes.language.annotating import believed
from limbeck.teachers.answers import Answer
from tests.schemes.passages import DRUGS, MARKS, Tagger, passages, records
from tests.schemes.tiny import cast as texts_cast
from tests.schemes.tiny import weights


class Annotator:
    """Answers with what it is told of a passage."""

    def __init__(self, says: Callable[[str, int], str]) -> None:
        self.says, self.asked = says, list[str]()

    def generate(self, prompts: Sequence[str], *, n: int = 1, **_: Any) -> list[list[Answer]]:
        self.asked += prompts
        return [[Answer(self.says(prompt.split("@")[1], draw)) for draw in range(n)] for prompt in prompts]

    def each(self, prompts: Sequence[str], **settings: Any) -> Any:
        yield from enumerate(self.generate(prompts, **settings))

    def stop(self) -> None: ...


KNOWN = {record["text"]: record["pairs"] for record in records(400, known=True)}


def right(text: str, _: int = 0) -> str:
    return "\n".join(f"{a} | {b}" for a, b in KNOWN[text])


def scene(source: Any, **changes: Any) -> Cast:
    torch.manual_seed(0)
    student = Tagger(source.train.tokens.size)
    settings = {"steps": 4, "optimizer": "adamw", "lr": 0.01, "device": "cpu", "compile": "off", **changes}
    loader = LanguageLoader(source.train, batch_size=16, seed=1)
    return Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(**settings), loader, seed=5)


def scheme(says: Callable[[str, int], str], **options: Any) -> ADELLMDistill:
    return ADELLMDistill(**{"template": "{examples}@{passage}@", "shots": [], "writer": Annotator(says), **options})


def trained(given: Cast, way: ADELLMDistill) -> Any:
    (training,) = way.trainings(given)
    assert callable(training.train)
    return training.train()


@pytest.mark.slow
def test_a_teacher_that_is_right_gives_supervised_training() -> None:
    known = {"train": records(40, known=True)}
    gold = anchored_source(known, tokenizer="bytes", anchors=DRUGS, marks=MARKS, validation=0)
    found = [perform(scheme(right), scene(passages(40)), quiet=True).student]
    found.append(perform(scheme(right), scene(gold), quiet=True).student)
    assert torch.equal(*map(weights, found))


def test_what_is_believed(tmp_path: Path) -> None:
    texts = [record["text"] for record in records(40)]

    def says(text: str, _: int) -> str:
        number = texts.index(text)
        return {0: "I do not know", 1: "none", 2: f"{right(text)}\nadol | gout"}.get(number, right(text))

    given = replace(scene(passages(40)), folder=tmp_path)
    split = trained(given, scheme(says)).split
    facts = json.loads((tmp_path / "written" / "summary.json").read_text())
    gone, none, more = (texts.count(texts[n]) for n in range(3))
    assert (facts["asked"], facts["unreadable"], facts["not_there"]) == (40, gone, more)
    assert facts["passages"] == len(split.passages) == 40 - gone
    assert facts["rows"] == len(split) == 2 * (40 - gone)  # two drugs in each
    assert facts["events"] == 40 - gone - none
    assert [p.pairs for p in split.passages if p.text == texts[1]] == [()] * none


def test_votes() -> None:
    votes = [["a", "b"], ["a", "a"], ["b", "a"], ["a"]]
    assert believed(votes, 0.5) == ["a", "b"]
    assert believed(votes, 0.51) == ["a"]
    split = trained(
        scene(passages(8)), scheme(lambda text, draw: right(text) if draw else "adol | cough", samples=3, agree=0.6)
    ).split
    assert all([list(pair) for pair in passage.pairs] == KNOWN[passage.text] for passage in split.passages)


@pytest.mark.slow
def test_the_student_is_better_than_its_noisy_teacher() -> None:
    dice = random.Random(1)

    def noisy(text: str, _: int = 0) -> str:
        ((drug, event),) = KNOWN[text]
        chance = dice.random()
        other = next(word for word in text.split() if word in ("adol", "brixin", "ceptum", "dorazole") and word != drug)
        return "none" if chance < 0.15 else f"{other} | {event}" if chance < 0.3 else f"{drug} | {event}"

    source = passages(300, tokenizer={"bpe": 400})
    held = [Passage(r["text"], tuple(map(tuple, r["pairs"]))) for r in records(400, known=True)[300:]]
    wrong = [[tuple(pair.split(" | ")) for pair in [noisy(p.text)] if " | " in pair] for p in held]
    teacher = scores(held, wrong)["f1"]  # type: ignore[arg-type]
    given = scene(source, steps=110, lr=0.02)
    before = assess_pairs(given.student, source.train.told(held))["f1"]
    student = perform(scheme(noisy), given, quiet=True).student
    after = assess_pairs(student, source.train.told(held))
    assert before < teacher < 0.85
    assert after["f1"] > teacher
    assert after["strict_f1"] <= after["f1"]
    assert len(extract(student, source.train)) == 300


def test_the_prompt_holds_examples_and_passage_once() -> None:
    asked = ADELLMDistill(template="{examples}{passage}", shots=[{"text": "{passage}", "pairs": []}]).asks("{examples}")
    assert asked == "Passage: {passage}\nPairs:\nnone\n\n{examples}"
    assert ADELLMDistill().asks("x").count("Passage:") == 6


def test_what_cannot_be_is_said() -> None:
    for options, word in (
        ({"template": "x"}, "template"),
        ({"shots": [{"text": "a"}]}, "shots.0"),
        ({"between": " "}, "between"),
        ({"samples": 0}, "samples"),
        ({"agree": 2.0}, "agree"),
    ):
        with pytest.raises(ConfigError, match=word):
            ADELLMDistill(**options)
    with pytest.raises(DataError, match="no passages"):
        trained(texts_cast(CrossEntropy()), scheme(right))
    with pytest.raises(LimbeckError, match="annotated by"):
        trained(scene(passages(8)), ADELLMDistill())
    with pytest.raises(DataError, match="could be read"):
        trained(scene(passages(8)), scheme(lambda text, _: "hm"))
