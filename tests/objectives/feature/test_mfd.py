from __future__ import annotations

from math import sqrt

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.objectives.feature.mfd import MFD, hide_patches, mfd_loss
from tests.objectives.reference import dot
from tests.objectives.test_classes import Net, make, make_batch


def test_equals_the_paper() -> None:
    student, teacher = 3 * torch.randn(2, 5, 7).double()
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        gaps = zip(s, t, strict=True)
        total += sum((a / sqrt(dot(s, s)) - b / sqrt(dot(t, t))) ** 2 for a, b in gaps) / 5
    assert mfd_loss(student, teacher).item() == pytest.approx(total, rel=1e-9)


def test_only_the_direction_counts() -> None:
    feature = torch.randn(3, 6)
    assert mfd_loss(0.1 * feature, feature) < 1e-12
    torch.testing.assert_close(mfd_loss(-feature, feature), torch.tensor(4.0))


@pytest.mark.parametrize(("ratio", "grid", "kept"), [(0.75, 4, 4), (0.5, 2, 2), (0.99, 4, 1), (0.75, 20, 16)])
def test_patches_are_hidden_whole(ratio: float, grid: int, kept: int) -> None:
    images = torch.ones(6, 3, 8, 8)
    hidden = hide_patches(images, ratio, grid)
    side = min(grid, 8)
    cells = hidden.unflatten(3, (side, -1)).unflatten(2, (side, -1))
    shown = cells.amin((1, 3, 5))
    assert torch.equal(shown, cells.amax((1, 3, 5)))
    assert shown.flatten(1).sum(1).tolist() == [kept] * 6
    assert len({tuple(row.flatten().tolist()) for row in shown}) > 1  # other patches in each image


def test_the_teacher_sees_whole_images() -> None:
    batch = make_batch()
    masked = MFD(clean=False, grid=4).prepare(batch)
    assert torch.equal(masked.teacher_inputs, batch.inputs)
    assert (masked.inputs == 0).float().mean() == 0.75
    assert masked.labels is batch.labels


def test_with_whole_images_beside() -> None:
    batch = make_batch()
    seen = MFD(grid=4).prepare(batch)
    assert torch.equal(seen.inputs[:8], batch.inputs)
    assert (seen.inputs[8:] == 0).float().mean() == 0.75
    assert torch.equal(seen.teacher_inputs, batch.inputs.repeat(2, 1, 1, 1))
    assert seen.labels.tolist() == [*batch.labels.tolist(), *[-1] * 8]


def test_objective() -> None:
    loss, teacher, batch = MFD(clean=False), Net(6), make_batch()
    distiller = make(loss, teacher)
    prepared = loss.prepare(batch)

    def vector(net: Net, images: torch.Tensor) -> torch.Tensor:
        return net.layer3(net.layer2(net.layer1(images))).mean((2, 3))

    student, goal = vector(distiller.student, prepared.inputs), vector(teacher, batch.inputs)
    wanted = mfd_loss(loss.projector(student), goal)
    torch.testing.assert_close(loss(*distiller.traces(prepared), prepared), wanted)


def test_refusals() -> None:
    for ratio in (0.0, 1.0):
        with pytest.raises(ConfigError, match="ratio"):
            MFD(ratio=ratio)
    with pytest.raises(DataError, match=r"batch\.inputs.*int64"):
        MFD().prepare(Batch(torch.zeros(2, 5, dtype=torch.long)))
    with pytest.raises(TensorError, match="teacher_feature"):
        mfd_loss(torch.randn(2, 3), torch.randn(2, 4))
