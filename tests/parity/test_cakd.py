"""CAKD's grouped projector against the authors', for every grid that theirs knows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.projectors import GroupedLinear


@pytest.mark.parametrize("places", [196, 49])
def test_the_grouped_projector(places: int) -> None:
    with np.load(Path(__file__).parent / "cakd_crossarch_kd.npz", allow_pickle=False) as file:
        head = f"grouped{places}/"
        theirs = {k.removeprefix(head): torch.from_numpy(v) for k, v in file.items() if k.startswith(head)}
    side = math.isqrt(places)
    layer = GroupedLinear(2, 3, (side, side)).double()
    layer.load_state_dict({"weight": theirs["weight"].mT, "bias": theirs["bias"].unsqueeze(1)})
    feature = theirs["feature"].requires_grad_()
    out = layer(feature.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out, theirs["out"], rtol=1e-10, atol=1e-12)
    out.square().sum().backward()
    torch.testing.assert_close(feature.grad, theirs["grad"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, theirs["grad_weight"].mT, rtol=1e-10, atol=1e-12)
