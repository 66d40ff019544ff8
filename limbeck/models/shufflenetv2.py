"""ShuffleNet V2 for 32x32 images: half of the channels pass by, the halves are shuffled together.

Source: Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, 2018, arXiv:1807.11164.
The stem is a 1x1 convolution without stride or pooling, as in the distillation papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck.models.initialise import initialise_

_STEM = 24


class ShuffleUnit(nn.Module):
    """1x1, depthwise 3x3, 1x1 on one half; the other half passes by, or both take the whole input where it shrinks."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False),
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, half, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(),
            )
        self.conv1 = nn.Conv2d(in_channels if stride == 2 else half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        aside, out = (x, x) if self.stride == 2 else x.chunk(2, dim=1)
        out = self.relu1(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = self.relu3(self.bn3(self.conv3(out)))
        return self.shuffle(torch.cat([self.shortcut(aside), out], dim=1))


class ShuffleNetV2(nn.Module):
    """Stages ``layer1`` to ``layer3`` of shuffle units, each at half the resolution, a 1x1 convolution, ``linear``.

    Images ``[B, in_channels, H, W]`` from 8x8 on; logits ``[B, num_classes]``.

    Args:
        widths: Even channels of the three stages and of the last convolution; the default is the paper's 1x net.
        counts: Units in each stage.

    Example:
        >>> sum(p.numel() for p in ShuffleNetV2(num_classes=100).parameters())
        1355528
    """

    foreign_names: ClassVar = (
        *((rf"^(layer[123]\.0)\.conv{i}\.", rf"\1.shortcut.{2 * i - 2}.") for i in (1, 2)),
        *((rf"^(layer[123]\.0)\.bn{i}\.", rf"\1.shortcut.{2 * i - 1}.") for i in (1, 2)),
        *((rf"^(layer[123]\.0)\.(conv|bn){i}\.", rf"\1.\g<2>{i - 2}.") for i in (3, 4, 5)),
    )

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (116, 232, 464, 1024),
        counts: Sequence[int] = (4, 8, 4),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu1 = nn.ReLU()
        self.layer1 = self._stage(counts[0], _STEM, widths[0])
        self.layer2 = self._stage(counts[1], widths[0], widths[1])
        self.layer3 = self._stage(counts[2], widths[1], widths[2])
        self.conv2 = nn.Conv2d(widths[2], widths[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[3], num_classes)
        initialise_(self)

    @staticmethod
    def _stage(count: int, in_channels: int, width: int) -> nn.Sequential:
        first = ShuffleUnit(in_channels, width, 2)
        return nn.Sequential(first, *(ShuffleUnit(width, width, 1) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.avgpool(self.relu2(self.bn2(self.conv2(x))))
        return self.linear(x.flatten(1))
