"""A small federation: points in the plane of three classes, and an ear on its wire."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from limbeck.core.objective import Terms
from limbeck.data import as_loader
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast
from limbeck.schemes.federated import rounds


def net(seed: int = 1, wide: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, wide), nn.Tanh(), nn.Linear(wide, 3))


def points(count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(count, 4)
    return x, (x @ torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [1, 1, 0]])).argmax(1)


def scene(count: int = 60, batch: int = 8, **train: Any) -> Cast:
    settings = {"epochs": 3, "lr": 0.1, **train}
    data = as_loader(points(count), batch_size=batch, train=True)
    judged = as_loader(points(90, seed=5))
    config = TrainConfig(**settings)
    return Cast(net(), Terms.of(CrossEntropy()), None, config, data, judged, fresh=lambda number: net(10 + number))


@contextmanager
def overheard() -> Iterator[list[bytes]]:
    """Every payload that crosses the wire of a federation in this process: what is told, and what is said."""
    heard: list[bytes] = []
    pack, unpack = rounds.pack, rounds.unpack

    def told(*args: Any) -> bytes:
        heard.append(pack(*args))
        return heard[-1]

    def said(payload: bytes, *args: Any) -> dict[str, Tensor]:
        heard.append(payload)
        return unpack(payload, *args)

    with patch.object(rounds, "pack", told), patch.object(rounds, "unpack", said):
        yield heard
