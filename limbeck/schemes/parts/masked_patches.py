"""Masked patches: which an image shows, how the others are left out of a transformer, and a decoder that adds them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError
from limbeck.core.hashing import draw_bits, key, key_tensor
from limbeck.models.vit import Block
from limbeck.schemes.many_teachers.token_dropping import taken

_ORDER = 52  # keeps these draws apart from others
_TICKS = 2.0**40  # of progress


def patch_order(index: Tensor, patches: int, seed: int = 0, progress: float | Tensor = 0.0) -> Tensor:
    """The place of each patch in a random order of its sample's patches, ``[B, N]``; the first places are shown.

    Drawn by what it is for: sample, seed and progress. So it is the same in whatever batch or process a sample comes.

    Args:
        index: ``[B]`` ids of samples.
        patches: N.
        seed: Of the run.
        progress: Of the training; every step has its own.

    >>> patch_order(torch.tensor([3]), 4).sort().values
    tensor([[0, 1, 2, 3]])
    """
    moment = (torch.as_tensor(progress, device=index.device) * _TICKS).long().reshape(1)
    keys = draw_bits(key_tensor([key(_ORDER, seed)], index.device), moment).reshape(1)
    places = index.long().unsqueeze(1) * patches + torch.arange(patches, device=index.device)
    return draw_bits(keys, places).squeeze(-1).argsort(dim=1).argsort(dim=1)


def sincos_positions(patches: int, width: int) -> Tensor:
    r"""Fixed positions of a square grid of patches, ``[patches, width]``, as in masked autoencoders.

    .. math:: [\sin(x \omega), \cos(x \omega), \sin(y \omega), \cos(y \omega)], \qquad
        \omega_i = 10000^{-4 i / \text{width}}

    Args:
        patches: A square number; row by row.
        width: Of a token; a multiple of 4.

    Raises:
        ConfigError: Other numbers.

    >>> sincos_positions(4, 4)[1]
    tensor([0.8415, 0.5403, 0.0000, 1.0000])
    """
    side = math.isqrt(patches)
    if side * side != patches or width % 4:
        raise ConfigError(
            "fixed positions are for square grids, and tokens whose width is a multiple of 4",
            where="positions",
            found=f"{patches} patches, width {width}",
        )
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    along = torch.arange(side, dtype=torch.float64).unsqueeze(1) * omega
    waves = torch.cat([along.sin(), along.cos()], dim=1)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).to(torch.get_default_dtype())


class Masking:
    """Before a transformer's first block all patches leave but those that are shown; only while ``order`` is set.

    Args:
        model: It gets a hook, which ``close`` takes off.
        block: Name of its first block, which takes ``[B, prefix + N, D]``.
        prefix: Tokens before the patches; the first, the class token, stays.
        shown: How many patches stay.
    """

    def __init__(self, model: nn.Module, block: str, prefix: int, shown: int) -> None:
        self.prefix, self.shown = prefix, shown
        self.order: Tensor | None = None
        self._handle = model.get_submodule(block).register_forward_pre_hook(self._leave)

    def _leave(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.order is None:
            return None
        tokens = given[0]
        tokens = torch.cat([tokens[:, :1], tokens[:, self.prefix :]], dim=1)
        return (taken(tokens, self.order.argsort(dim=1)[:, : self.shown], 1), *given[1:])

    def close(self) -> None:
        """Take the hook off."""
        self._handle.remove()


class PatchDecoder(nn.Module):
    """A masked autoencoder's light decoder: of the tokens that were shown it makes tokens of all patches.

    Tokens ``[B, 1 + shown, features]`` and the patches' order ``[B, N]`` in, ``[B, 1 + N, width]`` out.

    Args:
        features: Width of the encoder's tokens.
        patches: N.
        width: Of its own tokens, a multiple of ``heads`` and of 4.
        depth: Blocks.
        heads: Of each.

    >>> decoder = PatchDecoder(6, patches=4, width=8, depth=1, heads=2)
    >>> decoder(torch.zeros(3, 2, 6), torch.arange(4).expand(3, 4)).shape
    torch.Size([3, 5, 8])
    """

    positions: Tensor

    def __init__(self, features: int, patches: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.enter = nn.Linear(features, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        places = sincos_positions(patches, width)
        self.register_buffer("positions", torch.cat([torch.zeros(1, width), places]).unsqueeze(0))
        self.blocks = nn.ModuleList(Block(width, heads, 4.0) for _ in range(depth))
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(drawn_evenly)

    def forward(self, tokens: Tensor, order: Tensor) -> Tensor:
        known = self.enter(tokens)
        absent = order.shape[1] + 1 - known.shape[1]
        hidden = self.mask_token.to(known.dtype).expand(len(known), absent, -1)
        patches = torch.cat([known[:, 1:], hidden], dim=1)
        patches = patches.gather(1, order.unsqueeze(-1).expand(-1, -1, known.shape[-1]))
        x_BND = torch.cat([known[:, :1], patches], dim=1) + self.positions
        for block in self.blocks:
            x_BND = block(x_BND)
        return x_BND


def drawn_evenly(module: nn.Module) -> None:
    """Linear layers start as in masked autoencoders: Xavier's uniform weights, no bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
