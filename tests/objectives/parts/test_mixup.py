from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError, LimbeckError
from limbeck.objectives.parts.mixup import mix, partial_mixup


def batch_of(size: int = 8, classes: int = 5) -> Batch:
    return Batch(torch.rand(size, 3, 4, 4), labels=torch.arange(size) % classes)


def test_a_mixed_sample() -> None:
    batch = batch_of()
    partner, share = torch.arange(8).roll(1), torch.full((8,), 0.3)
    mixed = mix(batch, partner, share, 5)
    torch.testing.assert_close(mixed.inputs, 0.3 * batch.inputs + 0.7 * batch.inputs.roll(1, 0))
    assert mixed.labels is not None
    assert mixed.labels.shape == (8, 5)
    torch.testing.assert_close(mixed.labels.sum(1), torch.ones(8))
    first, second = mixed.labels[3, 3], mixed.labels[3, 2]
    assert (first.item(), second.item()) == pytest.approx((0.3, 0.7))
    assert int((mixed.labels[3] > 0).sum()) == 2


def test_the_teacher_sees_what_the_student_sees() -> None:
    batch = batch_of().replace(teacher_inputs=torch.rand(8, 3, 6, 6))
    share = torch.rand(8)
    mixed = mix(batch, torch.arange(8).roll(1), share, 5)
    for found, values in ((mixed.inputs, batch.inputs), (mixed.teacher_inputs, batch.teacher_inputs)):
        torch.testing.assert_close(found, torch.lerp(values.roll(1, 0), values, share[:, None, None, None]))


@pytest.mark.parametrize("clean", [0.0, 0.5, 0.9, 1.0])
def test_how_many_stay_clean(clean: float) -> None:
    batch = batch_of(40)
    mixed = partial_mixup(batch, 5, clean=clean)
    same = (mixed.inputs == batch.inputs).flatten(1).all(1)
    assert mixed.labels is not None
    sharp = mixed.labels.max(1).values == 1
    assert torch.equal(sharp[same], torch.ones_like(sharp[same]))
    assert int(clean * 40) <= int(same.sum()) <= int(clean * 40) + 8  # a sample may draw itself, or a share of one
    assert torch.equal(mixed.labels[same], torch.nn.functional.one_hot(batch.require("labels"), 5).float()[same])


@pytest.mark.parametrize(("beta", "deviation"), [(1.0, 12**-0.5), (0.2, 0.5 * 1.4**-0.5)])
def test_shares_follow_the_beta_distribution(beta: float, deviation: float) -> None:
    """Read off the labels of pairs of two classes."""
    labels = torch.arange(4000) % 2
    mixed = partial_mixup(Batch(labels[:, None].float(), labels=labels), 2, clean=0.0, beta=beta)
    kept = mixed.require("labels").gather(1, labels[:, None])[:, 0]
    apart = kept < 1  # a partner of the same class tells nothing
    assert float(kept[apart].mean()) == pytest.approx(0.5, abs=0.05)
    assert float(kept[apart].std()) == pytest.approx(deviation, abs=0.03)


def test_what_the_mask_hides_neither_gives_nor_takes() -> None:
    batch = batch_of()
    batch.inputs[2] = math.nan
    mask = torch.ones(8, dtype=torch.bool)
    mask[2] = False
    mixed = mix(batch.replace(mask=mask), torch.arange(8).roll(-1), torch.full((8,), 0.5), 5)
    assert mixed.inputs[mask].isfinite().all()
    torch.testing.assert_close(mixed.inputs[1], batch.inputs[1])  # its partner is hidden
    assert not torch.equal(mixed.inputs[4], batch.inputs[4])


def test_samples_without_a_label_and_soft_labels() -> None:
    batch = batch_of(3).replace(labels=torch.tensor([0, -1, 2]))
    mixed = mix(batch, torch.tensor([1, 0, 2]), torch.tensor([0.25, 0.25, 1.0]), 3)
    torch.testing.assert_close(mixed.labels, torch.tensor([[0.25, 0, 0], [0.75, 0, 0], [0, 0, 1.0]]))
    soft = mix(mixed, torch.tensor([2, 1, 0]), torch.tensor([0.5, 1.0, 1.0]), 3)
    torch.testing.assert_close(soft.labels, torch.tensor([[0.125, 0, 0.5], [0.75, 0, 0], [0, 0, 1.0]]))


def test_what_it_refuses() -> None:
    tokens = Batch(torch.zeros(4, 6, dtype=torch.long), labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(DataError, match=r"batch\.inputs"):
        partial_mixup(tokens, 5)
    with pytest.raises(DataError, match=r"batch\.teacher_inputs"):
        partial_mixup(batch_of(4).replace(teacher_inputs=tokens.inputs), 5)
    with pytest.raises(LimbeckError, match="labels"):
        partial_mixup(Batch(torch.rand(4, 3)), 5)
    with pytest.raises(LimbeckError, match="names no class"):
        partial_mixup(batch_of(), 3)
