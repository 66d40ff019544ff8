"""Item response theory: simulated respondents give back what they were simulated with."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import TensorError
from limbeck.core.item_response import fit_two_parameters


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def test_the_order_of_simulated_discriminations_comes_back() -> None:
    torch.manual_seed(1)
    a = torch.tensor([0.2, 0.4, 0.7, 1.1, 1.6, 2.3, 3.2, 4.5]).double()
    b, theta = torch.randn(8).double() * 0.5, torch.randn(1500).double()
    right = torch.rand(1500, 8).double() < (a * (theta.unsqueeze(1) - b)).sigmoid()
    found, difficulty, ability = fit_two_parameters(right)
    assert torch.equal(ranks(found), ranks(a))
    assert torch.corrcoef(torch.stack([difficulty, b])[:, 2:])[0, 1] > 0.97  # the first hardly tell of it
    assert torch.corrcoef(torch.stack([ability, theta]))[0, 1] >= 0.8


def test_it_is_where_the_posterior_has_no_slope() -> None:
    """The integral as a fine sum over abilities, respondent by respondent."""
    torch.manual_seed(2)
    right = torch.rand(9, 5) < 0.5
    a, b, theta = fit_two_parameters(right)
    a, b = a.requires_grad_(), b.requires_grad_()
    nodes = torch.linspace(-7, 7, 1401, dtype=torch.double)
    density = torch.exp(-0.5 * nodes**2) / (2 * torch.pi) ** 0.5
    posterior = -0.5 * (b**2).sum() - 0.5 * (a.log() ** 2).sum()
    for row, expected in zip(right, theta, strict=True):
        chance = density.clone()
        for place, well in enumerate(row.tolist()):
            p = torch.sigmoid(a[place] * (nodes - b[place]))
            chance = chance * (p if well else 1 - p)
        posterior = posterior + (chance.sum() * 0.01).log()
        assert float((chance * nodes).sum() / chance.sum()) == pytest.approx(float(expected), abs=1e-4)
    for slope in torch.autograd.grad(posterior, (a, b)):
        assert float(slope.abs().max()) < 1e-3


def test_questions_that_all_or_none_can_answer_stay_finite() -> None:
    right = torch.tensor([[True, False], [True, False]])
    for part in fit_two_parameters(right):
        assert bool(part.isfinite().all())
    with pytest.raises(TensorError, match="right: no table of answers"):
        fit_two_parameters(torch.ones(2, 2))
