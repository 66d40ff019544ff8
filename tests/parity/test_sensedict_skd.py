"""The choice of senses, against the authors' loss and their rules for the nearest sense."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.models.senses import Rule, SenseDictionary
from limbeck.schemes.language.sensedict_skd import sensedict_skd_loss
from tests.parity.test_parity import close

NUMBERS = Path(__file__).parent / "sensedict_skd_sensedict.npz"


def given(case: str) -> dict[str, Tensor]:
    with np.load(NUMBERS) as file:
        names = [k for k in file if k.startswith(f"{case}/") and not k.endswith("what")]
        return {k.removeprefix(f"{case}/"): torch.as_tensor(file[k]) for k in names}


@pytest.mark.parametrize("case", ["0", "1"])
def test_value_and_gradient(case: str) -> None:
    """The second case has tokens with fewer senses than others: theirs score 0 there."""
    known = given(case)
    leaf, counts = known["student"].clone().requires_grad_(), known["counts"]
    value = sensedict_skd_loss(
        leaf[counts], known["teacher"][counts], known["senses"][counts], known["there"][counts], spare="zero"
    )
    assert value.item() == pytest.approx(float(known["loss"]), rel=1e-12)
    value.backward()
    close(leaf.grad, known["grad"], 1e-12)


@pytest.mark.parametrize("case", ["0", "1"])
@pytest.mark.parametrize("rule", get_args(Rule))
def test_the_nearest_sense(case: str, rule: Rule) -> None:
    known = given(case)
    counts = known["counts"]
    senses, there, states = known["senses"][counts], known["there"][counts], known["student"][counts]
    dictionary = SenseDictionary.of((n, s[t]) for n, (s, t) in enumerate(zip(senses, there, strict=True)))
    found = dictionary.replaced(torch.arange(len(states)), states, rule=rule)
    assert torch.equal(found, known[f"replaced_{rule}"])
