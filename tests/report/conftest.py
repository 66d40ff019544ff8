"""A comparison's facts, and a real one's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report.facts import ACCURACY, facts_of


@pytest.fixture
def comparison() -> dict[str, Any]:
    return facts_of(ACCURACY)


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Path:
    """A real comparison's folder: two methods' lines, two seeds, a teacher trained first."""
    from limbeck.recipes.compare import compare
    from limbeck.recipes.load import load

    small = [
        "data.samples=100",
        "data.batch_size=32",
        "train.epochs=2",
        "train.validate_epochs=1",
        "teacher={model: mlp_16, train: {epochs: 2}}",
        "student={model: mlp_8}",
    ]
    folder = tmp_path_factory.mktemp("compared")
    compare(load("digits", small), ["kd"], 2, ["no_teacher"], out=folder, quiet=True, command="limbeck compare digits")
    return folder
