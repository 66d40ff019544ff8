from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.objectives.response.luminet import LumiNet, luminet_loss
from tests.objectives import reference


def perception(logits: Tensor, eps: float) -> list[list[float]]:
    columns = []
    for column in zip(*logits.tolist(), strict=True):
        mu = reference.mean(list(column))
        variance = reference.mean([(z - mu) ** 2 for z in column])
        columns.append([(z - mu) / math.sqrt(variance + eps) for z in column])
    return [list(row) for row in zip(*columns, strict=True)]


def plain(student: Tensor, teacher: Tensor, temperature: float, eps: float) -> float:
    rows = zip(perception(student, eps), perception(teacher, eps), strict=True)
    return reference.mean(
        [reference.kl(reference.softmax(t, temperature), reference.softmax(s, temperature)) for s, t in rows]
    )


@pytest.mark.parametrize(("temperature", "eps"), [(4.0, 1e-5), (1.0, 0.1)])
def test_equals_the_paper(temperature: float, eps: float) -> None:
    student, teacher = 3 * torch.randn(2, 6, 4).double()
    value = luminet_loss(student, teacher, temperature=temperature, eps=eps)
    assert value.item() == pytest.approx(plain(student, teacher, temperature, eps), rel=1e-9)


def test_worked_example() -> None:
    """Columns 1, 3 and 0, 0 become -1, 1 and 0, 0."""
    student = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    value = luminet_loss(student, -student, temperature=1.0, eps=1e-12)
    p, q = reference.softmax([1.0, 0.0]), reference.softmax([-1.0, 0.0])
    assert value.item() == pytest.approx((reference.kl(p, q) + reference.kl(q, p)) / 2, rel=1e-6)


def test_scale_and_shift_of_a_class_do_not_matter() -> None:
    teacher = 3 * torch.randn(8, 5).double()
    student = teacher * (0.5 + torch.rand(5)) + torch.randn(5)
    assert luminet_loss(student, teacher, eps=1e-12) < 1e-9
    assert luminet_loss(teacher, teacher) == 0


def test_one_row_gives_nothing() -> None:
    student = torch.randn(1, 5).requires_grad_()
    value = luminet_loss(student, torch.randn(1, 5))
    assert value == 0
    value.backward()
    assert (student.grad == 0).all()


def test_the_gradient_moves_no_class_as_a_whole() -> None:
    student = torch.randn(6, 4).double().requires_grad_()
    luminet_loss(student, torch.randn(6, 4).double()).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad.sum(0), torch.zeros(4).double())


def test_tokens_are_rows_and_masked_ones_take_no_part() -> None:
    student, teacher = torch.randn(2, 2, 3, 4).double()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    torch.testing.assert_close(luminet_loss(student, teacher, mask=mask), luminet_loss(student[mask], teacher[mask]))


def test_what_it_refuses() -> None:
    for name in ("temperature", "eps"):
        with pytest.raises(ConfigError, match=name):
            LumiNet(**{name: 0.0})
