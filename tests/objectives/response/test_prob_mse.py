"""Regression on probabilities against torch's mean squared error."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from limbeck.objectives.response.prob_mse import prob_mse_loss


def test_is_torchs_of_both_softmaxes() -> None:
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64).requires_grad_()
    found = prob_mse_loss(student, teacher)
    torch.testing.assert_close(found, F.mse_loss(student.softmax(1), teacher.softmax(1)))
    ours = torch.autograd.grad(found, student, retain_graph=True)[0]
    torch.testing.assert_close(
        ours, torch.autograd.grad(F.mse_loss(student.softmax(1), teacher.detach().softmax(1)), student)[0]
    )


def test_it_is_bounded_and_blind_to_a_constant() -> None:
    student = torch.tensor([[100.0, 0.0]], dtype=torch.float64)
    assert float(prob_mse_loss(student, -student)) <= 1.0
    torch.testing.assert_close(prob_mse_loss(student + 5.0, -student), prob_mse_loss(student, -student))
