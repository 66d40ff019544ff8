from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import TensorError
from limbeck.objectives.feature.at import at_loss
from tests.objectives import reference


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_equals_the_papers_code(p: float) -> None:
    student, teacher = torch.randn(3, 4, 2, 3).double(), torch.randn(3, 7, 2, 3).double()
    assert at_loss(student, teacher, p=p).item() == pytest.approx(reference.at(student, teacher, p), rel=1e-9)


def test_sums_over_layers() -> None:
    students = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
    teachers = [torch.randn(2, 6, 8, 8), torch.randn(2, 9, 4, 4)]
    parts = sum(at_loss(s, t) for s, t in zip(students, teachers, strict=True))
    torch.testing.assert_close(at_loss(students, teachers), parts)


@pytest.mark.parametrize(
    ("student", "teacher"), [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((8, 3), (4, 6)), ((4, 4, 4), (2, 2, 2))]
)
def test_the_larger_map_is_pooled(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    s, t = torch.randn(2, 3, *student), torch.randn(2, 5, *teacher)
    size = [min(a, b) for a, b in zip(student, teacher, strict=True)]
    pool = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool3d
    torch.testing.assert_close(at_loss(s, t), at_loss(pool(s, size), pool(t, size)))


def test_tokens_are_places() -> None:
    student, teacher = torch.randn(2, 6, 5), torch.randn(2, 6, 8)
    as_maps = at_loss(student.transpose(1, 2).unsqueeze(2), teacher.transpose(1, 2).unsqueeze(2))
    torch.testing.assert_close(at_loss(student, teacher), as_maps)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("p", [2.0, 4.0])
def test_scale_does_not_matter_in_float32(scale: float, p: float) -> None:
    """Without care the powers leave float32's range, or fall below the epsilon of a normalisation."""
    student, teacher = torch.randn(2, 2, 4, 3, 3)
    torch.testing.assert_close(at_loss(student * scale, teacher / scale, p=p), at_loss(student, teacher, p=p))


def test_dead_maps_stay_finite() -> None:
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    at_loss(student, torch.randn(2, 3, 4, 4)).backward()
    assert not student.grad.any()


def test_mask_over_places_hides_them_from_both_maps() -> None:
    student, teacher = torch.randn(2, 2, 5, 3).double()
    counts = torch.tensor([[True, True, True, False, False]]).expand(2, 5)
    torch.testing.assert_close(at_loss(student, teacher, mask=counts), at_loss(student[:, :3], teacher[:, :3]))


def test_what_it_refuses() -> None:
    with pytest.raises(TensorError, match="2 layers"):
        at_loss([torch.randn(2, 3, 4, 4)], [torch.randn(2, 3, 4, 4)] * 2)
    with pytest.raises(TensorError, match=r"\[2, 5, 3\].*\[2, 6, 3\]"):
        at_loss(torch.randn(2, 5, 3), torch.randn(2, 6, 3))
    with pytest.raises(TensorError, match="at least 1"):
        at_loss([], [])
