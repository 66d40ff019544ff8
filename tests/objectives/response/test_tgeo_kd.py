"""TGeo-KD against the paper's equations in plain loops."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.objectives.response.cross_entropy import cross_entropy_loss
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.tgeo_kd import TGeoKD, tgeo_kd_loss, trilateral_state


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    powers = [exp(z / tau) for z in row]
    return [p / sum(powers) for p in powers]


def written_out(ratio: Tensor, student: Tensor, teacher: Tensor, labels: Tensor, tau: float) -> float:
    total = 0.0
    for a, s, t, y in zip(ratio.tolist(), student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p, q = softmax(t, tau), softmax(s, tau)
        kl = sum(x * log(x / z) for x, z in zip(p, q, strict=True))
        total += a * tau**2 * kl - (1 - a) * log(softmax(s)[y])
    return total / len(student)


def made(size: int = 7, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return *torch.randn(2, size, classes).double(), torch.randint(0, classes, (size,))


def test_equals_the_paper() -> None:
    student, teacher, labels = made()
    ratio = torch.rand(7).double()
    found = tgeo_kd_loss(ratio, student, teacher, labels, temperature=1.5)
    assert found.item() == pytest.approx(written_out(ratio, student, teacher, labels, 1.5), rel=1e-9)


def test_fixed_ratios_are_what_is_known() -> None:
    student, teacher, labels = made()
    none, all_, some = (torch.full((7,), a).double() for a in (0.0, 1.0, 0.3))
    own, other = cross_entropy_loss(student, labels), kd_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(tgeo_kd_loss(none, student, teacher, labels, temperature=2.0), own)
    torch.testing.assert_close(tgeo_kd_loss(all_, student, teacher, labels, temperature=2.0), other)
    mixed = tgeo_kd_loss(some, student, teacher, labels, temperature=2.0)
    torch.testing.assert_close(mixed, 0.3 * other + 0.7 * own)


def test_the_state_has_nine_parts() -> None:
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]).log()
    means = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    found = trilateral_state(student, teacher, torch.tensor([0]), means).view(9, 2)
    wanted = [(0.5, 0.5), (0.9, 0.1), (1, 0), (0.7, 0.3), (0.04, 0.04), (0.25, 0.25), (0.16, 0.16), (0.01, 0.01)]
    torch.testing.assert_close(found, torch.tensor([*wanted, (0.09, 0.09)]))


def set_up(objective: TGeoKD) -> tuple[Distiller, Batch]:
    batch = Batch(torch.randn(12, 5), labels=torch.arange(12) % 3)
    distiller = Distiller(nn.Linear(5, 3), objective, nn.Linear(5, 3))
    return distiller.setup(batch, DataInfo(12, classes=3, batches=lambda: [batch])), batch


def test_class_means_are_the_teachers_over_the_training_set() -> None:
    objective = TGeoKD()
    distiller, batch = set_up(objective)
    said = distiller.teacher.model(batch.inputs).softmax(1)
    wanted = torch.stack([said[batch.labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(objective.class_means, wanted)


def test_without_its_scheme_the_controller_is_fixed() -> None:
    objective = TGeoKD()
    distiller, batch = set_up(objective)
    distiller(batch).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.parameters())
    assert distiller.student.weight.grad is not None


def test_a_controller_of_ones_own() -> None:
    class Trusting(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            return torch.ones_like(state[..., :1])

    objective = TGeoKD(temperature=3.0)
    objective.controller = Trusting()
    distiller, batch = set_up(objective)
    said = distiller.student(batch.inputs), distiller.teacher.model(batch.inputs)
    torch.testing.assert_close(distiller(batch).total, kd_loss(*said, temperature=3.0))


def test_what_is_missing_is_told() -> None:
    student, teacher, labels = made()
    with pytest.raises(TensorError, match=r"ratio.*\[3\].*\[7\] as labels"):
        tgeo_kd_loss(torch.rand(3), student, teacher, labels)
    with pytest.raises(TensorError, match="TGeo-KD needs to know the class"):
        tgeo_kd_loss(torch.rand(7), student, teacher, student.softmax(1))
    batch = Batch(torch.randn(4, 5), labels=torch.arange(4) % 3)
    with pytest.raises(ConfigError, match="tgeo_kd: this needs the teacher's answers"):
        Distiller(nn.Linear(5, 3), TGeoKD(), nn.Linear(5, 3)).setup(batch)
