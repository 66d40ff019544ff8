from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import TensorError
from limbeck.objectives import SP
from limbeck.objectives.relation.sp import sp_loss


def reference(student: Tensor, teacher: Tensor) -> float:
    def similarities(x: Tensor) -> list[list[float]]:
        points = x.flatten(1).tolist()
        products = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in points] for p in points]
        return [[v / sqrt(sum(w * w for w in row)) for v in row] for row in products]

    pairs = zip(similarities(student), similarities(teacher), strict=True)
    return sum((a - b) ** 2 for s, t in pairs for a, b in zip(s, t, strict=True)) / len(student) ** 2


@pytest.mark.parametrize("size", [1, 2, 6])
def test_equals_the_paper(size: int) -> None:
    student, teacher = torch.randn(size, 3, 2, 2).double(), torch.randn(size, 5, 4, 4).double()
    assert sp_loss(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-9, abs=1e-15)


def test_rotated_and_scaled_features_cost_nothing() -> None:
    teacher = torch.randn(6, 4).double()
    student = 3.0 * teacher @ torch.linalg.qr(torch.randn(4, 4).double())[0]
    assert sp_loss(student, teacher).item() == pytest.approx(0.0, abs=1e-20)


def test_rows_add_up() -> None:
    student, teacher = torch.randn(5, 3), torch.randn(5, 4)
    each = sp_loss(student, teacher, reduction="none")
    torch.testing.assert_close(each.mean(), sp_loss(student, teacher))
    torch.testing.assert_close(each.sum(), sp_loss(student, teacher, reduction="sum"))


def test_masked_samples_and_tokens_are_left_out() -> None:
    student, teacher = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 6).double()
    counts = torch.tensor([True, False, True, True, False])
    wanted = sp_loss(student[counts], teacher[counts])
    torch.testing.assert_close(sp_loss(student, teacher, mask=counts), wanted)
    tokens = torch.tensor([[True, False, True]] * 5)
    wanted = sp_loss(student[:, [0, 2]], teacher[:, [0, 2]])
    torch.testing.assert_close(sp_loss(student, teacher, mask=tokens), wanted)


def test_zero_features_pass_no_gradient() -> None:
    student = torch.zeros(3, 4, requires_grad=True)
    sp_loss(student, torch.randn(3, 4)).backward()
    assert not student.grad.any()


def test_several_layers_add_up() -> None:
    def model(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2))

    student, teacher, batch = model(4), model(5), Batch(torch.randn(6, 3))

    def loss(tap: str | list[str]) -> Tensor:
        return Distiller(student, SP(tap), teacher).setup(batch)(batch).total

    torch.testing.assert_close(loss(["0", "1"]), loss("0") + loss("1"))


def test_other_samples_are_refused() -> None:
    with pytest.raises(TensorError, match="different numbers of samples"):
        sp_loss(torch.randn(4, 3), torch.randn(5, 3))
