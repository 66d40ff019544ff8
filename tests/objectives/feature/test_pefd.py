from __future__ import annotations

from math import sqrt

import pytest
import torch

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.feature.pefd import PEFD, pefd_loss
from tests.objectives.reference import dot, mean
from tests.objectives.test_classes import Net, make, make_batch


def test_equals_the_paper() -> None:
    student, teacher = torch.randn(2, 5, 7).double()
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    wanted = mean([1 - dot(s, t) / sqrt(dot(s, s) * dot(t, t)) for s, t in pairs])
    assert pefd_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-9)


def test_length_does_not_matter() -> None:
    student, teacher = torch.randn(2, 5, 7).double()
    torch.testing.assert_close(pefd_loss(3 * student, teacher), pefd_loss(student, 0.2 * teacher))
    assert pefd_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-12)


def test_a_dead_projection_costs_one_and_passes_no_gradient() -> None:
    student = torch.zeros(2, 3, requires_grad=True)
    value = pefd_loss(student, torch.randn(2, 3))
    value.backward()
    assert value == 1
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("number", [1, 4])
def test_objective(number: int) -> None:
    loss, teacher, batch = PEFD(number=number), Net(6), make_batch()
    distiller = make(loss, teacher)
    found = distiller(batch).total
    student, inputs = distiller.student, batch.inputs
    assert isinstance(student, Net)
    own, told = (net.layer3(net.layer2(net.layer1(inputs))).mean((2, 3)) for net in (student, teacher))
    projectors = loss.projectors
    assert projectors is not None
    assert len(projectors) == number
    wanted = pefd_loss(torch.stack([layer(own).relu() for layer in projectors]).mean(0), told)
    torch.testing.assert_close(found, wanted)
    assert len({float(p.weight.detach().sum()) for p in projectors}) == number  # each starts elsewhere


def test_projectors_of_a_signed_feature_are_linear() -> None:
    loss = PEFD("layer3.0", number=2)  # before its ReLU
    distiller = make(loss, Net(6))
    distiller(make_batch()).total.backward()
    assert not loss.relu
    assert loss.projectors is not None
    assert all(p.weight.grad is not None and p.weight.grad.any() for p in loss.projectors)


def test_misuse_is_refused() -> None:
    with pytest.raises(TensorError, match="teacher_feature"):
        pefd_loss(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(ConfigError, match="number"):
        PEFD(number=0)
