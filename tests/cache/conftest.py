"""A small teacher, its data and a cache of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.cache.build import build
from limbeck.data import Augment, ResidentLoader
from limbeck.data.sources.load import load_source

FULL = {"raw": {"dtype": "float32"}}


def make_teacher(seed: int = 0) -> nn.Module:
    """A convolutional net on digits' images, its random weights those of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 10),
        ).eval()


def make_loader(samples: int = 90, *, view_seed: int = 3, augment=("pad_crop", "flip"), **options) -> ResidentLoader:
    """Digits, augmented."""
    split = load_source("digits").train
    options = {"batch_size": 20, "seed": 11, "drop_last": False, **options}
    chain = Augment(list(augment), normalise=split.normalise, seed=view_seed, samples=samples, classes=10)
    return ResidentLoader(split.load()[:samples], split.labels[:samples], augment=chain, **options)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A finished cache of 3 views of 90 samples in several shards."""
    folder = tmp_path_factory.mktemp("caches") / "small"
    store = {"logits": FULL, "0": FULL, "logits@weight": FULL}
    build(make_teacher(), make_loader(), folder, store=store, views=3, batch=16, shard_rows=48)
    return folder
