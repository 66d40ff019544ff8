from __future__ import annotations

import math
from math import log

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.objectives.response.abkd import ABKD, abkd_loss
from limbeck.objectives.response.alpha_divergence import alpha_divergence_loss
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.reverse_kl import reverse_kl_loss
from tests.objectives.reference import mean, softmax


def alpha_beta(p: list[float], q: list[float], a: float, b: float) -> float:
    if a == b == 0:
        return sum((log(x) - log(y)) ** 2 for x, y in zip(p, q, strict=True)) / 2
    if a == 0:
        return sum(y**b * log(y**b / x**b) - y**b + x**b for x, y in zip(p, q, strict=True)) / b**2
    if b == 0:
        return alpha_beta(q, p, b, a)
    c = a + b
    return -sum(x**a * y**b - a / c * x**c - b / c * y**c for x, y in zip(p, q, strict=True)) / (a * b)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (0.2, 0.7), (1.0, 1.0), (0.0, 0.5), (2.0, 0.0), (0.0, 0.0)])
def test_equals_the_paper(alpha: float, beta: float, temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    wanted = [
        temperature**2 * alpha_beta(softmax(t, temperature), softmax(s, temperature), alpha, beta)
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    found = abkd_loss(student, teacher, alpha=alpha, beta=beta, temperature=temperature)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-8)


def test_its_corners_are_kd_and_reverse_kl() -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    torch.testing.assert_close(abkd_loss(student, teacher, alpha=1, beta=0), kd_loss(student, teacher))
    torch.testing.assert_close(
        abkd_loss(student, teacher, alpha=0, beta=1), reverse_kl_loss(student, teacher, temperature=4.0)
    )


def test_on_a_line_it_is_the_alpha_divergence() -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    found = abkd_loss(student, teacher, alpha=0.3, beta=0.7, temperature=1.0)
    torch.testing.assert_close(found, alpha_divergence_loss(student, teacher, alphas=[0.3], clip=None))


@pytest.mark.parametrize("limit", [(0.0, 0.5), (0.5, 0.0), (0.0, 0.0)])
def test_it_is_continuous_at_zero(limit: tuple[float, float]) -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    near = abkd_loss(student, teacher, alpha=max(limit[0], 1e-5), beta=max(limit[1], 1e-5))
    torch.testing.assert_close(abkd_loss(student, teacher, alpha=limit[0], beta=limit[1]), near, rtol=1e-3, atol=1e-6)


def test_a_class_that_both_rule_out_changes_nothing() -> None:
    student, teacher = torch.randn(2, 4, 5).double()
    gone = torch.full((4, 1), -math.inf).double()
    for alpha, beta in ((0.8, 0.3), (0.0, 0.5), (0.5, 0.0), (0.0, 0.0)):
        wide = torch.cat([student, gone], 1).requires_grad_()
        found = abkd_loss(wide, torch.cat([teacher, gone], 1), alpha=alpha, beta=beta)
        torch.testing.assert_close(found, abkd_loss(student, teacher, alpha=alpha, beta=beta))
        found.backward()
        assert wide.grad is not None
        assert wide.grad.isfinite().all()


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="alpha"):
        ABKD(alpha=-0.1)
    with pytest.raises(ConfigError, match="beta"):
        ABKD(beta=math.inf)
