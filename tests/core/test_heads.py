from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.errors import TensorError
from limbeck.core.heads import BatchNorm


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 4)])
def test_equals_torchs_in_training_and_keeps_nothing(shape: tuple[int, ...]) -> None:
    own, wanted = BatchNorm(3), (nn.BatchNorm1d(3) if len(shape) == 2 else nn.BatchNorm2d(3)).train()
    x = torch.randn(shape)
    torch.testing.assert_close(own(x), wanted(x))
    torch.testing.assert_close(own.eval()(x), wanted(x))
    assert sorted(own.state_dict()) == ["bias", "weight"]


def test_tokens_have_their_channels_last() -> None:
    tokens = torch.randn(2, 5, 3)
    torch.testing.assert_close(BatchNorm(3)(tokens).flatten(0, 1), BatchNorm(3)(tokens.flatten(0, 1)))


def test_one_sample_is_refused() -> None:
    with pytest.raises(TensorError, match="2 or more"):
        BatchNorm(3)(torch.zeros(1, 3))
    assert BatchNorm(3)(torch.zeros(1, 3, 2, 2)).shape == (1, 3, 2, 2)
