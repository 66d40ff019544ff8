"""A critic of pairs for the dual form of Wasserstein distances."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


def lipschitz_critic(width: int, hidden: int = 128) -> nn.Module:
    """A perceptron that gives a pair of vectors, side by side, a number, and changes by no more than they do.

    Both layers have spectral norm 1 (Miyato et al., 2018, arXiv 1802.05957), up to what power iteration lags behind.
    The last has no bias, which differences of scores take out again.

    Args:
        width: Of each vector.
        hidden: Between the layers.

    >>> import torch
    >>> lipschitz_critic(4)(torch.zeros(2, 3, 8)).shape
    torch.Size([2, 3])
    """
    layers = nn.Linear(2 * width, hidden), nn.Linear(hidden, 1, bias=False)
    return nn.Sequential(spectral_norm(layers[0]), nn.ReLU(), spectral_norm(layers[1]), nn.Flatten(-2))
