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


class Fusion(nn.Module):
    """A layer of the student, fused by attention with what was fused of deeper ones (ReviewKD, arXiv 2104.09044).

    Args:
        channels, width, out: Of the student's map, of what is handed on, and of the teacher's map.
        deepest: There is nothing deeper to fuse with.
    """

    def __init__(self, channels: int, width: int, out: int, deepest: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(ConvProjector(channels, width, 1, bias=False), BatchNorm(width))
        self.leave = nn.Sequential(nn.Conv2d(width, out, 3, padding=1, bias=False), BatchNorm(out))
        self.attend = None if deepest else nn.Conv2d(2 * width, 2, 1)
        for block in (self.enter, self.leave):
            nn.init.kaiming_uniform_(block[0].get_parameter("weight"), a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher's map of this size, and what is handed on."""
        x = self.enter(feature)
        if self.attend is not None and deeper is not None:
            y = F.interpolate(deeper, x.shape[2:], mode="nearest")
            first, second = self.attend(torch.cat([x, y], dim=1)).sigmoid().split(1, dim=1)
            x = x * first + y * second
        x = x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest")
        return self.leave(x), x


def two_layers(width: int, hidden: int, out: int) -> nn.Sequential:
    """A linear layer, ReLU, a linear layer."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))


def bottleneck(channels: int, out: int) -> nn.Sequential:
    """From one map to another: 1x1, 3x3 and 1x1 convolutions with batch normalisation, inside twice as wide as out."""
    first = ConvProjector(channels, 2 * out, 1, bias=False), BatchNorm(2 * out), nn.ReLU()
    inner = nn.Conv2d(2 * out, 2 * out, 3, padding=1, bias=False), BatchNorm(2 * out), nn.ReLU()
    return nn.Sequential(*first, *inner, nn.Conv2d(2 * out, out, 1, bias=False))
