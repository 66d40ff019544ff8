from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.ats import ATS, ats_loss
from limbeck.objectives.response.kd import kd_loss
from tests.objectives.reference import kl, mean, softmax


@pytest.mark.parametrize(("correct", "wrong", "temperature"), [(4.0, 2.0, 1.0), (1.0, 3.0, 2.0)])
def test_equals_the_paper(correct: float, wrong: float, temperature: float) -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    labels = torch.randint(0, 6, (5,))
    wanted = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p = softmax([z / (correct if c == y else wrong) for c, z in enumerate(t)])
        wanted.append(temperature**2 * kl(p, softmax(s, temperature)))
    found = ats_loss(student, teacher, labels, correct=correct, wrong=wrong, temperature=temperature)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_one_temperature_is_kd() -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    found = ats_loss(student, teacher, torch.arange(5), correct=3.0, wrong=3.0, temperature=3.0)
    torch.testing.assert_close(found, kd_loss(student, teacher, temperature=3.0))


def test_other_classes_of_a_sure_teacher_differ_more() -> None:
    """What the student is told of them at the optimum, beside one temperature that leaves the label as probable."""
    teacher = torch.tensor([[12.0, 3.0, 1.0, 0.0]]).double()
    both = (teacher / torch.tensor([4.0, 2.0, 2.0, 2.0])).softmax(1)
    one = min(((teacher / t).softmax(1) for t in torch.arange(1.0, 9, 0.01)), key=lambda p: abs(p[0, 0] - both[0, 0]))
    assert both[0, 1:].var() > 2 * one[0, 1:].var()
    student = both.log().requires_grad_()
    value = ats_loss(student, teacher, torch.tensor([0]))
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


def test_places_without_a_label_do_not_count() -> None:
    student, teacher = torch.randn(2, 2, 3, 4)
    labels = torch.tensor([[1, -1, 0], [-1, 2, 3]])
    known = labels >= 0
    found = ats_loss(student, teacher, labels)
    torch.testing.assert_close(found, ats_loss(student[known], teacher[known], labels[known]))


def test_what_it_refuses() -> None:
    logits = torch.randn(2, 3)
    with pytest.raises(TensorError, match="labels"):
        ats_loss(logits, logits)
    with pytest.raises(ConfigError, match="wrong"):
        ATS(wrong=0.0)
