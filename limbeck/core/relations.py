"""What losses on features share: one row a sample, unit vectors, and where a feature keeps its channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_floating, fit_mask


def channel_dim(feature: Tensor) -> int:
    """Where the channels are: last in vectors ``[B, D]`` and tokens ``[B, T, D]``, second in maps ``[B, C, H, W]``."""
    return 1 if feature.ndim >= 4 else feature.ndim - 1


def rows(feature: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """One row a sample, ``[B, D]``, and which samples count.

    What the mask leaves out is 0 in the row, so that padding changes no relation; a sample counts where any of its
    places does.

    Args:
        feature: ``[B, *]``.
        mask: ``[B]``, or ``[B, *]`` over the first dimensions of the feature.
    """
    if mask is not None:
        feature = feature.masked_fill(~fit_mask(mask, feature), 0.0)
        mask = mask.reshape(mask.shape[0], -1).any(dim=1)
    return feature.reshape(feature.shape[0], -1), mask


def pooled(feature: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The mean of each sample's places that count, ``[B, D]``, and which samples count.

    Args:
        feature: ``[B, D]``, tokens ``[B, T, D]`` or maps ``[B, C, *]``.
        mask: ``[B]``, or over the places: ``[B, T]``, ``[B, *]``.
    """
    places = feature.movedim(channel_dim(feature), -1).flatten(1, -2) if feature.ndim > 2 else feature.unsqueeze(1)
    if mask is None:
        return places.mean(dim=1), None
    counts = fit_mask(mask, feature.select(channel_dim(feature), 0)).reshape(places.shape[:2])
    total = places.masked_fill(~counts.unsqueeze(-1), 0.0).sum(dim=1)
    return total / counts.sum(dim=1, keepdim=True).clamp(min=1), counts.any(dim=1)


def project(layer: nn.Module, feature: Tensor, name: str) -> Tensor:
    """Run a feature through a learned map, in the map's own precision."""
    check_floating(feature, name, least=2)
    dtype = next((p.dtype for p in layer.parameters()), feature.dtype)
    return layer(feature.to(dtype))


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors of length 1; a zero vector stays zero, and passes no gradient.

    No epsilon is added, so that the direction of a very short vector is exact in any precision.
    """
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / length.masked_fill(length == 0, math.inf)


def check_same_batch(student: Tensor, teacher: Tensor, student_name: str, teacher_name: str) -> None:
    """Refuse two tensors that do not hold the same samples."""
    if student.shape[0] != teacher.shape[0]:
        raise TensorError(
            f"{student_name} and {teacher_name} hold different numbers of samples",
            where=teacher_name,
            found=list(teacher.shape),
            wanted=f"{student.shape[0]} samples as in {student_name} {list(student.shape)}",
        )
