"""DeepInversion: images that fit the teacher's memory, a pool that keeps them, and what cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from limbeck.core.errors import ModelError
from limbeck.core.teacher import as_teacher
from limbeck.data.normalise import Normalisation
from limbeck.schemes import build
from limbeck.schemes.data_free.losses import competition_loss
from limbeck.schemes.data_free.pool import Pool, shifted
from tests.schemes.data_free.scene import STATS, cast, net, trained


def dreaming(**options):
    whole = cast()
    (training,) = build("deep_inversion", **{"size": 12, "every": 2, "iterations": 40, **options}).trainings(whole)
    distiller = training.stages[0].distiller
    return distiller.setup(training.train.example()), training.train.example(12).inputs


def test_dreams_fit_the_statistics_and_their_classes():
    distiller, like = dreaming(lr=0.05, jitter=1)
    torch.manual_seed(0)
    made = distiller.make(like)[0]
    assert made.shape == like.shape
    kept = distiller.pool.normalise(distiller.pool.kept[: distiller.pool.size])
    noise = torch.rand_like(kept) * 2.5 - 0.75
    with torch.no_grad():
        dream, chance = distiller.inverted(kept), distiller.inverted(noise)
        fits = distiller.inverted.statistics_loss(dream) / distiller.inverted.statistics_loss(chance)
    assert fits < 0.5
    targets = distiller.targets(kept.device)
    assert targets.bincount().tolist() == [4, 4, 4]
    assert nn.functional.cross_entropy(dream.logits, targets) < nn.functional.cross_entropy(chance.logits, targets)
    black, white = -0.3 / 0.4, 0.7 / 0.4
    assert kept.min() >= black - 1e-5
    assert kept.max() <= white + 1e-5


def test_rounds_come_when_they_are_due_and_add_to_the_pool():
    distiller, like = dreaming(iterations=1)
    batch = distiller.prepare(
        next(iter(build("deep_inversion").trainings(cast()))).train.example(4)  # blank inputs
    )
    sizes = []
    for _ in range(5):
        distiller.made(batch)
        sizes.append(distiller.pool.size)
    assert sizes == [12, 12, 24, 24, 36]
    assert like.abs().sum() == 0


def test_the_student_is_as_it_was_after_a_round():
    distiller, like = dreaming(iterations=2)
    distiller.student.train()
    before = {k: v.clone() for k, v in distiller.student.state_dict().items()}
    distiller.make(like)
    assert all(torch.equal(before[k], v) for k, v in distiller.student.state_dict().items())
    assert all(m.training for m in distiller.student.modules())
    assert all(p.requires_grad and p.grad is None for p in distiller.student.parameters())


def test_competition_asks_for_what_the_student_gets_wrong():
    """The gradient of the competition is none where both agree, and least where they are most apart."""
    logits = torch.randn(6, 5, dtype=torch.float64)
    assert competition_loss(logits, logits) == pytest.approx(1.0)
    p, q = (torch.randn(6, 5, dtype=torch.float64) for _ in range(2))
    a, b = (z.div(3).softmax(1) for z in (p, q))
    m = (a + b) / 2
    wanted = 1 - 0.5 * ((a * (a / m).log()).sum(1) + (b * (b / m).log()).sum(1)).mean()
    torch.testing.assert_close(competition_loss(p, q), wanted)
    apart = competition_loss(torch.tensor([[90.0, 0.0]]), torch.tensor([[0.0, 90.0]]))
    assert float(apart) == pytest.approx(1 - 0.6931, abs=1e-3)


def test_the_pool_is_a_ring_of_bytes():
    pool = Pool(5, (1, 2, 2), STATS)
    pixels = torch.rand(3, 1, 2, 2)
    pool.add(STATS(pixels))
    assert pool.size == 3
    torch.testing.assert_close(pool.kept[:3].float() / 255, pixels, atol=0.5 / 255 + 1e-6, rtol=0)
    pool.add(STATS(torch.zeros(4, 1, 2, 2)))
    assert pool.size == 5
    assert pool.kept[[0, 1, 3, 4]].sum() == 0
    torch.testing.assert_close(pool.kept[2].float() / 255, pixels[2], atol=0.5 / 255 + 1e-6, rtol=0)
    floats = Pool(2, (3,), Normalisation())
    floats.add(torch.tensor([[-9.0, 0.25, 7.0]]))
    assert floats.draw(2).tolist() == [[-9.0, 0.25, 7.0]] * 2


def test_crops_are_shifts_with_black_around_them():
    torch.manual_seed(1)
    images = torch.rand(40, 2, 5, 5) + 1
    images.requires_grad_()
    found = shifted(images, 1, -3.0, flip=False)
    padded = nn.functional.pad(images + 3, [1] * 4) - 3
    for number in range(40):
        crops = [padded[number, :, i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
        assert any(torch.equal(found[number], crop) for crop in crops)
    found.sum().backward()
    assert set(images.grad.unique().tolist()) == {0.0, 1.0}
    mirrored = shifted(images.detach(), 0)
    kinds = {(torch.equal(a, b), torch.equal(a, b.flip(2))) for a, b in zip(mirrored, images.detach(), strict=True)}
    assert kinds == {(True, False), (False, True)}


def test_a_teacher_that_remembers_nothing_is_refused():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="no batch normalisation"):
        trained(build("deep_inversion"), replace(cast(), teacher=as_teacher(plain)))


def test_the_first_layer_can_weigh_more():
    distiller, _ = dreaming()
    x = torch.randn(6, 1, 8, 8)
    trace = distiller.inverted(x)
    model = net(8, 2)
    feature = model[0](x)
    wanted = (feature.mean((0, 2, 3)) - model[1].running_mean).norm()
    wanted = wanted + (feature.var((0, 2, 3), correction=0) - model[1].running_var).norm()
    found = distiller.inverted.statistics_loss(trace, 10.0) - distiller.inverted.statistics_loss(trace)
    torch.testing.assert_close(found, 9 * wanted)
