"""Losses of schemes without data against their authors' code: values and gradients, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.core.teacher import FrozenTeacher
from limbeck.schemes.data_free.inversion import Inverted
from limbeck.schemes.data_free.losses import (
    activation_loss,
    discrepancy,
    information_entropy_loss,
    one_hot_loss,
    total_variation,
)

NUMBERS = Path(__file__).parent / "data_free_authors.npz"


def numbers(name: str) -> dict[str, Tensor]:
    with np.load(NUMBERS) as file:
        start = f"{name}/"
        return {k.removeprefix(start): torch.from_numpy(np.asarray(v)) for k, v in file.items() if k.startswith(start)}


def test_dafl() -> None:
    """huawei-noah/Efficient-Computing@225ddd2, with the weights of its script."""
    given = numbers("dafl")
    x = given["x"].requires_grad_()
    feature = (x @ given["W"]).relu()
    logits = feature @ given["V"]
    found = one_hot_loss(logits), information_entropy_loss(logits), activation_loss(feature)
    for value, name in zip(found, ("one_hot", "entropy", "activation"), strict=True):
        torch.testing.assert_close(value, given[name])
    (found[0] + 5 * found[1] + 0.1 * found[2]).backward()
    torch.testing.assert_close(x.grad, given["grad"])


def test_dfad() -> None:
    """VainF/DFAD@c161591."""
    given = numbers("dfad")
    x = given["x"].requires_grad_()
    value = discrepancy(x @ given["S"], x @ given["T"])
    torch.testing.assert_close(value, given["student"])
    torch.testing.assert_close(-value, given["generator"])
    (-value).backward()
    torch.testing.assert_close(x.grad, given["grad"])


def test_deep_inversion() -> None:
    """NVlabs/DeepInversion@2413af1: statistics, with and without its weight of the first layer, and total variation."""
    given = numbers("deep_inversion")
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3)
    ).double()
    net.load_state_dict({k: given[k] for k in net.state_dict() if k in given}, strict=False)
    x = given["x"].requires_grad_()
    inverted = Inverted(FrozenTeacher(net, logits=None), x.detach(), statistics=True)
    trace = inverted(x)
    torch.testing.assert_close(inverted.statistics_loss(trace), given["statistics"])
    weighted, variation = inverted.statistics_loss(trace, first=10.0), total_variation(x)
    torch.testing.assert_close(weighted, given["statistics_first"])
    torch.testing.assert_close(variation, given["variation"])
    (weighted + 0.3 * variation).backward()
    torch.testing.assert_close(x.grad, given["grad"])
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
