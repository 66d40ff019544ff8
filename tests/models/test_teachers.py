"""The published CIFAR-10 weights load strictly and classify as well as was measured by other means."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from limbeck.models import load_model, parameters

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def test_set(shared_data: Path) -> tuple[Tensor, Tensor]:
    table = pq.read_table(shared_data / "cifar10" / "test.parquet")
    rows = table.column("image").to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x.to(memory_format=torch.channels_last), torch.from_numpy(table.column("label").to_numpy().copy())


def stated(shared_data: Path, name: str) -> float:
    """Top-1 on the test set, from the table in the data's README."""
    row = re.search(rf"\| {name} \| [\d.]+ \| ([\d.]+) \|", (shared_data / "README.md").read_text())
    assert row, f"no figure for {name}"
    return float(row[1])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param("resnet20", 269722, marks=pytest.mark.slow),
        pytest.param("resnet32", 464154, marks=pytest.mark.slow),
        pytest.param("resnet44", 658586, marks=pytest.mark.slow),
        pytest.param("resnet56", 853018, marks=pytest.mark.slow),
    ],
)
def test_top1(name: str, count: int, shared_data: Path, test_set: tuple[Tensor, Tensor]) -> None:
    weights = shared_data / "teachers" / f"cifar10_{name}.safetensors"
    net = load_model(f"{name}_a", num_classes=10, weights=weights).eval().to(memory_format=torch.channels_last)
    assert parameters(net) == count
    x, labels = test_set
    with torch.inference_mode():
        found = torch.cat([net(part).argmax(1) for part in x.split(250)])
    top1 = 100 * (found == labels).float().mean().item()
    assert round(top1, 2) == pytest.approx(stated(shared_data, name), abs=0.011)  # one image of 10,000
