"""Kernel self-distillation: the closed forms against plain fits, to 1e-8 and better."""

from __future__ import annotations

import pytest
import torch

from limbeck.analysis.self_distillation import KernelSelfDistillation, limit, optimal_weight, shrinkage
from limbeck.core.errors import LimbeckError


@pytest.fixture(scope="module")
def scene():
    drawn = torch.Generator().manual_seed(0)
    x = torch.rand(30, 3, dtype=torch.float64, generator=drawn)
    y = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1) + 0.1 * torch.randn(
        30, 2, dtype=torch.float64, generator=drawn
    )
    kernel = torch.exp(-(torch.cdist(x, x) ** 2))
    return kernel[:20, :20], y[:20], kernel[20:, :20], y[20:]


RIDGE = 0.05


def plain_fits(kernel, y, weights):
    """Every step by solving its own linear system."""
    eye, found = torch.eye(len(y), dtype=torch.float64), []
    predicted = y
    for weight in [1.0, *weights]:
        targets = weight * y + (1 - weight) * predicted
        predicted = kernel @ torch.linalg.solve(kernel + RIDGE * eye, targets)
        found.append(predicted)
    return found


@pytest.mark.parametrize("weights", [[0.0] * 4, [0.5] * 4, [1.0] * 3, [0.9, 0.1, 0.4, 0.0, 0.7]])
def test_shrinkage_predicts_every_step(scene, weights):
    kernel, y, _, _ = scene
    model = KernelSelfDistillation(kernel, y, RIDGE)
    diagonals = shrinkage(model.eigenvalues, RIDGE, weights)
    vectors = model.vectors
    for number, wanted in enumerate(plain_fits(kernel, y, weights)):
        by_diagonal = vectors @ (diagonals[number, :, None] * (vectors.T @ y))
        assert float((by_diagonal - wanted).abs().max()) < 1e-8
        if number:
            model.step(weights[number - 1])
        assert float((model.fitted - wanted).abs().max()) < 1e-8


@pytest.mark.parametrize("weight", [0.05, 0.3, 0.8, 1.0])
def test_endless_steps_are_one_fit_with_a_larger_ridge(scene, weight):
    kernel, y, _, _ = scene
    model = KernelSelfDistillation(kernel, y, RIDGE)
    endless = shrinkage(model.eigenvalues, RIDGE, [weight] * 3000)[-1]
    assert float((endless - limit(model.eigenvalues, RIDGE, weight)).abs().max()) < 1e-8
    larger = KernelSelfDistillation(kernel, y, RIDGE / weight).fitted
    for _ in range(3000):
        model.step(weight)
    assert float((model.fitted - larger).abs().max()) < 1e-8


def test_without_truth_all_is_forgotten_and_small_directions_first(scene):
    kernel, y, _, _ = scene
    values = KernelSelfDistillation(kernel, y, RIDGE).eigenvalues.clamp(min=1e-3)
    steps = shrinkage(values, RIDGE, [0.0] * 200)
    assert torch.equal(limit(values, RIDGE, 0.0), torch.zeros_like(values))
    assert float(steps[-1].max()) < float(steps[0].max())
    ratio = steps[:5, 0] / steps[:5, -1]  # of the smallest to the largest
    assert (ratio.diff() < 0).all()


def test_the_best_weight_is_that_of_a_grid(scene):
    kernel, y, cross, held = scene
    for steps in range(4):
        model = KernelSelfDistillation(kernel, y, RIDGE)
        for _ in range(steps):
            model.step(0.3)
        exact = model.best_weight(cross, held, clip=False)
        u, w = model.predict(cross, y), model.predict(cross, model.fitted)
        grid = exact + torch.linspace(-1, 1, 2001, dtype=torch.float64)
        errors = torch.stack([((w + a * (u - w) - held) ** 2).sum() for a in grid])
        assert abs(float(grid[errors.argmin()]) - exact) < 1e-8
        stepped = KernelSelfDistillation(kernel, y, RIDGE)
        for _ in range(steps):
            stepped.step(0.3)
        weight = min(max(exact, 0.0), 1.0)
        assert stepped.best_weight(cross, held) == weight
        assert float((stepped.step(weight).predict(cross) - (w + weight * (u - w))).abs().max()) < 1e-8


def test_no_difference_no_preference_and_mistakes():
    y = torch.tensor([1.0, 2.0])
    assert optimal_weight(y, y, y) == 1.0
    with pytest.raises(LimbeckError, match="by_teacher: predictions do not fit"):
        optimal_weight(y, y, torch.zeros(3))
    with pytest.raises(LimbeckError, match="not a kernel matrix"):
        KernelSelfDistillation(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), y, 0.1)
    with pytest.raises(LimbeckError, match="ridge"):
        shrinkage(y, 0.0, [])
    with pytest.raises(LimbeckError, match="weights"):
        shrinkage(y, 0.1, [1.5])
