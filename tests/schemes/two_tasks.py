"""Data of two tasks, for recipes: ``tests.schemes.two_tasks:digits``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from limbeck.data.sources.load import load_source


def digits() -> Any:
    """Digits: of some samples it is known which digit they are, of the others whether it is even."""
    source = load_source("digits")

    def told(split: Any) -> Any:
        place = torch.arange(len(split.labels)) % 3
        labels = torch.stack([split.labels, split.labels % 2], dim=1)
        labels[place == 0, 0] = -1
        labels[place != 0, 1] = -1
        return dataclasses.replace(split, labels=labels, classes=None)

    train, rest = told(source.train), (told(s) for s in (source.validation, source.test))
    return dataclasses.replace(source, train=train, **dict(zip(("validation", "test"), rest, strict=True)))
