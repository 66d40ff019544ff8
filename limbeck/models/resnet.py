"""ResNets for small images: the CIFAR nets of depth 6n+2, and ResNet-18/34/50 with a 3x3 stem.

Source: He et al., Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385 (section 4.2 for CIFAR).
No ReLU works in place, so whatever a tap captures stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.models.initialise import initialise_

Shortcut = Literal["A", "B"]


class PadShortcut(nn.Module):
    """Option A: keep every ``stride``-th pixel, add zero channels, half in front and half behind. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))


def make_shortcut(in_channels: int, out_channels: int, stride: int, option: Shortcut) -> nn.Module:
    """The path around a block: the identity where shapes agree, else option A or B (1x1 convolution, BN)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option == "A":
        return PadShortcut(in_channels, out_channels, stride)
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. Its output is that of ``relu2``; what enters ``relu2`` is the pre-activation."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, option: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = make_shortcut(in_channels, width, stride, option)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, four times as wide outside as inside. The 3x3 one carries the stride."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, option: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = make_shortcut(in_channels, 4 * width, stride, option)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem, stages ``layer1``, ``layer2``, ... of residual blocks, global average pooling, ``linear``.

    Every stage but the first halves the resolution. Images ``[B, in_channels, H, W]`` from 8x8 on; logits
    ``[B, num_classes]``.

    Args:
        counts: Blocks in each stage.
        widths: Channels of the stem, then of each stage (before a bottleneck's expansion).
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        shortcut: ``"B"`` (1x1 convolution and BN) or ``"A"`` (subsampling and zero channels).

    Example:
        >>> import torch
        >>> net = ResNet((1, 1), widths=(8, 8, 16), num_classes=5, in_channels=1)
        >>> net(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 5])
    """

    foreign_names: ClassVar = ((r"^fc\.", "linear."), (r"\.downsample\.", ".shortcut."))

    def __init__(
        self,
        counts: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        shortcut: Shortcut = "B",
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ModelError("no such shortcut", where="shortcut", found=repr(shortcut), wanted="'A' or 'B'")
        if len(widths) != len(counts) + 1:
            wanted = f"{len(counts) + 1} numbers: the stem, then {len(counts)} stages"
            raise ModelError("wrong number of widths", where="widths", found=tuple(widths), wanted=wanted)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu1 = nn.ReLU()
        channels = widths[0]
        self.stages = tuple(f"layer{i}" for i in range(1, len(counts) + 1))
        for name, count, width in zip(self.stages, counts, widths[1:], strict=True):
            blocks = []
            for i in range(count):
                stride = 2 if i == 0 and name != "layer1" else 1
                blocks.append(block(channels, width, stride, shortcut))
                channels = width * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(self.avgpool(x).flatten(1))


def cifar_resnet(
    depth: int,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 16, 32, 64),
    shortcut: Shortcut = "B",
) -> ResNet:
    """The CIFAR ResNet of depth 6n+2: three stages of n basic blocks with 16, 32 and 64 channels.

    Option B is that of the tables in the distillation papers (CRD and later); option A is He et al.'s choice for CIFAR.

    Example:
        >>> sum(p.numel() for p in cifar_resnet(20, shortcut="A").parameters())
        269722
    """
    if depth < 8 or (depth - 2) % 6:
        raise ModelError("no such depth", where=f"resnet{depth}", found=depth, wanted="6n+2: 8, 14, 20, 26, 32, ...")
    n = (depth - 2) // 6
    return ResNet((n, n, n), widths, num_classes=num_classes, in_channels=in_channels, shortcut=shortcut)


def imagenet_resnet(depth: int, *, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18, 34 or 50 as the ImageNet nets are used on 32x32 images: 3x3 stem without pooling, four stages.

    Example:
        >>> sum(p.numel() for p in imagenet_resnet(18).parameters())
        11173962
    """
    layouts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
    if depth not in layouts:
        raise ModelError("no such depth", where=f"ResNet{depth}", found=depth, wanted="18, 34 or 50")
    block = Bottleneck if depth == 50 else BasicBlock
    widths = (64, 64, 128, 256, 512)
    return ResNet(layouts[depth], widths, num_classes=num_classes, in_channels=in_channels, block=block)
