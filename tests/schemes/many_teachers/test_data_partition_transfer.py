"""Transfer by data partitioning: what stays put, what is plain distillation, and what a weaker teacher does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.build import as_loader
from limbeck.engine import TrainConfig
from limbeck.objectives import KD, CrossEntropy, FitNets
from limbeck.schemes import Cast, build, perform


def linear(seed: int, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    model.weight.data.mul_(scale)
    return model


def batch() -> Batch:
    return Batch(torch.randn(12, 4, generator=torch.Generator().manual_seed(2)), torch.arange(12) % 3)


def cast(teacher: nn.Module | None, **more: object) -> Cast:
    given = batch()
    settings = {"loss": Terms.of(KD(1.0)), "config": TrainConfig(steps=3, lr=0.1, weight_decay=0.0)}
    train = as_loader((given.inputs, given.labels), batch_size=4)
    held = None if teacher is None else FrozenTeacher(teacher)
    return Cast(**{"student": linear(0), "teacher": held, "train": train, **settings, **more})


def test_only_samples_that_the_teacher_knows_better_pull_at_the_student():
    given, data = cast(linear(1)), batch()
    (training,) = build("data_partition_transfer").trainings(given)
    distiller = training.stages[0].distiller.setup(data)
    student, teacher = (m(data.inputs).log_softmax(1) for m in (given.student, given.teacher.model))
    rows = torch.arange(12)
    better = teacher[rows, data.labels] > student[rows, data.labels]
    assert 0 < better.sum() < 12
    wanted = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)[better].sum() / 12
    found = distiller(data).total
    torch.testing.assert_close(found, wanted)
    own = torch.autograd.grad(found, given.student.weight)[0]
    torch.testing.assert_close(own, torch.autograd.grad(wanted, given.student.weight)[0])
    kept = Batch(data.inputs[~better], data.labels[~better])
    still = distiller(kept).total
    assert still.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(still, given.student.weight)[0].abs().max() < 1e-6


def test_a_teacher_that_is_the_student_moves_nothing_and_one_that_is_always_surer_is_plain_distillation():
    given = cast(linear(0))
    perform(build("data_partition_transfer"), given, quiet=True)
    torch.testing.assert_close(given.student.weight, linear(0).weight, rtol=0, atol=1e-6)
    sure = linear(0, 60.0)
    first, second = (cast(sure, student=linear(5, 0.0)) for _ in range(2))
    for made in (first, second):
        made.student.bias.data.zero_()
    perform(build("data_partition_transfer", supervised=False), first, quiet=True)
    perform(build("offline"), second, quiet=True)
    torch.testing.assert_close(first.student.weight, second.student.weight)


def test_without_supervision_no_label_is_needed():
    given = cast(linear(1))
    given.train = as_loader((batch().inputs, torch.full((12,), -1)), batch_size=4)
    (training,) = build("data_partition_transfer", supervised=False).trainings(given)
    distiller = training.stages[0].distiller.setup(batch())
    with_labels, without = distiller(batch()).total, distiller(batch().replace(labels=None)).total
    assert torch.equal(with_labels, without)
    assert distiller.made(batch()).labels is None
    perform(build("data_partition_transfer", supervised=False), given, quiet=True)
    assert not torch.equal(given.student.weight, linear(0).weight)


def test_a_weaker_teacher_does_no_harm():
    """One that is right on one class alone: plain distillation forgets the others, this does not."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(90) % 3
    inputs = 0.6 * torch.randn(90, 4, generator=generator) + 2 * F.one_hot(labels, 4).float()
    train = as_loader((inputs, labels), batch_size=30)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    with torch.no_grad():
        for model in (student, teacher):
            model.bias.zero_()
            model.weight.copy_(torch.eye(3, 4))
        student.weight[2] = 0.0  # it knows nothing of the third class
        teacher.weight[:2] = 0.0  # which is all that the teacher knows
    config = TrainConfig(steps=60, lr=0.5, weight_decay=0.0)

    def accuracy(model: nn.Module) -> torch.Tensor:
        right = model(inputs).argmax(1) == labels
        return torch.stack([right[labels == c].float().mean() for c in range(3)])

    first, second = (cast(teacher, student=copy.deepcopy(student), train=train, config=config) for _ in range(2))
    perform(build("data_partition_transfer"), first, quiet=True)
    perform(build("offline"), second, quiet=True)
    before, ours, plain = (accuracy(m) for m in (student, first.student, second.student))
    assert ours.mean() > before.mean() > plain.mean()
    assert ours[2] > before[2]


def test_teachers_one_by_one_each_begin_with_the_student_as_it_is_then():
    teachers = {name: FrozenTeacher(linear(seed)) for name, seed in (("a", 1), ("b", 2))}
    given = cast(None, teachers=teachers)
    seen = []
    for training in build("data_partition_transfer", one_by_one=True, pretrain=0.5).trainings(given):
        seen.append(training.name)
        if training.name != "before":
            copied = training.stages[0].distiller.teacher.members[0].model
            assert torch.equal(copied.weight, given.student.weight)
        given.student.weight.data.add_(1.0)
    assert seen == ["before", "transfer-1", ""]
    (training,) = build("data_partition_transfer").trainings(given)
    assert len(training.stages[0].distiller.teacher.members) == 3


@pytest.mark.parametrize("loss", [Terms.of(CrossEntropy()), KD() + FitNets("0")])
def test_mistakes_are_told(loss):
    with pytest.raises(ConfigError, match="chosen by its logits"):
        list(build("data_partition_transfer").trainings(cast(linear(1), loss=loss)))
    with pytest.raises(ConfigError, match="transferred from"):
        list(build("data_partition_transfer").trainings(cast(None)))
