from __future__ import annotations

from math import exp, log

import pytest
import torch

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.feature.pad import PAD, pad_loss
from tests.objectives.reference import mean
from tests.objectives.test_classes import Net, make, make_batch


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_equals_the_paper(eps: float) -> None:
    student, teacher, variance = torch.randn(3, 4, 5).double()
    values = []
    for s, t, v in zip(*(x.flatten().tolist() for x in (student, teacher, variance)), strict=True):
        values.append((t - s) ** 2 / (eps + exp(v)) + v)
    assert pad_loss(student, teacher, variance, eps=eps).item() == pytest.approx(mean(values), rel=1e-9)


def test_the_best_variance_is_the_squared_distance() -> None:
    student, teacher = torch.zeros(1, 1).double(), torch.full((1, 1), 3.0).double()
    grid = torch.linspace(0, 4, 4001).double()
    losses = torch.stack([pad_loss(student, teacher, g.reshape(1, 1)) for g in grid])
    assert grid[losses.argmin()].item() == pytest.approx(log(9), abs=1e-3)


def test_hard_samples_move_the_student_less() -> None:
    student, teacher = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
    variance = torch.tensor([[0.0] * 3, [2.0] * 3])
    pad_loss(student, teacher, variance).backward()
    torch.testing.assert_close(student.grad[0] / student.grad[1], torch.full((3,), exp(2)))


def test_objective() -> None:
    loss, teacher, batch = PAD(), Net(6), make_batch()
    distiller = make(loss, teacher)
    student, said = (trace["penultimate"] for trace in distiller.traces(batch))
    wanted = pad_loss(loss.projector(student), said, loss.variance(student))
    torch.testing.assert_close(distiller(batch).total, wanted)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.01)
    seen = []
    for _ in range(20):
        optimizer.zero_grad()
        total = distiller(batch).total
        total.backward()
        optimizer.step()
        seen.append(total.item())
    assert seen[-1] < seen[0] - 0.1


def test_refusals() -> None:
    with pytest.raises(TensorError, match="log_variance"):
        pad_loss(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 1))
    with pytest.raises(ConfigError, match="eps"):
        PAD(eps=0.0)
    distiller = make(PAD())
    with pytest.raises(TensorError, match="2 or more"):
        distiller(make_batch(size=1))
