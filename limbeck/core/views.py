"""Several views of each sample in one batch: rotations, two augmentations, a clean and a mixed image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError


def stack_views(batch: Batch, views: Sequence[Tensor], *, labelled: int = 1) -> Batch:
    """A batch in which every sample stands several times, view after view: ``[V * B, ...]``.

    Losses on labels see the first ``labelled`` views only; in the others each sample has no label (-1). All other terms
    of a loss see all views.

    Args:
        batch: What is there; its inputs are replaced.
        views: Inputs of each view, ``[B, ...]`` each; the first usually ``batch.inputs`` as they are.
        labelled: How many views keep the labels.

    Raises:
        DataError: The batch's inputs are no tensor, or it has soft labels that cannot be taken away.

    >>> batch = stack_views(Batch(torch.zeros(2, 3), labels=torch.tensor([0, 1])), [torch.zeros(2, 3)] * 2)
    >>> batch.inputs.shape, batch.labels.tolist()
    (torch.Size([4, 3]), [0, 1, -1, -1])
    """
    if not isinstance(batch.inputs, Tensor):
        raise DataError(
            "views are made of tensors", where="batch.inputs", found=type(batch.inputs).__name__, wanted="a tensor"
        )
    number, labels = len(views), batch.labels
    if labels is not None:
        if labels.is_floating_point() and labelled < number:
            raise DataError("soft labels cannot be left out", where="batch.labels", wanted="integer labels")
        without = labels if labels.is_floating_point() else torch.full_like(labels, -1)
        labels = torch.cat([labels] * labelled + [without] * (number - labelled))
    teacher = batch.teacher_inputs
    return batch.replace(
        inputs=torch.cat(list(views)),
        labels=labels,
        index=None if batch.index is None else batch.index.repeat(number),
        mask=None if batch.mask is None else torch.cat([batch.mask] * number),
        teacher_inputs=teacher if teacher is None else torch.cat([teacher] * number),
        extras={**batch.extras, "views": number},
    )


def split_views(values: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """What a model said of each view, ``[B, ...]`` each, in the order in which they were stacked."""
    return values.chunk(int(batch.extras.get("views", 1)))


def quarter_turns(batch: Batch) -> Batch:
    """Every image four times: upright, and turned by 90, 180 and 270 degrees, ``[4 B, C, H, H]``.

    What the teacher sees is turned alike. Labels stay with the upright images (``stack_views``).

    Raises:
        DataError: The inputs are no square images.

    >>> batch = quarter_turns(Batch(torch.arange(4.0).view(1, 1, 2, 2)))
    >>> batch.inputs[1].flatten().tolist()
    [1.0, 3.0, 0.0, 2.0]
    """

    def turned(images: object) -> list[Tensor]:
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[2] != images.shape[3]:
            found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise DataError(
                "only square images can be turned", where="batch.inputs", found=found, wanted="[B, C, H, H]"
            )
        return [images.rot90(turns, (2, 3)) for turns in range(4)]

    other, stacked = batch.teacher_inputs, stack_views(batch, turned(batch.inputs))
    return stacked if other is None else stacked.replace(teacher_inputs=torch.cat(turned(other)))


def perturbed(images: Tensor, probability: float = 0.5) -> Tensor:
    """Images of which some are seen otherwise: other brightness and contrast, turned, cropped, with patches hidden.

    Of each image by chance: contrast 0.6 to 1.4, brightness by up to 0.4 of its deviation, in each channel; a turn of
    up to 30 degrees; a square of 0.7 to 1 of its side, anywhere; of an 8 by 8 grid, one in ten is 0.

    Args:
        images: ``[B, C, H, W]``, floating.
        probability: That an image is seen otherwise.

    >>> images = torch.randn(4, 3, 8, 8)
    >>> torch.equal(perturbed(images, probability=0.0), images), perturbed(images).shape
    (True, torch.Size([4, 3, 8, 8]))
    """
    size, device = images.shape[0], images.device

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(size, *shape, device=device)

    channels = images.shape[1]
    seen = images.float()
    mean, deviation = seen.mean(dim=(2, 3), keepdim=True), seen.std(dim=(1, 2, 3), keepdim=True, correction=0)
    seen = (seen - mean) * drawn(0.6, 1.4, channels, 1, 1) + mean + deviation * drawn(-0.4, 0.4, channels, 1, 1)
    angle, side = drawn(-math.pi / 6, math.pi / 6), drawn(0.7, 1.0)
    shift = drawn(-1.0, 1.0, 2) * (1 - side).unsqueeze(1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(size, 2, 2)
    theta = torch.cat([turn * side.view(size, 1, 1), shift.unsqueeze(2)], dim=2)
    seen = F.grid_sample(seen, F.affine_grid(theta, list(seen.shape), align_corners=False), align_corners=False)
    hidden = F.interpolate((drawn(0.0, 1.0, 1, 8, 8) < 0.1).float(), images.shape[2:]) > 0
    other = drawn(0.0, 1.0, 1, 1, 1) < probability
    return torch.where(other, seen.masked_fill(hidden, 0.0).to(images.dtype), images)
