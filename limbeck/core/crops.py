"""Random crops of images for self-supervised learning: a part of each image, stretched, flipped, otherwise coloured."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.core.reduction import check_floating


def random_crops(
    images: Tensor,
    size: tuple[int, int],
    area: tuple[float, float] = (0.08, 1.0),
    *,
    stretch: float = 4 / 3,
    flip: bool = True,
    rand: Callable[..., Tensor] = torch.rand,
) -> Tensor:
    """A random part of each image at another resolution, interpolated; half of them mirrored.

    The part's area is uniform between the bounds, its ratio of sides log-uniform, its place uniform; a side beyond the
    image's is cut to it. Chance comes from torch's global random state, unless told otherwise.

    Args:
        images: ``[B, C, H, W]``, floating.
        size: Height and width of what comes out.
        area: Bounds of the area, parts of the image's.
        stretch: Bound of the ratio of width to height.
        flip: Mirror every other one from left to right.
        rand: Who draws, as ``torch.rand`` does: of several processes ``limbeck.core.ranks.Rows.rand``.

    Raises:
        ConfigError: Bounds that are none.
        TensorError: No images.

    Source: Szegedy et al., "Going Deeper with Convolutions", 2014, arXiv 1409.4842.

    >>> random_crops(torch.ones(2, 3, 8, 8), (4, 4), (0.2, 0.5)).shape
    torch.Size([2, 3, 4, 4])
    """
    check_floating(images, "images", least=4)
    if not 0 < area[0] <= area[1] <= 1 or stretch < 1:
        raise ConfigError("no such part of an image", where="area", found=f"{area}, stretch {stretch}")
    count, device = images.shape[0], images.device
    share = area[0] + (area[1] - area[0]) * rand(count, device=device)
    shape = math.log(stretch) * (2 * rand(count, device=device) - 1)
    sides = torch.stack([share.sqrt() * (shape / 2).exp(), share.sqrt() * (-shape / 2).exp()], dim=1).clamp(max=1.0)
    place = (2 * rand(count, 2, device=device) - 1) * (1 - sides)
    mirrored = rand(count, device=device) < (0.5 if flip else 0.0)
    wide = torch.where(mirrored, -sides[:, 0], sides[:, 0])
    zero = torch.zeros_like(wide)
    theta = torch.stack([wide, zero, place[:, 0], zero, sides[:, 1], place[:, 1]], dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta.to(images.dtype), [count, images.shape[1], *size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def recoloured(
    images: Tensor,
    *,
    blur: float = 0.5,
    often: float = 0.8,
    grey: float = 0.2,
    rand: Callable[..., Tensor] = torch.rand,
) -> Tensor:
    """Images with other brightness and contrast, some of them grey, some blurred.

    Contrast about each image's mean, 0.6 to 1.4; brightness by up to 0.4 of its deviation; grey: every channel the
    mean of all; blurred: each place the weighted mean of 3 x 3. For images of any normalisation.

    Args:
        images: ``[B, C, H, W]``, floating.
        blur: How many of them are blurred.
        often: How many have other colours.
        grey: How many, where there are several channels, become grey.
        rand: As in :func:`random_crops`.

    >>> images = torch.rand(4, 3, 8, 8)
    >>> torch.equal(recoloured(images, blur=0.0, often=0.0, grey=0.0), images)
    True
    """
    check_floating(images, "images", least=4)
    count, channels = images.shape[:2]

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * rand(count, 1, 1, 1, device=images.device, dtype=images.dtype)

    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    spread = images.std(dim=(1, 2, 3), keepdim=True, correction=0)
    other = (images - mean) * drawn(0.6, 1.4) + mean + spread * drawn(-0.4, 0.4)
    seen = torch.where(drawn(0.0, 1.0) < often, other, images)
    if channels > 1:
        seen = torch.where(drawn(0.0, 1.0) < grey, seen.mean(dim=1, keepdim=True).expand_as(seen), seen)
    line = images.new_tensor([0.25, 0.5, 0.25])
    kernel = (line.unsqueeze(1) * line).expand(channels, 1, 3, 3)
    smooth = F.conv2d(F.pad(seen, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)
    return torch.where(drawn(0.0, 1.0) < blur, smooth, seen)
