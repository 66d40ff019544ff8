"""Class activation maps: what a classifier says at every place of the map that is pooled before it."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.layout import to_map
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import check_floating, widen
from limbeck.core.relations import pooled, unit


@without_autocast
def class_maps(feature: Tensor, weight: Tensor, bias: Tensor | None = None, name: str = "feature") -> Tensor:
    r"""The classifier at every place, ``[B, C, H, W]``.

    .. math:: M_c(u) = \sum_d W_{cd} f_d(u) + b_c

    Pooling and the linear layer change places, so where the logits are the classifier of the map's mean, they are the
    mean of these maps; with the bias left out, up to the bias.

    Args:
        feature: ``[B, D, H, W]``, or tokens ``[B, N, D]`` of a square map (class tokens in front are left out).
        weight: ``[C, D]``.
        bias: ``[C]``.
        name: What the feature is called in errors.

    Raises:
        TensorError: No such feature, or a classifier of another width.

    >>> maps = class_maps(torch.ones(1, 2, 3, 3), torch.tensor([[1.0, 2.0]]))
    >>> maps.shape, float(maps[0, 0, 0, 0])
    (torch.Size([1, 1, 3, 3]), 3.0)
    """
    feature = to_map(feature, name)
    check_floating(weight, "weight", least=2)
    if weight.shape[1:] != feature.shape[1:2]:
        raise TensorError(
            "this classifier does not read this feature",
            where=name,
            found=f"{list(feature.shape)} for a classifier {list(weight.shape)}",
            wanted=f"{weight.shape[1]} channels",
            remedy="name the map that is pooled before the classifier",
        )
    maps = torch.einsum("bdhw,cd->bchw", widen(feature), widen(weight))
    if bias is None:
        return maps
    check_floating(bias, "bias")
    return maps + widen(bias).reshape(-1, 1, 1)


def check_class_maps(student_maps: Tensor, teacher_maps: Tensor) -> None:
    """Refuse what are not two ``[B, C, H, W]`` of the same samples and classes; the sizes may differ."""
    check_floating(student_maps, "student_maps", least=4)
    check_floating(teacher_maps, "teacher_maps", least=4)
    if student_maps.ndim != 4 or teacher_maps.ndim != 4 or student_maps.shape[:2] != teacher_maps.shape[:2]:
        raise TensorError(
            "not the maps of the same samples and classes",
            where="teacher_maps",
            found=f"{list(teacher_maps.shape)} beside {list(student_maps.shape)}",
            wanted="two [B, C, H, W] that differ in size alone",
        )


def check_pooled(feature: Tensor, penultimate: Tensor, where: str) -> None:
    """Refuse a map whose mean is not what enters the classifier: its class activation maps would mean nothing.

    Up to scale and rounding, so that a half-precision model passes.

    Args:
        feature: The map, ``[B, D, H, W]`` or tokens.
        penultimate: What enters the classifier, ``[B, D]``.
        where: The tap, named in the error.

    Raises:
        ConfigError: It is another map.
    """
    mean, _ = pooled(widen(to_map(feature, where)))
    entering = widen(penultimate)
    if mean.shape != entering.shape or (unit(mean) - unit(entering)).norm(dim=1).mean() > 0.1:
        raise ConfigError(
            "the classifier does not read the mean of this map, so it says nothing about its places",
            where=where,
            found=f"{list(feature.shape)} before {list(penultimate.shape)}",
            remedy="name the map that is pooled before the classifier; models that pool otherwise have none",
        )
