"""Iterated self-distillation by the engine's own losses: closed form, estimate, and what a training learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.analysis.self_distillation import KernelSelfDistillation, shrinkage
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.engine import TrainConfig
from limbeck.objectives import KD, MSE, Brier, CrossEntropy, LogitMSE, ProbabilityMSE
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.parts.sides import weigh_sides
from limbeck.schemes.self_taught.kernel_self_distill import estimated_weight

RIDGE = 0.3


@pytest.fixture(scope="module")
def scene():
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, dtype=torch.float64, generator=drawn)
    y = x[:, :2].sin() + 0.3 * torch.randn(24, 2, dtype=torch.float64, generator=drawn)
    return x[:16], y[:16], x[16:], y[16:]


def fitted(x, y, teacher: nn.Module | None, loss: Terms) -> nn.Linear:
    """The linear student without gradient: its loss is quadratic, so one Newton step leads there."""
    model = nn.Linear(x.shape[1], y.shape[1], bias=False).double()
    distiller = Distiller(model, loss, teacher if loss.teacher_taps else None).setup(Batch(x, y))

    def total(weight):
        said = torch.func.functional_call(distiller, {"student.weight": weight}, (Batch(x, y),)).total
        return said + RIDGE / y.numel() * weight.square().sum()

    start = model.weight.detach().clone()
    gradient = torch.autograd.functional.jacobian(total, start).flatten()
    hessian = torch.autograd.functional.hessian(total, start).reshape(start.numel(), -1)
    distiller.close()
    with torch.no_grad():
        model.weight.copy_(start - torch.linalg.solve(hessian, gradient).view_as(start))
    return model.requires_grad_(False)


@pytest.mark.parametrize("weights", [[0.25] * 4, [0.0] * 3, [1.0] * 2, [0.7, 0.1]])
def test_steps_with_the_schemes_losses_are_the_closed_form(scene, weights):
    """Linear students with a ridge are kernel ridge regression: each step's predictions are V B V^T y."""
    x, y, _, _ = scene
    exact = KernelSelfDistillation(x @ x.T, y, RIDGE)
    diagonals = shrinkage(exact.eigenvalues, RIDGE, weights)
    teacher = None
    for number, weight in enumerate([1.0, *weights]):
        loss = weigh_sides(MSE() + LogitMSE(), weight, 1 - weight, "the test")
        teacher = fitted(x, y, teacher, loss)
        wanted = exact.vectors @ (diagonals[number, :, None] * (exact.vectors.T @ y))
        assert float((teacher(x) - wanted).abs().max()) < 1e-8


def test_the_estimate_is_exact_where_predictions_are_linear_in_targets(scene):
    """The scheme's estimate against a grid over the weight, each point a fit of its own."""
    x, y, held, truth = scene
    loader = as_loader((held, truth), batch_size=3, task="regression", normalise=None)
    first = fitted(x, y, None, weigh_sides(MSE() + LogitMSE(), 1.0, 0.0, "the test"))
    without = fitted(x, y, first, weigh_sides(MSE() + LogitMSE(), 0.0, 1.0, "the test"))
    found = estimated_weight(FrozenTeacher(first), FrozenTeacher(without), loader)
    exact = KernelSelfDistillation(x @ x.T, y, RIDGE)
    assert found == pytest.approx(exact.best_weight(held @ x.T, truth), abs=1e-8)

    def error(weight):
        model = KernelSelfDistillation(x @ x.T, y, RIDGE).step(weight)
        return float((model.predict(held @ x.T) - truth).square().sum())

    grid = [error(i / 200) for i in range(201)]
    assert error(found) <= min(grid) + 1e-12
    assert abs(found - grid.index(min(grid)) / 200) <= 1 / 400 + 1e-9


def test_the_papers_loss_is_that_of_mixed_targets():
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64)
    logits, labels, weight = logits.requires_grad_(), torch.arange(6) % 4, 0.3
    student, other = nn.Identity(), nn.Linear(4, 4).double()
    with torch.no_grad():
        other.weight.copy_(torch.eye(4))
        other.bias.zero_()
    loss = weigh_sides(Brier() + ProbabilityMSE(), weight, 1 - weight, "the test")
    losses = Distiller(student, loss, other).setup(Batch(logits.detach(), labels))(Batch(logits, labels))
    p, q, hot = logits.softmax(1), other(logits).detach().softmax(1), F.one_hot(labels, 4).double()
    wanted = weight * F.mse_loss(p, hot) + (1 - weight) * F.mse_loss(p, q)
    torch.testing.assert_close(losses.total, wanted)
    target = weight * hot + (1 - weight) * q
    found, mixed = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (losses.total, F.mse_loss(p, target)))
    torch.testing.assert_close(found, mixed)


def test_all_or_nothing():
    loss = CrossEntropy() + 0.5 * KD(1.0)
    assert weigh_sides(loss, 1.0, 0.0, "").names == ["cross_entropy"]  # and the teacher is not asked at all
    assert weigh_sides(loss, 0.0, 1.0, "").names == ["kd"]
    with pytest.raises(ConfigError, match="no term of the loss learns from a teacher"):
        weigh_sides(Terms.of(CrossEntropy()), 0.5, 0.5, "it")
    with pytest.raises(ConfigError, match="learns from labels; found kd"):
        weigh_sides(Terms.of(KD()), 0.5, 0.5, "it")


def cast(loss=None, validation=True, teacher=None, steps=4):
    torch.manual_seed(0)
    x = torch.randn(48, 4)
    data = as_loader((x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), batch_size=16, train=True)

    def fresh(number):
        torch.manual_seed(number)
        return nn.Linear(4, 3)

    held = as_loader((x[:20], data.labels[:20]), batch_size=8) if validation else None
    loss = Brier() + ProbabilityMSE() if loss is None else loss
    return Cast(nn.Linear(4, 3), loss, teacher, TrainConfig(steps=steps, lr=0.5), data, held, fresh=fresh)


def test_the_chain_is_estimated_and_told(tmp_path: Path):
    perform(build("kernel_self_distill", steps=3), cast(), out=tmp_path / "run", quiet=True)
    names = sorted(p.name for p in (tmp_path / "run/trainings").iterdir())
    assert names == ["step-1", "step-2", "step-2-without-truth", "step-3-without-truth"]
    told = json.loads((tmp_path / "run/self_distillation.json").read_text())["weights"]
    assert len(told) == 2
    assert all(0 <= weight <= 1 for weight in told)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert set(line["terms"]) <= {"brier", "prob_mse"}


def test_a_teacher_is_the_first_step():
    given = cast(teacher=FrozenTeacher(nn.Linear(4, 3)))
    trainings = build("kernel_self_distill", steps=3, weight=0.4).trainings(given)
    assert [training.name for training in trainings] == ["step-2", ""]


@pytest.mark.parametrize(
    ("given", "scheme", "message"),
    [
        ({"validation": False}, {}, "there are none"),
        ({"loss": Terms.of(KD())}, {"weight": 0.5}, "no term of the loss learns from labels"),
    ],
)
def test_mistakes(given, scheme, message):
    with pytest.raises(ConfigError, match=message):
        list(build("kernel_self_distill", **scheme).trainings(cast(**given)))


@pytest.mark.parametrize(("option", "message"), [({"steps": 1}, "two at least"), ({"weight": 1.5}, "between 0 and 1")])
def test_options(option, message):
    with pytest.raises(ConfigError, match=message):
        build("kernel_self_distill", **option)
