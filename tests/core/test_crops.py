"""Random crops: a part of the image, where and as large as it may be, and nothing but that."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.crops import random_crops, recoloured
from limbeck.core.errors import ConfigError, TensorError


def ramp(count: int, size: int = 32) -> torch.Tensor:
    """Two channels that tell the row and the column, from 0 to 1."""
    line = (torch.arange(size) + 0.5) / size
    return torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(count, -1, -1, -1).contiguous()


def test_crops_have_the_area_the_shape_and_places_asked_for():
    seen = random_crops(ramp(400), (8, 8), (0.2, 0.5))
    spans = [(seen[:, c].amax((1, 2)) - seen[:, c].amin((1, 2))) * 8 / 7 for c in (0, 1)]  # between centers of pixels
    area, ratio = spans[0] * spans[1], spans[1] / spans[0]
    for found, low, high in ((area, 0.2, 0.5), (ratio, 3 / 4, 4 / 3)):
        assert found.min().item() == pytest.approx(low, rel=0.08)
        assert found.max().item() == pytest.approx(high, rel=0.08)
    assert seen.min() < 0.05
    assert seen.max() > 0.95
    mirrored = (seen[:, 1, 0, 0] > seen[:, 1, 0, -1]).float().mean()
    assert 0.4 < mirrored < 0.6
    assert (random_crops(ramp(9), (8, 8), flip=False)[:, 1].diff(dim=2) > 0).all()


def test_the_whole_image_at_its_own_size_is_the_image():
    images = torch.randn(3, 2, 9, 9)
    torch.testing.assert_close(random_crops(images, (9, 9), (1.0, 1.0), stretch=1.0, flip=False), images)


def test_colours_change_each_image_on_its_own():
    images = torch.randn(60, 3, 8, 8)
    changed = recoloured(images, blur=0.0, often=0.5, grey=0.0).ne(images).flatten(1).any(1).float().mean()
    assert 0.3 < changed < 0.7
    grey = recoloured(images, blur=0.0, often=0.0, grey=1.0)
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand_as(images))
    flat = torch.full((2, 1, 5, 5), 3.0)
    torch.testing.assert_close(recoloured(flat, blur=1.0, often=0.0), flat)
    assert recoloured(images, blur=1.0, often=0.0, grey=0.0).var() < 0.5 * images.var()


def test_what_cannot_be_is_told():
    with pytest.raises(ConfigError, match="no such part"):
        random_crops(ramp(1), (4, 4), (0.5, 0.2))
    with pytest.raises(TensorError, match="images"):
        recoloured(torch.zeros(2, 3))
