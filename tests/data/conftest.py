"""Small sets that tests of data share."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor


@pytest.fixture
def images() -> Tensor:
    """Forty images of random bytes, wider than high so that a swapped axis shows."""
    return torch.randint(0, 256, (40, 3, 6, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(40) % 5


@pytest.fixture
def encode():
    """Encodes ``[C, H, W]`` bytes as PNG, without loss."""

    def png(image: Tensor) -> bytes:
        pixels = image.permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return png


@pytest.fixture
def write_parquet(encode):
    """Writes images and labels as a Parquet file in the hub's image layout."""

    def write(
        path, images: Tensor, labels: Tensor, names: str | None = '["a", "b", "c", "d", "e"]', rows=None, **extra
    ):
        cells = rows if rows is not None else [{"bytes": encode(i), "path": None} for i in images]
        table = pa.table(
            {
                "image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
                "label": pa.array(labels.numpy().astype(np.int8)),
                **extra,
            }
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"label_names": names} if names else None), path, row_group_size=7)
        return path

    return write
