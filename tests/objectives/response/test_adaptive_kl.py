from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.objectives.response.adaptive_kl import AdaptiveKL, adaptive_kl_loss, head_share
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.reverse_kl import reverse_kl_loss
from tests.objectives.reference import kl, mean, softmax


def plain(student: list[float], teacher: list[float], head: float, temperature: float) -> tuple[float, float]:
    """One row by the paper's steps: the head's and the tail's gap, and the weighted divergence."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    gaps, total = [0.0, 0.0], 0.0
    for rank, c in enumerate(sorted(range(len(p)), key=lambda c: -p[c])):
        total += p[c]
        gaps[rank > 0 and total > head] += abs(p[c] - q[c])
    share = gaps[0] / (gaps[0] + gaps[1])
    return share, temperature**2 * (share * kl(p, q) + (1 - share) * kl(q, p))


@pytest.mark.parametrize(("head", "temperature"), [(0.5, 1.0), (0.9, 2.0), (0.05, 1.0)])
def test_equals_the_paper(head: float, temperature: float) -> None:
    student, teacher = 3 * torch.randn(2, 6, 7).double()
    rows = [
        plain(s, t, head, temperature)
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]  # fmt: skip
    found = adaptive_kl_loss(student, teacher, head=head, temperature=temperature)
    assert found.item() == pytest.approx(mean([value for _, value in rows]), rel=1e-9)
    log_p, log_q = ((z / temperature).log_softmax(-1) for z in (teacher, student))
    torch.testing.assert_close(head_share(log_p, log_q, head), torch.tensor([share for share, _ in rows]).double())


def test_a_gap_in_the_head_alone_gives_kl_and_in_the_tail_alone_reverse_kl() -> None:
    p = torch.tensor([[0.3, 0.3, 0.2, 0.2]], dtype=torch.float64).log()
    within = torch.tensor([[0.4, 0.2, 0.2, 0.2]], dtype=torch.float64).log()
    beyond = torch.tensor([[0.3, 0.3, 0.3, 0.1]], dtype=torch.float64).log()
    torch.testing.assert_close(adaptive_kl_loss(within, p, head=0.7), kd_loss(within, p, temperature=1.0))
    torch.testing.assert_close(adaptive_kl_loss(beyond, p, head=0.7), reverse_kl_loss(beyond, p))


def test_the_weights_are_constants() -> None:
    student, teacher = 2 * torch.randn(2, 4, 5).double()
    student.requires_grad_()
    share = head_share(teacher.log_softmax(-1), student.log_softmax(-1), 0.5)
    values = [
        loss(student, teacher, reduction="none")
        for loss in (lambda *a, **k: kd_loss(*a, temperature=1.0, **k), reverse_kl_loss)
    ]
    wanted = torch.autograd.grad((share * values[0] + (1 - share) * values[1]).mean(), student)[0]
    found = torch.autograd.grad(adaptive_kl_loss(student, teacher), student)[0]
    torch.testing.assert_close(found, wanted)


def test_at_equality_nothing_is_left() -> None:
    student: Tensor = torch.randn(3, 5).double().requires_grad_()
    value = adaptive_kl_loss(student, student.detach().clone())
    value.backward()
    assert value.item() == 0
    torch.testing.assert_close(student.grad, torch.zeros(3, 5).double())


def test_a_divergence_without_weight_may_be_infinite() -> None:
    """The student rules out a class of the tail; all of the gap lies there, so KL, which is infinite, has no weight."""
    teacher = torch.tensor([[0.5, 0.3, 0.2]]).log()
    student = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert adaptive_kl_loss(student, teacher).item() == pytest.approx(0.5 * math.log(0.5 / 0.3))


def test_what_it_refuses() -> None:
    for head in (0.0, 1.0):
        with pytest.raises(ConfigError, match="head"):
            AdaptiveKL(head=head)
