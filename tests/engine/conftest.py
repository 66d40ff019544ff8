"""Small real things to train: a linearly separable problem, an MLP, a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.data import Loader, as_loader
from limbeck.objectives import KD, CrossEntropy


@pytest.fixture
def loader() -> Callable[..., Loader]:
    def make(samples: int = 96, batch_size: int = 16, train: bool = True, **options: object) -> Loader:
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randn(samples, 6, generator=generator)
        labels = (inputs @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
        return as_loader((inputs, labels), batch_size=batch_size, train=train, **options)

    return make


def mlp(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 3))


@pytest.fixture
def distiller() -> Callable[..., Distiller]:
    def make(loss: object = None, width: int = 8, teacher: int = 2) -> Distiller:
        return Distiller(mlp(width, 1), loss if loss is not None else CrossEntropy() + 0.5 * KD(), mlp(16, teacher))

    return make
