"""The quadratic score against torch's mean squared error."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from limbeck.objectives.response.brier import brier_loss


def test_is_torchs_of_softmax_and_one_hot() -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 3, -1, 2, -100, 1])
    known = labels >= 0
    wanted = F.mse_loss(logits[known].softmax(1), F.one_hot(labels[known], 4).double())
    torch.testing.assert_close(brier_loss(logits, labels), wanted)


def test_soft_labels_and_masks() -> None:
    logits, soft = torch.randn(2, 5, 3, dtype=torch.float64)
    soft, mask = soft.softmax(1), torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(brier_loss(logits, soft, mask=mask), F.mse_loss(logits[mask].softmax(1), soft[mask]))


def test_it_is_proper() -> None:
    truth = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    logits = truth.log().requires_grad_()
    expected = sum(truth[c] * brier_loss(logits[None], torch.tensor([c])) for c in range(3))
    assert float(torch.autograd.grad(expected, logits)[0].abs().max()) < 1e-12
