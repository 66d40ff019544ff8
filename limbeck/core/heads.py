"""Parts of learned heads that stand beside a student while it trains, and are dropped when it ships."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import TensorError
from limbeck.core.projectors import ConvProjector
from limbeck.core.relations import channel_dim


class BatchNorm(nn.Module):
    """Batch normalisation of vectors ``[B, C]``, tokens ``[B, N, C]`` or maps ``[B, C, *]`` by the batch's statistics.

    In any mode: a head that never runs alone needs no running statistics, so a step leaves no state behind.

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
        channels = channel_dim(input)
        if input.numel() <= input.shape[channels]:
            raise TensorError(
                "a head with batch normalisation needs two samples",
                where="student_feature",
                found=list(input.shape),
                wanted="a batch of 2 or more",
            )
        first = input.movedim(channels, 1)
        return F.batch_norm(first, None, None, self.weight, self.bias, training=True).movedim(1, channels)


def two_layers(width: int, hidden: int, out: int) -> nn.Sequential:
    """A linear layer, ReLU, a linear layer."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))


def bottleneck(channels: int, out: int) -> nn.Sequential:
    """From one map to another: 1x1, 3x3 and 1x1 convolutions with batch normalisation, inside twice as wide as out."""
    first = ConvProjector(channels, 2 * out, 1, bias=False), BatchNorm(2 * out), nn.ReLU()
    inner = nn.Conv2d(2 * out, 2 * out, 3, padding=1, bias=False), BatchNorm(2 * out), nn.ReLU()
    return nn.Sequential(*first, *inner, nn.Conv2d(2 * out, out, 1, bias=False))
