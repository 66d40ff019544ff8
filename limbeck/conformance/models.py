"""Tiny students and teachers that have every place an objective may listen to."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class ImageClassifier(nn.Module):
    """``[B, 3, 8, 8]`` to ``[B, C]``: three resolutions in ``layer1`` to ``layer3``, then ``fc``."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.layer1 = _layer(3, width, depth, stride=1)
        self.layer2 = _layer(width, width, depth, stride=2)
        self.layer3 = _layer(width, 2 * width, depth, stride=2)
        self.fc = _head(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(images)))
        return self.fc(x.mean(dim=(2, 3)))


def _layer(channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    blocks = [ConvBlock(channels if i == 0 else width, width, stride if i == 0 else 1) for i in range(depth)]
    return nn.Sequential(*blocks)


def _head(width: int, classes: int) -> nn.Linear:
    """A classifier as sure as a trained one: logits of size 1 and more."""
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=2.0)
    return head


class Attention(nn.Module):
    """Self-attention with two heads; gives its output and its maps ``[B, 2, T, T]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -1e4)
        maps = scores.softmax(dim=-1)
        return self.out((maps @ v).transpose(1, 2).flatten(2)), maps


class AttentionBlock(nn.Module):
    """Attention and a feed-forward layer, each added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(x, mask)[0]
        return x + self.feed(x)


class TextModel(nn.Module):
    """Token ids ``[B, T]`` to logits: ``[B, T, C]``, or ``[B, C]`` where it pools."""

    def __init__(self, width: int, depth: int, classes: int, pool: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(AttentionBlock(width) for _ in range(depth))
        self.head = _head(width, classes)
        self.pool = pool

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(dim=1) if self.pool else x)


class DualEncoder(nn.Module):
    """Images and texts to how well each matches each: ``[B, B]``, row by image, column by text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.visual_projection = nn.Linear(3 * 8 * 8, width)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.text_projection = nn.Linear(width, width)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        seen = self.visual_projection(images.flatten(1))
        read = self.text_projection(self.embedding(ids).mean(dim=1))
        return 5 * nn.functional.normalize(seen, dim=1) @ nn.functional.normalize(read, dim=1).T


VOCABULARY = 16
