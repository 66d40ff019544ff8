"""What the fused losses may be given, and their settings as the operators take them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError, did_you_mean
from limbeck.core.reduction import check_floating, check_inside, check_positive
from limbeck.kernels.divergence_rows import DIVERGENCES


class Settings(NamedTuple):
    """What every chunk is told.

    Args:
        divergence: A name in ``DIVERGENCES``.
        share: The divergence's beta or skew; 0 where it has none.
        temperature: T.
        weight: Of the divergence in the gradient.
        gradient: Whether the logits are to be overwritten with their gradient.
    """

    divergence: str
    share: float
    temperature: float
    weight: float
    gradient: bool


def check_settings(
    divergence: str, beta: float, skew: float, temperature: float, weight: float, label_weight: float, chunk: int | None
) -> float:
    """Refuse settings that mean nothing, and give the divergence's share of a mixture."""
    if divergence not in DIVERGENCES:
        remedy = did_you_mean(str(divergence), DIVERGENCES)
        raise ConfigError(
            "no such divergence",
            where="divergence",
            found=repr(divergence),
            wanted=", ".join(DIVERGENCES),
            remedy=remedy,
        )
    check_positive(temperature, "temperature")
    for value, name in ((weight, "weight"), (label_weight, "label_weight")):
        if not 0 <= value < math.inf:
            raise ConfigError("must be zero or more, and finite", where=name, found=value)
    if chunk is not None and chunk < 1:
        raise ConfigError("a chunk has at least one place", where="chunk", found=chunk)
    if divergence == "jsd":
        check_inside(beta, "beta", remedy="its limits are the divergences 'forward_kl' (0) and 'reverse_kl' (1)")
        return beta
    if divergence.startswith("skew"):
        plain = "reverse_kl" if "reverse" in divergence else "forward_kl"
        check_inside(skew, "skew", remedy=f"without skew this is the divergence {plain!r}")
        return skew
    return 0.0


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, whose: str) -> torch.dtype:
    """Refuse hidden states and a head that do not fit, and give the dtype in which they are multiplied.

    That is autocast's where it is on, else their own, which they must share.
    """
    check_floating(hidden, f"{whose}_hidden", least=2)
    check_floating(weight, f"{whose}_weight", least=2)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise TensorError(
            f"the head does not fit the {whose}'s hidden states",
            where=f"{whose}_weight",
            found=list(weight.shape),
            wanted=f"[vocabulary, {hidden.shape[-1]}]",
        )
    if bias is not None:
        check_floating(bias, f"{whose}_bias")
        if bias.shape != weight.shape[:1]:
            raise TensorError(
                "the bias does not fit the head",
                where=f"{whose}_bias",
                found=list(bias.shape),
                wanted=list(weight.shape[:1]),
            )
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    for other, name in ((weight, "weight"), (bias, "bias")):
        if other is not None and other.dtype != hidden.dtype:
            raise TensorError(
                "another dtype than the hidden states",
                where=f"{whose}_{name}",
                found=other.dtype,
                wanted=hidden.dtype,
                remedy="convert one of them, or compute the loss under torch.autocast",
            )
    return hidden.dtype


def check_places(places: torch.Size, *others: tuple[torch.Size, str]) -> None:
    """Refuse what has not one entry for each of the student's places."""
    for found, name in others:
        if found != places:
            raise TensorError(
                "does not belong to the student's places", where=name, found=list(found), wanted=list(places)
            )


def check_labels(labels: Tensor | None, label_weight: float, places: torch.Size) -> None:
    """Refuse labels that are not one integer a place, and a weight of labels that are not there."""
    if labels is None:
        if label_weight:
            raise ConfigError(
                "a cross-entropy needs labels",
                where="label_weight",
                found=label_weight,
                remedy="give labels, or leave it 0",
            )
    elif labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TensorError("labels are integers", where="labels", found=labels.dtype, wanted="torch.int64")
    else:
        check_places(places, (labels.shape, "labels"))


def check_normalizer(normalizer: float | Tensor | None) -> None:
    """Refuse a count that is not one number above zero; a tensor's value is not looked at."""
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise TensorError("one number is wanted", where="normalizer", found=list(normalizer.shape), wanted="[]")
    elif normalizer is not None:
        check_positive(normalizer, "normalizer")
