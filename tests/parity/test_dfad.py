"""DFAD against its authors' code: values and gradients, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from limbeck.schemes.data_free.losses import discrepancy

NUMBERS = Path(__file__).parent / "dfad_dfad.npz"


def test_the_authors_numbers() -> None:
    with np.load(NUMBERS) as file:
        given = {k.removeprefix("case/"): torch.from_numpy(file[k]) for k in file if k.startswith("case/")}
    x = given["x"].requires_grad_()
    value = discrepancy(x @ given["S"], x @ given["T"])
    torch.testing.assert_close(value, given["student"])
    torch.testing.assert_close(-value, given["generator"])
    (-value).backward()
    torch.testing.assert_close(x.grad, given["grad"])
