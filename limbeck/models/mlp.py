"""A multilayer perceptron for flat inputs, or for small images laid flat."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from limbeck.core.errors import ModelError


class Layer(nn.Module):
    """A linear map and a ReLU."""

    def __init__(self, in_features: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, features)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x))


class MLP(nn.Module):
    """Hidden ``blocks`` of the given widths with ReLU, then ``linear``: ``[B, ...]`` laid flat to ``[B, num_classes]``.

    Args:
        hidden: Widths of the hidden layers; none gives a linear classifier.
        in_features: Values of one input; ``None`` takes ``in_channels * image_size ** 2``.

    Example:
        >>> import torch
        >>> MLP((32, 16), in_channels=1, image_size=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        hidden: Sequence[int] = (256, 128),
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        in_features: int | None = None,
    ) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise ModelError("a layer needs one unit or more", where="hidden", found=tuple(hidden))
        features = in_channels * image_size**2 if in_features is None else in_features
        self.blocks = nn.ModuleList()
        for width in hidden:
            self.blocks.append(Layer(features, width))
            features = width
        self.linear = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.linear(x)
