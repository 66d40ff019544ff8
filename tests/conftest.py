"""What every test has: one seed, one thread, no network, and the real data where they are at hand."""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers and datasets are imported

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("limbeck", deadline=None, derandomize=True)
hypothesis.settings.load_profile("limbeck")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: ``LIMBECK_DATA``, else ``../shared/data`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LIMBECK_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set LIMBECK_DATA to their folder")
    return folder
