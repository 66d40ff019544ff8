"""DeepInversion against its authors' code: values and gradients, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from limbeck.core.teacher import FrozenTeacher
from limbeck.schemes.data_free.inversion import Inverted
from limbeck.schemes.data_free.losses import total_variation

NUMBERS = Path(__file__).parent / "deep_inversion_deepinversion.npz"


def test_the_authors_numbers() -> None:
    with np.load(NUMBERS) as file:
        given = {k.removeprefix("case/"): torch.from_numpy(file[k]) for k in file if k.startswith("case/")}
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
