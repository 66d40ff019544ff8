"""ShuffleNet V1 for 32x32 images: grouped 1x1 convolutions with a channel shuffle between.

Source: Zhang et al., ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, 2018,
arXiv:1707.01083. The stem is a 1x1 convolution without stride or pooling, as in the distillation papers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.models.initialise import initialise_

_STEM = 24


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to the input, or beside its average where it shrinks."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        inner = channels // 4
        first_groups = 1 if in_channels == _STEM else groups  # the stem's 24 channels are not grouped
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            return self.relu3(out + x)
        return self.relu3(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))


class ShuffleNetV1(nn.Module):
    """Stages ``layer1`` to ``layer3`` of shuffle units, each at half the resolution, then ``linear``.

    Images ``[B, in_channels, H, W]`` from 8x8 on; logits ``[B, num_classes]``.

    Args:
        widths: Channels of the stages; 240, 480, 960 is the paper's 1x net with three groups.
        counts: Units in each stage.
        groups: Groups of the 1x1 convolutions.

    Example:
        >>> sum(p.numel() for p in ShuffleNetV1(num_classes=100).parameters())
        949258
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (240, 480, 960),
        counts: Sequence[int] = (4, 8, 4),
        groups: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu1 = nn.ReLU()
        self.layer1 = self._stage(counts[0], _STEM, widths[0], groups)
        self.layer2 = self._stage(counts[1], widths[0], widths[1], groups)
        self.layer3 = self._stage(counts[2], widths[1], widths[2], groups)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[2], num_classes)
        initialise_(self)

    @staticmethod
    def _stage(count: int, in_channels: int, width: int, groups: int) -> nn.Sequential:
        first = ShuffleUnit(in_channels, width - in_channels, 2, groups)  # the pooled input fills the rest
        return nn.Sequential(first, *(ShuffleUnit(width, width, 1, groups) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.avgpool(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.flatten(1))
