"""FSP against its paper's matrices, and at its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, LimbeckError, TensorError
from limbeck.core.taps import listen
from limbeck.models import create
from limbeck.objectives.feature.fsp import FSP, fsp_loss


def matrix(first: Tensor, second: Tensor) -> Tensor:
    """The paper's sum over places, of one sample's maps of one size."""
    (m, height, width), n = first.shape, second.shape[0]
    found = torch.zeros(m, n, dtype=first.dtype)
    for i in range(m):
        for j in range(n):
            for h in range(height):
                for w in range(width):
                    found[i, j] += first[i, h, w] * second[j, h, w] / (height * width)
    return found


def maps(*widths: int, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, w, 4, 4).double() for w in widths]


def test_the_papers_sum() -> None:
    student, teacher = maps(2, 3, 4), maps(2, 3, 4)
    each = []
    for b in range(2):
        losses = [
            (matrix(student[i][b], student[i + 1][b]) - matrix(teacher[i][b], teacher[i + 1][b])).square().mean()
            for i in range(2)
        ]
        each.append(sum(losses))
    torch.testing.assert_close(fsp_loss(student, teacher, reduction="none"), torch.stack(each))
    tokens = [[f.flatten(2).transpose(1, 2) for f in side] for side in (student, teacher)]
    torch.testing.assert_close(fsp_loss(*tokens), torch.stack(each).mean())


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_the_larger_map_is_pooled(pool: str) -> None:
    smaller = F.max_pool2d if pool == "max" else F.avg_pool2d
    student, teacher = [maps(2)[0], torch.randn(2, 3, 2, 2).double()], [maps(2)[0], torch.randn(2, 3, 2, 2).double()]
    wanted = fsp_loss([smaller(student[0], 2), student[1]], [smaller(teacher[0], 2), teacher[1]])
    torch.testing.assert_close(fsp_loss(student, teacher, pool=pool), wanted)


def test_sizes_of_student_and_teacher_need_not_agree() -> None:
    """Matrices are means over places: twice as many of the same places change nothing."""
    student, teacher = maps(2, 3), maps(2, 3)
    twice = [F.interpolate(f, scale_factor=2) for f in teacher]
    torch.testing.assert_close(fsp_loss(student, twice), fsp_loss(student, teacher))


def test_tokens_left_out_are_as_if_they_were_not() -> None:
    student, teacher = ([torch.randn(2, 5, w) for w in (3, 4)] for _ in range(2))
    mask = torch.arange(5) < torch.tensor([[3], [3]])
    cut = [[f[:, :3] for f in side] for side in (student, teacher)]
    torch.testing.assert_close(fsp_loss(student, teacher, mask=mask), fsp_loss(*cut))


def test_widths_of_the_teacher_are_learned() -> None:
    batch = Batch(torch.randn(3, 1, 8, 8), labels=torch.arange(3))
    loss, student = FSP(), create("resnet8", in_channels=1).eval()
    teacher = create("resnet8x4", in_channels=1)
    found = Distiller(student, loss, teacher).setup(batch)(batch).total
    s, t = (listen(m, batch.inputs, ["stages"])["stages"] for m in (student, teacher))
    torch.testing.assert_close(found, fsp_loss([m(f) for m, f in zip(loss.projectors, s, strict=True)], t))
    Distiller(student, loss, create("resnet14", in_channels=1)).setup(batch)
    assert [type(m) for m in loss.projectors] == [nn.Identity] * 3


def test_it_is_its_own_first_stage() -> None:
    loss = FSP()
    assert loss.opening() is loss


def test_mistakes_are_named() -> None:
    with pytest.raises(TensorError, match="found 1 and 1 layers; wanted two or more"):
        fsp_loss(maps(2), maps(2))
    with pytest.raises(TensorError, match="found 2 and 3 layers"):
        fsp_loss(maps(2, 2), maps(2, 2, 2))
    with pytest.raises(TensorError, match=r"teacher_feature.*found \[2, 2, 4\]; wanted \[2, 2, 3\]"):
        fsp_loss(maps(2, 3), maps(2, 4))
    with pytest.raises(ConfigError, match="pool: no such pooling"):
        fsp_loss(maps(2, 2), maps(2, 2), pool="min")
    with pytest.raises(LimbeckError, match="mask"):
        fsp_loss(maps(2, 2), maps(2, 2), mask=torch.ones(3, dtype=torch.bool))
