"""Images of another source, fitted to what a model takes: out-of-domain data, and pools without labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.data.augment import Augment
from limbeck.data.blank import BlankLoader
from limbeck.data.build import build_loader
from limbeck.data.loader import IndexedLoader, Loader
from limbeck.data.normalise import Normalisation
from limbeck.data.resident import ResidentLoader
from limbeck.data.sources.load import load_source


def fitted(images: Tensor, shape: tuple[int, ...], normalise: Normalisation | None) -> Tensor:
    """Images from 0 to 1 in another shape, and normalised: resized (bilinear), their channels averaged or repeated.

    Args:
        images: ``[B, C, H, W]``.
        shape: ``[C', H', W']``.
        normalise: As the model's data; ``None``: not at all.

    >>> fitted(torch.ones(2, 3, 8, 8), (1, 4, 4), None).shape
    torch.Size([2, 1, 4, 4])
    """
    if images.ndim != 4 or len(shape) != 3:
        raise DataError(
            "only images can be fitted to a model of images",
            where="scheme.source",
            found=list(images.shape[1:]),
            wanted=f"images for inputs {list(shape)}",
        )
    if images.shape[1] != shape[0]:
        images = images.mean(dim=1, keepdim=True).expand(-1, shape[0], -1, -1)
    if images.shape[2:] != torch.Size(shape[1:]):
        images = F.interpolate(images, shape[1:], mode="bilinear", antialias=True, align_corners=False)
    return images.contiguous() if normalise is None else normalise(images)


def other_images(source: Any, options: dict[str, Any], like: BlankLoader, samples: int, whose: Loader) -> IndexedLoader:
    """The training images of another source, without their labels, held in memory as bytes.

    Args:
        source: As ``load_source`` takes it.
        options: Of the source.
        like: Tells shape, normalisation, batch size and seed.
        samples: At most so many, the first in a random order that the seed fixes.
        whose: The loader of the recipe's data: these images are augmented as its.

    Raises:
        DataError: The source holds no images.
    """
    split = load_source(source, **options).train
    loader = build_loader(split, batch_size=min(256, samples), train=True, normalise="none", seed=0, drop_last=False)
    parts, found = list[Tensor](), 0
    for batch in loader.batches():
        inputs = batch.inputs
        if not isinstance(inputs, Tensor):
            raise DataError("the source holds no images", where="scheme.source", found=type(inputs).__name__)
        pixels = fitted(inputs.float(), tuple(like.shape), None)
        parts.append((pixels * 255).round().clamp(0, 255).byte())
        found += len(inputs)
        if found >= samples:
            break
    images = torch.cat(parts)[:samples].to(like.device)
    known = getattr(whose, "augment", None)
    size = like.batch_size or 1
    if len(images) < size:
        raise DataError("too few images", where="scheme.source", found=len(images), wanted=f"a batch of {size} or more")
    augment = Augment(
        () if known is None else known.transforms,
        normalise=like.normalise,
        seed=like.seed,
        samples=len(images),
        classes=like.classes,
    )
    return ResidentLoader(
        images, None, batch_size=size, augment=augment, device=like.device, seed=like.seed, classes=like.classes
    )
