from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.objectives.response.alpha_divergence import AlphaDivergence, alpha_divergence_loss
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.reverse_kl import reverse_kl_loss
from tests.objectives.reference import kl, mean, softmax


def alpha_of(p: list[float], q: list[float], alpha: float, clip: float = math.inf) -> float:
    if alpha == 1:
        return kl(p, q)
    if alpha == 0:
        return sum(-b * math.log(min(a / b, clip)) for a, b in zip(p, q, strict=True))
    total = sum(b * (min((a / b) ** alpha, clip) - 1) for a, b in zip(p, q, strict=True))
    return total / (alpha * (alpha - 1))


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("alphas", [[0.5], [-1.0], [2.0], [0.0], [1.0], [-1.0, 1.0], [-0.5, 0.3, 1.5]])
def test_equals_the_paper(alphas: list[float], clip: float | None) -> None:
    student, teacher = torch.randn(2, 7, 6).double()
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax(s, 1.5), softmax(t, 1.5)
        wanted.append(1.5**2 * max(alpha_of(p, q, a, clip or math.inf) for a in alphas))
    found = alpha_divergence_loss(student, teacher, alphas=alphas, clip=clip, temperature=1.5)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_its_members_join_kl_and_reverse_kl() -> None:
    student, teacher = torch.randn(2, 7, 6).double()
    near = [alpha_divergence_loss(student, teacher, alphas=[a], clip=None) for a in (1 - 1e-6, 1e-6)]
    torch.testing.assert_close(near[0], kd_loss(student, teacher, temperature=1.0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(near[1], reverse_kl_loss(student, teacher), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 2.0])
def test_where_nothing_is_clipped_the_gradient_is_the_derivative(alpha: float) -> None:
    student, teacher = torch.randn(2, 4, 5).double()
    gradients = []
    for clip in (None, 1e9):
        leaf = student.clone().requires_grad_()
        alpha_divergence_loss(leaf, teacher, alphas=[alpha], clip=clip).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.autograd.gradcheck(
        lambda s: alpha_divergence_loss(s, teacher, alphas=[alpha], clip=None), student.requires_grad_()
    )


def test_clipping_bounds_what_a_sure_student_pays() -> None:
    """Alpha -1 weighs (q / p), which has no bound where the teacher believes in nothing."""
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -80.0]])
    assert alpha_divergence_loss(student, teacher, alphas=[-1.0], clip=None).item() > 1e30
    assert alpha_divergence_loss(student, teacher, alphas=[-1.0], clip=5.0).item() == pytest.approx(0.875)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 1.0])
def test_renyi(alpha: float) -> None:
    student, teacher = torch.randn(2, 4, 5).double()
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax(s), softmax(t)
        total = sum(a**alpha * b ** (1 - alpha) for a, b in zip(p, q, strict=True))
        wanted.append(kl(p, q) if alpha == 1 else math.log(total) / (alpha - 1))
    found = alpha_divergence_loss(student, teacher, alphas=[alpha], clip=None, renyi=True)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_a_class_that_both_rule_out_changes_nothing() -> None:
    student, teacher = torch.randn(2, 4, 5).double()
    gone = torch.full((4, 1), -math.inf).double()
    for alphas in ([-1.0], [0.0], [0.5], [2.0]):
        for clip in (None, 3.0):
            wide = torch.cat([student, gone], 1).requires_grad_()
            found = alpha_divergence_loss(wide, torch.cat([teacher, gone], 1), alphas=alphas, clip=clip)
            torch.testing.assert_close(found, alpha_divergence_loss(student, teacher, alphas=alphas, clip=clip))
            found.backward()
            assert wide.grad is not None
            assert wide.grad.isfinite().all()


def test_what_it_refuses() -> None:
    for options in ({"alphas": []}, {"alphas": [math.nan]}, {"clip": 0.5}, {"renyi": True}):
        with pytest.raises(ConfigError, match="alpha|clip"):
            AlphaDivergence(**options)
