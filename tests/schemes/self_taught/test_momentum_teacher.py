"""The momentum teacher: the average over several steps, the mix of sides, and a step in parts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.engine import TrainConfig
from limbeck.objectives import KD, CrossEntropy, ProbabilityMSE
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.scheme import Scheme


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def cast(loss=None, teacher=None, accumulate=1):
    torch.manual_seed(0)
    x = torch.randn(48, 4)
    data = as_loader((x, (x[:, 0] > 0).long() + (x[:, 1] > 0)), batch_size=16, train=True)
    loss = CrossEntropy() + KD(1.0) if loss is None else loss
    return Cast(net(), loss, teacher, TrainConfig(epochs=3, lr=0.3, accumulate=accumulate), data)


class Given(Scheme):
    def __init__(self, training):
        self.training = training

    def trainings(self, cast):
        yield self.training


@pytest.mark.parametrize(("accumulate", "end"), [(1, None), (2, 1.0)])
def test_the_average_follows_once_a_step(accumulate, end):
    given = cast(accumulate=accumulate)
    (training,) = build("momentum_teacher", decay=0.9, end=end).trainings(given)
    distiller = training.stages[0].distiller
    weights, averages, forward = [], [], type(distiller).forward

    def watched(batch, turn="student"):
        if torch.is_tensor(batch.progress) and (not weights or float(batch.progress) > weights[-1][0]):
            weights.append((float(batch.progress), copy.deepcopy(distiller.student.state_dict())))
            averages.append(copy.deepcopy(distiller.average.state_dict()))
        return forward(distiller, batch, turn)

    distiller.forward = watched
    perform(Given(training), given, quiet=True)
    assert len(weights) == 9
    wanted = weights[0][1]
    for number in range(1, 9):
        progress = torch.tensor(weights[number - 1][0])
        decay = 0.9 if end is None else float(1 + (0.9 - 1) * 0.5 * (1 + torch.cos(torch.pi * progress)))
        for name, live in weights[number][1].items():
            mixed = decay * wanted[name] + (1 - decay) * live if live.is_floating_point() else live
            torch.testing.assert_close(averages[number][name], mixed)
        wanted = averages[number]
    if accumulate == 1:  # the counter of what was normalised
        assert int(averages[-1]["1.num_batches_tracked"]) == 8


def test_the_mix_is_that_of_soft_targets():
    """ALBEF's (1 - a) CE(y) + a CE(average) is cross-entropy with the mixed target."""
    given = cast()
    (training,) = build("momentum_teacher", ramp=0.5).trainings(given)
    distiller = training.stages[0].distiller
    batch = given.train.example(8)
    distiller.setup(batch)
    with torch.no_grad():
        for p in distiller.average.parameters():
            p.add_(0.3)
    for progress, share in ((0.0, 0.0), (0.25, 0.2), (0.5, 0.4), (1.0, 0.4)):
        distiller.student.eval()
        losses = distiller(batch.replace(progress=progress))
        log_p = distiller.student(batch.inputs).log_softmax(1)
        q = distiller.average(batch.inputs).softmax(1)
        target = (1 - share) * nn.functional.one_hot(batch.labels, 3) + share * q
        wanted = -(target * log_p).sum(1).mean() + share * (q * q.log()).sum(1).mean()
        torch.testing.assert_close(losses.total, wanted)
    gradients = torch.autograd.grad(losses.total, list(distiller.student.parameters()), retain_graph=True)
    own = torch.autograd.grad(-(target * log_p).sum(1).mean(), list(distiller.student.parameters()))
    torch.testing.assert_close(gradients, own)
    assert not any(p.requires_grad for p in distiller.average.parameters())


def test_a_mean_teacher_has_the_losss_own_weights():
    (training,) = build("momentum_teacher", mix=None).trainings(cast(CrossEntropy() + 100.0 * ProbabilityMSE()))
    weights = training.stages[0].distiller.loss.weights
    assert [float(weight(0.5)) for weight in weights] == [1.0, 100.0]


def test_the_ramp_is_the_first_epoch():
    (training,) = build("momentum_teacher").trainings(cast())
    weight = training.stages[0].distiller.loss.weights[1]
    assert float(weight(1 / 6)) == pytest.approx(0.2)
    assert float(weight(1 / 3)) == pytest.approx(0.4)


def test_averages_of_one_model_share_nothing_with_it():
    given = cast()
    (training,) = build("momentum_teacher").trainings(given)
    distiller = training.stages[0].distiller
    fitted = perform(Given(training), given, quiet=True)
    assert fitted.student is given.student
    assert not {p.data_ptr() for p in distiller.average.parameters()} & {
        p.data_ptr() for p in given.student.parameters()
    }
    assert not any(m._forward_hooks for m in given.student.modules())
    assert type(given.student(torch.zeros(2, 4))) is torch.Tensor


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"teacher": FrozenTeacher(nn.Linear(4, 3))}, {}, "own average is the teacher"),
        ({"loss": Terms.of(CrossEntropy())}, {}, "no term of the loss learns from a teacher"),
        ({"loss": Terms.of(CrossEntropy())}, {"mix": None}, "asks the teacher"),
    ],
)
def test_mistakes(given, options, message):
    with pytest.raises(ConfigError, match=message):
        list(build("momentum_teacher", **options).trainings(cast(**given)))
    with pytest.raises(ConfigError, match="decay"):
        build("momentum_teacher", decay=1.5)


def test_a_loop_of_ones_own_tells_progress():
    given = cast()
    (training,) = build("momentum_teacher", decay=0.5).trainings(given)
    distiller = training.stages[0].distiller
    start = copy.deepcopy(distiller.average.state_dict())
    with torch.no_grad():
        given.student[0].weight.add_(1.0)
    distiller.made(Batch(torch.zeros(2, 4), progress=0.1))
    torch.testing.assert_close(distiller.average.state_dict()["0.weight"], start["0.weight"] + 0.5)
    distiller.made(Batch(torch.zeros(2, 4), progress=0.1))  # the same step
    torch.testing.assert_close(distiller.average.state_dict()["0.weight"], start["0.weight"] + 0.5)
