"""Crops of a part of the area: what is read, and that a chain of them is made again from its place."""

import math

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.data.area_crop import AreaCrop
from limbeck.data.augment import views


def bits(count):
    return torch.randint(-(2**63), 2**63 - 1, (count, 4), generator=torch.Generator().manual_seed(1))


def places(crop, drawn, size):
    rows, columns = (torch.arange(s).expand(len(drawn), -1) for s in size)
    return crop.coordinates(rows, columns, size, drawn)


def test_all_of_the_area_and_no_stretch_is_the_image():
    rows, columns = places(AreaCrop(1.0, 1.0, 1.0), bits(20), (6, 9))
    assert torch.equal(rows, torch.arange(6).expand(20, -1))
    assert torch.equal(columns, torch.arange(9).expand(20, -1))


def test_areas_and_shapes_are_those_that_are_asked_for():
    crop = AreaCrop(0.25, 0.5, 2.0)
    rows, columns = places(crop, bits(4000), (400, 400))
    tall, wide = (p[:, -1] - p[:, 0] + 1 for p in (rows, columns))
    area, ratio = tall * wide / 160000, wide / tall
    assert area.min() > 0.245
    assert area.max() < 0.505
    assert area.mean() == pytest.approx(0.375, abs=0.01)
    assert ratio.log().mean() == pytest.approx(0, abs=0.02)
    assert ratio.max() < 2.02
    assert ratio.min() > 0.495
    assert ratio.log().var() == pytest.approx((2 * math.log(2)) ** 2 / 12, rel=0.05)  # evenly between the bounds
    assert rows.min() == 0
    assert rows.max() == 399
    assert bool((rows.diff(dim=1) >= 0).all())


def test_a_view_is_made_again_whatever_the_batch():
    images, chain = torch.rand(6, 3, 8, 8), [AreaCrop(), "flip", {"pad_crop": {"padding": 1}}]
    whole = views(images, torch.arange(6), seed=3, epoch=2, transforms=chain)
    assert torch.equal(views(images, torch.tensor([4, 1]), seed=3, epoch=2, transforms=chain), whole[[4, 1]])
    assert not torch.equal(views(images, torch.arange(6), seed=3, epoch=3, transforms=chain), whole)


@pytest.mark.parametrize("options", [(0.0, 1.0), (0.6, 0.5), (0.5, 1.5), (0.5, 1.0, 0.5)])
def test_bounds_that_are_none_are_refused(options):
    with pytest.raises(ConfigError):
        AreaCrop(*options)
