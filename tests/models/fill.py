"""Weights and inputs by an exact formula, so that another code base can be given the very same ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def noise(count: int, salt: int) -> Tensor:
    """Numbers in [-1, 1): quadratic residues modulo a prime, exact whole-number arithmetic, the same everywhere."""
    i = torch.arange(count, dtype=torch.int64)
    return ((31 * i * i + 17 * i + 101 * salt) % 10007).double() / 5003.5 - 1


def fill(model: nn.Module) -> nn.Module:
    """Set every tensor of the state dict, in its order, in float64: weights scaled by fan-in, BN near the identity."""
    model = model.double()
    with torch.no_grad():
        for salt, (name, tensor) in enumerate(model.state_dict().items()):
            values = noise(tensor.numel(), salt).view(tensor.shape)
            if name.endswith("num_batches_tracked"):
                continue
            if tensor.ndim > 1:
                values = values * (6 / tensor[0].numel()) ** 0.5  # variance 2 / fan-in
            elif name.endswith("running_var") or name.endswith("weight"):
                values = 1 + 0.5 * values
            else:
                values = 0.1 * values
            tensor.copy_(values)
    return model


def images(count: int = 2, channels: int = 3, size: int = 32) -> Tensor:
    """Images ``[count, channels, size, size]`` in [-1, 1)."""
    return noise(count * channels * size * size, 7).view(count, channels, size, size)
