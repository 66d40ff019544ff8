from __future__ import annotations

from math import log

import pytest
import torch

from limbeck.core.errors import TensorError
from limbeck.objectives.response.cross_entropy import cross_entropy_loss
from limbeck.objectives.response.dkd import dkd_loss
from limbeck.objectives.response.nkd import nkd_loss
from tests.objectives.reference import mean, softmax


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0), (0.0, 2.0)])
@pytest.mark.parametrize("classes", [2, 7])
def test_equals_the_paper(gamma: float, temperature: float, classes: int) -> None:
    student, teacher = 2 * torch.randn(2, 5, classes).double()
    labels = torch.randint(0, classes, (5,))
    wanted = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        target = -softmax(t)[y] * log(softmax(s)[y])
        p, q = softmax(t, temperature), softmax(s, temperature)
        others = [c for c in range(classes) if c != y]
        rest = -sum(p[c] / (1 - p[y]) * log(q[c] / (1 - q[y])) for c in others)
        wanted.append(target + gamma * temperature**2 * rest)
    found = nkd_loss(student, teacher, labels, gamma=gamma, temperature=temperature)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_the_other_classes_have_dkds_gradient() -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    labels, gradients = torch.randint(0, 6, (5,)), []
    for loss in (
        lambda s: (
            nkd_loss(s, teacher, labels, gamma=2.0, temperature=3.0)
            - nkd_loss(s, teacher, labels, gamma=0.0, temperature=3.0)
        ),
        lambda s: dkd_loss(s, teacher, labels, alpha=0.0, beta=2.0, temperature=3.0),
    ):
        leaf = student.clone().requires_grad_()
        loss(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_with_a_sure_teacher_the_target_part_is_the_cross_entropy() -> None:
    student, labels = torch.randn(5, 6).double(), torch.randint(0, 6, (5,))
    teacher = 400.0 * torch.nn.functional.one_hot(labels, 6).double()
    torch.testing.assert_close(
        nkd_loss(student, teacher, labels, gamma=0.0), cross_entropy_loss(student, labels), rtol=1e-9, atol=1e-12
    )


def test_of_soft_labels_the_largest_is_the_target() -> None:
    student, teacher = torch.randn(2, 5, 6)
    soft = torch.rand(5, 6).softmax(-1)
    torch.testing.assert_close(nkd_loss(student, teacher, soft), nkd_loss(student, teacher, soft.argmax(-1)))


def test_unlabelled_samples_do_not_count() -> None:
    student, teacher, labels = *torch.randn(2, 3, 4), torch.tensor([1, -100, 2])
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(nkd_loss(student, teacher, labels), nkd_loss(student[kept], teacher[kept], labels[kept]))


def test_what_it_refuses() -> None:
    logits = torch.randn(2, 3)
    with pytest.raises(TensorError, match="labels"):
        nkd_loss(logits, logits)
    with pytest.raises(TensorError, match="class beside"):
        nkd_loss(logits[:, :1], logits[:, :1], torch.tensor([0, 0]))
