from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import TensorError
from limbeck.objectives.response.kd import kd_loss
from tests.objectives import reference


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_equals_the_paper(temperature: float, classes: int) -> None:
    student, teacher = torch.randn(2, 5, classes).double()
    value = kd_loss(student, teacher, temperature=temperature)
    assert value.item() == pytest.approx(reference.kd(student, teacher, temperature), rel=1e-9)


def test_gradient_tends_to_that_of_squared_logits() -> None:
    """Section 2.1 of the paper: for high T and centred logits the gradient is (z - v) / N, with T^2 taken out again."""
    student, teacher = torch.randn(2, 1, 6).double()
    student, teacher = student - student.mean(), teacher - teacher.mean()
    student.requires_grad_()
    kd_loss(student, teacher, temperature=1000.0).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 6, rtol=0, atol=1e-3)


def test_a_sure_teacher_keeps_its_digits() -> None:
    """Probabilities that round to 0 and 1 still give the exact divergence in float32."""
    student, teacher = torch.tensor([[0.0, 30.0]]), torch.tensor([[30.0, 0.0]])
    assert kd_loss(student, teacher, temperature=1.0).item() == pytest.approx(30.0, rel=1e-6)


def test_shapes_must_agree() -> None:
    with pytest.raises(TensorError, match=r"teacher_logits.*\[2, 4\].*\[2, 3\]"):
        kd_loss(torch.randn(2, 3), torch.randn(2, 4))
