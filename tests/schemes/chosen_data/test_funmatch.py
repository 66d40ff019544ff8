"""Function matching: one tensor for both models, no labels, the released loss; and what its controls see instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.data.sources.load import load_source
from limbeck.engine import TrainConfig, fit
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, build
from limbeck.teachers.several import SeveralTeachers


class Watched(nn.Module):
    """A model that remembers what it was given."""

    def __init__(self, seed: int = 0, classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, classes))
        self.given: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given.append(x)
        return self.body(x)


def digits(**more):
    return as_loader(load_source("digits").train, batch_size=16, train=True, seed=3, **more)


def training(loss=None, teacher=None, data=None, config=None, **options):
    teacher = FrozenTeacher(Watched(1)) if teacher is None else teacher
    cast = Cast(Watched(), Terms.of(KD(1.0) if loss is None else loss), teacher, config or TrainConfig(steps=2))
    cast.train = digits() if data is None else data
    (found,) = build("funmatch", **options).trainings(cast)
    return found, cast


def one_step(**options):
    """What both models were given in a step's forward, and the sum of losses."""
    found, cast = training(**options)
    distiller = found.stages[0].distiller.setup(found.train.example(4)).eval()
    (batch,) = next(found.train.epoch(0))
    member = getattr(cast.teacher, "model", None)
    cast.student.given.clear()
    if member is not None:
        member.given.clear()
    total = distiller(distiller.made(batch)).total
    return cast.student.given, None if member is None else member.given, batch, total, found


@pytest.mark.parametrize("views", ["function_matching", "consistent"])
def test_both_see_the_very_same_tensor(views):
    student, teacher, batch, _, found = one_step(views=views)
    assert student[0] is teacher[0]
    assert batch.labels.ndim == (2 if views == "function_matching" else 1)  # mixed labels; nobody reads them
    names = [t.name for t in found.train.augment.transforms]
    assert names == ["area_crop", "mixup"][: 2 if views == "function_matching" else 1]


def test_controls_see_another_crop_or_the_image_as_it_is():
    plain = digits().bare()
    for views in ("independent", "fixed"):
        student, teacher, batch, _, _ = one_step(views=views)
        assert not torch.equal(student[0], teacher[0])
        whole = next(plain.read([[(batch.index, 0)]])).inputs
        assert torch.equal(teacher[0], whole) == (views == "fixed")
        again, other, *_ = one_step(views=views)
        assert torch.equal(again[0], student[0])
        assert torch.equal(other[0], teacher[0])


def test_the_value_is_the_released_one_and_labels_change_nothing():
    student, _, batch, total, found = one_step(loss=KD(2.0))
    logits = [model.body(student[0]).detach().double() for model in (Watched(0), Watched(1))]
    q, p = ((z / 2).softmax(1) for z in logits)
    wanted = 4 * (p * (p.log() - q.log())).sum(1).mean()  # t**2 times the divergence, as in their dist(kind="kl")
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    distiller = found.stages[0].distiller
    shuffled = batch.replace(labels=batch.labels.flip(0))
    assert torch.equal(distiller(distiller.made(shuffled)).total, total)


def test_nothing_is_left_to_learn_where_the_student_is_the_teacher():
    found, cast = training(teacher=FrozenTeacher(Watched(0)))
    distiller = found.stages[0].distiller.setup(found.train.example(4))
    (batch,) = next(found.train.epoch(0))
    losses = distiller(distiller.made(batch))
    losses.total.backward()
    assert losses.total.item() == pytest.approx(0, abs=1e-7)
    assert max(p.grad.abs().max() for p in cast.student.parameters()) < 1e-7


def test_of_several_teachers_the_sum():
    alone = [one_step(teacher=FrozenTeacher(Watched(n)))[3] for n in (1, 2)]
    both = one_step(teacher=SeveralTeachers([Watched(1), Watched(2)]))[3]
    torch.testing.assert_close(both, sum(alone))


def test_length_and_settings():
    config = TrainConfig(epochs=3, lr=0.01, weight_decay=1e-4)
    found = training(config=config, longer=4, settings="paper")[0].stages[0].config
    assert (found.epochs, found.optimizer, found.clip, found.lr) == (12, "adamw", 1.0, 0.01)
    assert training(config=config)[0].stages[0].config == config


def test_what_is_refused():
    with pytest.raises(ConfigError, match="teacher alone"):
        training(loss=CrossEntropy() + KD())
    with pytest.raises(ConfigError, match="single images"):
        training(data=digits(augment=["mixup"]), views="consistent")
    vectors = as_loader((torch.randn(32, 64), torch.arange(32) % 10), batch_size=8, train=True)
    with pytest.raises(DataError, match="only images"):
        training(data=vectors)
    assert training(data=vectors, views="consistent", area=None)[0].train is vectors


def test_a_recipe_that_mixes_already_keeps_its_way():
    found, _ = training(data=digits(augment=[{"mixup": {"alpha": 0.3}}]), area=None)
    assert [t.alpha for t in found.train.augment.transforms] == [0.3]


@pytest.mark.slow
def test_it_comes_closer_to_the_teacher_than_one_that_sees_the_fixed_image():
    teacher = Watched(1)
    data = as_loader(load_source("digits").train, batch_size=64, train=True, seed=3)
    from limbeck.core.distiller import Distiller
    from limbeck.engine.stage import Stage

    config = TrainConfig(epochs=8, lr=0.1, device="cpu", compile="off")
    fit([Stage("labels", Distiller(teacher, CrossEntropy()), config)], data, quiet=True)
    test = as_loader(load_source("digits").test, batch_size=600)
    shown, scores = next(iter(test.batches())), {}
    for views in ("function_matching", "fixed"):
        found, cast = training(
            teacher=FrozenTeacher(teacher), data=data, config=config, views=views, area=(0.4, 1.0), longer=2
        )
        fit(found.stages, found.train, quiet=True)
        with torch.no_grad():
            p, q = (model.eval()(shown.inputs).log_softmax(1) for model in (teacher, cast.student))
        scores[views] = (p.exp() * (p - q)).sum(1).mean().item()
    assert scores["function_matching"] < scores["fixed"]
