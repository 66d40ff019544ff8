from __future__ import annotations

from math import log2, sqrt

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.relation.itrd import ITRD, itrd_loss
from tests.objectives.reference import dot, mean
from tests.objectives.test_classes import Net, make, make_batch


def correlation(student: Tensor, teacher: Tensor, alpha: float) -> float:
    total, n = 0.0, len(student)
    for x, y in zip(student.T.tolist(), teacher.T.tolist(), strict=True):
        cov = sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y, strict=True))
        spread = sqrt(sum((a - mean(x)) ** 2 for a in x) * sum((b - mean(y)) ** 2 for b in y)) / (n - 1)
        total += abs(cov / spread / n - 1) ** (2 * alpha)
    return log2(total)


def mutual(student: Tensor, teacher: Tensor) -> float:
    n = range(len(student))
    own, told = (
        [[dot(a, b) / sqrt(dot(a, a) * dot(b, b)) for b in z.tolist()] for a in z.tolist()] for z in (student, teacher)
    )
    joint = [[own[i][j] * told[i][j] for j in n] for i in n]
    return sum((own[i][j] / len(n)) ** 2 - (joint[i][j] / len(n)) ** 2 for i in n for j in n)


@pytest.mark.parametrize("alpha", [1.01, 1.5])
def test_equals_the_paper(alpha: float) -> None:
    student, teacher = torch.randn(2, 6, 4).double()
    wanted = 2 * correlation(student, teacher, alpha) + 0.5 * mutual(student, teacher)
    assert itrd_loss(student, teacher, alpha=alpha, mutual=0.5).item() == pytest.approx(wanted, rel=1e-9)


def test_scale_and_shift_of_a_channel_do_not_matter_for_its_correlation() -> None:
    student, teacher = torch.randn(2, 6, 4).double()
    moved = student * torch.tensor([1.0, 3, 0.2, 7]) + torch.tensor([0.0, 1, -2, 5])
    torch.testing.assert_close(itrd_loss(moved, teacher, mutual=0.0), itrd_loss(student, teacher, mutual=0.0))
    assert itrd_loss(teacher, teacher, mutual=0.0) < itrd_loss(student, teacher, mutual=0.0)


def test_equal_relations_say_nothing_more() -> None:
    """Where samples are alike in all or nothing, the joint Gram matrix is the student's own."""
    student = torch.eye(3)[torch.tensor([0, 0, 1, 2])].double()
    assert itrd_loss(student, student, correlation=0.0).item() == pytest.approx(0.0, abs=1e-12)


def test_what_does_not_vary_passes_no_gradient() -> None:
    student = torch.ones(5, 3, requires_grad=True)
    value = itrd_loss(student, torch.randn(5, 3), mutual=0.0)
    value.backward()
    assert value.item() == pytest.approx(2 * log2(3))
    assert student.grad is not None
    assert not student.grad.any()


def test_masked_samples_are_left_out() -> None:
    student, teacher = torch.randn(2, 7, 4).double()
    counts = torch.arange(7) % 3 > 0
    wanted = itrd_loss(student[counts], teacher[counts])
    torch.testing.assert_close(itrd_loss(student, teacher, mask=counts), wanted)


def test_objective() -> None:
    loss, teacher, batch = ITRD(alpha=1.5), Net(6), make_batch()
    distiller = make(loss, teacher)
    found = distiller(batch).total
    student, inputs = distiller.student, batch.inputs
    assert isinstance(student, Net)
    own, told = (net.layer3(net.layer2(net.layer1(inputs))).mean((2, 3)) for net in (student, teacher))
    assert loss.embed is not None
    torch.testing.assert_close(found, itrd_loss(loss.embed(own), told, alpha=1.5))


def test_misuse_is_refused() -> None:
    with pytest.raises(TensorError, match="teacher_feature"):
        itrd_loss(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(ConfigError, match="alpha"):
        ITRD(alpha=0.0)
