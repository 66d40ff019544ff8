"""Soft landmarks against principal components worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.errors import ConfigError, TensorError
from limbeck.data import ShapeModel


def shapes(count: int = 40) -> torch.Tensor:
    """Two directions of much variance, and little in the other four."""
    ways = torch.tensor([[1.0, 1, 0, 0, 2, 0], [0, 1, -1, 0, 0, 1]])
    return torch.randn(count, 2) * torch.tensor([3.0, 1.5]) @ ways + 0.05 * torch.randn(count, 6) + 7


def test_equals_the_paper() -> None:
    points = shapes()
    model = ShapeModel.fit(points, variance=0.97)
    values, vectors = np.linalg.eigh(np.cov(points.double().numpy().T))
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    assert model.components.shape == (2, 6)
    torch.testing.assert_close(model.deviations, torch.tensor(np.sqrt(values)).float())
    mean = points.double().numpy().mean(0)
    for given, found in zip(points.double().numpy(), model.soften(points), strict=True):
        weights = [float(vectors[:, k] @ (given - mean)) for k in range(2)]
        wanted = mean + sum(b * vectors[:, k] for k, b in enumerate(weights))
        torch.testing.assert_close(found, torch.tensor(wanted).float(), rtol=1e-4, atol=1e-4)


def test_no_shape_is_further_out_than_three_deviations() -> None:
    model = ShapeModel.fit(shapes(), variance=0.97)
    far = model.mean + 50 * model.deviations[0] * model.components[0]
    soft = model.soften(far.unsqueeze(0))[0]
    torch.testing.assert_close((soft - model.mean).norm(), 3 * model.deviations[0])


def test_fewer_components_are_smoother() -> None:
    points = shapes()
    few, many = (ShapeModel.fit(points, variance=v) for v in (0.5, 0.9999))
    assert len(few.components) == 1 < len(many.components)
    assert (few.soften(points) - points).norm() > (many.soften(points) - points).norm()


def test_errors() -> None:
    with pytest.raises(ConfigError, match="variance"):
        ShapeModel.fit(shapes(), variance=1.0)
    with pytest.raises(TensorError, match="landmarks"):
        ShapeModel.fit(torch.arange(6))
