from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import TensorError
from limbeck.models.vit import ViT
from limbeck.objectives.feature.srrl import SRRL, srrl_loss
from tests.objectives import reference
from tests.objectives.test_classes import Net, make_batch


def plain(student: Tensor, teacher: Tensor, weight: Tensor, alpha: float, beta: float) -> float:
    values = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        features = reference.mean([(a - b) ** 2 for a, b in zip(s, t, strict=True)])
        answers = reference.mean([(reference.dot(row, s) - reference.dot(row, t)) ** 2 for row in weight.tolist()])
        values.append(alpha * features + beta * answers)
    return reference.mean(values)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.0, 2.0), (3.0, 0.0)])
def test_equals_the_paper(alpha: float, beta: float) -> None:
    student, teacher, weight = *torch.randn(2, 5, 6).double(), torch.randn(4, 6).double()
    value = srrl_loss(student, teacher, weight, alpha=alpha, beta=beta)
    assert value.item() == pytest.approx(plain(student, teacher, weight, alpha, beta), rel=1e-9)
    assert srrl_loss(teacher, teacher, weight) == 0


def test_it_compares_the_answers_of_the_teachers_classifier() -> None:
    """With its bias, which falls out; and the student's connector stands before the pooling."""
    torch.manual_seed(0)
    teacher, student, batch, loss = Net(6), Net(4), make_batch(), SRRL(alpha=0.0)
    value = Distiller(student, loss, teacher).setup(batch)(batch).total
    h = loss.connector(student.layer3(student.layer2(student.layer1(batch.inputs)))).mean((2, 3))
    torch.testing.assert_close(value, F.mse_loss(teacher.fc(h), teacher(batch.inputs)))


def test_classifiers_stay_and_the_backbone_learns() -> None:
    teacher, student, batch, loss = Net(6), Net(4), make_batch(), SRRL()
    Distiller(student, loss, teacher).setup(batch)(batch).total.backward()
    assert student.fc.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())
    assert student.layer1[0].weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in loss.parameters())


def test_connector_ends_like_the_teachers_feature() -> None:
    for teacher, relu in (
        (Net(6), True),
        (ViT(dim=16, depth=1, heads=2, num_classes=5, image_size=8, patch_size=2), False),
    ):
        loss = SRRL()
        distiller = Distiller(Net(4), loss, teacher).setup(make_batch())
        assert any(isinstance(m, nn.ReLU) for m in loss.connector.modules()) == relu
        assert distiller(make_batch()).total.isfinite()


@pytest.mark.parametrize("tap", ["stages:-1", "penultimate"])
def test_into_a_transformer(tap: str) -> None:
    torch.manual_seed(0)
    student = ViT(dim=16, depth=2, heads=2, num_classes=5, image_size=8, patch_size=2)
    distiller, batch = Distiller(student, SRRL(tap=tap), Net(6)).setup(make_batch()), make_batch()
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    seen = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = distiller(batch).total
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.7 * seen[0]


def test_what_it_refuses() -> None:
    with pytest.raises(TensorError, match="weight"):
        srrl_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(TensorError, match="feature"):
        srrl_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(4, 3))
    distiller = Distiller(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        SRRL(tap="penultimate"),
        nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)),
    ).setup(Batch(torch.randn(4, 3)))
    with pytest.raises(TensorError, match="2 or more"):
        distiller(Batch(torch.randn(1, 3)))
