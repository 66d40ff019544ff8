"""ARTE: what is drafted, what the student likes of it, what its teacher learns from that."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.errors import ConfigError, DataError, LimbeckError
from limbeck.data import load_source
from limbeck.data.language import LanguageLoader
from limbeck.engine import fit
from limbeck.objectives import CrossEntropy
from limbeck.recipes.check import check
from limbeck.recipes.run import run
from limbeck.recipes.schema import Recipe
from limbeck.schemes import ARTE, Cast, Training
from limbeck.schemes.language import tailor, tailoring
from limbeck.schemes.language.authors import ModelAuthor
from limbeck.schemes.language.tailoring import Draft, answered, discriminating, final, preferred, shots, tasks_of
from limbeck.teachers.answers import Answer
from tests.schemes.tiny import cast, llama, records, weights
from tests.teachers.conftest import Loopback, loopback  # noqa: F401  a fixture

SMALL: dict[str, Any] = {
    "drafts": 8,
    "questions": 10,
    "seeds": 2,
    "candidates": 4,
    "preference": 3,
    "score": "likelihood",
    "unfinished": "keep",
    "plain": "{question}",
    "techniques": ["{question} so", "{question} then"],
    "question": "{questions} ",
    "question_tokens": 6,
    "rationale_tokens": 6,
    "answer_tokens": 6,
    "align": {"lr": 1e-3, "batch_size": 4},
}
PLAINLY = re.compile(r"####(.+)")


def split_of(data: list[dict[str, str]]) -> Any:
    return load_source(data, tokenizer="bytes", validation=0).train


def trainings(scene: Cast, **options: Any) -> tuple[Training, Training]:
    first, second = ARTE(**{**SMALL, **options}).trainings(scene)
    return first, second


def texts(loader: LanguageLoader, split: Any = None) -> list[tuple[str, str]]:
    """Each row's prompt and completion."""
    rows, decode, found = (split or loader.split).rows, loader.split.tokens.decode, []
    for row in range(len(rows)):
        batch = rows.batch(torch.tensor([row]))
        ids = batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0] > 0].tolist()
        first = int(batch.mask[0].int().argmax()) + 1
        found.append((decode(ids[:first]), decode(ids[first:])))
    return found


class Scripted:
    """Writes what it is told to, and counts."""

    def __init__(self, answer: Callable[[str, int], str]) -> None:
        self.answer, self.asked = answer, list[tuple[str, int]]()

    def generate(self, prompts: Sequence[str], *, n: int = 1, seed: int | None = None, **_: Any) -> list[list[Answer]]:
        self.asked += [(prompt, (seed or 0) + draw) for prompt in prompts for draw in range(n)]
        return [[Answer(self.answer(p, (seed or 0) + draw)) for draw in range(n)] for p in prompts]

    def each(self, prompts: Sequence[str], **settings: Any) -> Iterator[tuple[int, list[Answer]]]:
        yield from enumerate(self.generate(prompts, **settings))

    def stop(self) -> None: ...


def test_preferences_are_shares_and_their_means() -> None:
    torch.manual_seed(0)
    right = torch.rand(5, 4, 8) < 0.5
    of_rationales, of_questions = preferred(right)
    for q in range(5):
        for r in range(4):
            assert float(of_rationales[q, r]) == sum(map(bool, right[q, r])) / 8
        assert float(of_questions[q]) == pytest.approx(sum(of_rationales[q].tolist()) / 4, abs=1e-7)


def test_the_students_likes_are_those_of_a_plain_decoding() -> None:
    """One example, one question, one greedy text at a time, without padding."""
    scene = cast(CrossEntropy())
    tokens = scene.train.split.tokens
    author = ModelAuthor(scene.student, tokens)
    prompts = [shots([("to be", " or not")], question) for question in ("it", "whether", "nobler, ")]
    found = answered(author, prompts, 5, PLAINLY)
    for prompt, said in zip(prompts, found, strict=True):
        ids = [1, *tokens.encode([prompt])[0][0].tolist()]
        written: list[int] = []
        with torch.no_grad():
            while len(written) < 5 and written[-1:] != [1]:
                written.append(int(scene.student(torch.tensor([ids + written])).logits[0, -1].argmax()))
        assert said == final(tokens.decode(written).lstrip().split("\n\n")[0], PLAINLY)
    likely = tailoring.likelihoods(scene.student, tokens, prompts, ["a", "bcd", "ef"], 2)
    for value, prompt, answer in zip(likely.tolist(), prompts, ["a", "bcd", "ef"], strict=True):
        begin = [1, *tokens.encode([prompt])[0][0].tolist()]
        said = [*tokens.encode([answer])[0][0].tolist(), 1]
        logits = scene.student(torch.tensor([begin + said])).logits[0].log_softmax(-1)
        own = [float(logits[len(begin) - 1 + place, token].detach()) for place, token in enumerate(said)]
        assert value == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_answers_are_found_in_texts() -> None:
    pattern = ARTE().answer
    assert final("It is 4.\nThe answer is: 12.\n", pattern) == "12"
    assert final("so #### 3", pattern) == final("3.", pattern) == "3"


def test_tasks_are_told_by_tags() -> None:
    data = [{"prompt": f"{tag}{i}\n", "completion": f"  {i}", "tag": tag} for i in range(6) for tag in ("x", "y")]
    first, second = tasks_of(split_of([*data, data[0]]), 2, 3)
    assert [q for q, _ in first.seeds + first.held] == [f"x{i}\n" for i in range(5)]
    assert second.held == [(f"y{i}\n", f"  {i}") for i in (2, 3, 4)]
    assert (first.ending, first.worked(Answer(" so\n"))) == ("\n", "  so")
    with pytest.raises(DataError, match="there is no question to judge by; found 2 questions"):
        tasks_of(split_of(data[:4]), 2, 3)
    with pytest.raises(DataError, match="there are no questions"):
        tasks_of(load_source(["abc", "def"] * 20, tokenizer="bytes").train, 2, 3)


def test_questions_that_tell_models_apart_are_chosen() -> None:
    """Of what all know, none knows, and some know, the last."""
    held = [(f"q{i}", f"a{i}") for i in range(6)]

    def reader(level: int) -> Scripted:
        known = {"q0": 0, "q1": 0, "q2": 9, "q3": 9, "q4": 2, "q5": 3}
        return Scripted(lambda prompt, _: prompt.replace("q", "a")[-2:] if level >= known[prompt[-2:]] else "?")

    readers = [reader(level) for level in range(6)]
    assert discriminating(readers, [("s", "t")], held, 2, most=4, answer=PLAINLY) == [4, 5]
    assert len(readers[0].asked) == 2 * len(held)  # after none, and after the one example there is
    assert discriminating(readers, [], held, 6, most=4, answer=PLAINLY) == list(range(6))


def test_pairs_are_asked_for_plainly_and_end_in_the_aligned_teachers_words() -> None:
    scene = cast(CrossEntropy())
    aligned, last = trainings(scene)
    loader = aligned.train()
    distiller = aligned.stages[0].distiller
    chosen, rejected = texts(loader), texts(loader, distiller.rejected)
    assert [prompt for prompt, _ in chosen] == [prompt for prompt, _ in rejected]
    assert all(a != b for (_, a), (_, b) in zip(chosen, rejected, strict=True))
    about = tasks_of(scene.train.split, 2, 4)[0]
    asks = "\n\n".join(question.strip() for question, _ in about.seeds) + " "
    assert sum(prompt == asks for prompt, _ in chosen) == 2  # a quarter of the eight
    assert not any(prompt.endswith((" so", " then")) for prompt, _ in chosen)
    assert len(chosen) == 2 + 8
    assert aligned.judged is False
    made = last.train()
    assert len(made.split) == 10
    author = ModelAuthor(distiller.student, made.split.tokens)
    for prompt, said in texts(made)[:3]:
        ((answer,),) = author.generate([prompt], max_tokens=6, temperature=0.0)
        assert said.strip() == answer.text.strip()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_teacher_learns_from_pairs_however_they_are_cut(accumulate: int) -> None:
    """One step by hand over whole texts, without padding; its loss is log 2, since nothing was learned yet."""
    scene = cast(CrossEntropy(), steps=1, config={"accumulate": accumulate})
    settings = {"align": {"lr": 1e-2, "batch_size": 64, "warmup": 0.0}, "beta": 0.4}
    aligned, _ = trainings(scene, **settings)
    loader, distiller = aligned.train(), aligned.stages[0].distiller
    changes = {"optimizer": "sgd", "optimizer_options": {"momentum": 0.0}, "schedule": "constant"}
    stage = replace(aligned.stages[0], config=aligned.stages[0].config.model_copy(update=changes))
    policy, reference, total = llama(width=24, seed=2, sharp=8.0).double(), scene.teacher.model, 0.0

    def likely(model: Any, ids: list[int], first: int) -> torch.Tensor:
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logits[place - 1, ids[place]] for place in range(first, len(ids)))

    sides = [loader.rows, distiller.rejected.rows]
    for row in range(len(loader.rows)):
        gains = []
        for rows in sides:
            batch = rows.batch(torch.tensor([row]))
            ids = batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0] > 0].tolist()
            first = int(batch.mask[0].int().argmax()) + 1
            with torch.no_grad():
                before = likely(reference, ids, first)
            gains.append(likely(policy, ids, first) - before)
        total = total - torch.nn.functional.logsigmoid(0.4 * (gains[0] - gains[1])) / len(loader.rows)
    total.backward()
    assert float(total.detach()) == pytest.approx(0.6931471805599453, rel=1e-9)
    wanted = torch.cat([(p - 1e-2 * p.grad).detach().flatten() for p in policy.parameters()])

    fit([stage], loader, quiet=True)
    torch.testing.assert_close(weights(distiller.student), wanted, atol=1e-8, rtol=0)


def test_a_student_that_ignores_examples_prefers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tailor, "likelihoods", lambda model, tokens, prompts, answers, size: torch.zeros(len(prompts)))
    aligned, _ = trainings(cast(CrossEntropy()))
    with pytest.raises(DataError, match=r"the student is as good after every draft.*score: likelihood"):
        aligned.train()


def test_a_teacher_that_only_answers_gives_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rationales the one after which the student does better, told here by a rule."""
    monkeypatch.setattr(
        tailor,
        "likelihoods",
        lambda model, tokens, prompts, answers, size: torch.tensor([float("good" in p) for p in prompts]),
    )
    endings = {"so": "bad", "en": "good"}
    told = Scripted(lambda prompt, seed: endings.get(prompt[-2:], f"q{seed}"))
    scheme = ARTE(**{**SMALL, "writer": told, "question": "{questions}  "})
    (only,) = scheme.trainings(cast(CrossEntropy(), teacher=None))
    made = only.train()
    assert {said.strip() for _, said in texts(made)} == {"good"}
    assert len(made.split) == SMALL["drafts"]
    assert len(told.asked) == len(set(told.asked)) == 8 + 2 * 8


def recipe(url: str) -> Recipe:
    writer = {"base_url": url, "model": "tiny", "key_env": None}
    made = {
        "data": {"source": "tests.schemes.tiny:pairs", "batch_size": 6},
        "student": {"model": "tests.schemes.tiny:llama"},
        "loss": "cross_entropy",
        "scheme": {"arte": {**SMALL, "writer": writer, "question_tokens": 2, "rationale_tokens": 2}},
        "train": {"steps": 3, "lr": 0.05},
    }
    del made["scheme"]["arte"]["align"]
    return Recipe.model_validate(made)


@pytest.mark.slow
def test_a_served_teacher_is_asked_once(loopback: Callable[..., Loopback], tmp_path: Path) -> None:  # noqa: F811
    server = loopback(("429:0.01", "500"), share=0.5)
    served = recipe(server.url)
    assert check(served) == []
    assert server.asked() == []
    first = run(served, tmp_path / "run", quiet=True)
    answered_once = server.answered()
    assert len([p for p in answered_once if not p.endswith(("so", "then"))]) % 8 == 0  # the question, so many times
    rest = [p for p in answered_once if p.endswith(("so", "then"))]
    assert len(rest) == len(set(rest)) > 4
    summary = json.loads((tmp_path / "run" / "written" / "summary.json").read_text())
    assert summary["rows"] == summary["drafts"] > 4
    server.kill()
    (tmp_path / "run" / "result.json").unlink()
    again = run(served, tmp_path / "run", resume=True, quiet=True)
    assert again["perplexity"] == first["perplexity"]


def test_refusals() -> None:
    for wrong, where in (
        ({"drafts": 0}, "scheme.drafts"),
        ({"score": "taste"}, "scheme.score"),
        ({"unfinished": "cut"}, "scheme.unfinished"),
        ({"plain": "so?"}, "scheme.plain"),
        ({"techniques": []}, "scheme.techniques"),
        ({"techniques": ["x"]}, r"scheme.techniques.0: the prompt lacks its field.*wanted \{question\}"),
        ({"question": "{question}"}, r"scheme.question: the prompt lacks its field.*wanted \{questions\}"),
        ({"share": 0.6}, "scheme.share"),
        ({"beta": 0.0}, "scheme.beta"),
        ({"align": {"rate": 1.0}}, "scheme.align.rate"),
        ({"answer": "("}, "scheme.answer: cannot be read"),
        ({"answer": "x"}, "scheme.answer: must have one group"),
        ({"writer": 3}, "scheme.writer"),
    ):
        with pytest.raises(ConfigError, match=where):
            ARTE(**wrong)
    for scene, message in (
        (cast(CrossEntropy(), teacher=None), "teacher: the texts are written by a teacher; found none"),
        (cast(CrossEntropy(), data=split_of(records()[:2]), batch_size=1), "there is no question to judge by"),
    ):
        with pytest.raises(LimbeckError, match=message):
            next(iter(ARTE(**SMALL).trainings(scene)))
    assert Draft("q", Answer("q")).rationales == ()
