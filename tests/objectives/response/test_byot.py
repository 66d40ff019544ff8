from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.models.vit import ViT
from limbeck.models.zoo import create
from limbeck.objectives.response.byot import BYOT, byot_loss
from limbeck.objectives.response.cross_entropy import CrossEntropy
from tests.objectives import reference
from tests.objectives.test_classes import Net, make_batch


def plain(
    answers: list[Tensor],
    reads: list[Tensor],
    deep: Tensor,
    feature: Tensor,
    labels: Tensor,
    settings: dict[str, float],
) -> float:
    alpha, beta, t = settings["alpha"], settings["beta"], settings["temperature"]
    values = []
    for i, y in enumerate(labels.tolist()):
        wanted, value = reference.softmax(deep[i].tolist(), t), 0.0
        for z, f in zip(answers, reads, strict=True):
            row = z[i].tolist()
            right = -math.log(reference.softmax(row)[y]) if y >= 0 else 0.0
            value += (1 - alpha) * right + alpha * t**2 * reference.kl(wanted, reference.softmax(row, t))
            value += beta * sum((a - b) ** 2 for a, b in zip(f[i].tolist(), feature[i].tolist(), strict=True))
        values.append(value)
    return reference.mean(values)


def inputs() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    answers, reads = list(torch.randn(3, 5, 4).double()), list(torch.randn(3, 5, 6).double())
    return answers, reads, torch.randn(5, 4).double(), torch.randn(5, 6).double(), torch.tensor([0, 3, -1, 1, 2])


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.1, "beta": 1.28e-4, "temperature": 3.0},
        {"alpha": 0.7, "beta": 0.5, "temperature": 1.0},
        {"alpha": 0.0, "beta": 0.0, "temperature": 2.0},
    ],
)
def test_equals_the_paper(settings: dict[str, float]) -> None:
    given = inputs()
    assert byot_loss(*given, **settings).item() == pytest.approx(plain(*given, settings), rel=1e-9)


def test_the_deepest_is_a_constant() -> None:
    answers, reads, deep, feature, labels = inputs()
    deep.requires_grad_()
    feature.requires_grad_()
    answers[0].requires_grad_()
    byot_loss(answers, reads, deep, feature, labels, beta=1.0).backward()
    assert deep.grad is None
    assert feature.grad is None
    assert answers[0].grad is not None


STUDENTS = {
    "convolutional": lambda: create("resnet8", num_classes=5),
    "transformer": lambda: ViT(dim=16, depth=4, heads=2, num_classes=5, image_size=8, patch_size=2),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_shallow_layers_learn_without_a_teacher(kind: str) -> None:
    torch.manual_seed(0)
    student, loss, batch = STUDENTS[kind](), BYOT(), make_batch(size=16)
    names = list(student.state_dict())
    distiller = Distiller(student, 0.9 * CrossEntropy() + loss).setup(batch)
    assert len(loss.heads) == {"convolutional": 2, "transformer": 3}[kind]
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    seen = []
    for _ in range(15):
        optimizer.zero_grad()
        found = distiller(batch).total
        found.backward()
        optimizer.step()
        seen.append(found.item())
    assert all(p.grad is not None for p in loss.parameters())
    assert list(student.state_dict()) == names
    assert seen[-1] < 0.9 * seen[0]


def test_only_the_layers_below_a_branch_learn_from_it() -> None:
    student, batch = create("resnet8", num_classes=5), make_batch()
    Distiller(student, BYOT()).setup(batch)(batch).total.backward()
    grads = {name: p.grad for name, p in student.named_parameters()}
    blocks = sorted({n.split(".")[0] for n in grads if n.startswith("layer") or n.startswith("stage")})
    last = [g for n, g in grads.items() if n.startswith(blocks[-1]) or n.startswith(("fc", "linear"))]
    assert last
    assert all(g is None for g in last)
    assert any(g is not None for g in grads.values())


def test_what_it_refuses() -> None:
    answers, reads, deep, feature, labels = inputs()
    with pytest.raises(TensorError, match="branch_features"):
        byot_loss(answers, reads[:2], deep, feature, labels)
    with pytest.raises(TensorError, match="labels"):
        byot_loss(answers, reads, deep, feature)
    with pytest.raises(TensorError, match="feature"):
        byot_loss(answers, reads, deep, feature[:, :4], labels)
    with pytest.raises(ConfigError, match="temperature"):
        BYOT(temperature=0.0)
    with pytest.raises(ConfigError, match="shallower"):
        Distiller(Net(4), BYOT(tap="layer3")).setup(make_batch())
