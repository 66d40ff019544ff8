"""GHND and HND, which is GHND at one layer."""

from __future__ import annotations

import pytest
import torch

from limbeck.core import catalogue
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.taps import listen
from limbeck.models import create
from limbeck.objectives.feature.ghnd import GHND, ghnd_loss


def test_the_papers_sum() -> None:
    student, teacher = ([torch.randn(3, 2, 4, 4).double(), torch.randn(3, 5).double()] for _ in range(2))
    each = [0.0] * 3
    for weight, s_layer, t_layer in zip((1.0, 0.25), student, teacher, strict=True):
        for b in range(3):
            for s, t in zip(s_layer[b].flatten().tolist(), t_layer[b].flatten().tolist(), strict=True):
                each[b] += weight * (s - t) ** 2
    found = ghnd_loss(student, teacher, weights=[1.0, 0.25], reduction="none")
    assert found.tolist() == pytest.approx(each, rel=1e-12)
    total = sum(torch.nn.functional.mse_loss(s, t, reduction="sum") for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(ghnd_loss(student, teacher), total / 3)


def test_masks() -> None:
    student, teacher = ([torch.randn(2, 4, 3), torch.randn(2, 4, 5)] for _ in range(2))
    mask = torch.arange(4) < torch.tensor([[2], [0]])
    wanted = ghnd_loss([f[:1, :2] for f in student], [f[:1, :2] for f in teacher])
    torch.testing.assert_close(ghnd_loss(student, teacher, mask=mask), wanted)


def test_hnd_is_one_layer_of_it() -> None:
    batch = Batch(torch.randn(3, 1, 8, 8), labels=torch.arange(3))
    student, teacher = create("resnet8", in_channels=1).eval(), create("resnet14", in_channels=1)
    one = Distiller(student, catalogue.get("hnd").build(), teacher).setup(batch)(batch)
    assert list(one.terms) == ["hnd"]
    s, t = (listen(m, batch.inputs, ["layer1"])["layer1"] for m in (student, teacher))
    torch.testing.assert_close(one.total, ghnd_loss([s], [t]))
    every = Distiller(student, GHND(), teacher).setup(batch)(batch).total
    rest = Distiller(student, GHND(["layer2", "layer3"]), teacher).setup(batch)(batch).total
    torch.testing.assert_close(every, one.total + rest)


def test_a_head_learns_where_the_tail_is_the_teachers() -> None:
    """The paper's use: with the tail frozen, the student comes to answer like the teacher without labels."""
    torch.manual_seed(0)
    teacher, student = create("resnet8", in_channels=1).eval(), create("resnet8", in_channels=1)
    for name in ("layer2", "layer3", "linear"):
        student.get_submodule(name).load_state_dict(teacher.get_submodule(name).state_dict())
        student.get_submodule(name).requires_grad_(False)
    batch = Batch(torch.randn(32, 1, 8, 8))
    distiller = Distiller(student, GHND(["layer1", "layer2"]), teacher).setup(batch).eval()
    optimizer = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=0.01)

    def gap() -> float:
        with torch.no_grad():
            return float((student(batch.inputs) - teacher(batch.inputs)).square().mean())

    before = gap()
    for _ in range(30):
        optimizer.zero_grad()
        distiller(batch).total.backward()
        optimizer.step()
    assert gap() < 0.5 * before


def test_mistakes_are_named() -> None:
    layers = [torch.randn(2, 3), torch.randn(2, 4)]
    with pytest.raises(TensorError, match="teacher_features: layers are compared one by one; found 1 layers; wanted 2"):
        ghnd_loss(layers, layers[:1])
    with pytest.raises(TensorError, match="wanted at least 1"):
        ghnd_loss([], [])
    with pytest.raises(TensorError, match="student_feature"):
        ghnd_loss(layers, layers[::-1])
    with pytest.raises(ConfigError, match="weights: one weight a layer; found 3; wanted 2"):
        ghnd_loss(layers, layers, weights=[1.0] * 3)
