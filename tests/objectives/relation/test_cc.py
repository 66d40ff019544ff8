from __future__ import annotations

from math import exp, factorial, sqrt

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives import CC
from limbeck.objectives.relation.cc import cc_loss


def unit(x: Tensor) -> list[list[float]]:
    return [[v / sqrt(sum(w * w for w in row)) for v in row] for row in x.flatten(1).tolist()]


def reference(student: Tensor, teacher: Tensor, gamma: float, order: int) -> float:
    def matrix(x: Tensor) -> list[list[float]]:
        def kernel(p: list[float], q: list[float]) -> float:
            product = sum(a * b for a, b in zip(p, q, strict=True))
            return sum(exp(-2 * gamma) * (2 * gamma) ** n / factorial(n) * product**n for n in range(order + 1))

        return [[kernel(p, q) for q in unit(x)] for p in unit(x)]

    pairs = zip(matrix(student), matrix(teacher), strict=True)
    return sum((a - b) ** 2 for s, t in pairs for a, b in zip(s, t, strict=True)) / len(student) ** 2


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (1.0, 4), (0.1, 1)])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_equals_the_paper(size: int, gamma: float, order: int) -> None:
    student, teacher = torch.randn(size, 5).double(), torch.randn(size, 3).double()
    found = cc_loss(student, teacher, gamma=gamma, order=order)
    assert found.item() == pytest.approx(reference(student, teacher, gamma, order), rel=1e-9, abs=1e-15)


def test_the_expansion_tends_to_the_gaussian_kernel() -> None:
    student, teacher = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    s, t = (torch.tensor(unit(x)).double() for x in (student, teacher))
    gaussian = [(-0.4 * torch.cdist(x, x).square()).exp() for x in (s, t)]
    wanted = (gaussian[0] - gaussian[1]).square().mean()
    torch.testing.assert_close(cc_loss(student, teacher, order=12), wanted)
    assert abs(cc_loss(student, teacher) - wanted) > 1e-6


def test_neighbours_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]]), torch.zeros(3, 2)
    assert cc_loss(student, teacher, kernel="neighbours").item() == pytest.approx((0.0 + 2.0) / 2)
    assert cc_loss(student[:1], teacher[:1], kernel="neighbours").item() == 0.0


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
def test_masked_samples_are_left_out(kernel: str) -> None:
    student, teacher, counts = torch.randn(5, 3).double(), torch.randn(5, 6).double(), torch.arange(5) % 2 == 0
    wanted = cc_loss(student[counts], teacher[counts], kernel=kernel)
    torch.testing.assert_close(cc_loss(student, teacher, kernel=kernel, mask=counts), wanted)


def test_neighbours_learns_two_embeddings() -> None:
    student, teacher = (nn.Sequential(nn.Linear(3, w), nn.Linear(w, 2)) for w in (4, 6))
    batch = Batch(torch.randn(5, 3))
    objective = CC(kernel="neighbours")
    Distiller(student, objective, teacher).setup(batch)(batch).total.backward()
    assert [tuple(p.shape) for p in objective.parameters()] == [(128, 4), (128,), (128, 6), (128,)]
    assert all(p.grad is not None for p in objective.parameters())


def test_misuse_is_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ConfigError, match="know no mask"):
        cc_loss(x, x, kernel="neighbours", mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(TensorError, match="differ in shape"):
        cc_loss(x, torch.randn(4, 5), kernel="neighbours")
    with pytest.raises(ConfigError, match="no such kernel"):
        cc_loss(x, x, kernel="laplace")  # type: ignore[arg-type]
