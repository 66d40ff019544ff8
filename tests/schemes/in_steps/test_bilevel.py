"""The bilevel scheme: the controller's gradient runs through one step of the student, and nothing else does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.data import as_loader
from limbeck.engine import TrainConfig, fit
from limbeck.objectives import KD, CrossEntropy, TGeoKD
from limbeck.recipes.schema import usual_scheme
from limbeck.schemes import build

SAMPLES = 80


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    return inputs, (inputs @ torch.randn(6, 3, generator=generator)).argmax(dim=1)


def student() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def teacher() -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(6, 3)


def stage(config: TrainConfig | None = None, loss: object = None, **options: object):
    return build("bilevel", **options).stages(student(), loss, teacher(), config or TrainConfig(lr=0.1))[0]


def set_up(**options: object):
    inputs, labels = problem()
    whole = Batch(inputs, labels, torch.arange(SAMPLES))
    distiller = stage(**options).distiller
    distiller.setup(whole, DataInfo(SAMPLES, labels, 3, batches=lambda: [whole]))
    return distiller.train(), whole


def test_it_is_the_methods_own_scheme():
    assert usual_scheme("tgeo_kd").name == "bilevel"


def test_samples_are_held_out_once_and_for_all():
    distiller, whole = set_up(share=0.2)
    assert int(distiller.held.sum()) == 16
    assert torch.equal(distiller.held, set_up(share=0.2)[0].held)
    torch.testing.assert_close(distiller._judges.inputs, whole.inputs[distiller.held])
    only = whole.replace(inputs=whole.inputs[distiller.held], labels=whole.labels[distiller.held])
    losses = distiller(only.replace(index=whole.index[distiller.held]))
    assert losses.total.item() == 0  # the student does not learn from them
    assert distiller.eval()(only.replace(index=whole.index[distiller.held])).total.item() > 0


def test_the_controllers_gradient_is_that_of_the_upper_loss():
    """Against differences: the upper loss is computed anew, step of the student and all, at moved weights."""
    distiller, whole = set_up(share=0.25, samples=20, inner_lr=0.5)
    distiller.double()
    distiller.teacher.model.double()
    whole = whole.replace(inputs=whole.inputs.double())
    distiller._judges = distiller._judges.replace(inputs=distiller._judges.inputs.double())
    objective = next(iter(distiller.loss))
    bias = objective.controller[-2].bias

    def upper() -> float:
        twin = copy.deepcopy(distiller.student)
        parameters = dict(twin.named_parameters())
        said, answer = twin(whole.inputs), distiller.teacher.model(whole.inputs)
        ratio = objective.ratio(said, answer, whole.labels).detach()
        kept = ~distiller.held
        kd = F.kl_div((said / 1.5).log_softmax(1), (answer / 1.5).softmax(1), reduction="none").sum(1) * 1.5**2
        lower = (ratio * kd + (1 - ratio) * F.cross_entropy(said, whole.labels, reduction="none"))[kept].mean()
        found = torch.autograd.grad(lower, list(parameters.values()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), found, strict=True):
                parameter -= 0.5 * gradient
        return F.cross_entropy(twin(whole.inputs[distiller.held]), whole.labels[distiller.held]).item()

    losses = distiller(whole, "controller")
    assert losses.total.item() == pytest.approx(upper(), rel=1e-6)
    losses.total.backward()
    found, step = bias.grad.item(), 1e-4
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            bias += sign * step
        values.append(upper())
        with torch.no_grad():
            bias -= sign * step
    assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)
    assert found != 0


def test_the_controllers_turn_leaves_the_student_alone():
    distiller, whole = set_up()
    before = copy.deepcopy(distiller.student.state_dict())
    distiller(whole, "controller").total.backward()
    after = distiller.student.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())  # running statistics too
    assert int(distiller.judged) == 8
    objective = next(iter(distiller.loss))
    assert not objective.unrolled
    distiller.zero_grad()
    distiller(whole, "student").total.backward()
    assert all(p.grad is None for p in objective.parameters())


def test_parts_of_a_step_add_up():
    distiller, whole = set_up()
    distiller.student.eval()  # statistics of a batch are the batch's
    full = distiller(whole, "student").total
    totals = {"labels": torch.tensor(float(SAMPLES))}
    parts = [
        whole.replace(inputs=whole.inputs[r], labels=whole.labels[r], index=whole.index[r], totals=totals)
        for r in (slice(0, 11), slice(11, 80))
    ]
    torch.testing.assert_close(sum(distiller(part, "student").total for part in parts), full)


def test_both_learn_each_by_its_own_optimizer():
    """Adam moves every weight of the controller by about its rate in its first step; the student moves by SGD."""
    one, (inputs, labels) = stage(TrainConfig(steps=1), lr=0.1), problem()
    whole = Batch(inputs, labels, torch.arange(SAMPLES))
    one.distiller.setup(whole, DataInfo(SAMPLES, labels, 3, batches=lambda: [whole]))
    objective = next(iter(one.distiller.loss))
    before = copy.deepcopy(objective.controller)
    history = fit([one], as_loader(problem(), batch_size=20, train=True), quiet=True).history
    assert {"controller/upper", "student/tgeo_kd"} <= set(history[-1]["terms"])
    moved = (objective.controller[-2].bias - before[-2].bias).abs().item()
    assert moved == pytest.approx(0.1, rel=0.01)
    assert one.distiller.settings_of("student") == {}


def test_resumes_exactly(tmp_path):
    config = TrainConfig(steps=8, lr=0.05, checkpoint_every=3, keep=9)
    runs = []
    for out in (tmp_path / "whole", tmp_path / "cut"):
        one = stage(config, samples=3)
        fit([one], as_loader(problem(), batch_size=20, train=True), out=out, quiet=True)
        runs.append(one.distiller)
    (tmp_path / "cut" / "checkpoints" / "step-00000008").rename(tmp_path / "aside")
    again = stage(config, samples=3)
    fit([again], as_loader(problem(), batch_size=20, train=True), out=tmp_path / "cut", resume=True, quiet=True)
    wanted, found = runs[0].state_dict(), again.distiller.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(v, found[k]) for k, v in wanted.items())
    assert int(found["judged"]) == 24


@pytest.mark.slow
def test_a_teacher_that_is_wrong_is_trusted_less():
    """Half of the teacher's answers are those of another class; the controller finds out by what helps."""
    generator = torch.Generator().manual_seed(3)
    count = 300
    inputs = torch.randn(count, 6, generator=generator)
    labels = (inputs @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
    wrong = torch.rand(count, generator=generator) < 0.5
    said = 4.0 * F.one_hot(torch.where(wrong, (labels + 1) % 3, labels), 3).float()

    class Teacher(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs[:, 6:]

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs[:, :6])

    torch.manual_seed(0)
    config = TrainConfig(steps=120, lr=0.5, weight_decay=0.0, schedule="constant")
    both = torch.cat([inputs, said], dim=1)
    one = build("bilevel", share=0.3).stages(Student(), TGeoKD(), Teacher(), config)[0]
    fit([one], as_loader((both, labels), batch_size=100, train=True), quiet=True)
    objective = next(iter(one.distiller.loss))
    ratio = objective.ratio(one.distiller.student(both), said, labels)
    assert ratio[wrong].mean() < 0.7 * ratio[~wrong].mean()


@pytest.mark.parametrize(
    ("options", "where"), [({"share": 1.0}, "scheme.share"), ({"lr": 0.0}, "scheme.lr"), ({"samples": 0}, "samples")]
)
def test_options_that_cannot_be(options, where):
    with pytest.raises(ConfigError, match=where):
        build("bilevel", **options)


def test_what_cannot_be_is_told():
    with pytest.raises(ConfigError, match=r"nothing for the upper level to learn.*wanted tgeo_kd"):
        stage(loss=CrossEntropy() + KD())
    inputs, _ = problem()
    soft = torch.rand(SAMPLES, 3).softmax(1)
    with pytest.raises(TensorError, match="TGeo-KD needs to know the class"):
        fit([stage(TrainConfig(steps=1))], as_loader((inputs, soft), batch_size=20, train=True), quiet=True)
    whole = Batch(*problem(), torch.arange(SAMPLES))
    with pytest.raises(ConfigError, match="answers over the whole training set"):
        stage().distiller.setup(whole)
