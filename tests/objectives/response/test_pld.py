from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.pld import PLD, pld_loss
from tests.objectives import reference


def ranked(teacher: list[float], label: int) -> list[int]:
    return [label, *sorted((c for c in range(len(teacher)) if c != label), key=lambda c: -teacher[c])]


def plain(student: Tensor, teacher: Tensor, labels: Tensor, tau: float, student_tau: float, top: int) -> float:
    values = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        order, q, value = ranked(t, y), reference.softmax(t, tau), 0.0
        for k, c in enumerate(order[:top]):
            left = sum(math.exp(s[other] / student_tau) for other in order[k:])
            value += q[c] * (math.log(left) - s[c] / student_tau)
        values.append(value)
    return reference.mean(values)


@pytest.mark.parametrize(("tau", "student_tau"), [(1.0, 1.0), (4.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("top", [None, 1, 3])
@pytest.mark.parametrize("classes", [2, 7])
def test_equals_the_paper(tau: float, student_tau: float, top: int | None, classes: int) -> None:
    student, teacher = 2 * torch.randn(2, 5, classes).double()
    labels = torch.randint(0, classes, (5,))
    value = pld_loss(student, teacher, labels, teacher_temperature=tau, student_temperature=student_tau, top=top)
    wanted = plain(student, teacher, labels, tau, student_tau, classes if top is None else top)
    assert value.item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("label", "wanted"), [(0, 0.8258), (2, 0.5530)])
def test_worked_examples(label: int, wanted: float) -> None:
    teacher = torch.tensor([[math.log(4), math.log(2), 0.0]])
    assert pld_loss(torch.zeros(1, 3), teacher, torch.tensor([label])).item() == pytest.approx(wanted, abs=5e-5)


def test_a_sure_teacher_gives_cross_entropy() -> None:
    student, labels = torch.randn(6, 5).double(), torch.randint(0, 5, (6,))
    teacher = 60.0 * F.one_hot(labels, 5).double()
    torch.testing.assert_close(pld_loss(student, teacher, labels), F.cross_entropy(student, labels))


def test_first_choice_alone_is_weighted_cross_entropy() -> None:
    student, teacher, labels = *torch.randn(2, 6, 5).double(), torch.randint(0, 5, (6,))
    wanted = teacher.softmax(-1)[torch.arange(6), labels] * F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(pld_loss(student, teacher, labels, top=1, reduction="none"), wanted)


def test_gradient_is_the_closed_form() -> None:
    """Of each choice: softmax over what is left, minus one at the chosen class, times the weight."""
    student, teacher, labels = *torch.randn(2, 4, 6).double(), torch.randint(0, 6, (4,))
    student.requires_grad_()
    pld_loss(student, teacher, labels, reduction="sum").backward()
    wanted = torch.zeros(4, 6).double()
    for b, (s, t, y) in enumerate(zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)):
        order, q = ranked(t, y), reference.softmax(t)
        for k, c in enumerate(order):
            for other, p in zip(order[k:], reference.softmax([s[o] for o in order[k:]]), strict=True):
                wanted[b, other] += q[c] * (p - (other == c))
    assert student.grad is not None
    torch.testing.assert_close(student.grad, wanted)
    torch.testing.assert_close(student.grad.sum(-1), torch.zeros(4).double())


def test_what_changes_nothing_and_what_costs_more() -> None:
    student, teacher, labels = *torch.randn(2, 5, 6).double(), torch.randint(0, 6, (5,))
    value = pld_loss(student, teacher, labels, reduction="none")
    assert (value >= 0).all()
    moved = pld_loss(student + torch.randn(5, 1), teacher - 3, labels, reduction="none")
    torch.testing.assert_close(moved, value)
    labels = teacher.argmax(-1)
    assert (pld_loss(-teacher, teacher, labels, reduction="none") > pld_loss(teacher, teacher, labels)).all()


def test_it_is_convex() -> None:
    (one, other), teacher = torch.randn(2, 8, 5).double(), torch.randn(8, 5).double()
    labels = torch.randint(0, 5, (8,))
    middle = pld_loss((one + other) / 2, teacher, labels, reduction="none")
    ends = [pld_loss(s, teacher, labels, reduction="none") for s in (one, other)]
    assert (middle <= (ends[0] + ends[1]) / 2).all()


def test_what_it_refuses() -> None:
    logits, labels = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(TensorError, match="labels"):
        pld_loss(logits, logits)
    with pytest.raises(TensorError, match="integer labels"):
        pld_loss(logits, logits, logits.softmax(-1))
    for name in ("teacher_temperature", "student_temperature", "top"):
        with pytest.raises(ConfigError, match=name):
            PLD(**{name: 0})
        with pytest.raises(ConfigError, match=name):
            pld_loss(logits, logits, labels, **{name: 0})
