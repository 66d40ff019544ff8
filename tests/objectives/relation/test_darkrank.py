from __future__ import annotations

from itertools import permutations
from math import exp, log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.relation.darkrank import DarkRank, darkrank_loss
from tests.objectives.reference import mean
from tests.objectives.test_classes import Net, make, make_batch


def scores(x: Tensor, scale: float, power: float) -> list[list[float]]:
    rows = F.normalize(x, dim=1).tolist()
    return [[-((scale * sum((a - b) ** 2 for a, b in zip(p, q, strict=True))) ** power) for p in rows] for q in rows]


def named(score: list[float], order: tuple[int, ...]) -> float:
    """Probability of this order."""
    value = 1.0
    for i in range(len(order)):
        value *= exp(score[order[i]]) / sum(exp(score[j]) for j in order[i:])
    return value


def written_out(student: Tensor, teacher: Tensor, scale: float, power: float, length: int) -> float:
    own, told = scores(student, scale, power), scores(teacher, scale, power)
    values = []
    for q in range(len(own)):
        others = sorted((i for i in range(len(own)) if i != q), key=lambda i: -told[q][i])
        value = 0.0
        for order in permutations(others[:length]):
            p = named(told[q], order)
            value += p * log(p / named(own[q], order))
        values.append(value)
    return mean(values)


@pytest.mark.parametrize(("scale", "power", "length"), [(3.5, 1.0, 4), (1.0, 2.0, 3), (2.0, 1.5, 2)])
def test_equals_the_paper(scale: float, power: float, length: int) -> None:
    student, teacher = torch.randn(6, 4).double(), torch.randn(6, 5).double()
    found = darkrank_loss(student, teacher, scale=scale, power=power, length=length)
    assert found.item() == pytest.approx(written_out(student, teacher, scale, power, length), rel=1e-7)


def test_gradient_is_the_derivative() -> None:
    """The query's own included."""
    student, teacher = torch.randn(5, 3).double().requires_grad_(), torch.randn(5, 4).double()
    assert torch.autograd.gradcheck(lambda s: darkrank_loss(s, teacher), student)


def test_length_and_rotation_of_vectors_do_not_matter() -> None:
    student, teacher = torch.randn(2, 6, 4).double()
    turn = torch.linalg.qr(torch.randn(4, 4).double()).Q
    torch.testing.assert_close(darkrank_loss(3 * student @ turn, teacher), darkrank_loss(student, teacher))
    assert darkrank_loss(teacher @ turn, teacher).item() == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("left", [7, 4, 2, 1])
def test_masked_samples_are_neither_queries_nor_neighbours(left: int) -> None:
    """Also where fewer are left than a list is long."""
    student, teacher = torch.randn(2, 9, 4).double()
    counts = torch.zeros(9, dtype=torch.bool)
    counts[torch.randperm(9)[:left]] = True
    wanted = darkrank_loss(student[counts], teacher[counts])
    torch.testing.assert_close(darkrank_loss(student, teacher, mask=counts), wanted)
    assert (wanted > 0) == (left > 2)


def test_one_sample_has_no_neighbours() -> None:
    student = torch.randn(1, 4, requires_grad=True)
    value = darkrank_loss(student, torch.randn(1, 4))
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_objective_brings_the_student_nearer_to_the_teachers_order() -> None:
    distiller, batch = make(loss := DarkRank(), Net(6)), make_batch(size=16)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    seen = []
    for _ in range(30):
        optimizer.zero_grad()
        total = distiller(batch).total
        total.backward()
        optimizer.step()
        seen.append(total.item())
    assert seen[-1] < 0.5 * seen[0]
    assert not list(loss.parameters())


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigError, match="length"):
        DarkRank(length=7)
    with pytest.raises(ConfigError, match="power"):
        darkrank_loss(torch.randn(3, 2), torch.randn(3, 2), power=0.0)
    with pytest.raises(TensorError, match="teacher_feature"):
        darkrank_loss(torch.randn(3, 2), torch.randn(4, 2))
