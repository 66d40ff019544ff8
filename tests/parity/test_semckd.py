"""SemCKD's attention and regressors against their authors' code, with their weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.objectives.feature.semckd import SemCKD
from tests.parity.test_parity import load
from tests.parity.weighted import same_with_their_weights

NUMBERS = load(Path(__file__).parent / "semckd_attention.npz")


@pytest.mark.parametrize("case", [key.split("/")[0] for key in NUMBERS if key.endswith("/call")])
def test_attend_regress_compare(case: str) -> None:
    group = int(NUMBERS[f"{case}/group"])
    same_with_their_weights(case, NUMBERS, lambda students, teachers: SemCKD(students, teachers, group=group))
