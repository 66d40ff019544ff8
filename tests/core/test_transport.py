from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.transport import sinkhorn


def plain(cost: Tensor, epsilon: float, iterations: int) -> list[list[float]]:
    """Rows, then columns, scaled in turn; no logarithms."""
    n, m = cost.shape
    k = [[math.exp(-w / epsilon) for w in row] for row in cost.tolist()]
    for _ in range(iterations):
        k = [[v / sum(row) / n for v in row] for row in k]
        totals = [sum(row[j] for row in k) for j in range(m)]
        k = [[v / totals[j] / m for j, v in enumerate(row)] for row in k]
    return k


@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 6), (1, 1)])
@pytest.mark.parametrize("iterations", [1, 20])
def test_equals_plain_scaling(n: int, m: int, iterations: int) -> None:
    cost = torch.rand(n, m).double()
    wanted = torch.tensor(plain(cost, 0.1, iterations), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(cost, 0.1, iterations), wanted, rtol=1e-9, atol=1e-12)


def test_marginals_are_uniform() -> None:
    plan = sinkhorn(2 * torch.rand(2, 5, 7), 0.1, 50)
    torch.testing.assert_close(plan.sum(-1), torch.full((2, 5), 1 / 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(-2), torch.full((2, 7), 1 / 7), atol=1e-6, rtol=0)


def test_a_small_epsilon_finds_the_cheapest_matching() -> None:
    """Where a plain kernel is all zeros: exp(-1 / 1e-4) is no float64."""
    cost = torch.tensor([[1.0, 3.0, 2.0], [2.0, 1.5, 1.0], [1.2, 1.0, 3.0]])
    matching = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]) / 3
    torch.testing.assert_close(sinkhorn(cost, 1e-4), matching)


def test_what_does_not_count_is_not_there() -> None:
    cost = torch.rand(5, 6).double()
    rows, columns = torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([0, 1, 1, 0, 1, 1]).bool()
    kept = sinkhorn(cost[rows][:, columns])
    spoiled = cost.masked_fill(~rows[:, None], math.nan).masked_fill(~columns, math.inf).requires_grad_()
    plan = sinkhorn(spoiled, rows=rows, columns=columns)
    torch.testing.assert_close(plan[rows][:, columns], kept)
    torch.testing.assert_close(plan.sum(), kept.sum())
    (plan**2).sum().backward()
    assert spoiled.grad is not None
    assert spoiled.grad.isfinite().all()


def test_nothing_counts() -> None:
    cost = torch.rand(3, 3).requires_grad_()
    none = torch.zeros(3, dtype=torch.bool)
    plan = sinkhorn(cost, rows=none, columns=none)
    assert plan.sum() == 0
    plan.sum().backward()
    assert (cost.grad == 0).all()


def test_gradient_flows_through_the_iterations() -> None:
    assert torch.autograd.gradcheck(lambda c: sinkhorn(c, 0.3, 4), torch.rand(3, 4).double().requires_grad_())


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        sinkhorn(torch.zeros(2, 2), 0.0)
    with pytest.raises(ConfigError, match="iterations"):
        sinkhorn(torch.zeros(2, 2), 0.1, 0)
    with pytest.raises(TensorError, match="cost"):
        sinkhorn(torch.zeros(2))
    with pytest.raises(TensorError, match="mask"):
        sinkhorn(torch.zeros(2, 2), rows=torch.ones(3, dtype=torch.bool))
