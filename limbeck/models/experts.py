"""A CIFAR ResNet of several experts: first stages that they share, last stages and classifiers of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.models.initialise import initialise_
from limbeck.models.resnet import BasicBlock, Shortcut


class CosineLinear(nn.Module):
    r"""Logits by angles alone, :math:`z_c = s\, \hat w_c^\top \hat f`: no class wins by the length of its weights.

    Args:
        in_features: Width of f.
        classes: How many.
        scale: s.

    >>> layer = CosineLinear(2, 3, scale=30.0)
    >>> bool(layer(torch.randn(4, 2)).abs().max() <= 30.001)
    True
    """

    def __init__(self, in_features: int, classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw directions: uniform in each coordinate, of length 1."""
        with torch.no_grad():
            self.weight.copy_(F.normalize(torch.empty_like(self.weight).uniform_(-1, 1), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class Shallow(nn.Sequential):
    """Brings an earlier stage's map to the size of the last one: strided 3x3 convolutions with normalisation.

    Every one but the second ends in a ReLU, as in SHIKE's code.

    Args:
        widths: Channels of the stage that it starts from, and of all that follow.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after)]
            if number != 1:
                layers.append(nn.ReLU())
        super().__init__(*layers)


class Expert(nn.Module):
    """Last stages and a classifier; its output is its own logits ``[B, C]``.

    Args:
        stages: Its own.
        head: Its classifier.
        shallow: Multiplies the last map by an earlier one, where there is one.
        source: Which of the shared stages that reads.
    """

    def __init__(self, stages: nn.Sequential, head: nn.Module, shallow: Shallow | None, source: int) -> None:
        super().__init__()
        self.stages, self.shallow, self.source = stages, shallow, source
        self.linear = head

    def forward(self, maps: list[Tensor]) -> Tensor:
        feature = self.stages(maps[-1])
        if self.shallow is not None:
            feature = feature * self.shallow(maps[self.source])
        return self.linear(feature.mean(dim=(2, 3)))


class ExpertResNet(nn.Module):
    """A ResNet of three stages whose last ones are there several times; logits are the experts' mean.

    Args:
        counts: Blocks in each stage.
        widths: Channels of the stem, then of each stage.
        experts: How many.
        shared: Stages that all experts share: 1 as in RIDE and MDCS, 2 as in SHIKE.
        fuse: Expert i multiplies its last map by what convolutions make of shared stage ``i % shared`` (SHIKE).
        head: ``"cosine"`` or ``"linear"``.
        scale: Of cosine logits.
        shortcut: As in :class:`~limbeck.models.resnet.ResNet`.

    Raises:
        ModelError: Numbers that do not fit.

    Example:
        >>> net = ExpertResNet((1, 1, 1), (4, 4, 8, 16), experts=2, num_classes=5, in_channels=1)
        >>> net(torch.zeros(2, 1, 8, 8)).shape, len(net.experts)
        (torch.Size([2, 5]), 2)
    """

    def __init__(
        self,
        counts: Sequence[int],
        widths: Sequence[int],
        *,
        experts: int = 3,
        shared: int = 1,
        fuse: bool = False,
        head: Literal["cosine", "linear"] = "cosine",
        scale: float = 30.0,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: Shortcut = "B",
    ) -> None:
        super().__init__()
        if len(widths) != len(counts) + 1:
            wanted = f"{len(counts) + 1} numbers: the stem, then {len(counts)} stages"
            raise ModelError("wrong number of widths", where="widths", found=tuple(widths), wanted=wanted)
        if experts < 2:
            raise ModelError("experts are two or more", where="experts", found=experts)
        if not 1 <= shared < len(counts):
            raise ModelError(
                "no such share of the stages", where="shared", found=shared, wanted=f"1 to {len(counts) - 1}"
            )
        if head not in ("cosine", "linear"):
            raise ModelError("no such classifier", where="head", found=repr(head), wanted="'cosine' or 'linear'")
        if not 0 < scale < math.inf:
            raise ModelError("must be above zero", where="scale", found=scale)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu1 = nn.ReLU()
        whole = [
            [_stage(count, widths[n], widths[n + 1], 1 if n == 0 else 2, shortcut) for n, count in enumerate(counts)]
            for _ in range(experts)
        ]
        self.trunk = nn.ModuleList(whole[0][:shared])
        self.experts = nn.ModuleList(
            Expert(
                nn.Sequential(*stages[shared:]),
                nn.Linear(widths[-1], num_classes)
                if head == "linear"
                else CosineLinear(widths[-1], num_classes, scale),
                Shallow(widths[1 + number % shared :]) if fuse else None,
                number % shared,
            )
            for number, stages in enumerate(whole)
        )
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x, maps = self.relu1(self.bn1(self.conv1(x))), []
        for stage in self.trunk:
            x = stage(x)
            maps.append(x)
        return torch.stack([expert(maps) for expert in self.experts]).mean(dim=0)


def _stage(count: int, channels: int, width: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(channels, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width, 1, shortcut) for _ in range(count - 1)))


def expert_resnet(
    depth: int,
    *,
    experts: int = 3,
    shared: int = 1,
    fuse: bool = False,
    head: Literal["cosine", "linear"] = "cosine",
    scale: float = 30.0,
    widths: Sequence[int] = (16, 16, 32, 64),
    num_classes: int = 10,
    in_channels: int = 3,
    shortcut: Shortcut = "B",
) -> ExpertResNet:
    """The CIFAR ResNet of depth 6n+2 as a network of experts; RIDE's and MDCS's has widths 16, 16, 24, 48.

    Example:
        >>> net = expert_resnet(32, widths=(16, 16, 24, 48), num_classes=100)
        >>> [sum(p.numel() for p in part.parameters()) for part in (net.trunk, net.experts[0])]
        [23360, 255024]
    """
    if depth < 8 or (depth - 2) % 6:
        raise ModelError("no such depth", where=f"resnet{depth}_experts", found=depth, wanted="6n+2: 8, 14, 20, ...")
    return ExpertResNet(
        ((depth - 2) // 6,) * 3,
        widths,
        experts=experts,
        shared=shared,
        fuse=fuse,
        head=head,
        scale=scale,
        num_classes=num_classes,
        in_channels=in_channels,
        shortcut=shortcut,
    )
