from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.models.vit import ViT
from limbeck.objectives.response.cskd import CSKD, cskd_loss
from tests.objectives import reference
from tests.objectives.test_classes import Net, make_batch


def plain(student: Tensor, teacher: Tensor, r: float, hard: bool, temperature: float) -> float:
    """Place by place; the student's grid is twice the teacher's, two by two places are averaged."""
    values = []
    samples, classes, h, w = teacher.shape
    s, t = student.tolist(), teacher.tolist()
    for b in range(samples):
        whole = [reference.mean([t[b][c][i][j] for i in range(h) for j in range(w)]) for c in range(classes)]
        for i in range(h):
            for j in range(w):
                four = [(2 * i + a, 2 * j + d) for a in range(2) for d in range(2)]
                own = [reference.mean([s[b][c][y][x] for y, x in four]) for c in range(classes)]
                wanted = [r * t[b][c][i][j] + (1 - r) * whole[c] for c in range(classes)]
                if hard:
                    values.append(-math.log(reference.softmax(own)[wanted.index(max(wanted))]))
                else:
                    p, q = reference.softmax(wanted, temperature), reference.softmax(own, temperature)
                    values.append(temperature**2 * reference.kl(p, q))
    return reference.mean(values)


@pytest.mark.parametrize(("decay", "r"), [("linear", 0.7), ("square", 0.49), ("cosine", math.cos(0.15 * math.pi))])
@pytest.mark.parametrize(("hard", "temperature"), [(True, 1.0), (False, 1.0), (False, 3.0)])
def test_equals_the_paper(decay: str, r: float, hard: bool, temperature: float) -> None:
    student, teacher = 2 * torch.randn(2, 4, 6, 4).double(), 2 * torch.randn(2, 4, 3, 2).double()
    options = {"decay": decay, "hard": hard, "temperature": temperature}
    for progress in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        value = cskd_loss(student, teacher, progress=progress, **options)
        assert value.item() == pytest.approx(plain(student, teacher, r, hard, temperature), rel=1e-6)


@pytest.mark.parametrize("decay", ["linear", "square", "cosine"])
def test_local_at_first_global_in_the_end(decay: str) -> None:
    teacher = torch.randn(2, 5, 3, 3).double()
    whole = teacher.mean((2, 3), keepdim=True).expand_as(teacher)
    soft = {"hard": False, "decay": decay}
    assert cskd_loss(teacher, teacher, progress=0.0, **soft).item() == pytest.approx(0.0, abs=1e-12)
    assert cskd_loss(whole, teacher, progress=1.0, **soft).item() == pytest.approx(0.0, abs=1e-12)
    assert cskd_loss(whole, teacher, progress=0.0, **soft) > 0.01


def test_into_a_transformer_its_patches_learn_and_its_class_head_does_not() -> None:
    torch.manual_seed(0)
    teacher, loss, batch = Net(6), CSKD(), make_batch()
    student = ViT(dim=16, depth=2, heads=2, num_classes=5, image_size=8, patch_size=2)
    distiller = Distiller(student, loss, teacher).setup(batch)
    value = distiller(batch).total
    value.backward()
    assert student.linear.weight.grad is None
    assert student.blocks[0].mlp[0].weight.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert distiller(batch.replace(progress=1.0)).total != value


def test_it_trains_a_convolutional_student_too() -> None:
    torch.manual_seed(0)
    teacher, student, batch = Net(6), Net(4), make_batch()
    distiller = Distiller(student, CSKD(), teacher).setup(batch)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    seen = []
    for _ in range(30):
        optimizer.zero_grad()
        distiller(batch).total.backward()
        optimizer.step()
        seen.append(distiller(batch).total.item())
    assert seen[-1] < 0.8 * seen[0]


def test_what_it_refuses() -> None:
    maps = torch.randn(2, 3, 4, 4)
    with pytest.raises(TensorError, match="teacher_maps"):
        cskd_loss(maps, maps[:, :2])
    with pytest.raises(ConfigError, match="decay"):
        cskd_loss(maps, maps, decay="late")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature"):
        CSKD(temperature=0.0)
    teacher = ViT(dim=16, depth=1, heads=2, num_classes=5, image_size=8, patch_size=2)
    with pytest.raises(ConfigError, match="stages:-1.*pool"):
        Distiller(Net(4), CSKD(), teacher).setup(make_batch())
