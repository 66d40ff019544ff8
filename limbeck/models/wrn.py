"""Wide residual networks WRN-d-w.

Source: Zagoruyko and Komodakis, Wide Residual Networks, 2016, arXiv:1605.07146.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.models.initialise import initialise_


class WideBlock(nn.Module):
    """Normalise, activate, convolve, twice. Where the width changes, the shortcut starts after ``relu1``."""

    def __init__(self, in_channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.same = in_channels == width
        self.shortcut = nn.Identity() if self.same else nn.Conv2d(in_channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(active)))
        out = self.conv2(self.dropout(out))
        return out + self.shortcut(x if self.same else active)


class WideResNet(nn.Module):
    """WRN of depth 6n+4 and widening factor w: stages ``layer1`` to ``layer3`` of n blocks, 16w, 32w and 64w channels.

    Images ``[B, in_channels, H, W]`` from 8x8 on; logits ``[B, num_classes]``. The stages give sums that are not yet
    activated; ``relu`` gives the last stage's activation.

    Args:
        depth: 10, 16, 22, 28, 40, ...
        width: Widening factor, a positive whole number.
        dropout: Between the two convolutions of a block; 0 as in the distillation papers.

    Example:
        >>> sum(p.numel() for p in WideResNet(40, 2, num_classes=100).parameters())
        2255156
    """

    foreign_names: ClassVar = (
        (r"^fc\.", "linear."),
        (r"^block([123])\.layer\.(\d+)\.convShortcut\.", r"layer\1.\2.shortcut."),
        (r"^block([123])\.layer\.", r"layer\1."),
    )

    def __init__(
        self, depth: int, width: int, *, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        where = f"wrn_{depth}_{width}"
        if depth < 10 or (depth - 4) % 6:
            raise ModelError("no such depth", where=where, found=depth, wanted="6n+4: 10, 16, 22, 28, 34, 40, ...")
        if width < 1:
            raise ModelError("no such widening factor", where=where, found=width, wanted="1 or more")
        n = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.layer1 = self._stage(n, 16, 16 * width, 1, dropout)
        self.layer2 = self._stage(n, 16 * width, 32 * width, 2, dropout)
        self.layer3 = self._stage(n, 32 * width, 64 * width, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64 * width, num_classes)
        initialise_(self)

    @staticmethod
    def _stage(count: int, in_channels: int, width: int, stride: int, dropout: float) -> nn.Sequential:
        first = WideBlock(in_channels, width, stride, dropout)
        return nn.Sequential(first, *(WideBlock(width, width, 1, dropout) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.avgpool(self.relu(self.bn1(x)))
        return self.linear(x.flatten(1))
