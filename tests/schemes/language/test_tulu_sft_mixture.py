"""Instruction tuning on a mixture: shares, what is learned, and what is told of each set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import ConfigError, DataError
from limbeck.data.language import LanguageLoader
from limbeck.data.language.mixture import mixture_source
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, TuluSFTMixture, perform
from tests.schemes.tiny import cast, tagged, weights

WORDS = [{"prompt": f"say {i}", "completion": f" {'a' * (1 + i % 5)}"} for i in range(24)]
NUMBERS = [{"prompt": f"count {i}", "completion": f" {i}"} for i in range(8)]


def source(by: tuple[str, str] = ("human", "gpt-4"), **options: Any) -> Any:
    sets = {"words": {"source": WORDS, "by": by[0]}, "numbers": {"source": NUMBERS, "by": by[1]}}
    return mixture_source(sets, tokenizer="bytes", template="plain", **options)


def scene(made: Any, **changes: Any) -> Cast:
    held = made.validation
    validation = None if held is None else LanguageLoader(held, batch_size=4, shuffle=False, drop_last=False)
    return cast(CrossEntropy(), data=made.train, teacher=None, validation=validation, **changes)


def test_shares_are_kept() -> None:
    given = cast(CrossEntropy(), data=tagged(validation=0).train, teacher=None)
    (training,) = TuluSFTMixture(shares={"words": 0.23, "numbers": 0.77}).trainings(given)
    assert isinstance(training.train, LanguageLoader)
    tag: Any = training.train.rows.tag
    tags = torch.cat([tag[training.train.order(epoch)] for epoch in range(140)])
    assert len(tags) == 140 * 72
    assert float((tags == training.train.tags.index("words")).double().mean()) == pytest.approx(0.23, abs=0.01)


def test_answers_alone_are_learned() -> None:
    given = scene(source(validation=0))
    (training,) = TuluSFTMixture().trainings(given)
    assert training.train is given.train
    distiller, batch = training.stages[0].distiller, given.train.example(6)
    distiller.setup(batch)
    kept = list[Any]()
    distiller.student.register_forward_hook(lambda *told: kept.append(told[2].logits))
    found = distiller(batch)
    logits = kept[-1]
    logits.retain_grad()
    ids, width = batch.inputs["input_ids"], batch.inputs["input_ids"].shape[1]
    total, count = torch.zeros((), dtype=torch.double), 0
    for row in range(6):
        text = given.train.split.tokens.decode(ids[row].tolist())
        length = int(batch.inputs["attention_mask"][row].sum())
        answer = len(text.split("assistant: ")[1].encode()) + 1
        for place in range(length - answer, length):
            total -= logits.detach()[row, place - 1].log_softmax(0)[ids[row, place]]
            count += 1
    assert count < 6 * width
    assert float(found.total.detach()) == pytest.approx(float(total / count), rel=1e-12)
    found.total.backward()
    assert bool((logits.grad.abs().sum(-1) > 0).eq(batch.mask).all())


def test_who_wrote_a_text_changes_nothing() -> None:
    found = [scene(source(by, validation=0)) for by in (("human", "gpt-4"), ("self", "human"))]
    first, second = (perform(TuluSFTMixture(), given, quiet=True).student for given in found)
    assert torch.equal(weights(first), weights(second))


def test_every_set_is_told_of(tmp_path: Path) -> None:
    given = scene(source(validation=0.25), config={"lr": 1.0}, steps=6)
    perform(
        TuluSFTMixture(shares={"words": 1, "numbers": 1}, by={"numbers": "claude"}), given, out=tmp_path, quiet=True
    )
    facts = json.loads((tmp_path / "mixture.json").read_text())
    words, numbers = facts["sets"]["words"], facts["sets"]["numbers"]
    assert words["rows"] + numbers["rows"] == sum(a["rows"] for a in facts["authors"].values()) == 24
    assert words["share"] == numbers["share"] == 0.5
    assert set(facts["authors"]) == {"human", "claude"}
    split: Any = given.train.split  # type: ignore[union-attr]
    learned = int(split.rows.batch(torch.arange(24)).mask.sum())
    assert words["tokens"] + numbers["tokens"] == learned
    assert words["length"] == pytest.approx(words["tokens"] / words["rows"])
    assert words["loss_after"] < words["loss_before"]
    held: Any = given.validation
    batch = held.example(8)
    own = batch.extras["tag"] == split.tags.index("words")
    labels, mask = batch.labels[own], batch.mask[own]
    with torch.no_grad():
        logits = given.student(**batch.inputs).logits[own]
    assert words["loss_after"] == pytest.approx(float(F.cross_entropy(logits[mask], labels[mask])), rel=1e-9)
    assert math.isfinite(numbers["loss_before"])


def test_what_cannot_be_is_said() -> None:
    for options, word in (
        ({"shares": {"a": -1.0}}, "shares.a"),
        ({"shares": {"a": 0.0}}, "no set is shown"),
        ({"texts": -1}, "texts"),
    ):
        with pytest.raises(ConfigError, match=word):
            TuluSFTMixture(**options)
    with pytest.raises(DataError, match="tags"):
        next(TuluSFTMixture().trainings(cast(CrossEntropy(), teacher=None)))
    with pytest.raises(ConfigError, match="no such set"):
        next(TuluSFTMixture(shares={"word": 1.0}).trainings(scene(source(validation=0))))
