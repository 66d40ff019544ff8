"""DAFL against its authors' code: values and gradients, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from limbeck.schemes.data_free.losses import activation_loss, information_entropy_loss, one_hot_loss

NUMBERS = Path(__file__).parent / "dafl_efficient_computing.npz"


def test_the_authors_numbers() -> None:
    with np.load(NUMBERS) as file:
        given = {k.removeprefix("case/"): torch.from_numpy(file[k]) for k in file if k.startswith("case/")}
    x = given["x"].requires_grad_()
    feature = (x @ given["W"]).relu()
    logits = feature @ given["V"]
    found = one_hot_loss(logits), information_entropy_loss(logits), activation_loss(feature)
    for value, name in zip(found, ("one_hot", "entropy", "activation"), strict=True):
        torch.testing.assert_close(value, given[name])
    (found[0] + 5 * found[1] + 0.1 * found[2]).backward()
    torch.testing.assert_close(x.grad, given["grad"])
