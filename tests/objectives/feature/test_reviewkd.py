from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.feature.reviewkd import ReviewKD, reviewkd_loss
from limbeck.objectives.parts.fusion import Fusion
from tests.objectives.reference import mean
from tests.objectives.test_classes import Net, make, make_batch


def pool(maps: Tensor, size: int) -> Tensor:
    """Adaptive average pooling in loops: cell i of n covers floor(i H / n) up to ceil((i + 1) H / n)."""
    height, width = maps.shape[2:]
    result = torch.zeros(*maps.shape[:2], size, size, dtype=maps.dtype)
    for i in range(size):
        for j in range(size):
            rows = slice(i * height // size, -(-(i + 1) * height // size))
            columns = slice(j * width // size, -(-(j + 1) * width // size))
            result[:, :, i, j] = maps[:, :, rows, columns].mean((2, 3))
    return result


def written_out(students: list[Tensor], teachers: list[Tensor]) -> float:
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        layer, weight, weights = 0.0, 1.0, 0.0
        for size in (None, 4, 2, 1):
            if size is not None and size >= student.shape[2]:
                continue
            s, t = (student, teacher) if size is None else (pool(student, size), pool(teacher, size))
            gaps = zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)
            layer += weight * mean([(a - b) ** 2 for a, b in gaps])
            weights += weight
            weight /= 2
        total += layer / weights
    return total


def test_equals_the_paper() -> None:
    shapes = [(2, 3, 9, 9), (2, 2, 4, 4), (2, 5, 3, 5), (2, 6, 1, 1)]
    students, teachers = ([torch.randn(s).double() for s in shapes] for _ in range(2))
    assert reviewkd_loss(students, teachers).item() == pytest.approx(written_out(students, teachers), rel=1e-9)


def test_equal_features_cost_nothing_and_layers_add_up() -> None:
    maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 4, 2, 2)]
    assert reviewkd_loss(maps, maps) == 0
    others = [m + torch.randn_like(m) for m in maps]
    parts = sum(reviewkd_loss(a, b) for a, b in zip(maps, others, strict=True))
    torch.testing.assert_close(reviewkd_loss(maps, others), parts)
    each = reviewkd_loss(maps, others, reduction="none")
    torch.testing.assert_close(reviewkd_loss(maps, others, mask=torch.tensor([False, True])), each[1])


def test_fusion() -> None:
    """Attention weighs a layer against what comes from deeper ones, place by place."""
    fusion = Fusion(3, 4, 6, deepest=False)
    feature, deeper = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 2, 2)
    out, handed = fusion(feature, deeper, (8, 8))
    assert out.shape == (2, 6, 8, 8)
    x = fusion.enter(feature)
    y = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    weights = torch.sigmoid(fusion.attend(torch.cat([x, y], 1)))
    mixed = x * weights[:, :1] + y * weights[:, 1:]
    torch.testing.assert_close(handed, mixed.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(out, fusion.leave(handed))


def test_shallow_layers_of_the_teacher_reach_deep_layers_of_the_student() -> None:
    loss = ReviewKD()
    distiller = make(loss)
    student, teacher = distiller.traces(make_batch())
    assert [f.attend is None for f in loss.fusions] == [False, False, False, True]
    assert [f.leave[0].out_channels for f in loss.fusions] == [6, 12, 24, 24]
    loss(student, teacher, make_batch()).backward()
    assert distiller.student.layer3[0].weight.grad.abs().sum() > 0
    first = loss.fusions[0]
    made, _ = first(student["stages"][0], torch.randn(8, 16, 4, 4, requires_grad=True), (8, 8))
    assert made.shape == (8, 6, 8, 8)


def test_the_teacher_is_heard_before_its_relu() -> None:
    assert ReviewKD().teacher_taps == ("preactivations", "penultimate")
    assert ReviewKD(["layer1"]).teacher_taps == ("layer1", "penultimate")
    teacher = Net(6)
    distiller = make(ReviewKD(), teacher)
    _, trace = distiller.traces(make_batch())
    torch.testing.assert_close(trace["preactivations"][0], teacher.layer1[0](make_batch().inputs))


def test_width_is_bounded() -> None:
    loss = ReviewKD(width=5)
    make(loss)
    assert {f.enter[0].out_channels for f in loss.fusions} == {5}


def test_refusals() -> None:
    with pytest.raises(TensorError, match="teacher_feature"):
        reviewkd_loss([torch.randn(2, 3, 4, 4)], [])
    with pytest.raises(TensorError, match=r"\[2, 3, 4, 5\]"):
        reviewkd_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 5))
    loss, one = ReviewKD(["x"]), Trace(None, {"x": torch.randn(1, 3, 4, 4), "penultimate": torch.randn(1, 3)})
    loss.setup(one, one, Batch(torch.zeros(1)), DataInfo())
    with pytest.raises(TensorError, match="2 or more"):
        loss(one, one, Batch(torch.zeros(1)))
