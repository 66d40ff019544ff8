from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import TensorError
from limbeck.objectives import ICKD
from limbeck.objectives.feature.ickd import ickd_loss


def reference(student: Tensor, teacher: Tensor) -> float:
    def correlations(channels: list[list[float]]) -> list[list[float]]:
        products = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in channels] for p in channels]
        return [[v / sqrt(sum(w * w for w in row)) for v in row] for row in products]

    total = 0.0
    for s, t in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True):
        pairs = zip(correlations(s), correlations(t), strict=True)
        total += sum((a - b) ** 2 for p, q in pairs for a, b in zip(p, q, strict=True)) / len(s)
    return total / len(student)


@pytest.mark.parametrize(("size", "channels"), [(1, 2), (3, 5)])
def test_equals_the_definition(size: int, channels: int) -> None:
    student, teacher = torch.randn(size, channels, 4, 4).double(), torch.randn(size, channels, 3, 2).double()
    assert ickd_loss(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-10)


def test_places_in_another_order_cost_nothing() -> None:
    teacher = torch.randn(2, 5, 3, 3).double()
    student = 4.0 * teacher.flatten(2)[..., torch.randperm(9)].unflatten(2, (3, 3))
    assert ickd_loss(student, teacher).item() == pytest.approx(0.0, abs=1e-20)


def test_tokens_are_maps_without_the_class_token() -> None:
    maps, tokens = torch.randn(2, 5, 3, 3), torch.randn(2, 10, 5)
    as_map = tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 3))
    torch.testing.assert_close(ickd_loss(maps, tokens), ickd_loss(maps, as_map))


def test_dead_channels_pass_no_gradient() -> None:
    student = torch.randn(2, 3, 2, 2)
    student[:, 1] = 0
    student.requires_grad_()
    ickd_loss(student, torch.randn(2, 3, 2, 2)).backward()
    assert student.grad.isfinite().all()
    still = torch.zeros(2, 3, 2, 2, requires_grad=True)
    ickd_loss(still, torch.randn(2, 3, 2, 2)).backward()
    assert not still.grad.any()


def test_the_embedding_learns_and_leads_to_the_teachers_channels() -> None:
    student, teacher = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 7, 3, stride=2))
    objective, batch = ICKD("0"), Batch(torch.randn(4, 3, 8, 8))
    Distiller(student, objective, teacher).setup(batch)(batch).total.backward()
    assert [tuple(p.shape) for p in objective.parameters()] == [(7, 4, 1, 1), (7,), (7,)]
    assert all(p.grad is not None for p in objective.parameters())


def test_other_channels_are_refused() -> None:
    with pytest.raises(TensorError, match="one by one"):
        ickd_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4))
