from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.sinkd import SinKD, sinkd_loss
from tests.objectives import reference

SURE = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64).log()
UNSURE = torch.tensor([[0.6, 0.4], [0.4, 0.6]], dtype=torch.float64).log()
OTHER = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64).log()


def plain(student: Tensor, teacher: Tensor, temperature: float, epsilon: float, iterations: int) -> float:
    """The paper's steps one by one: cost, kernel, rows, columns, cost of the plan; the mean over samples."""
    s = [reference.softmax(row, temperature) for row in student.tolist()]
    t = [reference.softmax(row, temperature) for row in teacher.tolist()]
    cost = [[sum(abs(a - b) for a, b in zip(p, q, strict=True)) for q in t] for p in s]
    plan = [[math.exp(-w / epsilon) for w in row] for row in cost]
    for _ in range(iterations):
        plan = [[v / sum(row) for v in row] for row in plan]
        totals = [sum(column) for column in zip(*plan, strict=True)]
        plan = [[v / total for v, total in zip(row, totals, strict=True)] for row in plan]
    rows = [sum(p * w for p, w in zip(a, b, strict=True)) for a, b in zip(plan, cost, strict=True)]
    return reference.mean(rows)


@pytest.mark.parametrize(("temperature", "epsilon", "iterations"), [(2.0, 0.1, 20), (1.0, 0.5, 3)])
def test_equals_the_paper(temperature: float, epsilon: float, iterations: int) -> None:
    student, teacher = torch.randn(2, 5, 4).double()
    value = sinkd_loss(student, teacher, temperature=temperature, epsilon=epsilon, iterations=iterations)
    assert value.item() == pytest.approx(plain(student, teacher, temperature, epsilon, iterations), rel=1e-9)


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"), [(SURE, SURE, 3.6e-7), (UNSURE, UNSURE, 0.0144), (SURE, OTHER, 0.6001)]
)
def test_worked_examples(student: Tensor, teacher: Tensor, wanted: float) -> None:
    """Sums over the batch, as the authors' code has them; equality does not give exactly 0."""
    value = sinkd_loss(student, teacher, temperature=1.0, reduction="sum")
    assert value.item() == pytest.approx(wanted, rel=1e-2)
    assert value >= 0


def test_it_does_not_know_which_sample_is_which() -> None:
    student, teacher = torch.randn(2, 6, 3).double()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        sinkd_loss(student[order], teacher, iterations=200), sinkd_loss(student, teacher, iterations=200)
    )
    assert (kd_loss(student[order], teacher) - kd_loss(student, teacher)).abs() > 0.01


def test_tokens_are_rows_and_masked_ones_are_not_there() -> None:
    student, teacher = torch.randn(2, 2, 3, 4).double()
    torch.testing.assert_close(sinkd_loss(student, teacher), sinkd_loss(student.reshape(6, 4), teacher.reshape(6, 4)))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    spoiled = student.masked_fill(~mask.unsqueeze(-1), math.nan).requires_grad_()
    value = sinkd_loss(spoiled, teacher, mask=mask)
    torch.testing.assert_close(value, sinkd_loss(student[mask], teacher[mask]))
    value.backward()
    assert spoiled.grad is not None
    assert spoiled.grad.isfinite().all()


def test_label_words_only() -> None:
    student, teacher = torch.randn(2, 4, 9)
    words = [7, 2]
    torch.testing.assert_close(
        sinkd_loss(student, teacher, columns=words), sinkd_loss(student[:, words], teacher[:, words])
    )
    with pytest.raises(ConfigError, match=r"columns.*0 to 8"):
        sinkd_loss(student, teacher, columns=[9])


def test_options_above_zero() -> None:
    for name in ("temperature", "epsilon", "iterations"):
        with pytest.raises(ConfigError, match=name):
            SinKD(**{name: 0})
