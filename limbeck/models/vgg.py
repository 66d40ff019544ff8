"""VGG nets with batch normalisation for small images.

Source: Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2015,
arXiv:1409.1556. Global average pooling stands for the hidden fully connected layers, as in the distillation papers.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.models.initialise import initialise_

_COUNTS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class ConvBlock(nn.Module):
    """A 3x3 convolution, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class VGG(nn.Module):
    """Stages ``layer1`` to ``layer5`` of 64, 128, 256, 512 and 512 channels with max pooling between, then ``linear``.

    There is no pooling between the last two stages unless the image is 64 pixels or larger. Images
    ``[B, in_channels, H, W]`` from 8x8 on; logits ``[B, num_classes]``.

    Args:
        depth: 8, 11, 13, 16 or 19.
        image_size: Height of the images; only whether it reaches 64 matters.

    Example:
        >>> sum(p.numel() for p in VGG(8, num_classes=100).parameters())
        3965028
    """

    foreign_names: ClassVar = (
        (r"^classifier\.", "linear."),
        *(
            (rf"^block{stage}\.{3 * block + part}\.", f"layer{stage + 1}.{block}.{name}.")
            for stage in range(5)
            for block in range(4)
            for part, name in enumerate(("conv", "bn"))
        ),
    )

    def __init__(self, depth: int, *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> None:
        super().__init__()
        if depth not in _COUNTS:
            raise ModelError("no such depth", where=f"vgg{depth}", found=depth, wanted="8, 11, 13, 16 or 19")
        one, two, three, four, five = _COUNTS[depth]
        self.layer1 = self._stage(one, in_channels, 64)
        self.pool1 = nn.MaxPool2d(2)
        self.layer2 = self._stage(two, 64, 128)
        self.pool2 = nn.MaxPool2d(2)
        self.layer3 = self._stage(three, 128, 256)
        self.pool3 = nn.MaxPool2d(2)
        self.layer4 = self._stage(four, 256, 512)
        self.pool4 = nn.MaxPool2d(2) if image_size >= 64 else nn.Identity()
        self.layer5 = self._stage(five, 512, 512)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512, num_classes)
        initialise_(self)

    @staticmethod
    def _stage(count: int, in_channels: int, width: int) -> nn.Sequential:
        return nn.Sequential(ConvBlock(in_channels, width), *(ConvBlock(width, width) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.layer1(x))
        x = self.pool2(self.layer2(x))
        x = self.pool3(self.layer3(x))
        x = self.pool4(self.layer4(x))
        x = self.avgpool(self.layer5(x))
        return self.linear(x.flatten(1))
