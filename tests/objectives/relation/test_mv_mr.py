from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import TensorError
from limbeck.core.relations import dcor
from limbeck.objectives import MVMR
from limbeck.objectives.relation.mv_mr import mv_mr_loss


def correlation(x: list[list[float]], z: list[list[float]]) -> float:
    def centred(points: list[list[float]]) -> list[float]:
        n = len(points)
        d = [[sqrt(sum((a - b) ** 2 for a, b in zip(p, q, strict=True))) for q in points] for p in points]
        rows = [sum(row) / n for row in d]
        return [d[i][j] - rows[i] - rows[j] + sum(rows) / n for i in range(n) for j in range(n)]

    def product(a: list[float], b: list[float]) -> float:
        return sum(p * q for p, q in zip(a, b, strict=True))

    a, b = centred(x), centred(z)
    return sqrt(product(a, b) / sqrt(product(a, a) * product(b, b)))


def narrow(z: list[list[float]], margin: float) -> float:
    total = 0.0
    for column in zip(*z, strict=True):
        mean = sum(column) / len(column)
        total += max(0.0, margin - sqrt(sum((v - mean) ** 2 for v in column) / (len(column) - 1)))
    return total / len(z[0])


@pytest.mark.parametrize("margin", [0.5, 2.0])
def test_equals_its_formulas(margin: float) -> None:
    z, other, t = torch.randn(5, 3).double(), torch.randn(5, 3).double(), torch.randn(5, 7).double()
    a, b, c = z.tolist(), other.tolist(), t.tolist()
    alone = narrow(a, margin) + 1 - correlation(a, c)
    assert mv_mr_loss(z, t, margin=margin).item() == pytest.approx(alone, rel=1e-9)
    near = sum((x - y) ** 2 for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)) / 15
    wanted = near + narrow(a, margin) + narrow(b, margin) + 1 - correlation(b, a) + 1 - correlation(a, c)
    assert mv_mr_loss(z, t, other, margin=margin).item() == pytest.approx(wanted, rel=1e-9)


def test_spread_embeddings_are_wide_enough() -> None:
    z = torch.tensor([[2.0, -3.0], [-2.0, 3.0], [2.0, 3.0]]).double()
    assert mv_mr_loss(z, -3 * z + 1, margin=1.0).item() == pytest.approx(0.0, abs=1e-7)


def test_scale_leaves_the_correlations_alone_and_the_teacher_gets_no_gradient() -> None:
    z, t = 10 * torch.randn(6, 3).double(), torch.randn(6, 4).double().requires_grad_()
    torch.testing.assert_close(mv_mr_loss(z, t), mv_mr_loss(7 * z, t))
    student = z.requires_grad_()
    mv_mr_loss(student, t).backward()
    assert student.grad.any()
    assert t.grad is None


def test_masked_samples_are_left_out() -> None:
    z, other, t = torch.randn(6, 3).double(), torch.randn(6, 3).double(), torch.randn(6, 4).double()
    counts = torch.arange(6) % 3 > 0
    wanted = mv_mr_loss(z[counts], t[counts], other[counts])
    torch.testing.assert_close(mv_mr_loss(z, t, other, mask=counts), wanted)
    assert mv_mr_loss(z, t, other, mask=torch.arange(6) == 2).isfinite()


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, width, 3), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean(dim=(2, 3)))


def test_the_teacher_sees_what_is_not_perturbed() -> None:
    student, teacher, images = Net(3), Net(5), torch.randn(6, 1, 8, 8)
    objective = MVMR()
    distiller = Distiller(student, objective, teacher).setup(Batch(images))
    torch.manual_seed(0)
    prepared = objective.prepare(Batch(images, labels=torch.arange(6) % 4))
    assert prepared.labels.tolist() == [0, 1, 2, 3, 0, 1, *[-1] * 6]  # type: ignore[union-attr]
    first, second = prepared.inputs.chunk(2)
    assert torch.equal(first, images)
    assert not torch.equal(second, images)
    embed = objective.ready("projector")

    def feature(model: Net, x: Tensor) -> Tensor:
        return model.conv(x).relu().mean(dim=(2, 3))

    z_o, z = embed(torch.cat([feature(student, first), feature(student, second)])).chunk(2)
    torch.manual_seed(0)
    torch.testing.assert_close(distiller(Batch(images)).total, mv_mr_loss(z, feature(teacher, images), z_o))


def test_what_is_no_image_is_seen_once() -> None:
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    batch = Batch(torch.randn(5, 4))
    objective = MVMR("penultimate")
    total = Distiller(student, objective, teacher).setup(batch)(batch).total
    z = objective.ready("projector")(batch.inputs)
    torch.testing.assert_close(total, mv_mr_loss(z, batch.inputs))


def test_a_student_comes_to_depend_on_the_teacher_without_labels() -> None:
    """A linear probe of classes on the student's feature, trained so, beats one on an untrained student's."""
    torch.manual_seed(0)
    images = torch.randn(256, 8)
    teacher = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    classes = teacher(images).argmax(1)

    def accuracy(steps: int) -> float:
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 2))
        distiller = Distiller(student, MVMR(teacher_tap="logits"), teacher).setup(Batch(images[:8]))
        optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-2)
        for step in range(steps):
            optimizer.zero_grad()
            distiller(Batch(images[:128].roll(64 * step, 0)[:64])).total.backward()
            optimizer.step()
        said = torch.cat([student[:2](images).detach(), torch.ones(256, 1)], dim=1)
        weights = torch.linalg.lstsq(said[:128], nn.functional.one_hot(classes[:128], 3).float()).solution
        return (said[128:] @ weights).argmax(1).eq(classes[128:]).float().mean().item()

    assert accuracy(60) > accuracy(0) + 0.05


def test_dependence_needs_no_equal_widths_and_other_samples_are_refused() -> None:
    assert 0 <= dcor(torch.randn(6, 2), torch.randn(6, 9)) <= 1
    with pytest.raises(TensorError, match="different numbers of samples"):
        mv_mr_loss(torch.randn(4, 3), torch.randn(5, 3))
    with pytest.raises(TensorError, match="differ in shape"):
        mv_mr_loss(torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2))
