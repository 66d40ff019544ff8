"""PS-KD: shares by epoch, both pasts, and what cannot be kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import DataInfo, Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.engine import TrainConfig
from limbeck.objectives import KD, CrossEntropy, FitNets
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.parts.sides import TeacherShare


def cast(loss=None, teacher=None, student=None, **train):
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    data = as_loader((x, (x[:, 0] > 0).long()), batch_size=16, train=True)
    loss = CrossEntropy() + KD(1.0) if loss is None else loss
    student = nn.Linear(4, 2) if student is None else student
    return Cast(student, loss, teacher, TrainConfig(lr=0.3, **(train or {"epochs": 3})), data, data)


def test_predictions_gain_epoch_by_epoch():
    share = TeacherShare(0.8, epochs=300)
    steps = torch.arange(300 * 7, dtype=torch.float32)
    found = torch.stack([share(step / (300 * 7)) for step in steps])
    epoch = steps.long() // 7
    wanted = torch.where(epoch > 0, 0.8 * (epoch + 1) / 300, torch.zeros(()))
    torch.testing.assert_close(found, wanted)
    left = torch.stack([TeacherShare(0.8, epochs=300, left=True)(step / (300 * 7)) for step in steps])
    torch.testing.assert_close(found + left, torch.ones_like(found))


@pytest.mark.parametrize("past", ["predictions", "model"])
def test_a_training_takes_what_was_said_in_the_epoch_before(past):
    given = cast(steps=7)  # 2 steps an epoch: three and a half
    (training,) = build("ps_kd", past=past).trainings(given)
    distiller = training.stages[0].distiller
    seen, made = [], type(distiller).forward

    def watched(batch, turn="student"):
        teacher = distiller.traces(distiller.prepare(batch))[1].logits.softmax(1)
        seen.append((batch, teacher, {n: p.detach().clone() for n, p in distiller.student.state_dict().items()}))
        return made(distiller, batch, turn)

    distiller.forward = watched
    perform(type("Known", (), {"trainings": lambda *_: iter([training])})(), given, quiet=True)
    seen = seen[-7:]
    for number, (batch, teacher, _) in enumerate(seen[2:], start=2):
        first = number - number % 2
        if past == "model":
            weights = seen[first][2]
            wanted = torch.func.functional_call(distiller.student, weights, (batch.inputs,)).softmax(1)
            torch.testing.assert_close(teacher, wanted)
            continue
        for row, index in enumerate(batch.index.tolist()):
            before = [(b, w) for b, _, w in seen[:first] if index in b.index.tolist()]
            if not before:  # left out of the epoch before by drop_last
                torch.testing.assert_close(teacher[row], nn.functional.one_hot(batch.labels[row], 2).float())
                continue
            said = torch.func.functional_call(distiller.student, before[-1][1], (batch.inputs[row : row + 1],))
            torch.testing.assert_close(teacher[row], said.softmax(1)[0])


def test_the_first_epoch_is_labels_alone():
    given = cast()
    (training,) = build("ps_kd").trainings(given)
    distiller = training.stages[0].distiller
    batch = given.train.example(8)
    distiller.setup(batch, DataInfo(40))
    losses = distiller(batch.replace(progress=0.3))
    torch.testing.assert_close(losses.total, losses.terms["cross_entropy"])
    distiller.eval()  # held-out samples have no past: their index is none of the set's
    held = Batch(batch.inputs, batch.labels, torch.full_like(batch.index, 10**6), progress=0.9)
    torch.testing.assert_close(distiller(held).terms["kd"], losses.terms["cross_entropy"])


def test_parts_of_a_step_make_the_whole():
    given = cast()
    (training,) = build("ps_kd").trainings(given)
    distiller = training.stages[0].distiller
    batch = given.train.example(8)
    distiller.setup(batch, DataInfo(40))
    distiller(batch)
    kept = distiller.bank.clone()
    whole = torch.autograd.grad(distiller(batch.replace(progress=0.8)).total, distiller.student.weight)[0]
    distiller.bank.copy_(kept)
    total, totals = torch.zeros_like(whole), {"labels": 8, "positions": 8}
    for rows in (slice(0, 3), slice(3, 8)):
        part = Batch(batch.inputs[rows], batch.labels[rows], batch.index[rows], progress=0.8, totals=totals)
        total += torch.autograd.grad(distiller(part).total, distiller.student.weight)[0]
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": FrozenTeacher(nn.Linear(4, 2))}, "is the teacher; found|teacher: what the student said"),
        ({"loss": Terms.of(CrossEntropy())}, "no term of the loss learns from a teacher"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(ConfigError, match=message):
        list(build("ps_kd").trainings(cast(**given)))


def test_features_are_not_kept():
    student = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    given = cast(CrossEntropy() + FitNets("0"), student=student)
    with pytest.raises(ConfigError, match="past predictions alone"):
        perform(build("ps_kd"), given, quiet=True)
    assert perform(build("ps_kd", past="model"), given, quiet=True).steps == 6


def test_data_that_cannot_be_counted():
    (training,) = build("ps_kd").trainings(cast())
    with pytest.raises(DataError, match="their number is not known"):
        training.stages[0].distiller.setup(Batch(torch.ones(2, 4), torch.tensor([0, 1]), torch.arange(2)))
    with pytest.raises(ConfigError, match="past"):
        build("ps_kd", past="labels")
