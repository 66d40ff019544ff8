"""OFD's margins in closed form against the authors' code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from limbeck.objectives.feature.ofd import ofd_margin


def test_margins_from_batch_normalisation() -> None:
    with np.load(Path(__file__).parent / "ofd_authors.npz", allow_pickle=False) as file:
        weight, bias, margin = (torch.from_numpy(file[f"norm/{name}"]) for name in ("weight", "bias", "margin"))
    assert (margin < -2.9 * weight.abs()).any()  # the rule for channels that are hardly ever negative is among them
    torch.testing.assert_close(ofd_margin(weight, bias), margin.double(), rtol=1e-5, atol=1e-6)
