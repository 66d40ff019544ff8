from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.reverse_kl import ReverseKL, reverse_kl_loss
from tests.objectives.reference import kl, mean, softmax


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_paper(temperature: float) -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    wanted = mean(
        [
            temperature**2 * kl(softmax(s, temperature), softmax(t, temperature))
            for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
        ]
    )
    assert reverse_kl_loss(student, teacher, temperature=temperature).item() == pytest.approx(wanted, rel=1e-9)


def test_it_is_kd_with_sides_exchanged() -> None:
    student, teacher = torch.randn(2, 5, 3, 6)
    found = reverse_kl_loss(student, teacher, temperature=2.0, reduction="none")
    torch.testing.assert_close(found, kd_loss(teacher, student, temperature=2.0, reduction="none"))


def test_it_seeks_a_mode_where_kd_covers_all() -> None:
    """The teacher has two modes; a student on one of them is better for reverse KL, one on both for KD."""
    teacher = torch.tensor([[0.5, 0.499, 0.001]]).log()
    one, spread = torch.tensor([[0.98, 0.01, 0.01]]).log(), torch.tensor([[0.2, 0.2, 0.6]]).log()
    assert reverse_kl_loss(one, teacher) < reverse_kl_loss(spread, teacher)
    assert kd_loss(one, teacher, temperature=1.0) > kd_loss(spread, teacher, temperature=1.0)


def test_a_class_the_teacher_rules_out_costs_infinitely_much() -> None:
    teacher = torch.tensor([[0.0, 1.0, -math.inf]])
    assert reverse_kl_loss(torch.zeros(1, 3), teacher).item() == math.inf
    assert reverse_kl_loss(torch.tensor([[0.0, 1.0, -math.inf]]), teacher).item() == 0


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        ReverseKL(temperature=0.0)
