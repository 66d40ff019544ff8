"""A small transformer that classifies texts, each token by its id.

Source: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762; its blocks normalise first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.models.vit import Block


class TextEncoder(nn.Module):
    """Embedded tokens with sines for their positions through ``blocks``, ``norm``, their mean, ``linear``.

    Takes ``input_ids [B, T]`` of any length and ``attention_mask [B, T]``, 0 where a token is padding; blocks give
    ``[B, T, dim]``; logits ``[B, num_classes]``. Padding changes nothing.

    Args:
        dim: Width of a token, even.
        depth: Number of blocks.
        num_classes: Number of logits.
        vocabulary: Number of token ids; 0 is padding.
        heads: Attention heads of a block; by default as many as leave each a width of 32 or more.
        mlp_ratio: Inner over outer width of a block's perceptron.
        dropout: Of embedded tokens and of their mean: from scratch on few texts, words are learned by heart.

    Example:
        >>> net = TextEncoder(32, 2, num_classes=2, vocabulary=100)
        >>> net(torch.tensor([[5, 7, 0]]), torch.tensor([[1, 1, 0]])).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        dim: int = 64,
        depth: int = 2,
        *,
        num_classes: int = 2,
        vocabulary: int = 20_000,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ModelError("sines and cosines come in pairs", where="dim", found=dim, wanted="an even number")
        heads = next(h for h in range(max(dim // 32, 1), 0, -1) if dim % h == 0) if heads is None else heads
        if heads < 1 or dim % heads:
            raise ModelError("heads must share dim evenly", where="heads", found=heads, wanted=f"a divisor of {dim}")
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        with torch.no_grad():
            self.embedding.weight[0] = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x_BTD = self.embedding(input_ids) * self.embedding.embedding_dim**0.5
        x_BTD = self.dropout(x_BTD + positions(x_BTD))
        mask_BT = (torch.ones_like(input_ids) if attention_mask is None else attention_mask) > 0
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BT)
        counts_BT1 = mask_BT.unsqueeze(-1).to(x_BTD.dtype)
        mean_BD = (self.norm(x_BTD) * counts_BT1).sum(dim=1) / counts_BT1.sum(dim=1).clamp(min=1)
        return self.linear(self.dropout(mean_BD))


def positions(x_BTD: Tensor) -> Tensor:
    """Sines and cosines of each position at wavelengths from 2 pi to 10,000 times that, ``[T, D]``.

    >>> positions(torch.zeros(1, 3, 4))[0]
    tensor([0., 0., 1., 1.])
    """
    _, length, dim = x_BTD.shape
    place = torch.arange(length, device=x_BTD.device, dtype=torch.float32).unsqueeze(1)
    half = torch.arange(dim // 2, device=x_BTD.device, dtype=torch.float32)
    angle = place * torch.exp(half * (-math.log(10_000.0) / (dim // 2)))
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(x_BTD.dtype)
