from __future__ import annotations

from math import exp

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.feature.acam_kd import ACAMKD, CooperativeMasks, acam_kd_loss
from limbeck.objectives.parts.regions import overlap
from tests.objectives.test_classes import make, make_batch


def written_out(student: Tensor, teacher: Tensor, channels: Tensor, places: Tensor) -> float:
    total = 0.0
    gap = (teacher - student).flatten(2).tolist()  # [B][C][N]
    for i, d in enumerate(gap):
        width, number, units = len(d), len(d[0]), channels.shape[1]
        for m in range(units):
            c, p = channels[i, m].tolist(), places[i, m].flatten().tolist()
            by_channel = sum((c[k] * d[k][n]) ** 2 for k in range(width) for n in range(number))
            by_place = sum((p[n] * d[k][n]) ** 2 for k in range(width) for n in range(number))
            total += by_channel / (number * sum(c) * units) + by_place / (width * sum(p) * units)
    return total / len(gap)


def test_equals_the_paper() -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 4).double()
    channels, places = torch.rand(2, 4, 3).double(), torch.rand(2, 4, 2, 4).double()
    found = acam_kd_loss(student, teacher, channels, places)
    assert found.item() == pytest.approx(written_out(student, teacher, channels, places), rel=1e-9)


def test_equal_features_cost_nothing_whatever_the_masks() -> None:
    feature = torch.randn(2, 3, 4, 4)
    assert acam_kd_loss(feature, feature, torch.rand(2, 6, 3), torch.rand(2, 6, 4, 4)) == 0


def test_full_masks_give_the_mean_square_twice() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    found = acam_kd_loss(student, teacher, torch.ones(2, 5, 3), torch.ones(2, 5, 4, 4))
    torch.testing.assert_close(found, 2 * (student - teacher).square().mean())


def test_the_masks_are_the_attention_of_the_teacher_to_the_student() -> None:
    """Written out for one sample: A = softmax(Q K / sqrt(C / 2)), fused = A V, masks = sigmoid(units . fused)."""
    cooperate = CooperativeMasks(4, 3).double()
    student, teacher = torch.randn(2, 1, 4, 2, 3).double()
    channels, places = cooperate(student, teacher)
    s, t = student.flatten(2)[0].T, teacher.flatten(2)[0].T
    q, k = t @ cooperate.query.weight.flatten(1).T, s @ cooperate.key.weight.flatten(1).T
    v = s @ cooperate.value.weight.flatten(1).T + cooperate.value.bias
    fused = []
    for row in q:
        weights = [exp(float((row @ other).detach()) / 2**0.5) for other in k]
        fused.append(sum(w / sum(weights) * value for w, value in zip(weights, v, strict=True)))
    fused = torch.stack(fused)
    torch.testing.assert_close(places[0].flatten(1), torch.sigmoid(cooperate.places @ fused.T))
    torch.testing.assert_close(channels[0], torch.sigmoid(cooperate.channels @ fused.mean(0, keepdim=True)))


def test_diversity() -> None:
    assert overlap(torch.ones(1, 4, 6)).item() == 1
    assert overlap(torch.eye(4).unsqueeze(0)).item() == 0
    assert overlap(torch.rand(1, 1, 6)).item() == 0


def test_masks_change_as_the_student_learns() -> None:
    loss = ACAMKD("layer3")
    distiller = make(loss)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.02)

    def masks() -> tuple[Tensor, Tensor]:
        (pair,) = loss.features(*distiller.traces(make_batch()))
        return loss.masks[0](*pair)

    before = masks()
    for _ in range(5):
        optimizer.zero_grad()
        distiller(make_batch()).total.backward()
        optimizer.step()
    after = masks()
    assert all(not torch.allclose(a, b) for a, b in zip(before, after, strict=True))
    assert [tuple(m.shape) for m in after] == [(8, 6, 24), (8, 6, 2, 2)]


def test_no_gradient_through_the_attention_into_the_student() -> None:
    loss = ACAMKD("layer3")
    distiller = make(loss)
    loss(*distiller.traces(make_batch()), make_batch())["diversity"].backward()
    assert all(p.grad is None for p in distiller.student.parameters())
    assert all(p.grad is not None for p in loss.masks.parameters())


def test_refusals() -> None:
    maps = torch.randn(2, 3, 4, 4)
    with pytest.raises(TensorError, match=r"channel_masks.*\[2, 6, 4\].*\[2, K, 3\]"):
        acam_kd_loss(maps, maps, torch.rand(2, 6, 4), torch.rand(2, 6, 4, 4))
    with pytest.raises(TensorError, match="place_masks"):
        acam_kd_loss(maps, maps, torch.rand(2, 6, 3), torch.rand(2, 6, 4, 5))
    with pytest.raises(ConfigError, match="units"):
        ACAMKD(units=0)
