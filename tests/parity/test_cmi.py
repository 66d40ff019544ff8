"""CMI's contrast against its authors' code: value and gradients to features and head, without and with a bank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from limbeck.core.heads import two_layers
from limbeck.schemes.data_free.cmi import inversion_contrast

NUMBERS = Path(__file__).parent / "cmi_cmi.npz"


@pytest.mark.parametrize("bank", ["bank0", "bank8"])
def test_the_authors_numbers(bank: str) -> None:
    with np.load(NUMBERS) as file:
        given = {k.removeprefix(f"{bank}/"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{bank}/")}
    head = two_layers(6, 6, 4).double()
    head.load_state_dict({k.removeprefix("head.head."): v for k, v in given.items() if k.startswith("head.head.")})
    local = given["local"].requires_grad_()
    assert len(given["cached_local"]) == int(bank[-1])
    first = F.normalize(head(torch.cat([local, given["cached_local"]])))
    second = F.normalize(head(torch.cat([given["glob"], given["cached_global"]])))
    loss = inversion_contrast(first, second, len(local), 0.1)
    torch.testing.assert_close(loss, given["loss"])
    loss.backward()
    torch.testing.assert_close(local.grad, given["grad"])
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, given[f"gradhead.head.{name}"], msg=name)
