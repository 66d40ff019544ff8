"""Maps from the student's feature space into the teacher's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import TensorError
from limbeck.core.projectors import CrossAttentionProjector, GroupedLinear, projector


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 4), (2, 9)), ((2, 7, 4), (2, 7, 9)), ((2, 4, 5, 5), (2, 9, 5, 5))],
    ids=["vectors", "tokens", "maps"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_leads_to_the_teachers_width_in_its_own_precision(
    student: tuple[int, ...], teacher: tuple[int, ...], dtype: torch.dtype
) -> None:
    feature = torch.randn(student).to(dtype)
    layer = projector(feature, torch.zeros(teacher))
    out = layer(feature)
    assert tuple(out.shape) == teacher
    assert out.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_it_takes_part_in_autocast() -> None:
    layer = projector(torch.zeros(2, 4), torch.zeros(2, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.zeros(2, 4)).dtype == torch.bfloat16


def test_it_maps_each_position_alike() -> None:
    layer = projector(torch.zeros(1, 4, 3, 3), torch.zeros(1, 6, 3, 3), bias=False)
    x = torch.randn(2, 4, 3, 3)
    weight = next(iter(layer.parameters())).flatten(1)
    assert torch.allclose(layer(x), torch.einsum("oc,bchw->bohw", weight, x), atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 4), (2, 7, 9)), ((4,), (9,)), ((1, 2, 3, 4, 5), (1, 2, 3, 4, 5))]
)
def test_features_of_different_kinds_have_no_projector(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(TensorError, match="student_feature: no projector leads"):
        projector(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (torch.zeros(2, 5), r"another width than in the dry run; found \[2, 5\]; wanted 4 channels"),
        (torch.zeros(2, 4, dtype=torch.long), "wrong kind of tensor; found .*int64"),
        (torch.zeros(4), "2 or more dimensions"),
    ],
)
def test_what_does_not_fit_is_named(feature: Tensor, message: str) -> None:
    with pytest.raises(TensorError, match=f"student_feature: .*{message}|student_feature: {message}"):
        projector(torch.zeros(2, 4), torch.zeros(2, 9))(feature)


def test_a_grouped_layer_is_a_linear_layer_for_each_window() -> None:
    feature = torch.randn(2, 3, 7, 6)
    layer = GroupedLinear(3, 5, (7, 6), window=4)
    wanted = torch.empty(2, 5, 7, 6)
    for group, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        window = feature[:, :, top : top + 4, left : left + 4].movedim(1, -1)
        made = window @ layer.weight[group] + layer.bias[group, 0]
        wanted[:, :, top : top + 4, left : left + 4] = made.movedim(-1, 1)
    torch.testing.assert_close(layer(feature), wanted)
    one = GroupedLinear(3, 5, (7, 6), window=7)
    torch.testing.assert_close(
        one(feature), torch.einsum("bchw,cd->bdhw", feature, one.weight[0]) + one.bias[0, 0][:, None, None]
    )
    assert sum(p.numel() for p in layer.parameters()) == 4 * sum(p.numel() for p in one.parameters())
    with pytest.raises(TensorError, match="resolution"):
        layer(torch.zeros(1, 3, 6, 6))


def test_a_cross_attention_projector_asks_for_the_teachers_places() -> None:
    student, teacher = torch.randn(2, 6, 5, 4), torch.zeros(2, 12, 3, 2)
    own, given = CrossAttentionProjector(student, teacher), CrossAttentionProjector(student, teacher, learned=False)
    assert own.heads == 1
    assert CrossAttentionProjector(student, teacher, heads=8).heads == 4
    assert CrossAttentionProjector(student, torch.zeros(1, 192, 2, 2)).heads == 3
    assert own(student).shape == given(student, teacher).shape == (2, 12, 3, 2)
    assert given.queries is None
    moved = own(student.roll(1, 2))  # the positions are learned, so a moved map is another map
    assert not torch.allclose(moved, own(student), atol=1e-3)
    with pytest.raises(TensorError, match="width"):
        own(torch.zeros(2, 5, 5, 4))
