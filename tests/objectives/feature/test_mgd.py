from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.feature.mgd import MGD, generator, hide, mgd_loss


def traces(*shapes: tuple[int, ...]) -> list[Trace]:
    return [Trace(None, {"x": torch.randn(shape)}) for shape in shapes]


def ready(loss: MGD, student: Trace, teacher: Trace) -> MGD:
    loss.setup(student, teacher, Batch(torch.zeros(3)), DataInfo())
    return loss


def at(maps: Tensor, i: int, c: int, y: int, x: int) -> float:
    inside = 0 <= y < maps.shape[2] and 0 <= x < maps.shape[3]
    return float(maps[i, c, y, x]) if inside else 0.0


def convolved(maps: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 3x3 convolution in loops."""
    result = torch.zeros_like(maps)
    samples, channels, height, width = maps.shape
    for i in range(samples):
        for o in range(channels):
            for y in range(height):
                for x in range(width):
                    value = float(layer.bias[o])
                    for c in range(channels):
                        for dy in range(3):
                            for dx in range(3):
                                value += float(layer.weight[o, c, dy, dx]) * at(maps, i, c, y + dy - 1, x + dx - 1)
                    result[i, o, y, x] = value
    return result


def test_equals_the_paper() -> None:
    torch.manual_seed(3)
    block = generator(2).double()
    student, teacher = torch.randn(2, 2, 2, 3, 3).double()
    torch.manual_seed(5)
    kept = torch.rand(2, 1, 3, 3) >= 0.4
    with torch.no_grad():
        wanted = convolved(convolved(student * kept, block[0]).clamp(min=0), block[2])
        torch.manual_seed(5)
        found = mgd_loss(block(hide(student, 0.4)), teacher)
    squares = [(a - b) ** 2 for a, b in zip(wanted.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    assert found.item() == pytest.approx(sum(squares) / len(squares), rel=1e-9)


@pytest.mark.parametrize(("what", "same"), [("places", (1,)), ("channels", (2, 3))])
def test_what_is_hidden(what: str, same: tuple[int, ...]) -> None:
    hidden = hide(torch.ones(50, 8, 6, 6), 0.3, what) == 0
    assert 0.2 < hidden.float().mean() < 0.4
    assert (hidden.all(dim=same) | ~hidden.any(dim=same)).all()  # all channels of a place, all places of a channel
    assert hide(torch.ones(2, 3, 4, 4), 0.0).all()


def test_the_objective_hides_aligns_and_generates() -> None:
    student, teacher = traces((3, 4, 8, 8), (3, 6, 4, 4))
    loss = ready(MGD("x", ratio=0.6), student, teacher)
    torch.manual_seed(1)
    found = loss(student, teacher, Batch(torch.zeros(3)))
    torch.manual_seed(1)
    masked = hide(loss.projectors[0](nn.functional.avg_pool2d(student["x"], 2)), 0.6)
    torch.testing.assert_close(found, mgd_loss(loss.generators[0](masked), teacher["x"]))


def test_a_class_token_is_left_out() -> None:
    student, teacher = traces((3, 10, 4), (3, 10, 6))
    loss, batch = ready(MGD("x", ratio=0.0), student, teacher), Batch(torch.zeros(3))
    before = loss(student, teacher, batch)
    student["x"][:, 0], teacher["x"][:, 0] = 100.0, -100.0
    assert loss(student, teacher, batch) == before
    teacher["x"][:, 1] = 100.0
    assert loss(student, teacher, batch) > before


def test_reductions_and_mask() -> None:
    made, teacher = torch.randn(2, 3, 4, 2, 2)
    each = mgd_loss(made, teacher, reduction="none")
    torch.testing.assert_close(each[:2].mean(), mgd_loss(made, teacher, mask=torch.tensor([True, True, False])))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="ratio"):
        MGD(ratio=1.0)
    with pytest.raises(TensorError, match="teacher_feature"):
        mgd_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 5))
    student, teacher = traces((3, 4, 4, 4), (3, 4, 4, 4))
    loss = ready(MGD("x"), student, teacher)
    with pytest.raises(TensorError, match=r"student_feature.*channels"):
        loss(*traces((3, 5, 4, 4), (3, 5, 4, 4)), Batch(torch.zeros(3)))
