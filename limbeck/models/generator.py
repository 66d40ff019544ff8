"""A generator: images or vectors out of noise, for training without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.data.normalise import Normalisation

End = Literal["normal", "pixels"]


class Generator(nn.Module):
    r"""Inputs of a model, in the normalised space in which that model sees its data.

    Images: a linear layer makes a map of a quarter of the size with ``2 width`` channels; twice it is enlarged and
    convolved, with batch normalisation and LeakyReLU(0.2) between. Vectors: two hidden layers, ``2 width`` and
    ``width`` wide, with the same between.

    How images end: ``"normal"`` with :math:`\tanh` and a batch normalisation without parameters, so that each channel
    has mean 0 and deviation 1, as normalised data have; ``"pixels"`` with a sigmoid, pixels from 0 to 1 that are then
    normalised as the data are. Vectors have no range, so they always end with the batch normalisation.

    Args:
        latent: Width of the noise.
        shape: Of one input: ``[C, H, W]`` or ``[D]``.
        width: Channels before the last layer.
        end: See above.
        normalise: Of the data, for ``"pixels"``; ``None`` where they are as they are.

    Raises:
        ModelError: Inputs of another kind.

    Source: the generators of DAFL (huawei-noah), of DFAD (VainF/DFAD, its GeneratorA) and of CMI (zju-vipa/CMI), which
    agree up to their ends. Those of DAFL have an epsilon of 0.8 in two normalisations; here it is torch's.

    >>> Generator(10, (1, 8, 8), width=8)(torch.randn(4, 10)).shape
    torch.Size([4, 1, 8, 8])
    >>> Generator(10, (6,), width=8)(torch.randn(4, 10)).shape
    torch.Size([4, 6])
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        latent: int,
        shape: Sequence[int],
        *,
        width: int = 64,
        end: End = "normal",
        normalise: Normalisation | None = None,
    ) -> None:
        super().__init__()
        if len(shape) not in (1, 3):
            raise ModelError(
                "only images and vectors can be generated", where="inputs", found=list(shape), wanted="[C, H, W] or [D]"
            )
        self.latent, self.shape = latent, tuple(shape)
        if len(shape) == 1:
            layers = [*_linear(latent, 2 * width), *_linear(2 * width, width), nn.Linear(width, shape[0])]
            self.body = nn.Sequential(*layers, nn.BatchNorm1d(shape[0], affine=False))
            return
        self.small = tuple(math.ceil(side / 4) for side in shape[1:])
        self.first = nn.Linear(latent, 2 * width * self.small[0] * self.small[1])
        self.norm = nn.BatchNorm2d(2 * width)
        self.block1 = nn.Sequential(*_convolution(2 * width, 2 * width))
        self.block2 = nn.Sequential(*_convolution(2 * width, width), nn.Conv2d(width, shape[0], 3, padding=1))
        self.end = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(shape[0], affine=False)) if end == "normal" else nn.Sigmoid()
        stats = normalise or Normalisation()
        if end == "pixels":
            stats.check(shape[0])
        centre, deviation = (torch.tensor(v).view(-1, 1, 1) for v in (stats.mean, stats.std))
        self.register_buffer("mean", centre if end == "pixels" else torch.zeros(1, 1, 1), persistent=False)
        self.register_buffer("scale", deviation if end == "pixels" else torch.ones(1, 1, 1), persistent=False)

    def forward(self, noise: Tensor) -> Tensor:
        """``[B, latent]`` to ``[B, *shape]``."""
        if len(self.shape) == 1:
            return self.body(noise)
        height, width = self.shape[1:]
        found = self.norm(self.first(noise).unflatten(1, (-1, *self.small)))
        found = self.block1(F.interpolate(found, ((height + 1) // 2, (width + 1) // 2)))
        found = self.end(self.block2(F.interpolate(found, (height, width))))
        return (found - self.mean) / self.scale

    def start(self) -> None:
        """Draw all weights anew, as DCGAN does: deviation 0.02, of normalisations around 1."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.reset_running_stats()
                if module.affine:
                    nn.init.normal_(module.weight, 1.0, 0.02)
                    nn.init.zeros_(module.bias)


def _linear(inside: int, out: int) -> list[nn.Module]:
    return [nn.Linear(inside, out), nn.BatchNorm1d(out), nn.LeakyReLU(0.2)]


def _convolution(inside: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
