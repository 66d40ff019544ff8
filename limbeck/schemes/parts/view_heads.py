"""Heads of self-supervised learning: from a feature, or from a model's tokens, to scores for many prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import ConfigError
from limbeck.core.layout import patch_tokens, to_map, to_tokens
from limbeck.models.vit import Block


class Prototypes(nn.Module):
    """A linear layer whose rows have a length of their own, apart from their direction.

    Args:
        width: Of what it reads.
        count: How many prototypes.
        free: The lengths are learned; else they stay 1.
    """

    def __init__(self, width: int, count: int, *, free: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, width), std=0.02))
        self.length = nn.Parameter(torch.ones(count, 1), requires_grad=free)

    def forward(self, feature: Tensor, learns: bool = True) -> Tensor:
        """Scores ``[B, count]``; where the layer does not learn, its gradient is 0 and the feature's is what it is."""
        weight = self.length * F.normalize(self.direction, dim=1)
        if not learns:  # not without one: a fused optimizer wants all gradients from its first step on
            weight = weight.detach() + 0.0 * weight
        return F.linear(feature, weight)


class MLPHead(nn.Module):
    """DINO's head: three linear layers with GELU, length 1, prototypes of length 1.

    Args:
        width: Of the feature.
        prototypes: How many.
        hidden: Width inside.
        bottleneck: Width before the prototypes.

    >>> MLPHead(8, 5, hidden=16, bottleneck=4)(torch.ones(2, 8)).shape
    torch.Size([2, 5])
    """

    def __init__(self, width: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        _start(self)
        self.last = Prototypes(bottleneck, prototypes, free=False)

    def forward(self, feature: Tensor, learns: bool = True) -> Tensor:
        return self.last(F.normalize(self.layers(feature), dim=-1), learns)


class TokenHead(nn.Module):
    """Transformer blocks over a model's tokens, their mean, prototypes. A query from another model may stand beside.

    The query is one more token in front: it changes what the others say through attention, and is not in their mean.
    A map's own query is the mean of its places after the first layer, that of tokens their class token (without one,
    their mean).

    Args:
        feature: An example, a map ``[B, C, H, W]`` or tokens ``[B, N, C]``.
        width: Inside, of tokens and queries.
        prototypes: How many.
        depth: Blocks.
        heads: Attention heads of a block.

    >>> head = TokenHead(torch.zeros(2, 8, 4, 4), width=12, prototypes=5, depth=1, heads=2)
    >>> scores, query = head(torch.zeros(3, 8, 2, 2))
    >>> scores.shape, query.shape, head(torch.zeros(3, 8, 4, 4), torch.ones(3, 12))[0].shape
    (torch.Size([3, 5]), torch.Size([3, 12]), torch.Size([3, 5]))
    """

    def __init__(self, feature: Tensor, width: int, prototypes: int, depth: int = 3, heads: int = 6) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError("heads must share the width evenly", where="heads", found=heads, wanted=f"of {width}")
        channels = feature.shape[1] if feature.ndim == 4 else feature.shape[2]
        same = feature.ndim == 3 and channels == width
        self.enter: nn.Module = nn.Identity() if same else nn.Linear(channels, width)
        self.place = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, width, *to_map(feature).shape[2:]), std=0.02))
        self.blocks = nn.ModuleList(Block(width, heads, 4.0) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        _start(self.enter)
        _start(self.blocks)
        self.last = Prototypes(width, prototypes, free=True)

    def forward(self, feature: Tensor, query: Tensor | None = None, learns: bool = True) -> tuple[Tensor, Tensor]:
        """Scores ``[B, prototypes]`` and the query ``[B, width]`` that this feature gives itself."""
        whole = self.enter(to_tokens(feature))
        tokens = patch_tokens(whole) if feature.ndim == 3 else whole
        own = whole[:, 0] if whole.shape[1] > tokens.shape[1] else whole.mean(dim=1)
        grid = to_map(feature).shape[2:]
        place: Tensor = self.place
        if place.shape[2:] != grid:
            place = F.interpolate(place, grid, mode="bicubic", align_corners=False)
        x = tokens + place.flatten(2).transpose(1, 2)
        if query is not None:
            x = torch.cat([query.unsqueeze(1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        x = x if query is None else x[:, 1:]
        return self.last(x.mean(dim=1), learns), own


def _start(module: nn.Module) -> None:
    """A narrow normal for linear layers, as in the authors' code."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
