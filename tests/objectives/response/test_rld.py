from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.dkd import dkd_loss
from limbeck.objectives.response.rld import RLD, rld_loss
from tests.objectives.reference import kl, mean, softmax


@pytest.mark.parametrize(("temperature", "confidence"), [(1.0, 1.0), (4.0, 2.0)])
def test_equals_the_paper(temperature: float, confidence: float) -> None:
    student, teacher = 2 * torch.randn(2, 8, 6).double()
    labels = torch.randint(0, 6, (8,))
    labels[0], labels[1] = teacher[0].argmin(), teacher[1].argmax()
    wanted = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        top, own = max(softmax(t, confidence)), softmax(s, confidence)[y]
        value = confidence**2 * kl([top, 1 - top], [own, 1 - own])
        below = [c for c in range(6) if t[c] < t[y]]
        if below:
            parts = (softmax([z[c] for c in below], temperature) for z in (t, s))
            value += 3 * temperature**2 * kl(*parts)
        wanted.append(value)
    found = rld_loss(student, teacher, labels, beta=3.0, temperature=temperature, confidence_temperature=confidence)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_where_the_teacher_is_right_it_is_dkd() -> None:
    student, teacher = torch.randn(2, 6, 5).double()
    found = rld_loss(student, teacher, teacher.argmax(1), temperature=2.0)
    torch.testing.assert_close(found, dkd_loss(student, teacher, teacher.argmax(1), temperature=2.0))


def test_a_wrong_teacher_does_not_pull_away_from_the_label() -> None:
    """The gradient never lowers the label for the sake of the class the teacher takes it for."""
    student, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[1.0, 5.0, 0.0, -1.0]])
    rld_loss(student, teacher, torch.tensor([0])).backward()
    assert student.grad is not None
    assert student.grad[0, 0] < 0 < student.grad[0, 1]


def test_a_label_ranked_last_leaves_only_the_confidence() -> None:
    student, teacher = torch.randn(1, 4, requires_grad=True), torch.tensor([[-3.0, 5.0, 0.0, -1.0]])
    value = rld_loss(student, teacher, torch.tensor([0]), alpha=0.0)
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_unlabelled_samples_do_not_count() -> None:
    student, teacher, labels = *torch.randn(2, 3, 4), torch.tensor([1, -100, 2])
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(rld_loss(student, teacher, labels), rld_loss(student[kept], teacher[kept], labels[kept]))


def test_what_it_refuses() -> None:
    logits = torch.randn(2, 3)
    with pytest.raises(TensorError, match="labels"):
        rld_loss(logits, logits)
    with pytest.raises(ConfigError, match="confidence_temperature"):
        rld_loss(logits, logits, torch.tensor([0, 1]), confidence_temperature=0.0)
    with pytest.raises(ConfigError, match="temperature"):
        RLD(temperature=0.0)
