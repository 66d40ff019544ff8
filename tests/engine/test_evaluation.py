"""Scores against scikit-learn and hand-made sums."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, log_loss, top_k_accuracy_score
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


def many(logits, labels, size):
    return evaluate(nn.Identity(), as_loader((logits, labels), batch_size=size, task="multilabel"))


@pytest.mark.parametrize("size", [61, 10])
def test_any_number_of_labels_against_scikit_learn(size):
    logits, labels = torch.randn(61, 5), (torch.rand(61, 5) < 0.3).float()
    labels[:, 4] = 0  # nobody has it: it takes no part in the mean over classes
    labels[3:9, 1] = -1  # not known
    found, chances = many(logits, labels, size), logits.sigmoid().double().numpy()
    known, wanted = (labels >= 0).numpy(), (labels > 0.5).numpy()
    by_class = [average_precision_score(wanted[known[:, c], c], chances[known[:, c], c]) for c in range(4)]
    assert found["map_macro"] == pytest.approx(sum(by_class) / 4, rel=1e-5)
    assert found["map_micro"] == pytest.approx(average_precision_score(wanted[known], chances[known]), rel=1e-5)
    said = chances > 0.5
    f1 = [f1_score(wanted[known[:, c], c], said[known[:, c], c], zero_division=0) for c in range(5)]
    assert found["f1_micro"] == pytest.approx(f1_score(wanted[known], said[known]), rel=1e-5)
    assert found["f1_macro"] == pytest.approx(sum(f1[:4]) / 5, rel=1e-5)
    assert found["hamming"] == pytest.approx((wanted == said)[known].mean(), rel=1e-5)
    assert found["nll"] == pytest.approx(log_loss(wanted[known], chances[known]), rel=1e-5)
    assert found["samples"] == 61


def test_samples_of_which_nothing_is_known_do_not_count():
    labels = torch.tensor([[1.0, 0.0], [-1.0, -1.0]])
    assert many(torch.randn(2, 2), labels, 2)["samples"] == 1
    with pytest.raises(TensorError, match=r"labels do not belong.*wanted \[2, 3\] floating"):
        many(torch.randn(2, 3), labels, 2)
    with pytest.raises(DataError, match="no place has a label"):
        many(torch.randn(2, 2), -torch.ones(2, 2), 2)


def test_numbers_are_judged_by_their_distance():
    guesses, labels = torch.randn(9, 3), torch.randn(9, 3)
    found = evaluate(nn.Identity(), as_loader((guesses, labels), batch_size=4, task="regression"))
    assert found["mse"] == pytest.approx((guesses - labels).square().mean().item())
    assert found["mae"] == pytest.approx((guesses - labels).abs().mean().item())
    assert found["samples"] == 9


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
