from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.cross_entropy import cross_entropy_loss
from limbeck.objectives.response.label_smoothing import label_smoothing_loss
from limbeck.objectives.response.tf_kd import TfKD, tf_kd_loss
from tests.objectives import reference


def plain(student: Tensor, labels: Tensor, correct: float, temperature: float, soften_student: bool) -> float:
    values = []
    for row, label in zip(student.tolist(), labels.tolist(), strict=True):
        designed = [correct if c == label else (1 - correct) / (len(row) - 1) for c in range(len(row))]
        own = reference.softmax(row, temperature if soften_student else 1.0)
        values.append(reference.kl(reference.softmax(designed, temperature), own))
    return reference.mean(values) * (temperature**2 if soften_student else 1.0)


@pytest.mark.parametrize(("correct", "temperature"), [(0.99, 20.0), (0.9, 2.0)])
@pytest.mark.parametrize("soften_student", [False, True])
@pytest.mark.parametrize("classes", [2, 7])
def test_equals_the_paper(correct: float, temperature: float, soften_student: bool, classes: int) -> None:
    student, labels = 2 * torch.randn(5, classes).double(), torch.randint(0, classes, (5,))
    options = {"correct": correct, "temperature": temperature, "soften_student": soften_student}
    value = tf_kd_loss(student, labels, **options)
    assert value.item() == pytest.approx(plain(student, labels, correct, temperature, soften_student), rel=1e-9)


def test_an_undecided_teacher_is_label_smoothing() -> None:
    """Label smoothing is KD from a uniform teacher, as the paper proves: the gradients of the sums are the same."""
    student, labels = torch.randn(6, 5).double().requires_grad_(), torch.randint(0, 5, (6,))
    loss = 0.9 * cross_entropy_loss(student, labels) + 0.1 * tf_kd_loss(student, labels, temperature=1e9)
    (found,) = torch.autograd.grad(loss, student)
    (wanted,) = torch.autograd.grad(label_smoothing_loss(student, labels, smoothing=0.1), student)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_places_without_a_label_do_not_count() -> None:
    student, labels = torch.randn(2, 3, 4), torch.tensor([[1, -100, 2], [-1, 0, 3]])
    kept = labels >= 0
    torch.testing.assert_close(tf_kd_loss(student, labels), tf_kd_loss(student[kept], labels[kept]))


def test_what_it_refuses() -> None:
    logits, labels = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(TensorError, match="integer labels"):
        tf_kd_loss(logits, logits.softmax(-1))
    with pytest.raises(TensorError, match="student_logits"):
        tf_kd_loss(logits[:, :1], torch.tensor([0, 0]))
    for bad in (0.0, 1.0):
        with pytest.raises(ConfigError, match="correct"):
            TfKD(correct=bad)
    with pytest.raises(ConfigError, match="temperature"):
        tf_kd_loss(logits, labels, temperature=0.0)
