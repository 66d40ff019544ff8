"""Several teachers as one: everybody is asked, nobody learns."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.teacher import Teacher
from limbeck.engine.identity import describe_distiller
from limbeck.objectives import KD, DeltaKD
from limbeck.teachers.several import SeveralTeachers


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))


def test_every_one_answers_and_the_first_speaks_for_all() -> None:
    nets, batch = [net() for _ in range(3)], Batch(torch.randn(6, 4))
    teacher = SeveralTeachers(nets)
    assert isinstance(teacher, Teacher)
    teacher.attach(("logits", "penultimate"), batch)
    said = teacher(batch)
    for member, model in zip(said.members, nets, strict=True):
        assert not model.training
        torch.testing.assert_close(member.logits, model(batch.inputs).detach())
        assert not member["penultimate"].requires_grad
    assert said.logits is said.members[0].logits
    assert said["penultimate"] is said.members[0]["penultimate"]
    assert len(said.detach().members) == 3


def test_an_objective_that_knows_one_teacher_listens_to_the_first() -> None:
    student, nets, batch = net(), [net(), net()], Batch(torch.randn(6, 4))
    found = Distiller(student.eval(), KD(), SeveralTeachers(nets)).setup(batch)(batch).total
    torch.testing.assert_close(found, Distiller(student, KD(), nets[0]).setup(batch)(batch).total)


def test_a_teacher_that_is_the_student_itself_is_refused() -> None:
    student = net()
    with pytest.raises(ModelError, match="share modules"):
        Distiller(student, DeltaKD(), SeveralTeachers([net(), net(), student]))
    Distiller(student, DeltaKD(), SeveralTeachers([net(), net(), copy.deepcopy(student)]))


def test_a_run_is_told_from_one_with_another_member() -> None:
    student, first, second = net(), net(), net()
    told = [
        describe_distiller(Distiller(student, KD(), SeveralTeachers(members)))["teacher"]
        for members in ([first, second], [first, copy.deepcopy(second)], [second, first])
    ]
    assert told[0] == told[1] != told[2]


def test_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="members"):
        SeveralTeachers([])
