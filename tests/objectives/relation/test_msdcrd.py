from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.layout import windows
from limbeck.objectives import MSDCRD
from limbeck.objectives.parts.contrast import crd_loss
from limbeck.objectives.relation.msdcrd import msdcrd_loss


def contrast(a: list[list[float]], b: list[list[float]], temperature: float) -> float:
    def cosine(p: list[float], q: list[float]) -> float:
        return sum(x * y for x, y in zip(p, q, strict=True)) / sqrt(sum(x * x for x in p) * sum(y * y for y in q))

    rows = [[exp(cosine(p, q) / temperature) for q in b] for p in a]
    return -sum(log(row[i] / sum(row)) for i, row in enumerate(rows)) / len(a)


def test_equals_its_equations() -> None:
    s, t = torch.randn(4, 3, 5).double(), torch.randn(4, 3, 5).double()
    pairs = [(s[:, n].tolist(), t[:, n].tolist()) for n in range(3)]
    sample = sum(contrast(u, v, 0.3) + contrast(v, u, 0.3) for u, v in pairs) / 6
    channel = contrast(s.flatten(0, 1).T.tolist(), t.flatten(0, 1).T.tolist(), 0.3)
    assert msdcrd_loss(s, t, temperature=0.3, channel=0.0).item() == pytest.approx(sample, rel=1e-9)
    both = msdcrd_loss(s, t, temperature=0.3, sample=0.5, channel=2.0)
    assert both.item() == pytest.approx(0.5 * sample + 2 * channel, rel=1e-9)


def test_one_window_and_no_channels_is_the_contrast_within_a_batch() -> None:
    s, t = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    wanted = 0.5 * crd_loss(s, t, temperature=0.1)
    torch.testing.assert_close(msdcrd_loss(s.unsqueeze(1), t.unsqueeze(1), channel=0.0), wanted)


@pytest.mark.parametrize("size", [2, 5])
def test_an_equal_student_with_orthonormal_features(size: int) -> None:
    features = torch.eye(size).unsqueeze(1).double()
    wanted = log(1 + (size - 1) * exp(-1 / 0.1))
    assert msdcrd_loss(features, features, channel=0.0).item() == pytest.approx(wanted, rel=1e-6)


def test_order_and_scale_do_not_matter_to_the_samples() -> None:
    s, t, order = torch.randn(6, 3, 4).double(), torch.randn(6, 3, 4).double(), torch.randperm(6)
    wanted = msdcrd_loss(s, t, channel=0.0)
    torch.testing.assert_close(msdcrd_loss(s[order], t[order], channel=0.0), wanted)
    torch.testing.assert_close(msdcrd_loss(s * torch.rand(6, 3, 1).add(0.1), 7 * t, channel=0.0), wanted)


def test_windows_that_do_not_count_are_left_out() -> None:
    s, t = torch.randn(5, 2, 4).double(), torch.randn(5, 2, 4).double()
    counts = torch.tensor([[True, True], [True, False], [False, False], [True, True], [False, True]])
    found = msdcrd_loss(s, t, channel=0.0, mask=counts, reduction="none")
    values = torch.zeros(5, 2).double()
    for n in range(2):
        kept = counts[:, n]
        one = msdcrd_loss(s[kept, n : n + 1], t[kept, n : n + 1], channel=0.0, reduction="none")
        values[kept, n] = one
    torch.testing.assert_close(found, values.sum(1) / counts.sum(1).clamp(min=1))
    torch.testing.assert_close(msdcrd_loss(s, t, channel=0.0, mask=counts), found.sum() / 4)


def test_windows_slide_by_half() -> None:
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    found = windows(maps, [2]).squeeze().tolist()
    wanted = [float(maps[0, 0, i : i + 2, j : j + 2].mean()) for i in range(3) for j in range(3)]
    assert found == [*wanted, 7.5]
    assert windows(maps, [3]).shape == (1, 5, 1)  # of size 3 by one place each way, and the whole


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean(dim=(2, 3)))


def test_windows_are_judged_by_the_teachers_classifier() -> None:
    student, teacher = Net(5), Net(5)
    batch = Batch(torch.randn(6, 1, 4, 4), labels=torch.arange(6) % 4)
    distiller = Distiller(student, MSDCRD("conv", threshold=0.4), teacher).setup(batch)
    s, t = windows(student.conv(batch.inputs)), windows(teacher.conv(batch.inputs))
    shares = teacher.fc(t).softmax(dim=2)
    counts = (shares.argmax(2) == batch.labels.unsqueeze(1)) | (shares.amax(2) >= 0.4)  # type: ignore[union-attr]
    assert 0 < counts.sum() < counts.numel()
    torch.testing.assert_close(distiller(batch).total, msdcrd_loss(s, t, mask=counts))


def test_no_memory_is_kept() -> None:
    student, teacher, batch = Net(3), Net(5), Batch(torch.randn(2, 1, 4, 4), labels=torch.tensor([0, 1]))
    objective = MSDCRD("conv")
    Distiller(student, objective, teacher).setup(batch)(batch).total.backward()
    assert [tuple(p.shape) for p in objective.parameters()] == [(5, 3, 1, 1), (5,), (5,)]
    assert not list(objective.buffers())


def test_local_windows_teach_places_that_the_whole_does_not() -> None:
    """A student trained on all scales comes nearer to the teacher's map than one trained on the whole map alone."""
    images = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    teacher = Net(6)

    def agreement(scales: list[int] | None) -> float:
        torch.manual_seed(1)
        student = Net(6)
        objective = MSDCRD("conv", scales=scales, channel=0.0, threshold=0.0)
        batch = Batch(images, labels=torch.zeros(64, dtype=torch.long))
        distiller = Distiller(student, objective, teacher).setup(batch)
        optimizer = torch.optim.Adam(student.conv.parameters(), lr=0.02)
        for _ in range(20):
            optimizer.zero_grad()
            distiller(batch).total.backward()
            optimizer.step()
        maps = student.conv(images).detach(), teacher.conv(images).detach()
        return float(torch.cosine_similarity(*maps, dim=1).mean())

    assert agreement(None) > agreement([]) + 0.05


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        msdcrd_loss(torch.randn(2, 1, 3), torch.randn(2, 1, 3), temperature=0.0)
    with pytest.raises(TensorError, match="differ in shape"):
        msdcrd_loss(torch.randn(2, 1, 3), torch.randn(2, 1, 4))
