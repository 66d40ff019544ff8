from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.response.ctkd import CTKD, ctkd_loss
from limbeck.objectives.response.kd import kd_loss
from tests.objectives.reference import kd, kl, mean, softmax


def temperature_of(theta: float) -> float:
    return 1 + 20 / (1 + math.exp(-theta))


def made(loss: CTKD, student: Tensor, teacher: Tensor) -> tuple[Trace, Trace, Batch]:
    scene = Trace(student), Trace(teacher), Batch(torch.zeros(len(student), 1))
    loss.setup(*scene, DataInfo())
    return scene


def test_equals_the_paper() -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    for theta in (1.0, -2.0):
        found = ctkd_loss(student, teacher, raw=theta)
        assert found.item() == pytest.approx(kd(student, teacher, temperature_of(theta)), rel=1e-9)


def test_each_place_at_its_own_temperature() -> None:
    student, teacher, theta = 3 * torch.randn(2, 4, 6).double(), torch.randn(4, 6).double(), torch.randn(4).double()
    student = student[0]
    wanted = []
    for s, t, raw in zip(student.tolist(), teacher.tolist(), theta.tolist(), strict=True):
        found = temperature_of(raw)
        wanted.append(found**2 * kl(softmax(t, found), softmax(s, found)))
    assert ctkd_loss(student, teacher, raw=theta).item() == pytest.approx(mean(wanted), rel=1e-9)


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
def test_the_temperatures_gradient_is_reversed(strength: float) -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    step = 1e-5
    rise = (ctkd_loss(student, teacher, raw=0.4 + step) - ctkd_loss(student, teacher, raw=0.4 - step)) / (2 * step)
    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    ctkd_loss(student, teacher, raw=theta, strength=strength).backward()
    assert theta.grad is not None
    assert theta.grad.item() == pytest.approx(-strength * rise.item(), rel=1e-6, abs=1e-12)


def test_the_student_learns_as_from_kd() -> None:
    student, teacher, gradients = *torch.randn(2, 5, 6).double(), []
    for loss in (
        lambda s: ctkd_loss(s, teacher, raw=1.0),
        lambda s: kd_loss(s, teacher, temperature=temperature_of(1.0)),
    ):
        leaf = student.clone().requires_grad_()
        loss(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.8, 1.0)])
def test_the_curriculum(progress: float, share: float) -> None:
    """Half a cosine wave over the first tenth, then all of it."""
    loss = CTKD(curriculum=0.1)
    student, teacher, batch = made(loss, *3 * torch.randn(2, 5, 6))
    theta = loss.raw.detach().clone().requires_grad_()
    ctkd_loss(student.logits, teacher.logits, raw=theta).backward()
    loss(student, teacher, batch.replace(progress=progress)).backward()
    assert loss.raw.grad is not None
    assert theta.grad is not None
    torch.testing.assert_close(loss.raw.grad, share * theta.grad)


def test_steps_of_an_optimizer_make_it_harder() -> None:
    loss = CTKD()
    student, teacher, batch = made(loss, *3 * torch.randn(2, 8, 6))
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    seen = []
    for _ in range(10):
        value = loss(student, teacher, batch.replace(progress=0.5))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append(value.item())
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


def test_by_instance() -> None:
    """It starts where the global one starts, learns to tell samples apart, and never steers through the student."""
    loss = CTKD(mode="instance")
    student, teacher = 3 * torch.randn(2, 8, 6)
    student.requires_grad_()
    traces = made(loss, student, teacher)
    torch.testing.assert_close(loss(*traces), ctkd_loss(student, teacher, raw=1.0))
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    batch = traces[2].replace(progress=0.5)
    seen = []
    for _ in range(20):
        value = loss(*traces[:2], batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append(value.item())
    assert seen[-1] > seen[0]
    with torch.no_grad():
        theta = loss._predict(student, teacher)
    assert theta.shape == (8,)
    assert theta.std() > 1e-3
    student.grad = None
    loss(*traces[:2], batch).backward()
    own = student.grad
    leaf = student.detach().clone().requires_grad_()
    ctkd_loss(leaf, teacher, raw=theta).backward()
    torch.testing.assert_close(own, leaf.grad)


@pytest.mark.parametrize("mode", ["global", "instance"])
def test_masked_places_that_are_no_numbers_leave_the_temperature_alone(mode: Literal["global", "instance"]) -> None:
    loss = CTKD(mode=mode)
    student, teacher, batch = made(loss, *torch.randn(2, 4, 6))
    student.logits[1] = math.nan
    loss(student, teacher, batch.replace(mask=torch.tensor([True, False, True, True]), progress=0.5)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in loss.parameters())


def test_what_it_refuses() -> None:
    for options in ({"start": 0.0}, {"span": -1.0}, {"curriculum": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            CTKD(**options)
    with pytest.raises(ConfigError, match="predictor"):
        CTKD(mode="instance")(Trace(torch.randn(2, 3)), Trace(torch.randn(2, 3)), Batch(torch.zeros(2, 1)))
