"""KCA: what the examiner says, what the student knows, and what becomes of rows that it knows nothing of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from limbeck.core.errors import ConfigError, DataError, LimbeckError
from limbeck.data import load_source
from limbeck.data.language import ByteTokens
from limbeck.data.language.rewritten import parted
from limbeck.models.generating import Decoding, write
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, Offline, perform
from limbeck.schemes.language.examining import SHOTS, Question, choices, read_exam, read_need, shots_of
from limbeck.schemes.language.kca import KCA, SORRY
from limbeck.teachers.answers import Answer
from tests.schemes.tiny import cast, llama, weights

BLOCK = "#Question:\nIs it {n}?\n#Options:\n(A) a\n(B) b\n(C) c\n(D) d\n#Analysis:\nx\n#Answer:\n({right})\n"


class Examiner:
    """Says what it is told to: whether facts are needed, which, and the exam."""

    def __init__(self, needs: Callable[[str], str], right: Callable[[str], str], count: int = 3) -> None:
        self.needs, self.right, self.count, self.asked = needs, right, count, list[str]()

    def generate(self, prompts: Sequence[str], **_: Any) -> list[list[Answer]]:
        self.asked += prompts
        return [[Answer(self.say(*prompt.split("@", 1)))] for prompt in prompts]

    def say(self, name: str, text: str) -> str:
        if name == "need":
            return self.needs(text)
        if name == "knowledge":
            return f" all of {text.split('@')[0]} "
        return "".join(BLOCK.format(n=n, right=self.right(text)) for n in range(self.count))

    def each(self, prompts: Sequence[str], **settings: Any) -> Any:
        yield from enumerate(self.generate(prompts, **settings))

    def stop(self) -> None: ...


class Letter(nn.Module):
    """Always answers with one letter: a student who is examined and does not learn."""

    def __init__(self, letter: str) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(258).index_fill(0, torch.tensor([ord(letter) + 2]), 1.0))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.scores.expand(*input_ids.shape, -1)


def need(_: str) -> str:
    return "so. #Prediction:\n<need>"


def even(text: str) -> str:
    return need(text) if len(text) % 2 else "x #Prediction: <no need>"


def scheme(needs: Callable[[str], str] = need, right: str = "B", count: int = 3, **options: Any) -> KCA:
    prompts = {
        "need": "need@{instruction}",
        "knowledge": "knowledge@{instruction}@{output}",
        "exam": "exam@{knowledge}",
    }
    return KCA(**{**prompts, "writer": Examiner(needs, lambda _: right, count), "shots": [], **options})


def scene(letter: str = "", **changes: Any) -> Cast:
    given = cast(CrossEntropy(), teacher=None, **changes)
    if letter:
        given.student = Letter(letter)
    return given


def rows(given: Cast, way: KCA) -> list[tuple[str, str]]:
    (training,) = way.trainings(given)
    assert callable(training.train)
    split: Any = training.train().split
    return texts(split)


def texts(split: Any) -> list[tuple[str, str]]:
    return [(split.tokens.decode(prompt), split.tokens.decode(said)) for prompt, said in parted(split)]


@pytest.mark.parametrize("strategy", ["open_book", "discard", "refuse"])
def test_who_knows_all_learns_what_the_data_say(strategy: str) -> None:
    given = scene("B")
    assert rows(given, scheme(strategy=strategy)) == texts(given.train.split)  # type: ignore[union-attr]
    if strategy == "refuse":
        plain = perform(Offline(), scene(), quiet=True).student
        tuned = perform(scheme(lambda _: "x #Prediction: <no need>", strategy=strategy), scene(), quiet=True).student
        assert torch.equal(weights(plain), weights(tuned))


def test_what_is_unknown_is_changed_and_nothing_else(tmp_path: Path) -> None:
    given = replace(scene("A", options={"length": None}), folder=tmp_path)
    before = texts(given.train.split)  # type: ignore[union-attr]
    wanting = [len(prompt.strip()) % 2 == 1 for prompt, _ in before]
    assert 0 < sum(wanting) < len(wanting)
    opened, refused = rows(given, scheme(even)), rows(given, scheme(even, strategy="refuse"))
    for (prompt, said), new, sorry, unknown in zip(before, opened, refused, wanting, strict=True):
        assert new == (f"all of {prompt.strip()}\n{prompt}" if unknown else prompt, said)
        assert sorry == (prompt, f" {SORRY}" if unknown else said)
    facts = json.loads((tmp_path / "written" / "summary.json").read_text())
    assert facts["too_long"] == 0
    assert facts["classes"] == {"no_need": 60 - sum(wanting), "known": 0, "unknown": sum(wanting), "unread": 0}
    kept = [pair for pair, unknown in zip(before, wanting, strict=True) if not unknown]
    assert rows(given, scheme(even, strategy="discard")) == kept


def test_the_threshold() -> None:
    assert [KCA(threshold=1 / 3).passes(n, 3) for n in range(4)] == [False, False, True, True]
    assert [KCA(threshold=1 / 3, inclusive=True).passes(n, 3) for n in range(4)] == [False, True, True, True]
    assert KCA(threshold=1.0, inclusive=True).passes(3, 3)


def test_what_is_not_understood_is_dropped_or_kept() -> None:
    given = scene("B")
    with pytest.raises(DataError, match="nothing is left.*60 unread"):
        rows(given, scheme(lambda _: "maybe"))
    with pytest.raises(DataError, match="60 unread"):
        rows(given, scheme(count=0))  # no exam
    assert len(rows(given, scheme(lambda _: "maybe", unread="keep"))) == 60


def test_answers_are_read() -> None:
    assert read_need("so #Prediction: <need>\n#Search Query: x") == (True, "so")
    assert read_need("#Prediction: need") is None
    whole = "Question 1: Why?\nOptions:\nA) x (y)\nB) b\nC. c\nD. d\nAnswer: C. c\n"
    assert read_exam(whole) == [Question("Why?", ("x (y)", "b", "c", "d"), "C")]
    for broken in (whole.replace("D. d", ""), whole.replace("C. c\n", "E\n"), whole.replace("Options:", "")):
        assert read_exam(broken) == []
    assert len(read_exam(BLOCK.format(n=1, right="A") + whole + BLOCK.format(n=2, right="?"))) == 2


def test_the_student_chooses_the_likeliest_letter() -> None:
    model, tokens = llama(seed=3, sharp=6.0).double(), ByteTokens()
    head = shots_of([Question(s["question"], tuple(s["options"]), s["answer"]) for s in SHOTS[:1]])
    prompts = [("" if n else head[-40:]) + Question(f"{n}?" * (1 + n), tuple("wxyz"), "A").asked() for n in range(5)]
    found = choices(model, tokens, prompts, batch_size=2)
    for prompt, letter in zip(prompts, found, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([[1, *(b + 2 for b in prompt.encode())]])).logits[0, -1]
        assert letter == max("ABCD", key=lambda one: float(scores[ord(one) + 2]))
    assert head.count("Answer: C") == 1


def test_refusals_are_learned_where_facts_are_unknown() -> None:
    """A tiny model says the short word of refusal for prompts of one kind, and answers those of the other."""
    data = [{"prompt": f"{'fact' if n % 2 else 'word'} {n % 10}:", "completion": "yes"} for n in range(40)]
    split = load_source(data, tokenizer="bytes", validation=0).train
    given = scene(data=split, steps=60, config={"lr": 0.01, "optimizer": "adamw"}, batch_size=10)
    model: Any = llama(width=32, seed=1)
    model.get_input_embeddings().weight.data *= 5
    given.student = model
    way = scheme(
        lambda text: need(text) if "fact" in text else "x #Prediction: <no need>", strategy="refuse", refusal="no"
    )
    way.passes = lambda right, number: False  # type: ignore[method-assign]
    student = perform(way, given, quiet=True).student
    said = {}
    for word in ("fact 3:", "word 4:"):
        ids = torch.tensor([[1, *(b + 2 for b in word.encode())]])
        made = write(student, ids, ids > 0, Decoding(4, 0.0), ends=[1], pad=0)
        said[word] = ByteTokens().decode(made.ids[0][: int(made.lengths[0]) - 1].tolist())
    assert said == {"fact 3:": "no", "word 4:": "yes"}


def test_what_cannot_be_is_said() -> None:
    for options, word in (
        ({"strategy": "x"}, "strategy"),
        ({"unread": "x"}, "unread"),
        ({"threshold": 2.0}, "threshold"),
        ({"questions": 0}, "questions"),
        ({"exam": "x"}, "exam"),
        ({"shots": [{"question": "a"}]}, "shots.0"),
    ):
        with pytest.raises(ConfigError, match=word):
            KCA(**options)
    with pytest.raises(LimbeckError, match="annotated by"):
        rows(scene("A"), KCA())
