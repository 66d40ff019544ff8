"""Domains shown by how far the student lags behind its teacher in each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.language import LanguageLoader
from limbeck.data.language.domains import DomainLoader
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, perform
from limbeck.schemes.language.ddk import DDK, DomainDistiller, weighed
from limbeck.teachers import several
from tests.schemes.tiny import cast, llama, tagged, weights


def scene(**changes: Any) -> Cast:
    source = tagged()
    validation = LanguageLoader(source.validation, batch_size=7, shuffle=False, drop_last=False)
    return cast(CrossEntropy() + 0.2 * KD(temperature=1.0), data=source.train, **{"validation": validation, **changes})


def parts(given: Cast, **options: Any) -> tuple[DomainDistiller, DomainLoader]:
    (training,) = DDK(**options).trainings(given)
    distiller, loader = training.stages[0].distiller, training.train
    assert isinstance(distiller, DomainDistiller)
    assert isinstance(loader, DomainLoader)
    return distiller, loader


def test_the_papers_numbers() -> None:
    ratios = torch.tensor([2.0, 1.0])
    first = weighed(ratios)
    torch.testing.assert_close(first, torch.tensor([0.7311, 0.2689]), atol=5e-5, rtol=0)
    torch.testing.assert_close(weighed(ratios, first), torch.tensor([0.6904, 0.3096]), atol=5e-5, rtol=0)


def test_shares_sum_to_one_and_have_a_floor() -> None:
    shares = weighed(torch.tensor([50.0, 3.0, 1.0, 1.0]).double())
    for alpha in (0.0, 0.3, 0.5, 1.0):
        found = shares
        for _ in range(5):
            ratios = (1 + 20 * torch.rand(4)).double()
            psi = [r * math.exp(x) for r, x in zip(found.tolist(), ratios.tolist(), strict=True)]
            wanted = [alpha * p / sum(psi) + (1 - alpha) / 4 for p in psi]
            found = weighed(ratios, found, alpha)
            torch.testing.assert_close(found, torch.tensor(wanted).double())
            assert found.sum().item() == pytest.approx(1)
            assert float(found.min()) >= (1 - alpha) / 4 - 1e-12
    assert weighed(torch.ones(4), torch.full((4,), 0.25)).tolist() == [0.25] * 4  # equal models
    huge = weighed(torch.tensor([1e4, 1.0]))
    assert huge.tolist() == [1.0, 0.0]


def test_perplexities_are_those_of_each_domain() -> None:
    given = scene()
    distiller, _ = parts(given, texts=4)
    found = distiller.perplexities(given.student, None)
    held = given.validation
    assert isinstance(held, LanguageLoader)
    for number, name in enumerate(given.train.tags):  # type: ignore[union-attr]
        rows = (held.rows.tag == held.tags.index(name)).nonzero().flatten()[:4]  # type: ignore[union-attr]
        total, count = 0.0, 0
        for row in rows:
            batch = held.rows.batch(row.view(1))
            logits = given.student(input_ids=batch.inputs["input_ids"]).logits
            mask = batch.require("mask")
            total += F.cross_entropy(logits[mask], batch.require("labels")[mask], reduction="sum").item()
            count += int(mask.sum())
        assert float(found[number]) == pytest.approx(math.exp(total / count), rel=1e-6)


def test_an_interval_is_weighed_once() -> None:
    given = scene()
    distiller, loader = parts(given, interval=3)
    assert distiller.shares(0) is None  # the first shows domains by their size
    first = distiller.weights.clone()
    own, other = (distiller.perplexities(m, None) for m in (given.student, given.teacher.model))  # type: ignore[union-attr]
    torch.testing.assert_close(first, (own / other).softmax(0))
    with torch.no_grad():
        given.student.lm_head.weight *= 0.5
    assert distiller.shares(0) is None
    assert torch.equal(distiller.weights, first)
    ratios = distiller.perplexities(given.student, None) / other
    torch.testing.assert_close(distiller.shares(1), weighed(ratios, first))
    again = loader.rows.tag[loader.order(1)].bincount(minlength=2).double() / loader.shown  # type: ignore[index]
    torch.testing.assert_close(again, distiller.weights, atol=1 / loader.shown, rtol=0)
    assert loader.steps_per_epoch == 3


def test_a_student_that_is_its_teacher_sees_all_alike() -> None:
    given = scene(teacher=FrozenTeacher(llama(seed=1, sharp=6.0).double()))
    distiller, _ = parts(given)
    distiller.shares(0)
    torch.testing.assert_close(distiller.weights, torch.tensor([0.5, 0.5]).double())


@pytest.mark.slow
def test_where_the_student_lags_it_sees_more_and_catches_up() -> None:
    """A teacher that knows numbers, and words hardly: shares go to numbers, and there the gap closes further than with
    equal shares."""
    gaps = {}
    for alpha in (1.0, 0.0):
        source = tagged()
        given = scene(config={"lr": 0.5}, steps=24, batch_size=8)
        model = llama(width=24, seed=2).double()
        taught = cast(CrossEntropy(), data=source.train, steps=150, batch_size=8, config={"lr": 0.5})
        taught.student = model
        numbers = (source.train.rows.tag == source.train.tags.index("numbers")).nonzero().flatten()
        taught.train = LanguageLoader(source.train.subset(numbers), batch_size=8, seed=0)
        from limbeck.schemes import Offline

        perform(Offline(), taught, quiet=True)
        given.teacher = FrozenTeacher(model)
        (training,) = DDK(interval=8, alpha=alpha, texts=100).trainings(given)
        distiller = training.stages[0].distiller
        assert isinstance(distiller, DomainDistiller)
        fitted = perform(DDK(interval=8, alpha=alpha, texts=100), given, quiet=True)
        after = distiller.perplexities(fitted.student, None)
        gaps[alpha] = after[source.train.tags.index("numbers")].item()
    assert gaps[1.0] < gaps[0.0]


def test_the_run_has_as_many_steps_as_it_would_have() -> None:
    given = scene(steps=5)
    fitted = perform(DDK(interval=2), given, quiet=True)
    assert fitted.steps == 5
    assert not torch.equal(weights(fitted.student), weights(scene().student))


def test_what_it_refuses() -> None:
    with pytest.raises(DataError, match="no validation data"):
        perform(DDK(), scene(validation=None), quiet=True)
    with pytest.raises(DataError, match="domains are those of texts"):
        parts(scene(train=None))
    models = several.SeveralTeachers([llama(seed=2).double()])
    with pytest.raises(ConfigError, match="model at hand"):
        parts(scene(teacher=models))
    with pytest.raises(ConfigError, match="alpha"):
        DDK(alpha=1.5)
