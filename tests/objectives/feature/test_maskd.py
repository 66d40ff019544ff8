from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.feature.maskd import MasKD, maskd_loss
from limbeck.objectives.parts.regions import masked_mean, overlap
from tests.objectives.test_classes import Net, make, make_batch


def written_out(student: Tensor, teacher: Tensor, masks: Tensor, weights: Tensor) -> float:
    total = 0.0
    samples, channels, height, width = student.shape
    for i in range(samples):
        for k in range(masks.shape[1]):
            distance = mass = 0.0
            for y in range(height):
                for x in range(width):
                    m = float(masks[i, k, y, x])
                    mass += m
                    for c in range(channels):
                        distance += (m * float(student[i, c, y, x]) - m * float(teacher[i, c, y, x])) ** 2
            total += float(weights[i, k]) * distance / (channels * mass)
    return total / samples


def test_equals_the_paper() -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 4).double()
    masks, weights = torch.rand(2, 5, 2, 4).double(), torch.rand(2, 5).double()
    found = maskd_loss(student, teacher, masks, weights)
    assert found.item() == pytest.approx(written_out(student, teacher, masks, weights), rel=1e-9)
    alike = maskd_loss(student, teacher, masks)
    assert alike.item() == pytest.approx(written_out(student, teacher, masks, torch.full((2, 5), 0.2)), rel=1e-6)


def test_full_masks_give_the_mean_square_and_equal_features_nothing() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    torch.testing.assert_close(
        maskd_loss(student, teacher, torch.ones(2, 3, 4, 4)), (student - teacher).square().mean()
    )
    assert maskd_loss(teacher, teacher, torch.rand(2, 3, 4, 4)) == 0


def test_a_region_counts_by_its_mean_however_small() -> None:
    squares = torch.tensor([[4.0, 0.0, 0.0, 0.0]])
    masks = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    assert masked_mean(squares, masks).tolist() == [[4.0, 1.0, 0.0]]


def test_overlap() -> None:
    same = torch.rand(2, 1, 6).expand(2, 4, 6)
    torch.testing.assert_close(overlap(same), torch.ones(2))
    assert overlap(torch.eye(5).unsqueeze(0)).item() == 0
    assert overlap(torch.rand(2, 1, 9)).tolist() == [0, 0]
    rows = torch.rand(1, 3, 4).double()
    pairs = [2 * float(a @ b) / float(a @ a + b @ b) for a in rows[0] for b in rows[0] if not torch.equal(a, b)]
    assert overlap(rows).item() == pytest.approx(sum(pairs) / 6, rel=1e-12)


def test_tokens_learn_what_the_teacher_needs() -> None:
    """What the teacher says of the masked feature comes nearer to what it says of the whole."""
    teacher = Net(6)
    with torch.no_grad():
        teacher.fc.weight *= 30
    distiller = make(MasKD("layer3", tokens=2), teacher)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.02)
    losses = []
    for step in range(30):
        result = distiller(make_batch(8 * (step % 4)))
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
        parts = next(iter(distiller.loss))(*distiller.traces(make_batch()), make_batch())
        losses.append({k: v.item() for k, v in parts.items()})
    assert losses[-1]["kept"] < 0.5 * losses[0]["kept"]
    assert losses[-1]["masked"] < losses[0]["masked"]


def test_masks_do_not_follow_the_students_loss() -> None:
    loss = MasKD("layer3")
    distiller = make(loss)
    parts = loss(*distiller.traces(make_batch()), make_batch())
    parts["masked"].backward()
    assert all(p.grad is None for p in loss.receptors.parameters())
    assert distiller.student.layer1[0].weight.grad.any()


def test_two_stages_share_the_tokens() -> None:
    loss = MasKD("layer3")
    first = loss.opening()
    make(first)
    tokens = first.tokens.tokens
    distiller = make(loss)
    assert loss.receptors.tokens.tokens is tokens
    parts = loss(*distiller.traces(make_batch()), make_batch())
    assert list(parts) == ["masked"]


def test_the_students_masks_come_in_late() -> None:
    loss = MasKD("layer3", custom=0.5)
    distiller = make(loss)
    nn.init.normal_(loss.receptors.tokens.tokens)
    traces = distiller.traces(make_batch())
    early, later = (loss(*traces, make_batch().replace(progress=p))["masked"] for p in (0.4, 0.6))
    assert early != later
    loss.custom = 1.0
    assert loss(*traces, make_batch().replace(progress=1.0))["masked"] == early


def test_refusals() -> None:
    with pytest.raises(TensorError, match=r"masks.*\[2, 3, 4, 5\]"):
        maskd_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 5))
    with pytest.raises(ConfigError, match=r"teacher_tap.*6 channels.*wanted 24"):
        make(MasKD("layer1"))
    distiller = make(loss := MasKD("layer3"))
    loss.receptors.tokens = None
    with pytest.raises(ConfigError, match="set up"):
        distiller(make_batch())
