"""Parts of learned heads that stand beside a student while it trains, and are dropped when it ships."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import TensorError


class BatchNorm(nn.Module):
    """Batch normalisation of ``[N, C]`` or ``[B, C, *]`` by the batch's own statistics, in any mode.

    A head that never runs alone needs no running statistics, so a step leaves no state behind.

    Args:
        width: ``C``.

    Raises:
        TensorError: There is one value a channel, of which no statistic can be made.

    >>> BatchNorm(1)(torch.tensor([[1.0], [3.0]])).detach().flatten()
    tensor([-1.0000,  1.0000])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() <= input.shape[1]:
            raise TensorError(
                "a head with batch normalisation needs two samples",
                where="student_feature",
                found=list(input.shape),
                wanted="a batch of 2 or more",
            )
        return F.batch_norm(input, None, None, self.weight, self.bias, training=True)
