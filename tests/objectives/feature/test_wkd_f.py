from __future__ import annotations

from math import ceil, floor, sqrt

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.feature.wkd_f import WKDF, wkd_f_loss
from tests.objectives.reference import mean
from tests.objectives.test_classes import Net, make, make_batch


def fitted(channel: list[list[float]], grid: int) -> list[tuple[float, float]]:
    """Mean and deviation of each cell of one channel."""
    h, w = len(channel), len(channel[0])
    found = []
    for i in range(grid):
        for j in range(grid):
            rows = range(floor(i * h / grid), ceil((i + 1) * h / grid))
            columns = range(floor(j * w / grid), ceil((j + 1) * w / grid))
            values = [channel[r][c] for r in rows for c in columns]
            middle = mean(values)
            variance = sum((v - middle) ** 2 for v in values) / max(len(values) - 1, 1)
            found.append((middle, sqrt(variance + 1e-5)))
    return found


def written_out(student: Tensor, teacher: Tensor, gamma: float, grid: int) -> float:
    values = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        total = 0.0
        for a, b in zip(s, t, strict=True):
            for (mu, delta), (mu_t, delta_t) in zip(fitted(a, grid), fitted(b, grid), strict=True):
                total += gamma * (mu - mu_t) ** 2 + (delta - delta_t) ** 2
        values.append(total / grid**2)
    return mean(values)


@pytest.mark.parametrize(("grid", "gamma"), [(1, 4.0), (2, 1.0), (4, 2.0)])
def test_equals_the_paper(grid: int, gamma: float) -> None:
    student, teacher = torch.randn(3, 5, 6, 7).double(), 2 * torch.randn(3, 5, 4, 4).double() + 1
    found = wkd_f_loss(student, teacher, gamma=gamma, grid=grid)
    assert found.item() == pytest.approx(written_out(student, teacher, gamma, grid), rel=1e-9)


def test_it_is_the_distance_between_gaussians() -> None:
    """In one dimension the squared 2-Wasserstein distance of two samples of one size pairs them in order."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()
    student, teacher = x.view(1, 1, 400, 500), (1.7 * x + 0.4).view(1, 1, 400, 500)
    wanted = (student.flatten().sort().values - teacher.flatten().sort().values).square().mean()
    torch.testing.assert_close(wkd_f_loss(student, teacher, gamma=1.0), wanted, rtol=1e-4, atol=0)


def test_the_order_within_a_cell_does_not_matter() -> None:
    student, teacher = torch.randn(2, 3, 4, 4, 4).double()
    moved = student.roll((1, 1), dims=(2, 3))
    torch.testing.assert_close(wkd_f_loss(moved, teacher), wkd_f_loss(student, teacher))
    assert not torch.isclose(wkd_f_loss(moved, teacher, grid=2), wkd_f_loss(student, teacher, grid=2))


def test_constant_maps_pass_a_finite_gradient() -> None:
    student = torch.ones(2, 3, 4, 4, requires_grad=True)
    wkd_f_loss(student, torch.randn(2, 3, 8, 8), grid=4).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("grid", [1, 2])
def test_objective(grid: int) -> None:
    loss, teacher, batch = WKDF("layer2", grid=grid), Net(6), make_batch()
    distiller = make(loss, teacher)
    student, inputs = distiller.student, batch.inputs
    assert isinstance(student, Net)
    student_map, teacher_map = student.layer2(student.layer1(inputs)), teacher.layer2(teacher.layer1(inputs))
    assert loss.connector is not None
    wanted = wkd_f_loss(loss.connector(student_map), teacher_map, grid=grid)
    torch.testing.assert_close(distiller(batch).total, wanted)


def test_misuse_is_refused() -> None:
    with pytest.raises(TensorError, match=r"teacher_feature.*\[2, 4, 4, 4\]"):
        wkd_f_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4))
    with pytest.raises(ConfigError, match="grid"):
        WKDF(grid=0)
