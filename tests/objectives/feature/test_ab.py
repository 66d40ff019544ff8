"""AB against its paper's equation, its layers and its connectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.taps import listen
from limbeck.models import create
from limbeck.objectives.feature.ab import AB, ab_loss


def test_the_papers_sum() -> None:
    student, teacher = (3 * torch.randn(4, 2, 3, 3)).double(), torch.randn(4, 2, 3, 3).double()
    teacher[0, 0, 0, 0] = 0.0  # on the boundary: not firing
    for margin in (1.0, 0.3):
        wanted = 0.0
        for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
            if t <= 0 and s > -margin:
                wanted += (s + margin) ** 2
            if t > 0 and s <= margin:
                wanted += (s - margin) ** 2
        found = ab_loss(student, teacher, margin=margin, scale=1.0)
        assert found.item() == pytest.approx(wanted / 4, rel=1e-12)
        assert ab_loss(student, teacher, margin=margin).item() == pytest.approx(0.003 * wanted / 4, rel=1e-12)


def test_only_the_sides_of_the_teacher_count() -> None:
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    found = ab_loss(student, teacher)
    torch.testing.assert_close(found, ab_loss(student, 50 * teacher))
    torch.testing.assert_close(found, ab_loss(student, teacher.relu()))  # after the ReLU they are the same
    assert ab_loss(teacher.sign() * 1.5, teacher) == 0  # beyond the margin on the right side


def test_who_is_on_the_right_side_beyond_the_margin_gets_no_gradient() -> None:
    student = torch.tensor([[2.0, 0.5, -0.5, -2.0]], requires_grad=True)
    ab_loss(student, torch.tensor([[1.0, 1.0, 1.0, -1.0]]), scale=1.0).backward()
    assert student.grad.tolist() == [[0.0, -1.0, -3.0, 0.0]]


def test_masks() -> None:
    student, teacher = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    counts = torch.tensor([True, False, True])
    torch.testing.assert_close(ab_loss(student, teacher, mask=counts), ab_loss(student[counts], teacher[counts]))
    places = torch.arange(4) < torch.tensor([[2], [4], [0]])
    each = ab_loss(student, teacher, mask=places, reduction="none")
    wanted = [ab_loss(student[:1, :2], teacher[:1, :2]), ab_loss(student[1:2], teacher[1:2]), torch.tensor(0.0)]
    torch.testing.assert_close(each, torch.stack(wanted))
    torch.testing.assert_close(ab_loss(student, teacher, mask=places), each.sum() / 2)


def test_layers_weigh_half_as_much_as_the_next_and_are_tapped_before_the_relu() -> None:
    student, teacher = create("resnet8", in_channels=1).eval(), create("resnet14", in_channels=1)
    batch = Batch(torch.randn(4, 1, 8, 8), labels=torch.arange(4))
    found = Distiller(student, AB(), teacher).setup(batch)(batch).total
    s_trace, t_trace = (listen(m, batch.inputs, ["preactivations"])["preactivations"] for m in (student, teacher))
    wanted = sum(ab_loss(s, t) / 2 ** (2 - i) for i, (s, t) in enumerate(zip(s_trace, t_trace, strict=True)))
    torch.testing.assert_close(found, wanted)
    assert all((s < 0).any() for s in s_trace)


def test_connectors_only_where_widths_differ() -> None:
    batch = Batch(torch.randn(4, 1, 8, 8), labels=torch.arange(4))
    loss = AB()
    Distiller(create("resnet8", in_channels=1), loss, create("resnet14", in_channels=1)).setup(batch)
    assert [type(m) for m in loss.connectors] == [nn.Identity] * 3
    Distiller(create("resnet8", in_channels=1), loss, create("resnet8x4", in_channels=1)).setup(batch)
    assert [[type(m).__name__ for m in c] for c in loss.connectors] == [["ConvProjector", "BatchNorm2d"]] * 3


def test_it_is_its_own_first_stage() -> None:
    loss = AB()
    assert loss.opening() is loss


def test_mistakes_are_named() -> None:
    feature = torch.randn(2, 4)
    for option in ("margin", "scale"):
        with pytest.raises(ConfigError, match=option):
            ab_loss(feature, feature, **{option: 0.0})
        with pytest.raises(ConfigError, match=option):
            AB(**{option: -1.0})
    with pytest.raises(TensorError, match="student_feature"):
        ab_loss(feature[:, :3], feature)
