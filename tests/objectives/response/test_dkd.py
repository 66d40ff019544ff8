from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import TensorError
from limbeck.objectives.response.dkd import dkd_loss
from limbeck.objectives.response.kd import kd_loss
from tests.objectives import reference


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.0, 1.0, 1.0), (2.0, 0.0, 0.7)])
@pytest.mark.parametrize("classes", [2, 7])
def test_equals_the_paper(alpha: float, beta: float, temperature: float, classes: int) -> None:
    student, teacher = torch.randn(2, 5, classes).double()
    labels = torch.randint(0, classes, (5,))
    value = dkd_loss(student, teacher, labels, alpha=alpha, beta=beta, temperature=temperature)
    assert value.item() == pytest.approx(reference.dkd(student, teacher, labels, alpha, beta, temperature), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_its_two_parts(temperature: float) -> None:
    """Equation 7: KD = TCKD + (1 - p_y of the teacher) NCKD, place by place."""
    student, teacher = torch.randn(2, 5, 3, 6).double()
    labels = torch.randint(0, 6, (5, 3))
    target = dkd_loss(student, teacher, labels, alpha=1, beta=0, temperature=temperature, reduction="none")
    others = dkd_loss(student, teacher, labels, alpha=0, beta=1, temperature=temperature, reduction="none")
    p_target = (teacher / temperature).softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    whole = kd_loss(student, teacher, temperature=temperature, reduction="none")
    torch.testing.assert_close(target + (1 - p_target) * others, whole)


def test_two_classes_have_no_others() -> None:
    student, teacher = torch.randn(2, 5, 2)
    labels = torch.randint(0, 2, (5,))
    assert dkd_loss(student, teacher, labels, alpha=0, beta=8) == 0
    torch.testing.assert_close(dkd_loss(student, teacher, labels), kd_loss(student, teacher))


def test_a_sure_teacher_keeps_its_digits() -> None:
    """Where the target takes all probability in float32, the others' share is still right."""
    student, teacher, labels = torch.tensor([[40.0, 1.0, 0.0]]), torch.tensor([[60.0, 0.0, 1.0]]), torch.tensor([0])
    single = dkd_loss(student, teacher, labels, alpha=0, beta=1, temperature=1.0)
    exact = dkd_loss(student.double(), teacher.double(), labels, alpha=0, beta=1, temperature=1.0)
    assert single.item() == pytest.approx(exact.item(), rel=1e-5)
    assert exact.item() == pytest.approx((torch.e - 1) / (torch.e + 1), rel=1e-6)


def test_unlabelled_samples_do_not_count() -> None:
    student, teacher, labels = *torch.randn(2, 3, 4), torch.tensor([1, -100, 2])
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(dkd_loss(student, teacher, labels), dkd_loss(student[kept], teacher[kept], labels[kept]))


def test_what_it_refuses() -> None:
    logits = torch.randn(2, 3)
    with pytest.raises(TensorError, match="labels"):
        dkd_loss(logits, logits)
    with pytest.raises(TensorError, match="integer labels"):
        dkd_loss(logits, logits, logits.softmax(-1))
    with pytest.raises(TensorError, match="student_logits"):
        dkd_loss(logits[:, :1], logits[:, :1], torch.tensor([0, 0]))
