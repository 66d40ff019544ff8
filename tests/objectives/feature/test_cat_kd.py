from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.feature.cat_kd import CATKD, cat_kd_loss
from limbeck.objectives.response.cross_entropy import CrossEntropy
from tests.objectives.test_classes import Net, make_batch


def cells(one: list[list[float]], r: int) -> list[float]:
    """Cells of a map whose sides are multiples of r, averaged."""
    h, w = len(one) // r, len(one[0]) // r
    sums = [[sum(one[i * h + a][j * w + b] for a in range(h) for b in range(w)) for j in range(r)] for i in range(r)]
    return [v / (h * w) for row in sums for v in row]


def plain(student: Tensor, teacher: Tensor, r: int, normalize: bool) -> float:
    total, count = 0.0, 0
    for s_maps, t_maps in zip(student.tolist(), teacher.tolist(), strict=True):
        for s, t in zip(s_maps, t_maps, strict=True):
            a, b = cells(s, r), cells(t, r)
            if normalize:
                a, b = ([v / math.sqrt(sum(x * x for x in c)) for v in c] for c in (a, b))
            total += sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
            count += r * r
    return total / count


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_paper(r: int, normalize: bool) -> None:
    student, teacher = torch.randn(3, 5, 4, 6).double(), torch.randn(3, 5, 2, 4).double()
    value = cat_kd_loss(student, teacher, resolution=r, normalize=normalize)
    assert value.item() == pytest.approx(plain(student, teacher, r, normalize), rel=1e-9)


def test_scale_of_a_map_does_not_matter_once_normalised() -> None:
    student, teacher = torch.randn(2, 3, 5, 4, 4).double()
    scaled = student * (0.1 + torch.rand(3, 5, 1, 1))
    torch.testing.assert_close(cat_kd_loss(scaled, teacher), cat_kd_loss(student, teacher))
    assert not torch.isclose(
        cat_kd_loss(scaled, teacher, normalize=False), cat_kd_loss(student, teacher, normalize=False)
    )


def test_binarized_and_chosen_maps() -> None:
    student, teacher = torch.randn(2, 3, 5, 4, 4).double()
    binary = (teacher > teacher.abs().mean((2, 3), keepdim=True)).double()
    torch.testing.assert_close(cat_kd_loss(student, teacher, binarize=True), cat_kd_loss(student, binary))
    order = teacher.mean((2, 3)).argsort(dim=1, descending=True)
    for top, kept in ((2, order[:, :2]), (-2, order[:, -2:]), (9, order)):
        rows = torch.arange(3).unsqueeze(1)
        wanted = cat_kd_loss(student[rows, kept], teacher[rows, kept])
        torch.testing.assert_close(cat_kd_loss(student, teacher, top=top), wanted)


def test_one_cell_compares_logits() -> None:
    """With heads that have no bias."""
    student, teacher, batch = Net(4), Net(6), make_batch()
    for net in (student, teacher):
        net.fc = nn.Linear(net.fc.in_features, 5, bias=False)
    value = Distiller(student, CATKD(resolution=1, normalize=False), teacher).setup(batch)(batch).total
    torch.testing.assert_close(value, F.mse_loss(student(batch.inputs), teacher(batch.inputs)))


def test_a_double_costs_nothing_and_the_classifier_learns() -> None:
    teacher, student, batch = Net(4), Net(4), make_batch()
    distiller = Distiller(student, CATKD(), teacher).setup(batch)
    distiller(batch).total.backward()
    assert student.fc.weight.grad.abs().sum() > 0
    assert student.fc.bias.grad is None
    assert student.layer1[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    student.load_state_dict(teacher.state_dict())
    assert distiller(batch).total == 0


def test_weight_zero_is_plain_training() -> None:
    found = []
    for loss in (CrossEntropy(), CrossEntropy() + 0.0 * CATKD()):
        torch.manual_seed(0)
        student, teacher, batch = Net(4), Net(6), make_batch()
        Distiller(student, loss, teacher).setup(batch)(batch).total.backward()
        found.append([p.grad for p in student.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class Normed(Net):
    """Another map than its last is pooled."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(x))).sub(0.5).abs().mean((2, 3)))


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="stages:-1.*pooled"):
        Distiller(Net(4), CATKD(), Normed(6)).setup(make_batch())
    maps = torch.randn(2, 3, 4, 4)
    with pytest.raises(TensorError, match="teacher_maps"):
        cat_kd_loss(maps, maps[:, :2])
    with pytest.raises(TensorError, match="student_maps"):
        cat_kd_loss(maps[0], maps)
    with pytest.raises(ConfigError, match="top"):
        cat_kd_loss(maps, maps, top=0)
    with pytest.raises(ConfigError, match="resolution"):
        CATKD(resolution=0)


def test_it_teaches_without_labels() -> None:
    """A student that sees no label ends with the teacher's classes."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 3, 8, 8)
    teacher, student = Net(6), Net(6)
    with torch.no_grad():
        teacher.fc.weight.mul_(8.0)
        answers = teacher(inputs)
        teacher.fc.bias.sub_(answers.mean(0))
    batch = Batch(inputs)
    distiller = Distiller(student, 15.0 * CATKD(normalize=False), teacher).setup(batch)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-2)

    def agreement() -> float:
        z = student(inputs) - student.fc.bias + teacher.fc.bias
        return (z.argmax(1) == teacher(inputs).argmax(1)).float().mean().item()

    before = agreement()
    for _ in range(100):
        optimizer.zero_grad()
        distiller(batch).total.backward()
        optimizer.step()
    assert agreement() > max(0.6, before + 0.2)
