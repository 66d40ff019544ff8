"""A pruned model tuned on restated answers: what is asked, what is taken, what is trained."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from limbeck.compression import student_from
from limbeck.core.errors import ConfigError
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.language import LanguageLoader
from limbeck.data.language.rewritten import parted
from limbeck.models.generating import Decoding, write
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, Offline, perform
from limbeck.schemes.language.self_data_distill import SelfDataDistill
from tests.schemes.tiny import cast, llama, weights

SHORT = "{prompt}|{completion}|"


class Says:
    """A writer in the teacher's place."""

    def __init__(self, answer: Any, reason: str = "stop") -> None:
        self.answer, self.reason, self.asked = answer, reason, list[str]()

    def generate(self, prompts: list[str], **_: Any) -> list[list[Any]]:
        self.asked += prompts
        return [[SimpleNamespace(text=self.answer(prompt), finish_reason=self.reason)] for prompt in prompts]

    def each(self, prompts: list[str], **settings: Any) -> Any:
        yield from enumerate(self.generate(prompts, **settings))

    def stop(self) -> None:
        self.asked.clear()


def scene(**changes: Any) -> Cast:
    return cast(CrossEntropy(), **changes)


def test_what_is_refused_leaves_plain_fine_tuning() -> None:
    plain = perform(Offline(), scene(teacher=None), quiet=True).student
    for writer in (Says(lambda _: ""), Says(lambda _: "x" * 500), Says(lambda _: " it is", "length")):
        tuned = perform(SelfDataDistill(rank=0, writer=writer), scene(), quiet=True).student
        assert torch.equal(weights(plain), weights(tuned))


def test_the_teacher_is_asked_with_prompt_and_answer_and_its_words_are_learned() -> None:
    given, writer = scene(), Says(lambda prompt: prompt.split("|")[1].strip().upper() + "!  ")
    scheme = SelfDataDistill(template=SHORT, rank=0, writer=writer)
    (training,) = list(scheme.trainings(given))
    assert callable(training.train)
    loader = training.train()
    assert isinstance(loader, LanguageLoader)
    tokens, before = given.train.split.tokens, list(parted(given.train.split))  # type: ignore[union-attr]
    after = list(parted(loader.split))
    assert len(before) == len(after)
    for (prompt, gold), (again, said) in zip(before, after, strict=True):
        assert prompt == again
        text, own = tokens.decode(gold[:-1]), tokens.decode(said[:-1])
        assert own == " " + text.strip().upper() + "!"
        assert said[-1] == gold[-1] == tokens.eos
    asked = {f"{tokens.decode(p[1:])}|{tokens.decode(g[:-1])}|" for p, g in before}
    assert asked == set(writer.asked)
    batch = loader.example(9)
    for row, (prompt, said) in enumerate(after[:9]):
        counted = batch.mask[row].nonzero().flatten().tolist()  # type: ignore[index]
        assert counted == list(range(len(prompt) - 1, len(prompt) + len(said) - 1))


@pytest.mark.parametrize(
    ("options", "reference", "text", "wanted"),
    [
        ({}, "so it is 18", "#### 18.0", None),
        ({}, "so it is 18", "we get 19", "answer"),
        ({}, "so it is 18", "we get it", "answer"),
        ({}, "a word", "another 3", None),
        ({"answer": "none"}, "so it is 18", "we get 19", None),
        ({"answer": r"\((.)\)"}, "it is (b)", "surely (b)", None),
        ({"answer": r"\((.)\)"}, "it is (b)", "surely (c)", "answer"),
        ({}, "abcdefghij", "a", "length"),
        ({}, "ab", "abcdefghijk", "length"),
        ({"longest": 6.0}, "ab", "abcdefghijk", None),
        ({}, "ab", "  ", "empty"),
    ],
)
def test_what_is_taken(options: dict[str, Any], reference: str, text: str, wanted: str | None) -> None:
    assert SelfDataDistill(**options).refusal(reference, text, finished=True) == wanted
    assert SelfDataDistill(**options).refusal(reference, text, finished=False) == "unfinished"


def test_braces_in_a_text_are_no_places() -> None:
    assert SelfDataDistill(template=SHORT).asks("{completion}", "{prompt}{x}") == "{completion}|{prompt}{x}|"


def test_adapters_alone_train_and_are_merged() -> None:
    given = scene(options={"validation": 0}, config={"lr": 0.5})
    before = {name: tensor.clone() for name, tensor in given.student.state_dict().items()}
    perform(SelfDataDistill(rank=2, writer=Says(lambda _: "")), given, quiet=True)
    after = given.student.state_dict()
    assert sorted(before) == sorted(after)
    assert type(given.student.model.layers[0].mlp.up_proj) is torch.nn.Linear  # type: ignore[union-attr, index]
    for name, tensor in after.items():
        change = tensor - before[name]
        adapted = name.startswith("model.layers") and "norm" not in name
        assert bool(change.any()) == adapted, name
        if adapted:
            assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) <= 2, name


@pytest.mark.slow
def test_a_cut_model_comes_nearer_to_the_whole_one_on_its_own_words(tmp_path: Path) -> None:
    """The teacher's own words are likelier to it than the data's, and lead the student nearer to it than those do."""
    judge = llama(layers=4, seed=2, sharp=30.0).double().eval()
    letters = torch.tensor([ord(c) + 2 for c in "abcdefgh"])
    keep = torch.zeros(258, 1, dtype=torch.double).index_fill_(0, letters, 1.0)
    judge.lm_head.weight.data *= keep  # so that what it writes is text

    @functools.cache
    def own(prompt: str) -> str:
        ids = torch.tensor([[1, *(b + 2 for b in prompt.encode())]])
        said = write(judge, ids, ids > 0, Decoding(6, 0.0), ends=[], pad=0).ids[0]
        return "".join(chr(i - 2) for i in said.tolist())

    found = {}
    for name in ("whole", "data"):
        given = scene(teacher=FrozenTeacher(judge), steps=20, config={"lr": 0.01, "optimizer": "adamw"})
        texts: Any = given.train
        cut = student_from(judge, layers=3, choose="angular", importance=[texts.example(8)])
        given.student = cut.student
        writer = Says(lambda asked: own(asked.split("|")[0])) if name == "whole" else Says(lambda _: "")
        perform(SelfDataDistill(SHORT, rank=4, writer=writer), given, out=tmp_path / name, quiet=True)
        facts = json.loads((tmp_path / name / "written" / "summary.json").read_text())
        likely = facts["log_probability_learned"] - facts["log_probability_of_the_data"]
        prompts = [torch.tensor([p]) for p in {p for p, _ in parted(texts.split)}]
        gaps = []
        with torch.no_grad():
            for prompt in prompts:
                text = torch.tensor([[b + 2 for b in own("".join(chr(i - 2) for i in prompt[0, 1:])).encode()]])
                ids = torch.cat([prompt, text], dim=1)
                ours, theirs = (m(ids).logits[0, prompt.shape[1] - 1 :].log_softmax(-1) for m in (given.student, judge))
                gaps.append((theirs.exp() * (theirs - ours)).sum(-1).mean())
        found[name] = float(torch.stack(gaps).mean()), likely, facts
    assert found["whole"][2]["taken"] > 0
    assert found["whole"][1] > 0.1
    assert found["data"][1] == pytest.approx(0.0, abs=1e-9)
    assert found["data"][2] == {**found["data"][2], "prompts": 60, "taken": 0, "refused": {"empty": 60}}
    assert found["whole"][0] < found["data"][0]


def test_what_cannot_be_is_said() -> None:
    for options, word in (
        ({"template": "{prompt}"}, "completion"),
        ({"shortest": 2.0, "longest": 1.0}, "shortest"),
        ({"answer": "("}, "cannot be read"),
        ({"answer": "abc"}, "group"),
        ({"rank": -1}, "rank"),
    ):
        with pytest.raises(ConfigError, match=word):
            SelfDataDistill(**options)
