"""Singular vectors and their gradient."""

from __future__ import annotations

import pytest
import torch

from limbeck.objectives.parts.singular import right_vectors


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 3, 5), (2, 4, 4)])
def test_vectors_and_values_are_those_of_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).double()
    found, sigma = right_vectors(x, 2)
    _, values, rows = torch.linalg.svd(x)
    assert torch.equal(
        (found.transpose(1, 2) @ rows[:, :2].transpose(1, 2)).abs().round(decimals=9),
        torch.eye(2).expand(2, 2, 2).double(),
    )
    torch.testing.assert_close(sigma, values[:, :2] / x.abs().amax(dim=(1, 2)).unsqueeze(1))


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 3, 5), (1, 1, 4)])
def test_gradient_is_the_derivative(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape[2], dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        v, _ = right_vectors(x, 2)
        return torch.einsum("bcn,c->bn", v, weight).square()  # which does not know the sign

    assert torch.autograd.gradcheck(value, torch.randn(shape).double().requires_grad_())


def test_torch_gives_nothing_finite_where_values_are_equal_and_this_does() -> None:
    x = torch.diag(torch.tensor([2.0, 1.0, 1.0])).unsqueeze(0)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.linalg.svd(theirs)[2][:, 0].sum().backward()
    assert not theirs.grad.isfinite().all()
    right_vectors(ours, 1)[0].sum().backward()
    assert ours.grad.isfinite().all()
    assert ours.grad.abs().sum() > 0


def test_no_direction_where_there_is_none() -> None:
    x = torch.zeros(2, 3, 4)
    x[1] = torch.outer(torch.ones(3), torch.tensor([0.0, 2.0, 0.0, 0.0]))  # of rank one
    found, _ = right_vectors(x, 2)
    assert not found[0].any()
    assert found[1].abs().round(decimals=6).tolist() == [[0, 0], [1, 0], [0, 0], [0, 0]]
