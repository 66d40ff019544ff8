from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from limbeck.core.cam import class_maps
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.sdd import SDD, region_logits, sdd_loss
from tests.objectives.reference import dkd, kd, mean
from tests.objectives.test_classes import Net, make, make_batch


@pytest.mark.parametrize("base", ["kd", "dkd"])
def test_equals_the_paper(base: Literal["kd", "dkd"]) -> None:
    student, teacher = 2 * torch.randn(2, 6, 5, 4).double()
    labels = torch.randint(0, 4, (6,))
    teacher[range(6), 0, labels] += torch.tensor([9.0, 9, 9, 0, 0, 0])
    wanted, kinds = [], set()
    for s, t, y in zip(student, teacher, labels, strict=True):
        values = []
        for n in range(5):
            alike = (t[n].argmax() == y) == (t[0].argmax() == y)
            kinds.add(bool(alike))
            row = s[n : n + 1], t[n : n + 1]
            value = kd(*row, 2.0) if base == "kd" else dkd(*row, y[None], 1.0, 8.0, 2.0)
            values.append(value if alike else 3 * value)
        wanted.append(mean(values))
    found = sdd_loss(student, teacher, labels, base=base, temperature=2.0, complementary=3.0)
    assert kinds == {True, False}
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_regions_are_those_of_the_authors() -> None:
    """They pool the feature to a pyramid and classify each cell."""
    with np.load(Path(__file__).parents[2] / "parity" / "sdd_sdd.npz") as file:
        feature, weight, bias, wanted = (
            torch.from_numpy(file[f"0/regions/{n}"]) for n in ("feature", "weight", "bias", "wanted")
        )
    torch.testing.assert_close(region_logits(class_maps(feature, weight, bias), [1, 2, 4]), wanted)


def test_one_region_is_the_base_loss_on_the_logits() -> None:
    student, teacher, batch = Net(4), Net(6), make_batch()
    found = Distiller(student, SDD(scales=[1]), teacher).setup(batch)(batch).total
    logits = student(batch.inputs).double(), teacher(batch.inputs).double()
    assert batch.labels is not None
    assert found.item() == pytest.approx(dkd(*logits, batch.labels, 1.0, 8.0, 4.0), rel=1e-4)


def test_maps_of_different_sizes() -> None:
    """Cells of a grid cover the same part of the image, whatever the resolution."""
    maps = torch.randn(2, 3, 4, 4)
    finer = F.interpolate(maps, (8, 8), mode="nearest")
    torch.testing.assert_close(region_logits(maps, [1, 2, 4]), region_logits(finer, [1, 2, 4]))


def test_samples_without_a_label_do_not_count() -> None:
    student, teacher, labels = *torch.randn(2, 3, 5, 4), torch.tensor([1, -100, 2])
    kept = torch.tensor([0, 2])
    found = sdd_loss(student, teacher, labels)
    torch.testing.assert_close(found, sdd_loss(student[kept], teacher[kept], labels[kept]))


def test_the_whole_network_learns() -> None:
    distiller = make(SDD())
    distiller(make_batch()).total.backward()
    for name in ("fc.weight", "layer1.0.weight"):
        gradient = distiller.student.get_parameter(name).grad
        assert gradient is not None
        assert gradient.any()


def test_what_it_refuses() -> None:
    regions = torch.randn(2, 5, 3)
    with pytest.raises(TensorError, match="labels"):
        sdd_loss(regions, regions, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ConfigError, match="base"):
        sdd_loss(regions, regions, torch.tensor([0, 1]), base="nkd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="scales"):
        SDD(scales=[2, 1])
