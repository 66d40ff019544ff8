from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.projectors import OrthogonalProjector
from limbeck.objectives.feature.vkd import VkD, vkd_loss, whiten
from tests.objectives.reference import huber, mean
from tests.objectives.test_classes import Net, make, make_batch


def written_out(student: Tensor, teacher: Tensor) -> float:
    values = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        centre = mean(t)
        spread = (mean([(x - centre) ** 2 for x in t]) + 1e-5) ** 0.5
        values.append(mean([huber(a - (b - centre) / spread) for a, b in zip(s, t, strict=True)]))
    return mean(values)


def test_equals_the_paper() -> None:
    student, teacher = 2 * torch.randn(2, 5, 7).double()
    assert vkd_loss(student, teacher).item() == pytest.approx(written_out(student, teacher), rel=1e-9)


@pytest.mark.parametrize(("narrow", "wide"), [(5, 9), (9, 5), (6, 6)])
def test_the_projector_is_orthogonal_also_after_steps(narrow: int, wide: int) -> None:
    layer = OrthogonalProjector(narrow, wide)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.3)
    for step in range(4):
        weight = layer.weight
        inner = weight.T @ weight if wide >= narrow else weight @ weight.T
        torch.testing.assert_close(inner, torch.eye(min(narrow, wide)), atol=1e-5, rtol=0)
        optimizer.zero_grad()
        (layer(torch.randn(8, narrow)) - torch.randn(8, wide)).square().mean().backward()
        optimizer.step()
        assert step == 0 or not torch.allclose(weight, layer.weight)


def test_it_keeps_lengths_angles_and_distances() -> None:
    layer, rows = OrthogonalProjector(6, 11), torch.randn(7, 6)
    projected = layer(rows)
    torch.testing.assert_close(projected @ projected.T, rows @ rows.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cdist(projected, projected), torch.cdist(rows, rows), atol=1e-4, rtol=1e-4)


def test_zero_exactly_at_the_normalised_teacher() -> None:
    teacher = torch.randn(4, 6, requires_grad=True)
    target = nn.functional.layer_norm(teacher, (6,)).detach()
    assert vkd_loss(target, teacher) == 0
    student = (target + 0.1).requires_grad_()
    vkd_loss(student, teacher).backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()


def test_whitening() -> None:
    rows = torch.randn(200, 4).double() @ torch.randn(4, 4).double() + 3
    white = whiten(rows, eps=1e-9)
    torch.testing.assert_close(white.mean(0), torch.zeros(4).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(white.T @ white / 200, torch.eye(4).double(), atol=1e-5, rtol=0)
    counts = torch.arange(200) < 150
    torch.testing.assert_close(whiten(rows, counts)[:150], whiten(rows[:150]))
    few = whiten(torch.randn(3, 8))  # more channels than samples
    assert few.isfinite().all()
    assert whiten(torch.ones(5, 3)).abs().max() == 0


def test_alpha_zero_leaves_the_rest_alone() -> None:
    """With weight 0 only the other terms move the student."""
    batch = make_batch()
    distiller = make(0.0 * VkD())
    distiller(batch).total.backward()
    assert not any(p.grad.any() for p in distiller.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("normalise", ["layer_norm", "whiten"])
def test_objective(normalise: str) -> None:
    loss, teacher, batch = VkD(normalise=normalise), Net(6), make_batch()
    distiller = make(loss, teacher)
    inputs = batch.inputs
    student_feature = distiller.student.layer3(distiller.student.layer2(distiller.student.layer1(inputs))).mean((2, 3))
    teacher_feature = teacher.layer3(teacher.layer2(teacher.layer1(inputs))).mean((2, 3))
    wanted = vkd_loss(loss.projector(student_feature), teacher_feature, normalise=normalise)
    torch.testing.assert_close(distiller(batch).total, wanted)
    assert loss.contract.decomposes == (normalise == "layer_norm")


def test_the_student_learns_under_a_fixed_projection() -> None:
    distiller = make(loss := VkD())
    optimizer = torch.optim.Adam(distiller.student.parameters(), lr=0.01)
    seen = []
    for step in range(30):
        optimizer.zero_grad()
        total = distiller(make_batch(8 * (step % 4))).total
        total.backward()
        optimizer.step()
        seen.append(total.item())
    assert sum(seen[-4:]) < 0.9 * sum(seen[:4])
    assert loss.projector.weight.shape == (24, 16)


def test_refusals() -> None:
    with pytest.raises(TensorError, match=r"teacher_feature.*\[3, 4\]"):
        vkd_loss(torch.randn(3, 5), torch.randn(3, 4))
    with pytest.raises(ConfigError, match="normalise"):
        vkd_loss(torch.randn(3, 4), torch.randn(3, 4), normalise="batch")
    make(loss := VkD())
    with pytest.raises(TensorError, match=r"student_feature.*16 channels"):
        loss.projector(torch.randn(2, 5))
