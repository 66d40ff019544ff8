from __future__ import annotations

import pytest
import torch

from limbeck.objectives.relation.rkd import rkd_loss
from tests.objectives import reference

DISTANCE = {"distance_weight": 1.0, "angle_weight": 0.0}
ANGLE = {"distance_weight": 0.0, "angle_weight": 1.0}


@pytest.mark.parametrize("size", [2, 3, 6])
def test_equals_the_paper(size: int) -> None:
    student, teacher = torch.randn(size, 4).double(), torch.randn(size, 7).double()
    distance, angle = reference.rkd_distance(student, teacher), reference.rkd_angle(student, teacher)
    assert rkd_loss(student, teacher, **DISTANCE).item() == pytest.approx(distance, rel=1e-9, abs=1e-15)
    assert rkd_loss(student, teacher, **ANGLE).item() == pytest.approx(angle, rel=1e-9, abs=1e-15)
    assert rkd_loss(student, teacher).item() == pytest.approx(25 * distance + 50 * angle, rel=1e-9, abs=1e-13)


def test_tiny_case() -> None:
    teacher, student = torch.tensor([[0.0, 0], [3, 0], [0, 4]]), torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    assert rkd_loss(student, teacher, **DISTANCE).item() == pytest.approx(0.003481, abs=5e-7)
    assert rkd_loss(student, teacher, **ANGLE).item() == pytest.approx(0.000744, abs=5e-7)


@pytest.mark.parametrize("width", [4, 6])
def test_similar_figures_cost_nothing(width: int) -> None:
    """s = c R t + b, in the teacher's dimension or embedded in a larger one."""
    teacher = torch.randn(6, 4).double()
    rotation = torch.linalg.qr(torch.randn(width, width).double())[0][:4]
    student = 3.0 * teacher @ rotation + torch.randn(width)
    assert rkd_loss(student, teacher, **DISTANCE).item() == pytest.approx(0.0, abs=1e-20)
    assert rkd_loss(student, teacher, **ANGLE).item() == pytest.approx(0.0, abs=1e-20)


def test_anisotropic_scaling_is_seen() -> None:
    teacher = torch.randn(6, 4).double()
    stretched = teacher * torch.tensor([3.0, 1.0, 1.0, 1.0])
    assert rkd_loss(stretched, teacher, **DISTANCE) > 1e-3
    assert rkd_loss(stretched, teacher, **ANGLE) > 1e-3


def test_two_samples_have_one_distance_and_no_angle() -> None:
    assert rkd_loss(torch.randn(2, 4).double(), torch.randn(2, 7).double()).item() == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_samples_stay_finite(dtype: torch.dtype) -> None:
    """A normalisation with an epsilon would give gradients of 1e12 here."""
    teacher = torch.randn(5, 4)
    student = torch.randn(5, 4).to(dtype)
    student[3] = student[1]
    student.requires_grad_()
    rkd_loss(student, teacher).backward()
    assert student.grad.abs().max() < 100
    collapsed = torch.ones(5, 4, requires_grad=True)
    rkd_loss(collapsed, teacher).backward()
    assert not collapsed.grad.any()


def test_near_neighbours_far_from_zero_keep_their_digits() -> None:
    """A Gram matrix would round these distances away in float32."""
    teacher = torch.randn(6, 8)
    far = teacher + 1000.0
    assert rkd_loss(far, teacher).item() == pytest.approx(0.0, abs=1e-5)


def test_masked_tokens_are_hidden_from_both() -> None:
    student, teacher = torch.randn(4, 3, 5).double(), torch.randn(4, 3, 6).double()
    counts = torch.tensor([[True, False, False]] * 4)
    torch.testing.assert_close(rkd_loss(student, teacher, mask=counts), rkd_loss(student[:, 0], teacher[:, 0]))
