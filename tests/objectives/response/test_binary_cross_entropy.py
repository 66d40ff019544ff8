"""Binary cross-entropy against the equation in plain loops and against torch's own."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.binary_cross_entropy import BinaryCrossEntropy, binary_cross_entropy_loss


def written_out(logits: Tensor, labels: Tensor, smoothing: float) -> list[float]:
    values = []
    for row, wanted in zip(logits.tolist(), labels.tolist(), strict=True):
        value = 0.0
        for z, y in zip(row, wanted, strict=True):
            p, q = 1 / (1 + exp(-z)), (1 - smoothing) * y + smoothing / 2
            if y >= 0:
                value -= q * log(p) + (1 - q) * log(1 - p)
        values.append(value)
    return values


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_the_equation(smoothing: float) -> None:
    logits, labels = (
        torch.randn(5, 3).double(),
        torch.tensor([[1, 0, -1], [0, 0.3, 1], [-1, -1, -1], [1, 1, 1], [0, 0, 0]]),
    )
    found = binary_cross_entropy_loss(logits, labels, label_smoothing=smoothing, reduction="none")
    assert found.tolist() == pytest.approx(written_out(logits, labels.double(), smoothing), rel=1e-6)


def test_is_torchs_mean_times_the_classes() -> None:
    logits, labels = torch.randn(6, 4).double(), (torch.rand(6, 4) < 0.5).double()
    wanted = 4 * F.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(binary_cross_entropy_loss(logits, labels), wanted)


def test_what_is_not_known_passes_no_gradient() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    binary_cross_entropy_loss(logits, torch.tensor([[1.0, -1.0, 0.0], [-1.0, -1.0, -1.0]])).backward()
    assert logits.grad is not None
    assert (logits.grad != 0).tolist() == [[True, False, True], [False, False, False]]


def test_masked_samples_do_not_count() -> None:
    logits, labels = torch.randn(3, 2), torch.ones(3, 2)
    mask = torch.tensor([True, False, True])
    found = binary_cross_entropy_loss(logits, labels, mask=mask)
    torch.testing.assert_close(found, binary_cross_entropy_loss(logits[mask], labels[mask]))


def test_saturated_logits_are_exact() -> None:
    found = binary_cross_entropy_loss(torch.tensor([[1e4, -1e4]]), torch.tensor([[0.0, 0.0]]))
    assert found.item() == 1e4


@pytest.mark.parametrize(
    "labels", [torch.zeros(2, dtype=torch.long), torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.long)]
)
def test_one_yes_or_no_a_class(labels: Tensor) -> None:
    with pytest.raises(TensorError, match=r"a yes or no for each class.*wanted \[2, 3\] floating"):
        binary_cross_entropy_loss(torch.zeros(2, 3), labels)


def test_neither_yes_nor_no() -> None:
    with pytest.raises(TensorError, match=r"labels: a label is neither yes nor no; found 2\.0"):
        binary_cross_entropy_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))


def test_smoothing_is_a_share() -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        BinaryCrossEntropy(label_smoothing=1.5)
