"""MobileNetV2 for 32x32 images.

Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018, arXiv:1801.04381.
It is the half-width net of the distillation papers. Against Sandler et al.: the second stage keeps its resolution,
ReLU stands for ReLU6, the first block too has an expansion layer, and channels are cut down to whole numbers, not to
multiples of 8.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from limbeck.models.initialise import initialise_

# channels, blocks, stride of each stage; the first expands by 1, the others by `expansion`
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
_LAST = 1280


def conv_bn_relu(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size at stride 1, batch normalisation, ReLU."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU()]


class InvertedResidual(nn.Module):
    """Expand, convolve each channel by itself, project; the sum with the input where the shapes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, inner, 1),
            *conv_bn_relu(inner, inner, 3, stride, groups=inner),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """A stem of stride 2, stages ``layer1`` to ``layer7`` of inverted residuals, a 1x1 convolution, ``linear``.

    Images ``[B, in_channels, H, W]`` from 8x8 on; logits ``[B, num_classes]``.

    Args:
        width: Multiplier of all widths; 0.5 as in the CRD table.
        expansion: Widening inside a block; 6 as in the paper.

    Example:
        >>> sum(p.numel() for p in MobileNetV2(num_classes=100).parameters())
        812836
    """

    foreign_names: ClassVar = (
        (r"^classifier\.0\.", "linear."),
        *((rf"^blocks\.{i}\.", f"layer{i + 1}.") for i in range(len(_STAGES))),
    )

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3, width: float = 0.5, expansion: int = 6) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn_relu(in_channels, channels, 3, stride=2))
        self.stages = tuple(f"layer{i}" for i in range(1, len(_STAGES) + 1))
        for name, (wide, count, stride) in zip(self.stages, _STAGES, strict=True):
            blocks = []
            for i in range(count):
                out = int(wide * width)
                ratio = 1 if name == "layer1" else expansion
                blocks.append(InvertedResidual(channels, out, stride if i == 0 else 1, ratio))
                channels = out
            self.add_module(name, nn.Sequential(*blocks))
        last = max(_LAST, int(_LAST * width))
        self.conv2 = nn.Sequential(*conv_bn_relu(channels, last, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(last, num_classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(self.avgpool(self.conv2(x)).flatten(1))
