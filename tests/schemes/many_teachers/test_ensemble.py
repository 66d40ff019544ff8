"""An ensemble of teachers: the mean is what the student hears, by name, by label or by entropy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.ensembling import confidence_weights, mixed_logits
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.engine import TrainConfig
from limbeck.engine.identity import describe_distiller
from limbeck.objectives import KD
from limbeck.objectives.response.kd import kd_loss
from limbeck.schemes import Cast, build
from limbeck.teachers.ensemble import Ensemble


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(5, 4).double()


NETS = {"a": net(1), "b": net(2), "c": net(3)}


def batch() -> Batch:
    inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Batch(inputs, torch.arange(12) % 4)


def distiller(loss=None, **options):
    teachers = {name: FrozenTeacher(copy.deepcopy(model)) for name, model in NETS.items()}
    cast = Cast(net(0), Terms.of(KD(1.0) if loss is None else loss), None, TrainConfig(), teachers=teachers)
    (training,) = build("ensemble", **options).trainings(cast)
    return training.stages[0].distiller.setup(batch())


def test_the_student_hears_the_weighted_mean():
    found = distiller(KD(4.0), weights={"a": 2, "c": 0}, temperature=4.0)
    x = batch().inputs
    p = 2 / 3 * (NETS["a"](x) / 4).softmax(1) + 1 / 3 * (NETS["b"](x) / 4).softmax(1)
    log_q = (net(0)(x) / 4).log_softmax(1)
    wanted = 16 * (p * (p.log() - log_q)).sum(1).mean()
    torch.testing.assert_close(found(batch()).total, wanted)
    assert len(found.teacher(batch()).members) == 3


def test_of_logits():
    x, found = batch().inputs, distiller(of="logits")
    mean = sum(m(x) for m in NETS.values()) / 3
    torch.testing.assert_close(found(batch()).total, kd_loss(net(0)(x), mean, temperature=1.0))


def test_by_confidence_labels_weigh_and_only_weigh():
    """Of equal teachers labels say nothing; else the gradient is that of each teacher's own loss, weighted."""
    found, x = distiller(by="confidence"), batch().inputs
    found(batch()).total.backward()
    logits = torch.stack([m(x).detach() for m in NETS.values()])
    weights, student = confidence_weights(logits, batch().labels), net(0)
    apart = [kd_loss(student(x), z, temperature=1.0, reduction="none") for z in logits]
    (weights * torch.stack(apart)).sum(0).mean().backward()
    torch.testing.assert_close(found.student.weight.grad, student.weight.grad)
    same = Ensemble([copy.deepcopy(NETS["a"]) for _ in range(3)], by="confidence")
    same.attach(("logits",), batch())
    torch.testing.assert_close(same(batch()).logits.softmax(1), NETS["a"](x).softmax(1))
    with pytest.raises(DataError, match="labels"):
        found(Batch(x))


def test_by_entropy_needs_no_labels():
    found = distiller(by="entropy")
    assert found(Batch(batch().inputs)).total.isfinite()


def test_taps_other_than_logits_are_the_first_teachers():
    teacher = Ensemble([copy.deepcopy(m) for m in NETS.values()])
    teacher.attach(("logits", "logits@in"), batch())
    said = teacher(batch())
    assert torch.equal(said["logits@in"], batch().inputs)
    mixed = mixed_logits(torch.stack([m.logits for m in said.members]), torch.full((3,), 1 / 3))
    torch.testing.assert_close(said.logits, mixed)


def test_how_they_are_mixed_is_part_of_the_run():
    described = [describe_distiller(distiller(**o)) for o in ({}, {"weights": {"a": 2}}, {"of": "logits"})]
    assert described[0] != described[1]
    assert described[0] != described[2]


def test_parts_of_a_step_add_up():
    found, data = distiller(by="confidence"), batch()
    totals = {"positions": torch.tensor(12.0)}
    parts = [Batch(data.inputs[r], data.labels[r], totals=totals) for r in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(sum(found(part).total for part in parts), found(data).total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "votes"}, "scheme.of"),
        ({"by": "entropy", "weights": {"a": 1}}, "are fixed"),
        ({"temperature": 0.0}, "above zero"),
        ({"weights": {"d": 1}}, "no such teacher.*a, b, c"),
        ({"weights": {"a": -1}}, "zero or more"),
        ({"weights": {"a": 0, "b": 0, "c": 0}}, "not all zero"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        distiller(**options)


def test_one_teacher_is_no_ensemble():
    cast = Cast(net(0), Terms.of(KD()), FrozenTeacher(net(1)), TrainConfig())
    with pytest.raises(ConfigError, match="an ensemble has 2 teachers or more"):
        list(build("ensemble").trainings(cast))
