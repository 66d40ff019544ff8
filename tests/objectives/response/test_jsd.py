from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.jsd import JSD, jsd_loss
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.reverse_kl import reverse_kl_loss
from tests.objectives.reference import kl, mean, softmax


@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.1, 1.0), (0.9, 3.0)])
def test_equals_the_paper(beta: float, temperature: float) -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax(s, temperature), softmax(t, temperature)
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        wanted.append(temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m)))
    found = jsd_loss(student, teacher, beta=beta, temperature=temperature)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_the_middle_one_is_symmetric_and_bounded() -> None:
    student, teacher = 5 * torch.randn(2, 8, 4).double()
    torch.testing.assert_close(jsd_loss(student, teacher), jsd_loss(teacher, student))
    apart = jsd_loss(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]]))
    assert apart.item() == pytest.approx(math.log(2))


def test_its_ends_are_kl_and_reverse_kl() -> None:
    student, teacher = torch.randn(2, 8, 4).double()
    torch.testing.assert_close(jsd_loss(student, teacher, beta=1e-7) / 1e-7, kd_loss(student, teacher, temperature=1.0))
    torch.testing.assert_close(
        jsd_loss(student, teacher, beta=1 - 1e-7) / 1e-7, reverse_kl_loss(student, teacher), rtol=1e-5, atol=1e-6
    )


def test_a_class_only_one_of_both_rules_out_costs_something_finite() -> None:
    student = torch.tensor([[0.0, 1.0, -math.inf, 2.0]], requires_grad=True)
    value = jsd_loss(student, torch.tensor([[0.0, -math.inf, -math.inf, 1.0]]))
    value.backward()
    assert 0 < value.item() < math.log(2)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_what_it_refuses() -> None:
    for beta in (0.0, 1.0, -0.5, math.nan):
        with pytest.raises(ConfigError, match="beta"):
            JSD(beta=beta)
    with pytest.raises(TensorError, match="teacher_logits"):
        jsd_loss(torch.randn(2, 3), torch.randn(2, 4))
