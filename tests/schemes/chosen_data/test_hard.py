"""HARD: how images are moved, what the augmentation raises, who learns when, and that invariances pass over."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher, as_teacher
from limbeck.data.augment import Augment
from limbeck.data.resident import ResidentLoader
from limbeck.data.sources.load import load_source
from limbeck.engine import TrainConfig, fit
from limbeck.engine.stage import Stage
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.chosen_data.augmenters import LatentMover, Mover, moved
from limbeck.schemes.chosen_data.hard import disagreement
from limbeck.schemes.data_free.memory import Replay
from tests.schemes.data_free.scene import STATS, cast, images, mlp, same, trained


def hardened(whole=None, **options):
    (training,) = build("hard", **options).trainings(whole or cast())
    distiller = training.stages[0].distiller.setup((whole or cast()).train.example())
    return distiller


def first(whole):
    return next(whole.train.epoch(0))[0]


def test_moves_of_images():
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 2, 6] = 1

    def place(*moves):
        found = moved(image, torch.tensor([moves]))[0, 0]
        return divmod(int(found.argmax()), 9)

    assert torch.allclose(moved(image, torch.zeros(1, 5)), image, atol=1e-6)
    assert place(1 / 9, 0.0, 0.0, 0.0, 0.0) == (2, 7)
    assert place(0.0, 3 / 9, 0.0, 0.0, 0.0) == (5, 6)
    assert place(0.0, 0.0, math.pi / 2, 0.0, 0.0) in {(6, 6), (2, 2)}  # a quarter turn about the middle
    assert place(0.0, 0.0, 0.0, math.log(0.5), 0.0) == (3, 5)  # half as large
    assert place(0.0, 0.0, 0.0, math.log(2.0), 0.0) == (0, 8)
    grey = torch.full((1, 1, 4, 4), 0.25)
    assert torch.allclose(moved(grey, torch.tensor([[0.5, 0.2, 0.3, 0.1, 0.1]]), 0.25), grey)
    tall = torch.zeros(1, 1, 16, 8)
    tall[0, 0, 8, 6] = 1
    turned = moved(tall, torch.tensor([[0.0, 0.0, math.pi / 2, 0.0, 0.0]]))[0, 0]
    row, column = divmod(int(turned.argmax()), 8)
    assert abs(row - 7.5) == pytest.approx(2.5, abs=0.6)  # as far from the middle as before, in pixels
    assert abs(column - 3.5) == pytest.approx(0.5, abs=0.6)


def test_the_disagreement_is_kds():
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    assert disagreement(student, teacher, 3.0).item() == pytest.approx((9 * p * (p / q).log()).sum(1).mean().item())


def test_at_first_it_is_plain_distillation_on_doubled_batches():
    whole = cast(loss=0.4 * CrossEntropy() + 0.6 * KD(2.0))
    distiller = hardened(whole, spread=0.0)
    batch = first(whole)
    made = distiller.made(batch)
    assert made.size == 2 * batch.size
    assert torch.allclose(made.inputs[batch.size :], batch.inputs, atol=1e-5)
    assert (made.labels[batch.size :] == -1).all()
    plain = Distiller(whole.student, whole.loss, whole.teacher.model).setup(batch)
    torch.testing.assert_close(distiller(made).total, plain(batch).total, rtol=1e-4, atol=1e-5)


def test_a_twin_gives_the_augmentation_nothing_to_raise():
    whole = cast()
    whole.student = whole.teacher.model
    whole.teacher = FrozenTeacher(copy.deepcopy(whole.student))
    distiller = hardened(whole, keep=0.0)
    batch = distiller.made(first(whole))
    gain, _ = distiller.gain(batch.extras["clean"], batch.extras["noise"])
    assert abs(gain.item()) < 1e-6
    found = torch.autograd.grad(gain, list(distiller.augmenter.head.parameters()))
    assert max(g.abs().max() for g in found) < 1e-5


def climbed(optimizer, lr, **options):
    """The gain along some steps of the augmentation alone, on one batch, and how far the teacher strayed in the end."""
    torch.manual_seed(0)
    whole = cast()
    distiller = hardened(whole, **options)
    batch = distiller.made(first(whole))
    optimizer = optimizer(distiller.parameters_of("augmenter"), lr=lr)
    gains = []
    for _ in range(25):
        optimizer.zero_grad()
        losses = distiller(batch, "augmenter")
        losses.total.backward()
        optimizer.step()
        gains.append(-losses.total.item())
    return gains, losses.terms


@pytest.mark.slow
def test_the_augmentation_climbs_and_heeds_the_teacher():
    gains, _ = climbed(torch.optim.SGD, 2.0, keep=0.0, spread=0.0)
    assert all(later >= earlier - 1e-4 for earlier, later in pairwise(gains))
    assert gains[-1] > 1.02 * gains[0]
    _, free = climbed(torch.optim.Adam, 0.01, keep=0.0, spread=0.0)
    _, held = climbed(torch.optim.Adam, 0.01, keep=100.0, spread=0.0)
    assert held["strayed"] < 0.05 * free["strayed"]


def test_gradients_are_no_longer_than_clip():
    whole = cast()
    distiller = hardened(whole, clip=1e-3)
    batch = distiller.made(first(whole))
    losses = distiller(batch, "augmenter")
    losses.total.backward()
    own = list(distiller.parameters_of("augmenter"))
    assert torch.stack([p.grad.norm() for p in own]).norm().item() == pytest.approx(1e-3, rel=1e-2)
    gain, _ = distiller.gain(batch.extras["clean"], batch.extras["noise"])
    assert losses.total.item() == pytest.approx(-gain.item(), rel=1e-4)


@pytest.mark.parametrize("turn", ["student", "augmenter"])
def test_each_player_moves_alone(turn):
    whole = cast()
    before = {k: v.clone() for k, v in whole.teacher.model.state_dict().items()}
    distiller = hardened(whole)
    batch = distiller.made(first(whole))
    distiller(batch, turn).total.backward()
    moving = {id(p) for p in distiller.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moving
    assert moving <= {id(p) for p in distiller.parameters_of(turn)}
    assert same(before, whole.teacher.model.state_dict())
    assert all(p.grad is None for p in whole.teacher.model.parameters())


def test_thresholds_turn_the_game():
    whole = cast()
    distiller = hardened(whole, control="thresholds", high=3.0, low=1.5)
    usual = torch.tensor(0.0)
    batch = distiller.made(first(whole))
    clean = batch.extras["clean"]
    with torch.no_grad():
        student, teacher = (m.eval()(clean) for m in (whole.student, whole.teacher.model))
        usual = disagreement(student, teacher)
    phases = []
    for ratio in (1.0, 2.9, 3.1, 2.0, 1.6, 1.4, 2.0):
        distiller._turn(clean, ratio * usual)
        phases.append(bool(distiller.hunting))
    assert phases == [True, True, False, False, False, True, True]
    distiller.hunting.fill_(True)
    distiller(batch).total.backward()
    assert all(p.grad is None for p in distiller.student.parameters())
    found = trained(build("hard", control="thresholds", high=1.01, low=1.0, lr=0.1), cast())
    assert all(t.isfinite().all() for t in found.values() if t.is_floating_point())


def test_in_an_autoencoders_code():
    torch.manual_seed(0)
    autoencoder = Replay(4, (6,), 8)
    mover = LatentMover(autoencoder, noise=3)
    x = torch.randn(5, 6)
    wanted = autoencoder.decoder(autoencoder.encoder(x).chunk(2, dim=1)[0])
    torch.testing.assert_close(mover.train()(x, torch.randn(5, 3)), wanted)
    assert not any(p.requires_grad for p in autoencoder.parameters())
    data = ResidentLoader(torch.randn(40, 5), torch.arange(40) % 3, batch_size=10, classes=3)
    whole = replace(cast(data), student=mlp(4, 1), teacher=as_teacher(mlp(8, 2)))
    trainings = build("hard", augment="latent", latent=3, width=4).trainings(whole)
    training = next(trainings)
    assert (training.name, training.judged) == ("autoencoder", False)
    before = [p.detach().clone() for p in training.student.parameters()]
    fit(training.stages, data, quiet=True)
    assert any(not torch.equal(a, b) for a, b in zip(before, training.student.parameters(), strict=True))
    last = next(trainings)
    assert last.stages[0].distiller.augmenter.autoencoder is training.student
    fit(last.stages, data, quiet=True)


def test_what_is_refused():
    data = ResidentLoader(torch.zeros(40, 5), torch.arange(40) % 3, batch_size=10, classes=3)
    with pytest.raises(DataError, match="cannot be moved"):
        list(build("hard").trainings(replace(cast(data), student=mlp(4, 1), teacher=as_teacher(mlp(8, 2)))))
    with pytest.raises(ConfigError, match="cut into parts"):
        list(build("hard").trainings(cast(accumulate=2)))
    with pytest.raises(ConfigError, match="never turn"):
        build("hard", high=1.0, low=2.0)
    assert Mover(1, (0.0,) * 5)(images().example(2).inputs, torch.zeros(2, 16)).shape == (2, 1, 8, 8)
    assert STATS.mean == (0.3,)


@pytest.mark.slow
def test_a_student_learns_that_shifts_do_not_matter():
    """A teacher that is blind to shifts, a student that is not, and digits with a margin: 49% of those that stand a
    pixel aside are right after plain distillation, 59% after this."""
    source = load_source("digits")

    def framed(split):
        return nn.functional.pad(split.inputs.float() / 255, [2] * 4), split.labels

    pixels, labels = framed(source.train)
    loader = ResidentLoader(pixels, labels, batch_size=64, augment=Augment((), samples=len(pixels)), classes=10)
    settings = {"optimizer": "adam", "weight_decay": 0.0, "compile": "off"}
    torch.manual_seed(1)
    body = nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 16, 5, padding=2), nn.ReLU()
    teacher = nn.Sequential(*body, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    config = TrainConfig(epochs=10, lr=0.01, **settings)
    fit([Stage("teacher", Distiller(teacher, CrossEntropy()), config)], loader, quiet=True)
    test, truth = framed(source.test)
    aside = torch.cat([test.roll(way, (2, 3)) for way in ((0, 1), (1, 0), (0, -1), (-1, 0))])

    def right(scheme, **options):
        torch.manual_seed(2)
        student = nn.Sequential(nn.Flatten(), nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 10))
        config = TrainConfig(epochs=25, lr=0.003, **settings)
        given = Cast(student, Terms.of(KD(4.0)), as_teacher(teacher), config, loader)
        perform(build(scheme, **options), given, quiet=True)
        with torch.no_grad():
            return (student.eval()(aside).argmax(1) == truth.repeat(4)).float().mean().item()

    moves = {"shift": 0.1, "turn": 0.0, "scale": 0.0, "shear": 0.0}
    assert right("hard", **moves, lr=3e-4, keep=0.3) > right("offline") + 0.05
