from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import TensorError
from limbeck.objectives.response.total_variation import total_variation_loss
from tests.objectives.reference import mean, softmax


def test_equals_the_paper() -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    wanted = mean([sum(abs(a - b) for a, b in zip(softmax(s), softmax(t), strict=True)) / 2 for s, t in pairs])
    assert total_variation_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-9)


def test_it_lies_between_0_and_1() -> None:
    student, teacher = torch.randn(2, 4, 3)
    assert total_variation_loss(student, student + 7).item() == pytest.approx(0, abs=1e-6)
    assert total_variation_loss(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])) == 1
    torch.testing.assert_close(total_variation_loss(student, teacher), total_variation_loss(teacher, student))


def test_its_gradient_keeps_its_size_near_equality() -> None:
    teacher, offset = torch.randn(2, 4, 5).double()
    sizes = []
    for distance in (1e-2, 1e-4):
        student = (teacher + distance * offset).requires_grad_()
        total_variation_loss(student, teacher).backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_what_it_refuses() -> None:
    with pytest.raises(TensorError, match="teacher_logits"):
        total_variation_loss(torch.randn(2, 3), torch.randn(2, 4))
