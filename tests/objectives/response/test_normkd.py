from __future__ import annotations

from math import sqrt

import pytest
import torch

from limbeck.objectives.response.logit_std import logit_std_loss
from limbeck.objectives.response.normkd import normkd_loss
from tests.objectives.reference import kl, mean, softmax


def sigma(row: list[float]) -> float:
    return sqrt(sum((z - mean(row)) ** 2 for z in row) / (len(row) - 1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_the_paper(temperature: float) -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double() + 1
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        own, other = temperature * sigma(s), temperature * sigma(t)
        wanted.append(other**2 * kl(softmax(t, other), softmax(s, own)))
    assert normkd_loss(student, teacher, temperature=temperature).item() == pytest.approx(mean(wanted), rel=1e-9)


def test_it_is_logit_standardisation_weighted_by_the_teachers_variance() -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    plain = logit_std_loss(student, teacher, unbiased=True, reduction="none")
    torch.testing.assert_close(normkd_loss(student, teacher, reduction="none"), teacher.var(-1) * plain)


def test_only_the_teachers_size_matters() -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    torch.testing.assert_close(normkd_loss(9 * student + 1, teacher), normkd_loss(student, teacher))
    torch.testing.assert_close(normkd_loss(student, 3 * teacher), 9 * normkd_loss(student, teacher))


def test_logits_that_do_not_vary_pass_no_gradient() -> None:
    for student, teacher in ((torch.zeros(2, 4), torch.randn(2, 4)), (torch.randn(2, 4), torch.ones(2, 4))):
        student.requires_grad_()
        value = normkd_loss(student, teacher)
        value.backward()
        assert value.isfinite()
        assert student.grad is not None
        assert not student.grad.any()
