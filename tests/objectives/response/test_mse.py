"""Mean squared error against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import TensorError
from limbeck.objectives.response.mse import mse_loss


def test_is_torchs() -> None:
    predicted, wanted = torch.randn(2, 5, 3).double()
    torch.testing.assert_close(mse_loss(predicted, wanted), F.mse_loss(predicted, wanted))


def test_masked_samples_do_not_count() -> None:
    predicted, wanted, mask = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([True, False, True])
    torch.testing.assert_close(mse_loss(predicted, wanted, mask=mask), mse_loss(predicted[mask], wanted[mask]))


def test_targets_are_of_the_predictions_shape() -> None:
    with pytest.raises(TensorError, match=r"labels.*\[2, 4\].*\[2, 3\] as student_output"):
        mse_loss(torch.zeros(2, 3), torch.zeros(2, 4))
