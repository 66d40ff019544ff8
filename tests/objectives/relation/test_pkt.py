from __future__ import annotations

from math import log, sqrt

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import TensorError
from limbeck.objectives.relation.pkt import pkt_loss


def neighbours(x: Tensor, include_self: bool) -> list[list[float]]:
    points = x.flatten(1).tolist()
    lengths = [sqrt(sum(v * v for v in p)) for p in points]
    found = []
    for i, p in enumerate(points):
        row = [
            0.5 * (sum(a * b for a, b in zip(p, q, strict=True)) / (lengths[i] * lengths[j]) + 1)
            if include_self or i != j
            else 0.0
            for j, q in enumerate(points)
        ]
        found.append([v / sum(row) for v in row])
    return found


def reference(student: Tensor, teacher: Tensor, include_self: bool) -> float:
    total = 0.0
    for p, q in zip(neighbours(teacher, include_self), neighbours(student, include_self), strict=True):
        total += sum(a * log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    return total / len(student)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equals_the_paper(size: int, include_self: bool) -> None:
    student, teacher = torch.randn(size, 6).double(), torch.randn(size, 9).double()
    found = pkt_loss(student, teacher, include_self=include_self, eps=1e-14)
    assert found.item() == pytest.approx(reference(student, teacher, include_self), rel=1e-9, abs=1e-14)


def test_directions_are_all_that_matters() -> None:
    teacher = torch.randn(6, 4).double()
    turned = teacher @ torch.linalg.qr(torch.randn(4, 4).double())[0] * torch.rand(6, 1).add(0.1)
    assert pkt_loss(turned, teacher).item() == pytest.approx(0.0, abs=1e-12)


def test_two_samples_have_one_neighbour_each() -> None:
    assert pkt_loss(torch.randn(2, 4), torch.randn(2, 4)).item() == pytest.approx(0.0, abs=1e-7)


def test_opposite_samples_stay_finite() -> None:
    student = torch.tensor([[1.0], [-1.0], [1.0]], requires_grad=True)
    value = pkt_loss(student, torch.randn(3, 4))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_masked_samples_are_nobodys_neighbours() -> None:
    student, teacher, counts = torch.randn(5, 3).double(), torch.randn(5, 6).double(), torch.arange(5) % 2 == 0
    torch.testing.assert_close(pkt_loss(student, teacher, mask=counts), pkt_loss(student[counts], teacher[counts]))


def test_other_samples_are_refused() -> None:
    with pytest.raises(TensorError, match="different numbers of samples"):
        pkt_loss(torch.randn(4, 3), torch.randn(5, 3))
