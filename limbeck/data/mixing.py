"""Augmentations that mix a sample with another one of the set, and their labels with them: mixup and cutmix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from limbeck.core.hashing import below, uniform
from limbeck.data.transforms import Transform, check_number, rectangle

_QUANTILES = 14  # 2**14 quantiles stand for the distribution: its cumulative function is off by at most 2**-15


class Mixing(Transform):
    """A transform that takes a partner too. Its first random word chooses the partner among all samples of the set."""

    def __call__(self, images: Tensor, partners: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Mix ``images`` and ``partners`` ``[B, C, H, W]``; also gives the images' share ``[B]`` in the labels."""
        raise TypeError(f"{type(self).__name__} must define __call__")  # pragma: no cover


@dataclass(frozen=True)
class Mixup(Mixing):
    r"""Blend with a partner, labels alike: :math:`\lambda x_i + (1 - \lambda) x_j, \lambda \sim Beta(\alpha, \alpha)`.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2017 (arXiv 1710.09412). The authors' code draws one
    :math:`\lambda` a batch; here each sample has its own, as it must when a view does not depend on its batch.

    Args:
        alpha: Of the Beta distribution; the paper's ImageNet range is 0.1 to 0.4, the default 0.2 lies in it.
        probability: Samples that are mixed at all.
    """

    alpha: float = 0.2
    probability: float = 1.0
    name: ClassVar[str] = "mixup"
    draws: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, images: Tensor, partners: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Blend; ``bits [B, 3]``: partner, whether, lambda."""
        share = beta(bits[:, 2], self.alpha)
        share = torch.where(uniform(bits[:, 1]) < self.probability, share, 1.0)
        weight = share.view(-1, 1, 1, 1)
        # two products and a sum, each rounded once: lerp and addcmul may fuse them, differently on each device
        return images * weight + partners * (1 - weight), share


@dataclass(frozen=True)
class Cutmix(Mixing):
    r"""Paste a rectangle of a partner, :math:`1 - \lambda` of the area, :math:`\lambda \sim Beta(\alpha, \alpha)`.

    Sides are :math:`\sqrt{1 - \lambda}` of the image's, rounded down; the centre is uniform; what hangs over the
    border is lost, and the labels' share is that of the pixels really kept. Yun et al., "CutMix", 2019 (arXiv
    1905.04899); their alpha is 1. As with :class:`Mixup`, each sample has its own rectangle, where the authors' code
    draws one a batch.

    Args:
        alpha: Of the Beta distribution.
        probability: Samples that are mixed at all; the authors use 0.5 for CIFAR and 1 for ImageNet.
    """

    alpha: float = 1.0
    probability: float = 1.0
    name: ClassVar[str] = "cutmix"
    draws: ClassVar[int] = 5

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, images: Tensor, partners: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Paste; ``bits [B, 5]``: partner, whether, lambda, row, column."""
        height, width = images.shape[-2:]
        side = (1 - beta(bits[:, 2], self.alpha)).sqrt()
        side = torch.where(uniform(bits[:, 1]) < self.probability, side, 0.0)
        tall, wide = (side * height).long(), (side * width).long()
        top, left = below(bits[:, 3], height) - tall // 2, below(bits[:, 4], width) - wide // 2
        bottom, right = (top + tall).clamp(max=height), (left + wide).clamp(max=width)
        top, left = top.clamp(min=0), left.clamp(min=0)
        pasted = rectangle(top, bottom, left, right, height, width).unsqueeze(1)
        kept = height * width - (bottom - top) * (right - left)
        # divided by a tensor: by a number, CUDA would multiply with its reciprocal and round otherwise than the CPU
        share = kept.float() / torch.full_like(kept, height * width)
        return torch.where(pasted, partners, images), share


def _check(transform: Mixup | Cutmix) -> None:
    check_number(transform, "alpha", transform.alpha, low=0, open_low=True)
    check_number(transform, "probability", transform.probability, low=0, high=1)


def beta(bits: Tensor, alpha: float) -> Tensor:
    """Random bits as draws of Beta(alpha, alpha), float32, by looking up one of 16384 equally likely quantiles.

    The quantiles are multiples of 2**-16, so that neither the last digit of scipy's inverse nor any device's rounding
    can change a view, and a share and its complement add up to one exactly.
    """
    table = _beta_table(float(alpha), bits.device)
    return table[below(bits, 1 << _QUANTILES)]


@lru_cache(maxsize=16)
def _beta_table(alpha: float, device: torch.device) -> Tensor:
    from scipy.special import betaincinv  # slow to import, and few runs need it

    half = 1 << _QUANTILES - 1
    lower = np.round(betaincinv(alpha, alpha, (np.arange(half) + 0.5) / (2 * half)) * 65536) / 65536
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        return torch.from_numpy(np.concatenate([lower, 1 - lower[::-1]])).float().to(device)
