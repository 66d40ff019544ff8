"""Multi-label logits distillation against the paper's equation in plain loops."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import TensorError
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.mld import mld_loss


def written_out(student: Tensor, teacher: Tensor) -> float:
    value = 0.0
    for own, other in zip(student.tolist(), teacher.tolist(), strict=True):
        for z_s, z_t in zip(own, other, strict=True):
            p_s, p_t = 1 / (1 + exp(-z_s)), 1 / (1 + exp(-z_t))
            value += p_t * log(p_t / p_s) + (1 - p_t) * log((1 - p_t) / (1 - p_s))
    return value / len(student)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 2)])
def test_equals_the_paper(shape: tuple[int, int]) -> None:
    student, teacher = 2 * torch.randn(2, *shape).double()
    assert mld_loss(student, teacher).item() == pytest.approx(written_out(student, teacher), rel=1e-9)


def test_worked_example() -> None:
    assert mld_loss(torch.zeros(1, 2), torch.tensor([[1.0, -2.0]])).item() == pytest.approx(0.438757, abs=1e-6)


def test_equal_models_have_nothing_to_learn() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    mld_loss(logits, logits.detach()).backward()
    assert mld_loss(logits, logits).abs().item() < 1e-6
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_a_constant_matters_as_it_does_not_to_a_softmax() -> None:
    student, teacher = torch.randn(2, 4, 3).double()
    torch.testing.assert_close(kd_loss(student + 2, teacher), kd_loss(student, teacher))
    assert (mld_loss(student + 2, teacher) - mld_loss(student, teacher)).abs() > 0.1


def test_a_sure_teacher_keeps_its_digits() -> None:
    """Clamped probabilities would give at most 18.4, and no gradient."""
    student = torch.tensor([[-40.0]], requires_grad=True)
    value = mld_loss(student, torch.tensor([[40.0]]))
    value.backward()
    assert value.item() == pytest.approx(40.0)
    assert student.grad is not None
    assert student.grad.item() == pytest.approx(-1.0)


def test_shapes_must_agree() -> None:
    with pytest.raises(TensorError, match="teacher_logits"):
        mld_loss(torch.zeros(2, 3), torch.zeros(2, 4))
