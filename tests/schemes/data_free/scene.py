"""A small task for schemes without data: two models of images or vectors, and data that may be poisoned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.objective import Objective, Terms
from limbeck.core.teacher import as_teacher
from limbeck.data.augment import Augment
from limbeck.data.normalise import Normalisation
from limbeck.data.resident import ResidentLoader
from limbeck.engine import TrainConfig
from limbeck.objectives import KD
from limbeck.schemes import perform
from limbeck.schemes.scheme import Cast, Scheme

STATS = Normalisation((0.3,), (0.4,))


def net(width: int, seed: int) -> nn.Module:
    """A convolutional network with batch normalisation that saw something: its running statistics are not 0 and 1."""
    torch.manual_seed(seed)
    found = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )
    for _ in range(20):
        found(torch.randn(32, 1, 8, 8).cumsum(-1) * 0.5)
    return found.eval()


def mlp(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def images(poison: bool = False, size: int = 64) -> ResidentLoader:
    """Labelled images of 8 x 8; poisoned, every pixel is no number."""
    torch.manual_seed(7)
    pixels = torch.rand(size, 1, 8, 8)
    if poison:
        pixels.fill_(torch.nan)
    labels = torch.arange(size) % 3
    augment = Augment((), normalise=STATS, samples=size, classes=3)
    return ResidentLoader(pixels, labels, batch_size=16, augment=augment, classes=3)


def cast(loader: Any = None, loss: Objective | Terms | None = None, **settings: Any) -> Cast:
    config = TrainConfig(**{"steps": 6, "lr": 0.05, "compile": "off", **settings})
    terms = Terms.of(KD(temperature=2.0) if loss is None else loss)
    return Cast(net(4, 1), terms, as_teacher(net(8, 2)), config, images() if loader is None else loader)


def trained(scheme: Scheme, whole: Cast, **more: Any) -> dict[str, Tensor]:
    """The student's tensors after its training."""
    perform(scheme, whole, quiet=True, **more)
    return {name: tensor.detach().clone() for name, tensor in whole.student.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)
