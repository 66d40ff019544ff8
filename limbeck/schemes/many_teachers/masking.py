"""Masks inside a frozen teacher: a network reads a layer's feature and says how much of each channel goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.survey import Place, survey


class MaskNet(nn.Module):
    r"""How much of each channel of a feature goes on, between 0 and 1: :math:`M(h) = \sigma(f(\mathrm{MHA}(e(h))))`.

    A vector ``[B, D]`` is embedded as D tokens that attend to each other, each of which gives its channel's mask. Maps
    ``[B, C, H, W]`` are first reduced by a strided depthwise convolution, a 1x1 convolution, batch normalisation, ReLU
    and a mean over places; tokens ``[B, N, D]`` by their mean.

    Args:
        width: D or C.
        maps: It reads maps.
        heads: Of the attention.
        shrink: A token is so much narrower than the feature, up to a multiple of the heads.

    Raises:
        ConfigError: The feature is too narrow for so many heads.

    >>> import torch
    >>> MaskNet(12, heads=3)(torch.zeros(2, 12)).shape
    torch.Size([2, 12])
    """

    def __init__(self, width: int, *, maps: bool = False, heads: int = 3, shrink: int = 2) -> None:
        super().__init__()
        hidden = width // (shrink * heads) * heads
        if not hidden:
            raise ConfigError(
                "a mask cannot be made of so few channels",
                where="scheme.heads",
                found=f"{width} channels, {heads} heads, shrink {shrink}",
                wanted=f"{shrink * heads} channels or more",
                remedy="name other layers, or take fewer heads",
            )
        self.width, self.hidden = width, hidden
        self.reduce: nn.Module | None = None
        if maps:
            self.reduce = nn.Sequential(
                nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width, bias=False),
                nn.Conv2d(width, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
        self.embed = nn.Linear(width, hidden * width)
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.last = nn.Linear(hidden, 1)

    def forward(self, feature: Tensor) -> Tensor:
        x = feature
        if self.reduce is not None:
            x = self.reduce(x).mean(dim=(2, 3))
        elif x.ndim > 2:
            x = x.mean(dim=tuple(range(1, x.ndim - 1)))
        x = self.embed(x).unflatten(1, (self.width, self.hidden))
        return self.last(self.attention(x, x, x)[0]).squeeze(-1).sigmoid()


def masked(feature: Tensor, mask: Tensor) -> Tensor:
    """A feature ``[B, C, H, W]``, ``[B, N, D]`` or ``[B, D]``, each channel times its mask ``[B, C]``."""
    if feature.ndim == 4:
        return feature * mask[:, :, None, None]
    return feature * mask.reshape(len(mask), *[1] * (feature.ndim - 2), -1)


@contextlib.contextmanager
def inserted(model: nn.Module, layer: str, mask: nn.Module) -> Iterator[None]:
    """A mask behind a layer, for as long as this lasts: what comes after sees the masked feature."""

    def after(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return masked(output, mask(output))

    handle = model.get_submodule(layer).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def maskable(model: nn.Module, inputs: Any, wanted: int | list[str], name: str) -> list[Place]:
    """The layers behind which masks go: those named, or the last so many linear and convolutional ones.

    The layer that makes the logits is not counted.

    Raises:
        ConfigError: There is no such layer, or none at all.
        ModelError: It gives no single tensor with channels.
    """
    places = survey(model, inputs)
    if isinstance(wanted, int):
        kinds = ("Linear", "Conv2d")
        found = [p for p in places.values() if p.leaf and p.module in kinds and p.calls == 1 and p.plain]
        found = sorted(found, key=lambda p: p.order)[:-1][-wanted:]
        if len(found) < wanted:
            raise ConfigError(
                f"the teacher {name} has too few layers for masks",
                where="scheme.layers",
                found=f"{len(found)} before its last",
                wanted=wanted,
            )
        return found
    for layer in wanted:
        if layer not in places:
            raise ConfigError(
                f"the teacher {name} has no such layer", where="scheme.layers", found=layer, wanted=", ".join(places)
            )
        if not places[layer].plain or len(places[layer].shape or ()) not in (2, 3, 4):
            raise ModelError("no feature to mask", where=layer, found=places[layer].outputs, wanted="one tensor")
    return [places[layer] for layer in wanted]
