"""A rare class with texts that were written for it: the loss, the draws, what is written and what it is good for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.analysis.rare import assess_rare
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import build_loader
from limbeck.data.balanced import BalancedLoader
from limbeck.data.language import ByteTokens
from limbeck.data.resident import ResidentLoader
from limbeck.engine import TrainConfig
from limbeck.functional import cross_entropy_loss, kd_loss
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, Offline, perform
from limbeck.schemes.language.authors import asked
from limbeck.schemes.language.harmaug import HarmAug
from limbeck.teachers.answers import Answer
from tests.schemes.spam import HAM, SPAM, Bag, spam
from tests.schemes.tiny import cast as texts_cast
from tests.schemes.tiny import llama


class Writer:
    """Writes one text after the other."""

    def __init__(self, said: Sequence[str]) -> None:
        self.said, self.asked = list(said), list[Any]()

    def generate(self, prompts: Sequence[Any], *, n: int = 1, **settings: Any) -> list[list[Answer]]:
        self.asked.append((list(prompts), n, settings))
        if len(prompts) > 1:
            return [[Answer(f"answer to {prompt}")] for prompt in prompts]
        return [[Answer(self.said[i % len(self.said)]) for i in range(n)]]

    def each(self, prompts: Sequence[Any], **settings: Any) -> Any:
        yield from enumerate(self.generate(prompts, **settings))

    def stop(self) -> None: ...


def knows(split: Any) -> FrozenTeacher:
    """A teacher that knows every word of the rare class."""
    model = Bag(split.tokenizer.size)
    words = split.tokenizer(SPAM)["input_ids"][:, 0]
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[2:, 0] = -0.4
        model.embedding.weight[words, 0] = 4.0
        model.linear.weight.zero_()
        model.linear.weight[1, 0], model.linear.bias[:] = 12.0, 0.0
    return FrozenTeacher(model)


def scene(source: Any = None, **changes: Any) -> Cast:
    # words that are not in the training texts would have no id: all are known here
    made = source or spam(known=8, rare=16, validation=0.0)
    split = made.train
    torch.manual_seed(3)
    student = Bag(split.tokenizer.size)
    config = TrainConfig(
        **{"epochs": 12, "optimizer": "adamw", "lr": 0.03, "device": "cpu", "compile": "off", **changes}
    )
    loader = build_loader(split, batch_size=16, train=True, seed=1)
    return Cast(
        student, Terms.of(0.5 * CrossEntropy() + 0.5 * KD(temperature=1.0)), knows(split), config, loader, seed=5
    )


def made(scheme: HarmAug, given: Cast) -> Any:
    (training,) = scheme.trainings(given)
    assert callable(training.train)
    return training.train()


def test_the_loss_is_half_of_each() -> None:
    z, t, y = torch.zeros(1, 2).double(), torch.tensor([[0.2, 0.8]]).double().log(), torch.tensor([1])
    ce, kl = cross_entropy_loss(z, y), kd_loss(z, t, temperature=1.0)
    assert float(ce) == pytest.approx(0.6931, abs=5e-5)
    assert float(kl) == pytest.approx(0.1927, abs=5e-5)
    assert float(0.5 * (ce + kl)) == pytest.approx(0.443, abs=5e-4)
    sure = torch.tensor([[-60.0, 60.0]]).double()
    assert float(0.5 * (cross_entropy_loss(sure, y) + kd_loss(sure, sure, temperature=1.0))) == pytest.approx(0.0)


def test_classes_are_drawn_alike_and_anew() -> None:
    labels = torch.tensor([0] * 450 + [2] * 50)
    loader = BalancedLoader(ResidentLoader(torch.arange(500.0).view(-1, 1), labels, batch_size=50))
    first, second = loader.order(0), loader.order(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, loader.order(0))
    drawn = labels[torch.cat([loader.order(epoch) for epoch in range(20)])]
    assert float((drawn == 2).double().mean()) == pytest.approx(0.5, abs=0.02)
    rare = torch.cat([loader.order(epoch) for epoch in range(20)])
    counts = rare[rare >= 450].bincount(minlength=500)[450:].double()
    assert float(counts.std() / counts.mean().sqrt()) == pytest.approx(1.0, abs=0.4)  # as a binomial has it
    with pytest.raises(DataError, match="classes"):
        BalancedLoader(ResidentLoader(torch.zeros(4, 2), batch_size=2))


def test_what_was_written_is_labelled_by_the_teacher(tmp_path: Path) -> None:
    writer = Writer([" Casino lunch ", "I have an idea for a message: loan train", "garden school", "", "Casino lunch"])
    given = replace(scene(), folder=tmp_path)
    loader = made(HarmAug(number=10, writer=writer), given)
    split, old = loader.split, given.train.split  # type: ignore[union-attr]
    assert len(split) == len(old) + 3
    assert torch.equal(split.labels[: len(old)], old.labels)
    assert split.labels[len(old) :].tolist() == [1, 1, 0]
    wanted = old.tokenizer(["casino lunch", "loan train", "garden school"])["input_ids"]
    assert torch.equal(split.inputs["input_ids"][len(old) :], wanted)
    ((prompts, number, settings),) = writer.asked
    assert number == 10
    assert prompts[0][1] == {"role": "assistant", "content": "I have an idea for a message:"}
    assert settings["extra"]["continue_final_message"] is True
    facts = json.loads((tmp_path / "written" / "summary.json").read_text())
    assert facts == {**facts, "drawn": 10, "empty": 2, "twice": 5, "added": 3}
    assert facts["classes"]["written"] == [1, 2]


def test_texts_are_answered() -> None:
    writer = Writer(["prize a", "loan b"])
    scheme = HarmAug(number=2, writer=writer, respond="say: {text}", pair="{text} {answer}", chat=False)
    split = made(scheme, scene()).split
    assert torch.equal(
        split.inputs["input_ids"][-2:],
        split.tokenizer(["prize a answer to say: prize a", "loan b answer to say: loan b"])["input_ids"],
    )
    assert writer.asked[0][0] == [f"{scheme.asks.ask}\n{scheme.asks.prefix}"]


def test_nothing_written_and_no_balance_is_plain_training() -> None:
    first = perform(HarmAug(writer=Writer([""]), balance=False), scene(epochs=2), quiet=True).student
    second = perform(Offline(), scene(epochs=2), quiet=True).student
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_written_texts_raise_the_precision_of_the_rare_class() -> None:
    """A student that saw two of eight words of the rare class, with and without texts that use all of them."""
    source = spam(known=8, rare=16, validation=0.0)  # so that all words have ids
    few = torch.cat([torch.arange(90), 90 + torch.tensor([0, 1, 8, 9])])
    found = []
    for said in ([""], [f"{word} {HAM[i]} {HAM[-i]}" for i in range(3) for word in SPAM]):
        given = scene(replace(source, train=source.train.subset(few)))
        student = perform(HarmAug(writer=Writer(said), number=24), given, quiet=True).student
        found.append(assess_rare(student, build_loader(source.test, batch_size=64, train=False))["average_precision"])
    assert found[1] > found[0] + 0.05


def test_an_answer_that_is_begun_is_gone_on_with() -> None:
    tokens = ByteTokens()
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh, "}]
    assert asked(tokens, chat) == (*asked(tokens, "Hi", chat=True), *(b + 2 for b in b"Oh, "))


def test_what_cannot_be_is_said() -> None:
    for options, word in (
        ({"number": 0}, "number"),
        ({"respond": "say"}, "respond"),
        ({"pair": "{text}"}, "pair"),
        ({"ask": " "}, "ask"),
        ({"writer": 3}, "writer"),
        ({"answer_tokens": 0}, "answer_tokens"),
    ):
        with pytest.raises(ConfigError, match=word):
            HarmAug(**options)
    with pytest.raises(ConfigError, match="players.generator"):
        made(HarmAug(), scene())
    with pytest.raises(ConfigError, match="tokenizer"):
        made(HarmAug(), replace(scene(), players={"generator": llama()}))
    with pytest.raises(DataError, match="no texts to add to"):
        made(HarmAug(writer=Writer([""])), texts_cast(CrossEntropy()))
