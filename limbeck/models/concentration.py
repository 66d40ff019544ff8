"""A last part for very many classes: those of each vertical (cars, birds, ...) have layers and a pace of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError
from limbeck.core.relations import unit
from limbeck.models.last_layer import with_last

Pace = Literal["vertical", "class", "none"]
Verticals = list[int] | list[list[int]]


def verticals_of(verticals: Verticals, where: str = "verticals") -> list[list[int]]:
    """The classes of each vertical: written out, or told by how many follow each other.

    Raises:
        ConfigError: They are not all classes, each once.

    >>> verticals_of([2, 1]), verticals_of([[0, 2], [1]])
    ([[0, 1], [2]], [[0, 2], [1]])
    """
    found, start = list[list[int]](), 0
    for one in verticals:
        found.append(list(one) if isinstance(one, list) else list(range(start, start + one)))
        start += len(found[-1])
    if not found or not all(found) or sorted(c for one in found for c in one) != list(range(start)):
        raise ConfigError(
            "every class is of one vertical",
            where=where,
            found=f"{len(found)} verticals of {start} classes",
            wanted="numbers of classes, or lists that hold each class from 0 on once",
        )
    return found


class Branches(nn.Module):
    """A linear layer for each of several branches, ``[B, D]`` or ``[B, M, D]`` to ``[B, M, H]``; none sees another's.

    >>> Branches(3, 4, 5)(torch.zeros(2, 4)).shape
    torch.Size([2, 3, 5])
    """

    def __init__(self, count: int, width: int, out: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(count, out, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1).expand(-1, len(self.weight), -1) if x.ndim == 2 else x
        return torch.einsum("bmi,moi->bmo", x, self.weight) + self.bias


class ConcentrationHead(nn.Module):
    r"""Structurally connected layers with a pace for each vertical: features ``[B, D]`` to logits ``[B, N]``.

    A layer that all share, branches whose units see their own vertical's classes alone, and in the end
    :math:`y_v = \gamma_v\, x_v / \|x_v\|`. Without biases it has :math:`s_b s_1 + M s_1 s_2 + s_2 N` weights.

    Args:
        features: :math:`s_b`, of what it reads.
        verticals: As :func:`verticals_of` takes them.
        shared: :math:`s_1`, units of the shared layer; 0: none.
        branches: Units of each vertical's own layers, :math:`s_2` the last.
        common: Further units beside the branches' last, which every vertical's classes see.
        pace: :math:`\gamma` is one number a vertical, or one a class, or there is none.
        start: Its mean in the beginning; ``None``: :math:`\sqrt{N_v}`.

    Source: Knowledge Concentration, arXiv 1711.07607.

    >>> ConcentrationHead(8, [2, 3], shared=6, branches=[4])(torch.zeros(5, 8)).shape
    torch.Size([5, 5])
    """

    order: Tensor

    def __init__(
        self,
        features: int,
        verticals: Verticals,
        shared: int = 4096,
        branches: Sequence[int] = (512,),
        common: int = 0,
        pace: Pace = "vertical",
        start: float | None = None,
    ) -> None:
        super().__init__()
        if not branches or min(*branches, 1) < 1 or min(shared, common) < 0:
            raise ConfigError("every vertical has units of its own", where="branches", found=list(branches))
        classes = verticals_of(verticals)
        sizes = [len(one) for one in classes]
        self.shared = nn.Linear(features, shared) if shared else None
        inner = shared or features
        widths = [inner, *branches]
        self.branches = nn.ModuleList(
            Branches(len(classes), wide, out) for wide, out in zip(widths, branches, strict=False)
        )
        self.common = nn.Linear(inner, common) if common else None
        self.last = nn.ModuleList(nn.Linear(branches[-1] + common, size) for size in sizes)
        self.pace = nn.ParameterList(
            torch.randn(1 if pace == "vertical" else size) * 1e-3 + (size**0.5 if start is None else start)
            for size in (sizes if pace != "none" else [])
        )
        places = torch.tensor([c for one in classes for c in one])
        self.register_buffer("order", places.argsort(), persistent=False)

    def forward(self, feature: Tensor) -> Tensor:
        x = feature if self.shared is None else self.shared(feature).relu()
        own = x
        for layer in self.branches:
            own = layer(own).relu()
        beside = [] if self.common is None else [self.common(x).relu()]
        said = [layer(torch.cat([own[:, v], *beside], dim=1)) for v, layer in enumerate(self.last)]
        if len(self.pace):
            said = [gain * unit(z) for gain, z in zip(self.pace, said, strict=True)]
        return torch.cat(said, dim=1)[:, self.order]


def concentrated(
    body: str,
    verticals: Verticals,
    shared: int = 4096,
    branches: Sequence[int] = (512,),
    common: int = 0,
    pace: Pace = "vertical",
    start: float | None = None,
    *,
    in_channels: int | None = None,
    image_size: int | None = None,
    in_features: int | None = None,
    vocabulary: int | None = None,
    **options: Any,
) -> nn.Module:
    """A model with a :class:`ConcentrationHead` in the place of its last linear layer.

    In a recipe: ``model: limbeck.models.concentration:concentrated, options: {body: resnet20, verticals: [60, 40]}``.

    Args:
        body: As :func:`limbeck.models.load_model` takes it.
        verticals, shared, branches, common, pace, start: Of the head.
        in_channels, image_size, in_features, vocabulary: As ``load_model`` takes them.
        options: Of the body.

    >>> concentrated("mlp_8", [6, 4], 16, [8], in_features=6)(torch.zeros(3, 6)).shape
    torch.Size([3, 10])
    """
    sizes = {"in_channels": in_channels, "image_size": image_size, "in_features": in_features, "vocabulary": vocabulary}

    def head(width: int) -> nn.Module:
        return ConcentrationHead(width, verticals, shared, branches, common, pace, start)

    return with_last(body, head, **sizes, **options)
