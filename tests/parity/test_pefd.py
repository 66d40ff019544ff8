"""PEFD with its authors' projectors: gradients of the student's feature and of each projector.

The loss alone is compared by ``test_parity.py`` from the same file.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.objectives.feature.pefd import PEFD
from tests.parity.test_parity import load
from tests.parity.weighted import same_with_their_weights

NUMBERS = load(Path(__file__).parent / "pefd_pefd.npz")


@pytest.mark.parametrize("case", ["projectors0", "projectors1", "projectors2"])
def test_projectors(case: str) -> None:
    same_with_their_weights(case, NUMBERS, lambda students, teachers: PEFD(students[0], teachers[0]))
