"""Loyalty: of a model with itself, of models that share nothing, and against SciPy."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import pearsonr

from limbeck.analysis import label_loyalty, probability_loyalty, regression_loyalty
from limbeck.core.errors import TensorError


def test_nobody_is_more_loyal_than_oneself() -> None:
    z = torch.randn(20, 5)
    assert label_loyalty(z, z) == 1
    assert float(probability_loyalty(z, z)) == pytest.approx(1, abs=1e-3)
    assert float(regression_loyalty(z[:, 0], z[:, 0])) == pytest.approx(1)


def test_sure_of_other_classes_it_is_0() -> None:
    first, second = torch.tensor([[99.0, 0.0, 0.0]]).double(), torch.tensor([[0.0, 0.0, 99.0]]).double()
    assert float(probability_loyalty(first, second)) == pytest.approx(0, abs=1e-9)
    assert label_loyalty(first, second) == 0


def test_scipy_says_the_same() -> None:
    first, second = torch.randn(2, 30, 4).double()
    p, q = first.softmax(-1).numpy(), second.softmax(-1).numpy()
    wanted = 1 - jensenshannon(p, q, base=2, axis=1).mean()
    assert float(probability_loyalty(first, second)) == pytest.approx(wanted, abs=1e-9)
    assert float(probability_loyalty(first.view(5, 6, 4), second.view(5, 6, 4))) == pytest.approx(wanted, abs=1e-9)
    assert float(probability_loyalty(second, first)) == pytest.approx(wanted, abs=1e-9)
    each = [pearsonr(first[:, i].numpy(), second[:, i].numpy()).statistic for i in range(4)]
    assert float(regression_loyalty(first, second)) == pytest.approx(sum(each) / 4, abs=1e-9)
    assert float(regression_loyalty(first[:, 0], second[:, 0])) == pytest.approx(each[0], abs=1e-9)
    assert float(regression_loyalty(first[:, 0], -3 * first[:, 0] + 1)) == pytest.approx(-1)


def test_mistakes() -> None:
    with pytest.raises(TensorError, match="does not correlate"):
        regression_loyalty(torch.ones(1), torch.ones(1))
    with pytest.raises(TensorError):
        regression_loyalty(torch.ones(3), torch.ones(2))
    with pytest.raises(TensorError):
        probability_loyalty(torch.ones(3, 2), torch.ones(3, 4))
