"""Data of which a part has no labels, for recipes: ``tests.schemes.pools:half_labelled``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from limbeck.data.sources.load import load_source


def half_labelled(each: int = 8, samples: int = 240) -> Any:
    """Digits, of each class a few with their label and the rest with none."""
    source = load_source("digits")
    train = source.train.subset(torch.arange(samples))
    seen = torch.nn.functional.one_hot(train.labels, 10).cumsum(0).gather(1, train.labels[:, None])[:, 0]
    hidden = dataclasses.replace(train, labels=train.labels.masked_fill(seen > each, -1))
    return dataclasses.replace(source, train=hidden)
