"""AFD's attention against their authors' code, with their weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.objectives.feature.afd import AFD
from tests.parity.test_parity import load
from tests.parity.weighted import same_with_their_weights

NUMBERS = load(Path(__file__).parent / "afd_attention.npz")


@pytest.mark.parametrize("case", [key.split("/")[0] for key in NUMBERS if key.endswith("/call")])
def test_attend_and_compare(case: str) -> None:
    dim = int(NUMBERS[f"{case}/dim"])
    same_with_their_weights(case, NUMBERS, lambda students, teachers: AFD(students, teachers, dim=dim))
