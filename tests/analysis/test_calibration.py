"""Calibration against torchmetrics and scikit-learn."""

import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from limbeck.analysis import Calibration, brier, nll
from limbeck.core.errors import ConfigError, DataError, TensorError


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return 2 * torch.randn(500, 5), torch.randint(5, (500,))


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_error_is_that_of_torchmetrics(data, bins):
    logits, labels = data
    calibration = Calibration(bins)
    for rows in (slice(0, 3), slice(3, 3), slice(3, 500)):
        calibration.update(logits[rows], labels[rows])
    expected = multiclass_calibration_error(logits.softmax(-1), labels, num_classes=5, n_bins=bins)
    assert calibration.compute()["ece"] == pytest.approx(float(expected), abs=1e-6)


def test_likelihood_and_brier_are_those_of_scikit_learn(data):
    logits, labels = data
    probabilities = logits.double().softmax(-1).numpy()
    calibration = Calibration()
    calibration.update(logits.double(), labels)
    facts = calibration.compute()
    assert facts["nll"] == pytest.approx(log_loss(labels, probabilities, labels=range(5)))
    each = [brier_score_loss((labels == c).numpy(), probabilities[:, c]) for c in range(5)]
    assert facts["brier"] == pytest.approx(sum(each))
    assert float(nll(logits, labels)) == pytest.approx(facts["nll"], rel=1e-5)
    assert float(brier(logits, labels)) == pytest.approx(facts["brier"], rel=1e-5)


def test_bins_hold_every_place_and_average_to_the_whole(data):
    logits, labels = data
    calibration = Calibration()
    calibration.update(logits, labels)
    facts = calibration.compute()
    bins = facts["reliability"]
    assert sum(bins["count"]) == 500
    right = sum(n * a for n, a in zip(bins["count"], bins["accuracy"], strict=True) if n)
    assert right / 500 == pytest.approx(facts["accuracy"])
    assert facts["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    edges = bins["edges"]
    for low, high, n, confidence in zip(edges, edges[1:], bins["count"], bins["confidence"], strict=False):
        assert (confidence is None) == (n == 0)
        assert n == 0 or low <= confidence <= high


def test_certainty_falls_into_the_last_bin():
    calibration = Calibration(bins=4)
    calibration.update(torch.tensor([[1e4, 0.0], [1e4, 0.0]]), torch.tensor([0, 1]))
    facts = calibration.compute()
    assert facts["reliability"]["count"] == [0, 0, 0, 2]
    assert facts["ece"] == 0.5


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="bins"):
        Calibration(0)
    with pytest.raises(DataError, match="no labelled place"):
        Calibration().compute()
    with pytest.raises(TensorError, match="names no class"):
        Calibration().update(torch.zeros(2, 3), torch.tensor([0, 3]))
