"""CA-MKD: against plain loops, and as a method of several teachers of their own sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.models.vit import ViT
from limbeck.objectives.feature.ca_mkd import CAMKD, ca_mkd_loss
from limbeck.objectives.response.kd import kd_loss
from limbeck.teachers.several import SeveralTeachers
from tests.objectives.test_classes import Net, make_batch


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trust(losses: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in losses)
    return [(1 - math.exp(x) / total) / (len(losses) - 1) for x in losses]


def test_sample_by_sample_from_the_definition() -> None:
    student, teachers, labels = logits(6, 4), logits(3, 6, 4, seed=1), torch.tensor([0, 3, 1, 2, 2, 0])
    own, goals, said = logits(3, 6, 5, seed=2), logits(3, 6, 5, seed=3), logits(3, 6, 4, seed=4)
    total = 0.0
    for b, y in enumerate(labels.tolist()):
        w, v = (trust([-z[b].log_softmax(0)[y].item() for z in side]) for side in (teachers, said))
        for k in range(3):
            p, q = (teachers[k, b] / 2).softmax(0), (student[b] / 2).softmax(0)
            total += 0.5 * 4 * w[k] * (p * (p / q).log()).sum().item()
            total += 10 * v[k] * (own[k, b] - goals[k, b]).square().mean().item()
    found = ca_mkd_loss(
        student,
        list(teachers),
        labels,
        student_features=list(own),
        teacher_features=list(goals),
        feature_logits=list(said),
        alpha=0.5,
        beta=10.0,
        temperature=2.0,
    )
    assert found.item() == pytest.approx(total / 6, rel=1e-9)


def test_equal_teachers_and_one_alone_are_kd() -> None:
    student, teacher, labels = logits(6, 4), logits(6, 4, seed=1), torch.arange(6) % 4
    for number in (1, 3):
        found = ca_mkd_loss(student, [teacher] * number, labels, temperature=3.0)
        torch.testing.assert_close(found, kd_loss(student, teacher, temperature=3.0))


def test_a_teacher_that_is_wrong_is_hardly_heard() -> None:
    labels = torch.arange(6) % 4
    right = 8 * torch.nn.functional.one_hot(labels, 4).double()
    student = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    ca_mkd_loss(student, [right, right.roll(1, dims=1)], labels, temperature=1.0).backward()
    alone = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    kd_loss(alone, right, temperature=1.0).backward()
    torch.testing.assert_close(student.grad, alone.grad, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("student", [Net(4), ViT(dim=16, depth=1, heads=2, num_classes=5, image_size=8, patch_size=2)])
def test_teachers_of_their_own_sizes(student) -> None:
    torch.manual_seed(0)
    teachers, loss, batch = [Net(6), Net(8), Net(3)], CAMKD(), make_batch()
    distiller = Distiller(student, loss, SeveralTeachers(teachers)).setup(batch)
    assert [c[1].weight.numel() for c in loss.connectors.each] == [24, 32, 12]
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    seen = []
    for _ in range(15):
        optimizer.zero_grad()
        total = distiller(batch).total
        total.backward()
        optimizer.step()
        seen.append(total.item())
    assert seen[-1] < 0.8 * seen[0]
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())


def test_what_a_teachers_classifier_says_of_the_students_map() -> None:
    """The whole of it from the models' own layers."""
    torch.manual_seed(0)
    teachers, student, batch, loss = [Net(6), Net(6)], Net(4), make_batch(), CAMKD(alpha=0.0, beta=1.0)
    value = Distiller(student, loss, SeveralTeachers(teachers)).setup(batch)(batch).total
    maps = [net.layer3(net.layer2(net.layer1(batch.inputs))) for net in (student, *teachers)]
    mapped = [connect(maps[0]) for connect in loss.connectors.each]
    said = [net.fc(h.mean((2, 3))) for net, h in zip(teachers, mapped, strict=True)]
    losses = torch.stack([F.cross_entropy(z, batch.labels, reduction="none") for z in said])
    far = torch.stack([(h - goal).square().mean((1, 2, 3)) for h, goal in zip(mapped, maps[1:], strict=True)])
    torch.testing.assert_close(value, ((1 - losses.softmax(0)) * far).sum(0).mean())


def test_logits_alone_need_no_features() -> None:
    batch, loss = make_batch(), CAMKD(beta=0.0)
    value = Distiller(Net(4), loss, SeveralTeachers([Net(6), Net(8)])).setup(batch)(batch).total
    assert value.isfinite()
    assert not list(loss.parameters())


def test_what_it_refuses() -> None:
    student, labels = logits(6, 4), torch.arange(6) % 4
    with pytest.raises(TensorError, match=r"teacher_logits\[1\]"):
        ca_mkd_loss(student, [logits(6, 4), logits(6, 5)], labels)
    with pytest.raises(TensorError, match="1 of the student's, 0 of teachers'"):
        ca_mkd_loss(student, [student, student], labels, student_features=[student])
    with pytest.raises(ConfigError, match="beta"):
        CAMKD(beta=-1.0)
    batch, loss = make_batch(), CAMKD()
    said = SeveralTeachers([Net(3), Net(4)])
    said.attach(loss.teacher_taps, batch)
    with pytest.raises(ConfigError, match="not set up yet"):
        loss(said(batch), said(batch), batch)
    loss.setup(said(batch), said(batch), batch, DataInfo())
    with pytest.raises(TensorError, match="another number of teachers"):
        loss(said(batch), said(batch).members[0], batch)
