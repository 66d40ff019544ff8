"""Virtual images: how they are matched to real ones, to gradients, and to one another's features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import ConfigError

KINDS = ("color", "crop", "cutout", "flip", "scale", "rotate")
_CROP, _CUTOUT, _SCALE, _DEGREES, _TINY = 0.125, 0.5, 1.2, 15.0, 1e-6


def same_view(batches: Sequence[Tensor], kinds: Sequence[str] = KINDS) -> list[Tensor]:
    """One augmentation, drawn once, of all images of several batches alike; gradients pass.

    One of these kinds: colour (brightness, saturation, contrast), crop (a shift by up to an eighth), cutout (a square
    of half the side), flip (or none), scale (by up to 1.2 each way) or rotation (up to 15 degrees).

    Args:
        batches: ``[B, C, H, W]`` each.
        kinds: Of which one is drawn; none: images stay as they are.

    Source: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", arXiv 2102.08259.

    >>> first, second = same_view([torch.ones(2, 1, 8, 8), torch.ones(1, 1, 8, 8)])
    >>> torch.equal(first[:1], second)
    True
    """
    if not kinds:
        return list(batches)
    kind = kinds[int(torch.randint(len(kinds), ()))]
    dice = torch.rand(3).tolist()
    return [_view(images, kind, dice) for images in batches]


def _view(images: Tensor, kind: str, dice: list[float]) -> Tensor:
    first, second, third = dice
    height, width = images.shape[-2:]
    if kind == "color":
        images = images + (first - 0.5)
        grey = images.mean(dim=1, keepdim=True)
        images = (images - grey) * (2 * second) + grey
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return (images - mean) * (third + 0.5) + mean
    if kind == "flip":
        return images.flip(3) if first < 0.5 else images
    if kind == "cutout":
        down, across = int(first * height), int(second * width)
        tall, wide = int(height * _CUTOUT + 0.5), int(width * _CUTOUT + 0.5)
        hole = torch.ones(height, width, device=images.device, dtype=images.dtype)
        hole[
            max(down - tall // 2, 0) : down + (tall + 1) // 2, max(across - wide // 2, 0) : across + (wide + 1) // 2
        ] = 0
        return images * hole
    if kind == "crop":
        down, across = int(height * _CROP + 0.5), int(width * _CROP + 0.5)
        top, left = round((2 * first - 1) * down), round((2 * second - 1) * across)
        wide_images = F.pad(images, (across, across, down, down))
        return wide_images[..., down + top : down + top + height, across + left : across + left + width]
    turn = (2 * first - 1) * _DEGREES * math.pi / 180
    low = 1 / _SCALE
    matrix = {
        "scale": [[low + first * (_SCALE - low), 0.0, 0.0], [0.0, low + second * (_SCALE - low), 0.0]],
        "rotate": [[math.cos(turn), -math.sin(turn), 0.0], [math.sin(turn), math.cos(turn), 0.0]],
    }[kind]
    theta = torch.tensor(matrix, dtype=images.dtype, device=images.device).expand(len(images), -1, -1)
    return F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuse kinds of augmentation that are none."""
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong:
        raise ConfigError("no such augmentation", where="scheme.augment", found=wrong, wanted=", ".join(KINDS))


def means_by_class(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean feature of each class ``[C, D]``; zero where a class has no sample."""
    chosen = F.one_hot(labels, classes).to(features.dtype)
    return chosen.T @ features.flatten(1) / chosen.sum(dim=0).clamp(min=1)[:, None]


def matching_loss(real: Tensor, labels: Tensor, virtual: Tensor, virtual_labels: Tensor, classes: int) -> Tensor:
    r"""How far the mean features of virtual images are from those of real ones.

    .. math:: L_{DM} = \sum_c \| \bar e_c(R) - \bar e_c(S) \|^2 \quad \text{over classes that both have}

    Args:
        real: Features ``[N, D]``; detached.
        labels: ``[N]``.
        virtual: Features ``[M, D]``.
        virtual_labels: ``[M]``.
        classes: How many.

    Source: Zhao and Bilen, "Dataset Condensation with Distribution Matching", arXiv 2110.04181.

    >>> matching_loss(torch.ones(2, 3), torch.tensor([0, 0]), torch.zeros(1, 3), torch.tensor([0]), 2)
    tensor(3.)
    """
    both = (F.one_hot(labels, classes).sum(0) > 0) & (F.one_hot(virtual_labels, classes).sum(0) > 0)
    gap = means_by_class(real.detach(), labels, classes) - means_by_class(virtual, virtual_labels, classes)
    return gap[both].square().sum()


def gradient_loss(real: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    r"""How far two gradients point apart, output unit by output unit.

    .. math:: L_{GM} = \sum_{\text{layers}} \sum_{\text{rows}} (1 - \cos(g^R, g^S))

    Args:
        real: By parameter; detached. Those of one dimension (biases, norms) do not count.
        made: The same of virtual images.

    Source: Zhao et al., "Dataset Condensation with Gradient Matching", arXiv 2006.05929.

    >>> gradient_loss([torch.eye(2)], [2 * torch.eye(2)]).abs() < 1e-5
    tensor(True)
    """
    pairs = [(r.detach().flatten(1), m.flatten(1)) for r, m in zip(real, made, strict=True) if r.ndim > 1]
    apart = [(1 - (r * m).sum(-1) / (r.norm(dim=-1) * m.norm(dim=-1) + _TINY)).sum() for r, m in pairs]
    return torch.stack(apart).sum()


def kernel_distance(first: Tensor, second: Tensor, kernels: int = 5) -> Tensor:
    r"""Squared maximum mean discrepancy by Gaussian kernels whose widths double.

    .. math:: \mathrm{MMD}^2 = \overline{k(x, x')} + \overline{k(y, y')} - 2\, \overline{k(x, y)}

    Args:
        first: ``[N, D]``.
        second: ``[M, D]``.
        kernels: How many, around the mean squared distance.

    Source: Gretton et al., JMLR 2012; widths as in Long et al., arXiv 1502.02791.

    >>> round(kernel_distance(torch.eye(3), torch.eye(3)).item(), 6)
    0.0
    """
    rows, size = torch.cat([first, second]), len(first)
    squared = (rows[:, None] - rows[None]).square().sum(dim=-1)
    width = squared.detach().sum() / (len(rows) * (len(rows) - 1)) / 2.0 ** (kernels // 2)
    kernel = torch.stack([torch.exp(-squared / (width * 2.0**k).clamp(min=_TINY)) for k in range(kernels)]).sum(dim=0)
    return kernel[:size, :size].mean() + kernel[size:, size:].mean() - 2 * kernel[:size, size:].mean()
