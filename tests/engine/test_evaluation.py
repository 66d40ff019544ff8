"""Scores against scikit-learn and hand-made sums."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import DataError, TensorError
from limbeck.data import as_loader
from limbeck.engine import evaluate, evaluate_loss
from limbeck.objectives import KD, CrossEntropy


def test_against_scikit_learn():
    logits = 3 * torch.randn(103, 8)
    labels = torch.randint(0, 8, (103,))
    found = evaluate(nn.Identity(), as_loader((logits, labels), batch_size=10))
    chances = logits.double().softmax(dim=1).numpy()
    known = list(range(8))
    assert found["samples"] == 103
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, chances.argmax(1)))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, chances, k=5, labels=known))
    assert found["nll"] == pytest.approx(log_loss(labels, chances, labels=known), rel=1e-5)
    confidence, hit = chances.max(1), chances.argmax(1) == labels.numpy()
    ece = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    assert found["ece"] == pytest.approx(ece, abs=1e-6)


def test_places_that_do_not_count():
    logits, labels = torch.randn(20, 5, 4), torch.randint(0, 4, (20, 5))
    labels[:, 3:] = -100
    found = evaluate(nn.Identity(), as_loader((logits, labels), batch_size=7))
    hit = logits[:, :3].argmax(-1) == labels[:, :3]
    assert found["samples"] == 60
    assert found["accuracy"] == pytest.approx(hit.double().mean().item())


def test_modes_are_put_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9))
    model[1].eval()
    data = as_loader((torch.randn(12, 4), torch.arange(12) % 4), batch_size=5)
    assert evaluate(model, data) == evaluate(model, data)
    assert (model.training, model[1].training) == (True, False)


def test_what_cannot_be_judged():
    with pytest.raises(DataError, match="batch.labels"):
        evaluate(nn.Identity(), as_loader(torch.randn(6, 3), batch_size=3))
    with pytest.raises(DataError, match="no place has a label"):
        evaluate(nn.Identity(), as_loader((torch.randn(6, 3), torch.full((6,), -1)), batch_size=3))
    with pytest.raises(TensorError, match="do not belong"):
        evaluate(nn.Identity(), as_loader((torch.randn(6, 2, 3), torch.zeros(6, dtype=torch.long)), batch_size=3))


def test_loss_is_that_of_the_whole_set_whatever_the_batches():
    torch.manual_seed(0)
    inputs, labels = torch.randn(23, 4), torch.arange(23) % 3
    labels[5:11] = -1
    found = Distiller(nn.Linear(4, 3), CrossEntropy() + 2.0 * KD(), nn.Linear(4, 3))
    whole = found.setup(Batch(inputs, labels))(Batch(inputs, labels))
    for size in (23, 6, 1):
        loss = evaluate_loss(found, as_loader((inputs, labels), batch_size=size), torch.tensor(0.0))
        assert loss["total"] == pytest.approx(float(whole.total.detach()), rel=1e-5)
        assert loss["terms"] == pytest.approx({k: float(v) for k, v in whole.terms.items()}, rel=1e-5)
