"""Maps of convolutional networks and tokens of transformers as one another, and at one resolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_floating
from limbeck.core.relations import check_same_batch


def to_map(feature: Tensor, name: str = "feature") -> Tensor:
    """A feature as a map ``[B, C, H, W]``.

    Tokens ``[B, N, D]`` become a square grid; a class token in front (``N = n^2 + 1``) or two of them (a distillation
    token beside it) are left out, anything else that is no square becomes one row ``[B, D, 1, N]``. Maps stay.

    Raises:
        TensorError: Neither a map nor tokens.

    >>> import torch
    >>> to_map(torch.zeros(2, 17, 8)).shape
    torch.Size([2, 8, 4, 4])
    """
    check_floating(feature, name, least=3)
    if feature.ndim == 4:
        return feature
    if feature.ndim != 3:
        raise TensorError("neither a map nor tokens", where=name, found=list(feature.shape), wanted="[B, C, H, W]")
    tokens = patch_tokens(feature)
    side = math.isqrt(tokens.shape[1])
    grid = (side, side) if side * side == tokens.shape[1] else (1, tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(feature: Tensor, name: str = "feature") -> Tensor:
    """A feature as tokens ``[B, N, D]``: the places of a map in rows; tokens stay, class token included.

    Raises:
        TensorError: Neither a map nor tokens.

    >>> import torch
    >>> to_tokens(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 16, 8])
    """
    check_floating(feature, name, least=3)
    if feature.ndim == 3:
        return feature
    if feature.ndim != 4:
        raise TensorError("neither a map nor tokens", where=name, found=list(feature.shape), wanted="[B, N, D]")
    return feature.flatten(2).transpose(1, 2)


def patch_tokens(tokens: Tensor) -> Tensor:
    """The tokens ``[B, N, D]`` without those in front that stand for no place.

    ``N = n^2``: all of them; ``n^2 + 1`` or ``n^2 + 2`` (n of 3 or more): the last ``n^2``; else all of them.
    """
    count = tokens.shape[1]
    for extra in (0, 1, 2):
        side = math.isqrt(max(count - extra, 0))
        if side >= (3 if extra else 1) and side * side == count - extra:
            return tokens[:, extra:]
    return tokens


def is_grid(tokens: Tensor) -> bool:
    """Whether tokens ``[B, N, D]`` are a square map, up to class tokens in front."""
    count = patch_tokens(tokens).shape[1]
    return math.isqrt(count) ** 2 == count


def resize(feature: Tensor, size: tuple[int, ...]) -> Tensor:
    """A map at another resolution: averaged where it shrinks, linear between places where it grows.

    Args:
        feature: ``[B, C, H, W]``, or ``[B, C, T, H, W]`` of a video.
        size: The resolution wanted; the one it has leaves it as it is.
    """
    if feature.shape[2:] == size:
        return feature
    if all(new <= old for new, old in zip(size, feature.shape[2:], strict=True)):
        pool = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool3d
        return pool(feature, size)  # type: ignore[arg-type]  # as many numbers as the pool has dimensions
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(feature, size, mode=mode, align_corners=False)


def same_places(student: Tensor, teacher: Tensor, *, to: str = "smaller") -> tuple[Tensor, Tensor]:
    """Two features as maps of one resolution; channels stay as they are. Tokens become maps first.

    Args:
        student, teacher: Maps ``[B, C, H, W]`` or tokens ``[B, N, D]``; or both of videos, ``[B, C, T, H, W]``.
        to: ``"smaller"``: both at the smaller of the two; ``"teacher"``: both at the teacher's.

    Raises:
        TensorError: Tokens that are no square map beside something of another number of places.

    >>> import torch
    >>> [m.shape[2:] for m in same_places(torch.zeros(1, 3, 8, 8), torch.zeros(1, 17, 5))]
    [torch.Size([4, 4]), torch.Size([4, 4])]
    """
    lengths = {f.shape[1] if f.ndim == 3 else None for f in (student, teacher)}
    if len(lengths) > 1 and not all(is_grid(f) for f in (student, teacher) if f.ndim == 3):
        raise TensorError(
            "tokens that are no square have no places to compare with these",
            where="student_feature",
            found=f"{list(student.shape)} beside the teacher's {list(teacher.shape)}",
            wanted="tokens of equal number, tokens of square maps, or maps",
        )
    if not student.ndim == teacher.ndim == 5:
        student, teacher = to_map(student, "student_feature"), to_map(teacher, "teacher_feature")
    size = teacher.shape[2:]
    if to != "teacher":
        size = torch.Size(min(s, t) for s, t in zip(student.shape[2:], size, strict=True))
    return resize(student, size), resize(teacher, size)


def aligned(student: Tensor, teacher: Tensor, *, to: str = "smaller") -> tuple[Tensor, Tensor]:
    """Two features with the same places, for losses that compare place by place; channels stay as they are.

    Vectors, and tokens of one number, stay what they are (so that a mask over tokens still fits); anything else becomes
    maps of one resolution, as ``same_places`` makes them.

    Args:
        student, teacher: Vectors ``[B, D]``, tokens ``[B, N, D]`` or maps ``[B, C, H, W]``.
        to: ``"smaller"`` or ``"teacher"``, as in ``same_places``.

    Raises:
        TensorError: Not floating, other samples, or a vector beside something that has places.

    >>> import torch
    >>> [f.shape for f in aligned(torch.zeros(1, 6, 8), torch.zeros(1, 6, 5))]
    [torch.Size([1, 6, 8]), torch.Size([1, 6, 5])]
    >>> [f.shape for f in aligned(torch.zeros(1, 4, 8, 8), torch.zeros(1, 16, 5))]
    [torch.Size([1, 4, 4, 4]), torch.Size([1, 5, 4, 4])]
    """
    check_floating(student, "student_feature", least=2)
    check_floating(teacher, "teacher_feature", least=2)
    check_same_batch(student, teacher, "student_feature", "teacher_feature")
    if student.ndim == teacher.ndim and (
        student.ndim == 2 or (student.ndim == 3 and student.shape[1] == teacher.shape[1])
    ):
        return student, teacher
    return same_places(student, teacher, to=to)


def unfused(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the taps of these roles gave; of a fused layer, which stands for all three, its thirds.

    Raises:
        TensorError: Not floating ``[B, N, D]``.

    >>> import torch
    >>> fused = torch.zeros(1, 4, 6)
    >>> [t.shape[2] for t in unfused(fused, fused, fused)]
    [2, 2, 2]
    """
    for tensor, name in ((queries, "queries"), (keys, "keys"), (values, "values")):
        check_floating(tensor, name, least=3)
    return queries.chunk(3, dim=-1) if queries is values else (queries, keys, values)  # type: ignore[return-value]


def windows(feature: Tensor, scales: list[int] | None = None) -> Tensor:
    """Means over sliding windows of a map, ``[B, N, C]``: of each size, half a window apart.

    Args:
        feature: ``[B, C, H, W]``.
        scales: Window sizes; default 1, 2, 4, ... and the whole map, which is always the last.

    >>> import torch
    >>> windows(torch.zeros(1, 3, 4, 4)).shape  # 16 places, 9 windows of 2, the whole
    torch.Size([1, 26, 3])
    """
    side = min(feature.shape[2:])
    sizes = [2**i for i in range(side.bit_length()) if 2**i < side] if scales is None else scales
    cut = [F.avg_pool2d(feature, k, max(1, k // 2)).flatten(2) for k in sizes if k < side]
    return torch.cat([*cut, feature.mean(dim=(2, 3)).unsqueeze(2)], dim=2).transpose(1, 2)
