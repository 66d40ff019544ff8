"""What is told of a class that others outnumber."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import binary_average_precision, binary_f1_score

from limbeck.analysis.rare import assess_rare
from limbeck.core.errors import DataError
from limbeck.data import as_loader


@pytest.mark.parametrize("coarse", [False, True])
def test_figures_are_those_of_another_library(coarse: bool) -> None:
    torch.manual_seed(0)
    scores = torch.randn(200, 3).double()
    scores = scores.round() if coarse else scores  # many samples of one score
    labels = torch.randint(-1, 3, (200,))
    found = assess_rare(nn.Identity(), as_loader((scores, labels), batch_size=64), rare=2)
    known = labels >= 0
    said, there = scores[known].softmax(-1), (labels[known] == 2).int()
    assert found["average_precision"] == pytest.approx(float(binary_average_precision(said[:, 2], there)), abs=1e-6)
    hard = (scores[known].argmax(-1) == 2).int()
    assert found["f1"] == pytest.approx(float(binary_f1_score(hard, there)), abs=1e-6)


def test_a_class_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no sample"):
        assess_rare(nn.Identity(), as_loader((torch.randn(4, 2), torch.zeros(4).long()), batch_size=2))
