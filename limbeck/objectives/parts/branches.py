"""Classifiers on a student's inner layers, learned beside it: which layers, and the heads on maps and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import TensorError
from limbeck.core.heads import BatchNorm
from limbeck.core.layout import is_grid, patch_tokens, to_map, to_tokens

M = TypeVar("M", bound=nn.Module)
SIDE = 7  # of the grid to which tokens are merged


def branch_points(features: Sequence[Tensor], most: int = 4) -> list[int]:
    """Which layers branch off, by their number: the last at each resolution, or evenly spaced where there is but one.

    Args:
        features: Maps ``[B, C, H, W]`` or tokens ``[B, N, D]`` in the order of the forward.
        most: Of more, the deepest.

    Raises:
        TensorError: Something else stands among them.

    >>> branch_points([torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4), torch.zeros(1, 16, 2, 2)])
    [1, 2]
    >>> branch_points([torch.zeros(1, 17, 8)] * 12)
    [2, 5, 8, 11]
    """
    for feature in features:
        if feature.ndim not in (3, 4):
            found = list(feature.shape)
            raise TensorError("branches stand on maps or tokens", where="student_feature", found=found, wanted="3 or 4")
    last = {f.shape[2:] if f.ndim == 4 else f.shape[1]: i for i, f in enumerate(features)}
    if len(last) > 1:
        return sorted(last.values())[-most:]
    number = min(most, len(features))
    return [-(-(i + 1) * len(features) // number) - 1 for i in range(number)]


def branch(feature: Tensor, after: int, width: int, classes: int) -> nn.Module:
    """OFA's branch on a layer.

    Args:
        feature: An example, ``[B, C, H, W]`` or ``[B, N, D]``.
        after: How many stages the student has after it.
        width: What enters the classifier.
        classes: What leaves it.
    """
    if feature.ndim == 4:
        return conv_branch(feature.shape[1], after, width, classes).to(feature.device)
    return TokenBranch(feature, max(after, 1), width, classes).to(feature.device)


def conv_branch(channels: int, halvings: int, width: int, classes: int) -> nn.Sequential:
    """OFA's branch on a map: separable convolutions that halve the map and double the channels, pooling, a classifier.

    Args:
        channels: Of the map.
        halvings: How often the network halves the map after it; 0 gives a 1x1 convolution.
        width: What enters the classifier.
        classes: What leaves it.

    >>> conv_branch(8, 2, 64, 10)(torch.zeros(2, 8, 16, 16)).shape
    torch.Size([2, 10])
    """
    widths = [channels * 2**i for i in range(halvings)] + [width]
    steps: list[nn.Module] = [_separable(widths[i], widths[i + 1]) for i in range(halvings)]
    steps = steps or [nn.Conv2d(channels, width, 1)]
    return start(nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)))


def _separable(channels: int, out: int) -> nn.Sequential:
    """Two depthwise separable convolutions; the first halves the map, the second goes to ``out`` channels."""
    layers: list[nn.Module] = []
    for stride, leaving in ((2, channels), (1, out)):
        layers += [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, leaving, 1, bias=False),
            BatchNorm(leaving),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class BottleneckBranch(nn.Module):
    """BYOT's branch: convolutions that are narrow inside bring a layer to the last one's grid; pooling, a classifier.

    Args:
        feature: An example, ``[B, C, H, W]`` or ``[B, N, D]`` (its grid without class tokens).
        deepest: The same of the last layer.
        width: What enters the classifier.
        classes: What leaves it.
        relu: End the feature with a ReLU, as that of the last layer does.

    >>> answer, feature = BottleneckBranch(torch.zeros(2, 8, 16, 16), torch.zeros(2, 32, 4, 4), 32, 10)(
    ...     torch.zeros(2, 8, 16, 16)
    ... )
    >>> answer.shape, feature.shape
    (torch.Size([2, 10]), torch.Size([2, 32]))
    """

    def __init__(self, feature: Tensor, deepest: Tensor, width: int, classes: int, relu: bool = True) -> None:
        super().__init__()
        own, last, inner = to_map(feature), to_map(deepest), max(width // 4, 1)
        ratio = [max(a // b, 1) for a, b in zip(own.shape[2:], last.shape[2:], strict=True)]
        self.bottleneck = nn.Sequential(
            nn.Conv2d(own.shape[1], inner, 1),
            BatchNorm(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, (ratio[0], ratio[1]), (ratio[0], ratio[1])),
            BatchNorm(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
            BatchNorm(width),
            nn.ReLU() if relu else nn.Identity(),
        )
        self.classifier = nn.Linear(width, classes)
        for module in self.bottleneck:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, classes]`` and what the classifier reads, ``[B, width]``."""
        read = self.bottleneck(to_map(feature, "student_feature")).mean(dim=(2, 3))
        return self.classifier(read), read


class TokenBranch(nn.Module):
    """OFA's branch on tokens: patches merged two by two to a grid of 7, transformer blocks, a classifier.

    The classifier reads the class token where there is one, else the mean; class tokens are not merged.

    Args:
        tokens: An example, ``[B, N, D]``.
        blocks: How many transformer blocks, with 4 heads.
        width: Of the blocks.
        classes: What leaves it.

    >>> TokenBranch(torch.zeros(1, 197, 8), blocks=1, width=16, classes=10)(torch.zeros(2, 197, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, tokens: Tensor, blocks: int, width: int, classes: int) -> None:
        super().__init__()
        dim, merges = tokens.shape[2], 0
        side = math.isqrt(patch_tokens(tokens).shape[1]) if is_grid(tokens) else 0
        while side % 2 == 0 and side >= 2 * SIDE:
            side, merges = side // 2, merges + 1
        self.enter = nn.Linear(dim, width) if dim != width else nn.Identity()
        self.norms = nn.ModuleList(nn.LayerNorm(4 * width) for _ in range(merges))
        self.merges = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(merges))
        heads = next(h for h in (4, 2, 1) if width % h == 0)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
                for _ in range(blocks)
            )
        )
        self.classifier = nn.Linear(width, classes)
        start(self)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.enter(tokens)
        patches = patch_tokens(x)
        own = x[:, : x.shape[1] - patches.shape[1]]  # class tokens
        for i, (norm, merge) in enumerate(zip(self.norms, self.merges, strict=True)):
            quarters = to_tokens(F.pixel_unshuffle(to_map(patches), 2))
            patches = merge(norm(quarters))
            patches = F.gelu(patches) if i + 1 < len(self.merges) else patches
        x = self.blocks(torch.cat([own, patches], dim=1))
        return self.classifier(x[:, 0] if own.shape[1] else x.mean(dim=1))


def start(head: M) -> M:
    """A head's weights as in OFA's code: He's for convolutions (by what leaves), a narrow normal for linear layers."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return head
