from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.trace import Trace
from limbeck.objectives.response.delta_kd import DeltaKD, delta_kd_loss, shifted
from limbeck.objectives.response.kd import kd_loss
from limbeck.teachers.several import SeveralTeachers
from tests.objectives.reference import kl, mean, softmax


@pytest.mark.parametrize(("strength", "temperature"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_equals_the_formula(strength: float, temperature: float) -> None:
    student, tuned, raw, start = 2 * torch.randn(4, 5, 6).double()
    wanted = []
    for s, t, t0, s0 in zip(*(z.tolist() for z in (student, tuned, raw, start)), strict=True):
        target = [c + strength * (a - b) for a, b, c in zip(t, t0, s0, strict=True)]
        wanted.append(temperature**2 * kl(softmax(target, temperature), softmax(s, temperature)))
    found = delta_kd_loss(
        student, tuned, raw_teacher_logits=raw, raw_student_logits=start, strength=strength, temperature=temperature
    )
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_the_worked_example() -> None:
    """z_t = (2, 0, 0), z_t0 = (1, 0, 0), z_s0 = (0, 1, 0): z* = (1, 1, 0)."""
    start, to, origin = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = shifted(start, to, origin).softmax(0).tolist()
    assert found == pytest.approx([0.4223, 0.4223, 0.1554], abs=1e-4)


def test_a_teacher_that_did_not_change_holds_the_student_where_it_began() -> None:
    start, raw = torch.randn(2, 4, 6).double()
    student = start.clone().requires_grad_()
    value = delta_kd_loss(student, raw, raw_teacher_logits=raw, raw_student_logits=start)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(student.grad, torch.zeros(4, 6).double())
    student, tuned, raw, start = torch.randn(4, 4, 6).double()
    found = delta_kd_loss(student, tuned, raw_teacher_logits=raw, raw_student_logits=start, strength=0.0)
    torch.testing.assert_close(found, kd_loss(student, start, temperature=1.0))


def test_where_both_began_alike_it_is_kd() -> None:
    student, tuned, raw = torch.randn(3, 4, 6).double()
    found = delta_kd_loss(student, tuned, raw_teacher_logits=raw, raw_student_logits=raw, temperature=3.0)
    torch.testing.assert_close(found, kd_loss(student, tuned, temperature=3.0))


def test_constants_added_to_any_models_logits_do_not_matter() -> None:
    logits = torch.randn(4, 4, 6).double()
    student, tuned, raw, start = logits + torch.randn(4, 4, 1).double()
    found = delta_kd_loss(student, tuned, raw_teacher_logits=raw, raw_student_logits=start)
    wanted = delta_kd_loss(*logits[:2], raw_teacher_logits=logits[2], raw_student_logits=logits[3])
    torch.testing.assert_close(found, wanted)


def test_classes_that_are_ruled_out() -> None:
    out = -math.inf
    start, to = torch.tensor([0.0, 1.0, out, 2.0]), torch.tensor([1.0, out, 0.0, 2.0])
    found = shifted(start, to, torch.tensor([0.0, 0.0, 0.0, out])).softmax(0)
    assert found[1] == found[2] == 0
    assert bool(found.isfinite().all())


def test_three_models_teach() -> None:
    """A student that begins at the raw one, and learns the change of a teacher that was trained on."""
    torch.manual_seed(0)
    batch = Batch(torch.randn(32, 6))
    raw, start = nn.Linear(6, 4), nn.Linear(6, 4)
    tuned, student = copy.deepcopy(raw), copy.deepcopy(start)
    with torch.no_grad():
        tuned.weight += 0.5 * torch.randn(4, 6)
    distiller = Distiller(student, DeltaKD(), SeveralTeachers([tuned, raw, start])).setup(batch)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        distiller(batch).total.backward()
        optimizer.step()
    assert distiller(batch).total.item() < 1e-4

    def centred(weight: torch.Tensor) -> torch.Tensor:
        return weight - weight.mean(dim=0)

    learned = centred(student.weight.detach() - start.weight.detach())
    torch.testing.assert_close(learned, centred(tuned.weight.detach() - raw.weight.detach()), atol=0.02, rtol=0)


def test_what_it_refuses() -> None:
    logits = torch.randn(4, 3)
    said = Trace(logits)
    with pytest.raises(ConfigError, match=r"teacher.*found 1.*SeveralTeachers"):
        DeltaKD()(said, said, Batch(logits))
    with pytest.raises(TensorError, match="raw_student_logits"):
        delta_kd_loss(logits, logits, raw_teacher_logits=logits, raw_student_logits=logits[:, :2])
    with pytest.raises(ConfigError, match="temperature"):
        DeltaKD(temperature=0.0)
