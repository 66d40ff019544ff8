from __future__ import annotations

from typing import get_args

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.kernels.divergence_rows import DIVERGENCES
from limbeck.objectives.parts.divergences import Divergence, rows_of
from tests.kernels.definitions import FORMULAS


@pytest.mark.parametrize("name", get_args(Divergence))
def test_each_is_its_formula(name: str) -> None:
    log_p, log_q = torch.randn(2, 5, 7).double().log_softmax(-1)
    found = rows_of(name, beta=0.3, skew=0.2)(log_p, log_q)
    torch.testing.assert_close(found, FORMULAS[name](log_p.exp(), log_q.exp()))


def test_they_are_those_of_the_fused_losses() -> None:
    assert set(get_args(Divergence)) == set(DIVERGENCES)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="reverse_kl"):
        rows_of("reverse_lk")
    for options in ({"beta": 0.0}, {"skew": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            rows_of("jsd", **options)
