"""A small vision transformer whose attention maps can be listened to.

Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021, arXiv:2010.11929; the named sizes are those of
Touvron et al., Training Data-Efficient Image Transformers, 2021, arXiv:2012.12877.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.errors import ModelError


class Attention(nn.Module):
    """Self-attention; the output of ``probs`` is the attention map ``[B, heads, N, N]``.

    The map is computed in the open, not by a fused kernel, so that a tap can have it.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.probs = nn.Softmax(dim=-1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Each token asks all that count: ``mask_BN`` is False where one does not."""
        B, N, D = x_BND.shape
        q, k, v = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        scores_BHNN = q @ k.transpose(-2, -1) * self.scale
        if mask_BN is not None:
            scores_BHNN = scores_BHNN.masked_fill(~mask_BN[:, None, None], torch.finfo(scores_BHNN.dtype).min)
        out_BHNd = self.probs(scores_BHNN) @ v
        return self.proj(out_BHNd.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Normalise first; attention, then a GELU layer of ``mlp_ratio`` times the width; a sum after each."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, int(dim * mlp_ratio)), nn.GELU(), nn.Linear(int(dim * mlp_ratio), dim))

    def forward(self, x: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask_BN)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches and a class token through ``blocks``, then ``norm`` and ``linear`` on the class token.

    Images ``[B, in_channels, image_size, image_size]``; blocks give ``[B, 1 + patches, dim]``; logits
    ``[B, num_classes]``.

    Args:
        dim: Width of a token, a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads of a block.
        image_size: Height and width of the images, a multiple of ``patch_size``.
        patch_size: Height and width of a patch; 4 suits 32x32 images, 2 suits 8x8 digits.
        mlp_ratio: Inner over outer width of a block's perceptron; 4 as in the paper.

    Example:
        >>> net = ViT(dim=32, depth=2, heads=2, image_size=8, patch_size=2, in_channels=1)
        >>> net(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ModelError(
                "patches must tile the image", where="patch_size", found=patch_size, wanted=f"a divisor of {image_size}"
            )
        if dim % heads:
            raise ModelError("heads must share dim evenly", where="heads", found=heads, wanted=f"a divisor of {dim}")
        self.patch = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x_BND = self.patch(x).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x_BND], dim=1) + self.pos_embed
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.linear(self.norm(x_BND)[:, 0])
