"""Accuracy by class against scikit-learn."""

import pytest
import torch
from sklearn.metrics import recall_score

from limbeck.analysis import PerClass
from limbeck.core.errors import DataError


def test_accuracy_by_class_is_recall():
    logits, labels = torch.randn(200, 6), torch.randint(5, (200,))
    per_class = PerClass(6)
    for rows in (slice(0, 7), slice(7, 7), slice(7, 200)):
        per_class.update(logits[rows], labels[rows])
    facts = per_class.compute()
    expected = recall_score(labels, logits.argmax(-1), labels=range(5), average=None)
    assert facts["accuracy"][:5] == pytest.approx(list(expected))
    assert facts["accuracy"][5] is None
    assert facts["support"] == [*labels.bincount().tolist(), 0]


def test_no_labels_is_an_error():
    with pytest.raises(DataError, match="no labelled place"):
        PerClass(3).compute()
