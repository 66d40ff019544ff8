from __future__ import annotations

from math import exp, log

import pytest
import torch

from limbeck.core.errors import TensorError
from limbeck.objectives.response.wsld import wsld_loss
from tests.objectives.reference import mean, softmax


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_paper(temperature: float) -> None:
    student, teacher = 2 * torch.randn(2, 5, 6).double()
    labels = torch.randint(0, 6, (5,))
    wanted = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        weight = 1 - exp(-log(softmax(s)[y]) / log(softmax(t)[y]))
        p, q = softmax(t, temperature), softmax(s, temperature)
        wanted.append(-(temperature**2) * weight * sum(a * log(b) for a, b in zip(p, q, strict=True)))
    found = wsld_loss(student, teacher, labels, temperature=temperature)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-6)  # 1e-7 stands beside the teacher's cross-entropy


def test_soft_labels_fade_out_as_the_student_passes_the_teacher() -> None:
    """Same soft cross-entropy in both rows but for the label, which only the student or only the teacher knows."""
    knows, gropes = torch.tensor([[6.0, 0.0, 0.0]]), torch.tensor([[0.0, 6.0, 0.0]])
    ahead, behind = (wsld_loss(s, t, torch.tensor([0])).item() for s, t in ((knows, gropes), (gropes, knows)))
    assert ahead < 0.01 * behind


def test_the_weight_is_a_constant() -> None:
    student, teacher, labels = *torch.randn(2, 1, 5).double(), torch.tensor([2])
    student.requires_grad_()
    wsld_loss(student, teacher, labels).backward()
    with torch.no_grad():
        ratio = student.log_softmax(-1)[0, 2] / (teacher.log_softmax(-1)[0, 2] - 1e-7)
        wanted = 2 * (1 - (-ratio).exp()) * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1))
    assert student.grad is not None
    torch.testing.assert_close(student.grad, wanted)


def test_both_right_beyond_doubt() -> None:
    logits = torch.tensor([[900.0, 0.0]])
    assert wsld_loss(logits, logits, torch.tensor([0])) == 0


def test_unlabelled_samples_do_not_count() -> None:
    student, teacher, labels = *torch.randn(2, 3, 4), torch.tensor([1, -100, 2])
    kept = torch.tensor([0, 2])
    found = wsld_loss(student, teacher, labels)
    torch.testing.assert_close(found, wsld_loss(student[kept], teacher[kept], labels[kept]))


def test_what_it_refuses() -> None:
    logits = torch.randn(2, 3)
    for labels in (None, logits.softmax(-1)):
        with pytest.raises(TensorError, match="labels"):
            wsld_loss(logits, logits, labels)
