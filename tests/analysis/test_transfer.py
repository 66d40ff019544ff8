"""Gains and losses of a transfer, against plain counting."""

from __future__ import annotations

import pytest
import torch

from limbeck.analysis.transfer import complementary_knowledge, flips, success_rate
from limbeck.core.errors import TensorError


def test_shares_are_counted_and_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(1)
    before, after = torch.randn(2, 50, 3, generator=generator)
    labels = torch.randint(-1, 3, (50,), generator=generator)
    found = flips(before, after, labels)
    kept = [i for i in range(50) if labels[i] >= 0]
    was, now = ([int(x[i].argmax()) == int(labels[i]) for i in kept] for x in (before, after))
    pairs = list(zip(was, now, strict=True))
    wanted = {"gain": (False, True), "loss": (True, False), "both": (True, True), "neither": (False, False)}
    for name, pair in wanted.items():
        assert found[name] == pytest.approx(pairs.count(pair) / len(kept))
    assert sum(found[name] for name in wanted) == pytest.approx(1.0)
    assert found["delta"] == pytest.approx(found["gain"] - found["loss"], abs=1e-6)
    assert complementary_knowledge(after, before, labels) == found["gain"]
    assert flips(before, before, labels)["delta"] == 0


def test_other() -> None:
    assert success_rate(torch.tensor([0.5, -0.5, 0.1, 0.2])) == 0.75
    with pytest.raises(TensorError):
        flips(torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(3).long())
