"""SimKD: the loss by loops, and a student that ends in the teacher's classifier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TapError, TensorError
from limbeck.models import create, put_head
from limbeck.objectives.feature.simkd import SimKD, simkd_loss


def reference(student: Tensor, teacher: Tensor) -> float:
    """Equation 3 element by element, for maps of one size."""
    total, count = 0.0, 0
    for mine, other in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        total, count = total + (mine - other) ** 2, count + 1
    return total / count


def pair(name: str = "resnet8", classes: int = 4) -> tuple[nn.Module, nn.Module, Batch]:
    student = create(name, num_classes=classes, widths=(4, 4, 8, 8))
    teacher = create("resnet8", num_classes=classes)
    return student, teacher, Batch(torch.randn(6, 3, 8, 8), labels=torch.arange(6) % classes)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, 5, 2, 3)])
def test_it_is_the_papers_equation(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    assert simkd_loss(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-12)


def test_a_larger_map_of_the_teacher_is_averaged() -> None:
    student, teacher = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 4, 4).double()
    small = teacher.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    assert simkd_loss(student, teacher).item() == pytest.approx(reference(student, small), rel=1e-12)


def test_reductions_and_mask() -> None:
    student, teacher = torch.randn(2, 3, 4, 5).double()
    mask = torch.tensor([[True, True, False, False]] * 3)
    each = simkd_loss(student, teacher, mask=mask, reduction="none")
    assert each.shape == (3, 4)
    assert not each[:, 2:].any()
    assert torch.allclose(simkd_loss(student, teacher, mask=mask), each.sum() / 6)
    assert simkd_loss(student, teacher, mask=mask, reduction="sum") == each.sum()


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(2, 3, 5).requires_grad_(), torch.randn(2, 3, 5).requires_grad_()
    with pytest.raises(TensorError):
        simkd_loss(student[:, :2], teacher)
    simkd_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_only_what_is_the_students_own_learns() -> None:
    student, teacher, batch = pair()
    put_head(student, "reused", example=batch, teacher=teacher)
    distiller = Distiller(student, SimKD(), teacher).setup(batch)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, weight_decay=0.1)
    first = distiller(batch).total
    for _ in range(8):
        optimizer.zero_grad()
        loss = distiller(batch).total
        loss.backward()
        optimizer.step()
    assert loss < first
    assert torch.equal(student.linear.weight, teacher.linear.weight)
    assert torch.equal(student.linear.bias, teacher.linear.bias)
    still = [n for n, p in student.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert not still


def test_a_feature_matched_exactly_is_classified_as_by_the_teacher() -> None:
    """The paper's point: the classifier is the teacher's, so an equal feature gives equal logits."""
    student, teacher, batch = pair()
    put_head(student, "reused", example=batch, teacher=teacher)
    hint: list[Tensor] = []
    teacher.eval().get_submodule("layer3").register_forward_hook(lambda m, i, o: hint.append(o))
    wanted = teacher(batch.inputs)
    student.eval().get_submodule("layer3").projector.register_forward_hook(lambda m, i, o: hint[0])
    torch.testing.assert_close(student(batch.inputs), wanted)


def test_transformers_are_compared_where_they_are_pooled() -> None:
    teacher, student = (create("vit_mini", num_classes=3, image_size=8, patch_size=4) for _ in range(2))
    batch = Batch(torch.randn(4, 3, 8, 8))
    head = put_head(student, {"reused": {"feature": "pooled"}}, example=batch, teacher=teacher)
    assert head["reused"]["relu"] is False  # a normalised feature has negative entries
    distiller = Distiller(student, SimKD(feature="pooled"), teacher).setup(batch)
    assert distiller(batch).total > 0


def test_what_is_missing_is_named() -> None:
    student, teacher, batch = pair()
    with pytest.raises(TapError, match=r"head\.projector: .*put_head"):
        Distiller(student, SimKD(), teacher).setup(batch)
    put_head(student, {"reused": {"width": 64}}, example=batch)  # a classifier of its own
    with pytest.raises(ConfigError, match="not the teacher's"):
        Distiller(student, SimKD(), teacher).setup(batch)
