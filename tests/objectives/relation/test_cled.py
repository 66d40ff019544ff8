"""Label-wise embedding distillation, class-aware and instance-aware, against the paper's equations in plain loops."""

from __future__ import annotations

from math import dist

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multilabel_average_precision

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import TensorError
from limbeck.core.objective import Terms
from limbeck.objectives.relation.cled import CLED, cled_loss
from limbeck.objectives.relation.iled import ILED, iled_loss
from limbeck.objectives.response.binary_cross_entropy import BinaryCrossEntropy
from limbeck.objectives.response.l2d import L2D, l2d_loss
from limbeck.objectives.response.mld import mld_loss


def structure(student: list[list[float]], teacher: list[list[float]]) -> float:
    """H of one set: distances over the mean of those above zero, Huber, over the set's size."""

    def scaled(rows: list[list[float]]) -> list[list[float]]:
        pairs = [[dist(a, b) for b in rows] for a in rows]
        above = [d for row in pairs for d in row if d > 0]
        mean = sum(above) / len(above)
        return [[d / mean for d in row] for row in pairs]

    total = 0.0
    for own, other in zip(scaled(student), scaled(teacher), strict=True):
        for a, b in zip(own, other, strict=True):
            gap = abs(a - b)
            total += gap * gap / 2 if gap < 1 else gap - 0.5
    return total / len(student)


def by_class(student: Tensor, teacher: Tensor, labels: Tensor) -> float:
    total = 0.0
    for c in range(labels.shape[1]):
        rows = [i for i in range(len(labels)) if labels[i, c] > 0.5]
        if len(rows) > 1:
            total += structure(student[rows, c].tolist(), teacher[rows, c].tolist())
    return total / len(labels)


def by_sample(student: Tensor, teacher: Tensor, labels: Tensor) -> float:
    total = 0.0
    for i in range(len(labels)):
        classes = [c for c in range(labels.shape[1]) if labels[i, c] > 0.5]
        if len(classes) > 1:
            total += structure(student[i, classes].tolist(), teacher[i, classes].tolist())
    return total / len(labels)


def made(size: int = 6, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    labels = (torch.rand(size, classes) < 0.5).double()
    return torch.randn(size, classes, 3).double(), torch.randn(size, classes, 5).double(), labels


@pytest.mark.parametrize("sizes", [(6, 4), (9, 2), (2, 7)])
def test_equal_the_paper(sizes: tuple[int, int]) -> None:
    student, teacher, labels = made(*sizes)
    assert cled_loss(student, teacher, labels).item() == pytest.approx(by_class(student, teacher, labels), rel=1e-9)
    assert iled_loss(student, teacher, labels).item() == pytest.approx(by_sample(student, teacher, labels), rel=1e-9)


def test_scale_shift_and_rotation_do_not_matter() -> None:
    student, _, labels = made()
    rotation = torch.linalg.qr(torch.randn(3, 3).double()).Q
    teacher = 7 * student @ rotation + 2
    for loss in (cled_loss, iled_loss):
        assert loss(student, teacher, labels).item() == pytest.approx(0, abs=1e-12)


def test_no_label_twice_leaves_nothing_to_compare_within_a_class() -> None:
    student, teacher, _ = made(3, 3)
    student.requires_grad_()
    value = cled_loss(student, teacher, torch.eye(3).double())
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_one_label_a_sample_leaves_nothing_to_compare_within_a_sample() -> None:
    student, teacher, _ = made(6, 3)
    labels = nn.functional.one_hot(torch.tensor([0, 1, 1, 0, 0, 1]), 3).double()
    assert iled_loss(student, teacher, labels).item() == 0
    assert cled_loss(student, teacher, labels).item() > 0


def test_unknown_labels_are_none() -> None:
    student, teacher, labels = made()
    unknown = labels.clone()
    unknown[labels == 0] = -1
    for loss in (cled_loss, iled_loss):
        torch.testing.assert_close(loss(student, teacher, unknown), loss(student, teacher, labels))


def test_the_sum_of_three() -> None:
    student, teacher, labels = made()
    own, other = torch.randn(2, 6, 4).double()
    wanted = 2 * mld_loss(own, other) + 3 * by_class(student, teacher, labels) + 5 * by_sample(student, teacher, labels)
    found = l2d_loss(student, teacher, own, other, labels, mld_weight=2.0, cled_weight=3.0, iled_weight=5.0)
    torch.testing.assert_close(found, wanted)


def test_embeddings_made_of_classifier_and_feature() -> None:
    """Their sum over features is the logit without its bias, and both models learn nothing beside the student."""
    student, teacher = (nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 4)) for width in (5, 8))
    batch = Batch(torch.randn(6, 3), labels=(torch.rand(6, 4) < 0.5).float())
    features = [model[1](model[0](batch.inputs)) for model in (student, teacher)]
    made_ = [f.unsqueeze(1) * m[2].weight for f, m in zip(features, (student, teacher), strict=True)]
    torch.testing.assert_close(made_[0].sum(-1) + student[2].bias, student(batch.inputs))
    for objective, loss in ((CLED(), cled_loss), (ILED(), iled_loss)):
        assert batch.labels is not None
        distiller = Distiller(student, objective, teacher).setup(batch)
        torch.testing.assert_close(distiller(batch).total, loss(made_[0], made_[1].detach(), batch.labels))
        assert not list(objective.parameters())
    losses = Distiller(student, L2D(), teacher).setup(batch)(batch)
    assert set(losses.terms) == {"l2d/mld", "l2d/cled", "l2d/iled"}


def test_embeddings_of_label_queries() -> None:
    class Queries(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(3, 4 * width), nn.Unflatten(1, (4, width)))

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(x).sum(-1)

    student, teacher = Queries(2), Queries(6)
    batch = Batch(torch.randn(6, 3), labels=(torch.rand(6, 4) < 0.5).float())
    assert batch.labels is not None
    found = Distiller(student, ILED("decoder"), teacher).setup(batch)(batch).total
    torch.testing.assert_close(
        found, iled_loss(student.decoder(batch.inputs), teacher.decoder(batch.inputs), batch.labels)
    )


def test_errors_say_what_is_wanted() -> None:
    student, teacher, labels = made()
    with pytest.raises(TensorError, match=r"teacher_embedding: CLED compares one embedding a class.*\[B, C, D\]"):
        cled_loss(student, teacher[:, :2], labels)
    with pytest.raises(TensorError, match=r"labels: ILED needs a yes or no for each class"):
        iled_loss(student, teacher, labels.argmax(1))
    batch = Batch(torch.randn(6, 5, 3), labels=labels.float())
    distiller = Distiller(nn.Linear(3, 4), CLED(), nn.Linear(3, 4)).setup(batch)
    with pytest.raises(TensorError, match=r"tap: no embedding a class can be made of these.*\[6, 5, 3\]"):
        distiller(batch)


def mean_average_precision(loss: Terms | BinaryCrossEntropy) -> float:
    """On fresh samples, of a student that saw few labels, a third of them flipped, beside a teacher that knows."""
    generator = torch.Generator().manual_seed(0)
    inputs, fresh = torch.randn(48, 12, generator=generator), torch.randn(400, 12, generator=generator)
    teacher = nn.Linear(12, 4)
    nn.init.normal_(teacher.weight, generator=generator)
    with torch.no_grad():
        labels, wanted = (teacher(inputs) > 0).float(), (teacher(fresh) > 0).int()
    flipped = torch.rand(labels.shape, generator=generator) < 1 / 3
    batch = Batch(inputs, labels=torch.where(flipped, 1 - labels, labels))
    torch.manual_seed(0)
    student = nn.Linear(12, 4)
    distiller = Distiller(student, loss, teacher).setup(batch)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        distiller(batch).total.backward()
        optimizer.step()
    return float(multilabel_average_precision(student(fresh).sigmoid(), wanted, num_labels=4))


def test_a_student_of_few_and_noisy_labels_gains() -> None:
    gentle = L2D(mld_weight=1.0, cled_weight=1.0, iled_weight=1.0)  # as is right for embeddings made of the classifier
    assert mean_average_precision(BinaryCrossEntropy() + gentle) > mean_average_precision(BinaryCrossEntropy()) + 0.05
