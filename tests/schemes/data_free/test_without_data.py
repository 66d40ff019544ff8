"""What every scheme without data promises: no real sample is read, the teacher stays, what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import as_teacher
from limbeck.data.blank import BlankLoader
from limbeck.data.resident import ResidentLoader
from limbeck.engine import fit
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import build
from limbeck.schemes.data_free.made import Generating
from limbeck.schemes.data_free.noise_kd import noise
from limbeck.schemes.data_free.other_images import fitted, other_images
from limbeck.teachers.several import SeveralTeachers
from tests.schemes.data_free.scene import STATS, cast, images, mlp, net, same, trained

SMALL = {"latent": 6, "width": 4}
SCHEMES = {
    "noise_kd": {"images": "uniform"},
    "dafl": {**SMALL, "lr": 0.02},
    "dfad": {**SMALL, "every": 2},
    "deep_inversion": {"iterations": 2, "every": 2, "size": 6},
    "cmi": {**SMALL, "iterations": 2, "every": 2, "size": 6, "head": 4},
}


@pytest.mark.parametrize("key", SCHEMES)
def test_no_real_image_is_read(key):
    """Training images that are no numbers do not change a bit of the student."""
    clean = trained(build(key, **SCHEMES[key]), cast())
    poisoned = trained(build(key, **SCHEMES[key]), cast(images(poison=True)))
    assert same(clean, poisoned)
    assert all(t.isfinite().all() for t in clean.values() if t.is_floating_point())


@pytest.mark.parametrize("key", SCHEMES)
def test_the_student_learns_and_the_teacher_stays_as_it_was(key):
    whole = cast()
    before = {k: v.clone() for k, v in whole.teacher.model.state_dict().items()}
    start = {k: v.clone() for k, v in whole.student.state_dict().items()}
    after = trained(build(key, **SCHEMES[key]), whole)
    assert not same(start, after)
    assert same(before, whole.teacher.model.state_dict())
    assert all(p.grad is None and p.requires_grad for p in whole.teacher.model.parameters())
    assert not [m for m in (*whole.teacher.model.modules(), *whole.student.modules()) if m._forward_hooks][1:]


@pytest.mark.parametrize("key", ["dafl", "dfad"])
def test_each_player_moves_alone(key):
    """The student's turn leaves the generator as it is, the generator's leaves the student's weights."""
    whole = cast()
    (training,) = build(key, **SCHEMES[key]).trainings(whole)
    distiller = training.stages[0].distiller
    assert isinstance(distiller, Generating)
    distiller.setup(training.train.example())
    batch = distiller.made(next(iter(training.train.epoch(0)))[0])
    distiller.moves += distiller.moves % distiller.every  # a step in which the generator moves
    own = {id(p) for p in distiller.parameters_of("generator")}
    assert own
    assert own == {id(p) for p in distiller.generator.parameters()}
    for turn in ("student", "generator"):
        distiller.zero_grad(set_to_none=True)
        distiller(batch, turn).total.backward()
        moved = {id(p) for p in distiller.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        trains = {id(p) for p in distiller.parameters_of(turn)}
        assert moved & trains, turn
        if turn == "student":
            assert not moved & own
    assert {id(p) for p in distiller.parameters_of("student")}.isdisjoint(own)


@pytest.mark.parametrize("key", [k for k in SCHEMES if k != "cmi"])
def test_vectors_too(key):
    data = ResidentLoader(torch.full((40, 5), torch.nan), torch.arange(40) % 3, batch_size=10, classes=3)
    whole = replace(cast(data), student=mlp(4, 1), teacher=as_teacher(mlp(8, 2)))
    assert all(t.isfinite().all() for t in trained(build(key, **SCHEMES[key]), whole).values())


@pytest.mark.parametrize("key", SCHEMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"accumulate": 2}}, "accumulate: .*cannot be cut"),
        ({"config": {"precision": "fp16"}}, "precision: .*without loss scaling"),
        ({"teacher": None}, "teacher"),
        ({"teacher": SeveralTeachers([net(4, 3)])}, "teacher: .*nobody has seen"),
        ({"loss": Terms.of(CrossEntropy())}, "loss: nothing in this loss asks the teacher"),
    ],
)
def test_what_cannot_be_is_refused(key, change, message):
    fields = {name: value for name, value in change.items() if name != "config"}
    whole = replace(cast(**change.get("config", {})), **fields)
    with pytest.raises(ConfigError, match=message):
        list(build(key, **SCHEMES[key]).trainings(whole))


def test_labels_are_unknown():
    """Terms that learn from labels are 0; what asks the teacher is the same as without them."""
    alone = trained(build("noise_kd"), cast(loss=KD(temperature=2.0)))
    beside = trained(build("noise_kd"), cast(loss=CrossEntropy() + KD(temperature=2.0)))
    assert same(alone, beside)


def test_noise_is_plain_distillation_on_the_same_draws():
    """The control against a plain loop over the same noise."""
    config = {"optimizer": "sgd", "optimizer_options": {"momentum": 0.0}, "schedule": "constant", "weight_decay": 0.0}
    whole = cast(steps=3, lr=0.1, **config)
    found = trained(build("noise_kd"), whole)
    student, teacher = net(4, 1).train(), net(8, 2).eval()
    objective = KD(temperature=2.0)
    distiller = Distiller(student, objective, teacher).setup(Batch(torch.zeros(4, 1, 8, 8)))
    (training,) = build("noise_kd").trainings(whole)
    noisy, blank = training.stages[0].distiller, Batch(torch.zeros(16, 1, 8, 8))
    draws = [noisy.made(blank).inputs for _ in range(3)]
    assert not torch.equal(draws[0], draws[1])
    for inputs in draws:
        student.zero_grad()
        distiller(Batch(inputs)).total.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.1 * parameter.grad
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_noise_has_the_range_of_inputs():
    uniform = noise("uniform", torch.zeros(500, 1, 8, 8), STATS)
    assert -0.3 / 0.4 <= uniform.min() < -0.74
    assert 1.74 < uniform.max() <= 0.7 / 0.4
    for kind in ("gaussian", "uniform"):
        drawn = noise(kind, torch.zeros(4000, 5))
        torch.testing.assert_close(drawn.std(dim=0), torch.ones(5), atol=0.06, rtol=0)


def test_images_of_another_source():
    """They are fitted to the model's shape and normalised as its data; their labels are left out."""
    torch.manual_seed(3)
    colours = torch.rand(40, 3, 16, 12)
    whole = cast(images(poison=True))
    loader = other_images((colours, torch.arange(40) % 2), {}, BlankLoader(whole.train), 30, whole.train)
    batch = next(loader.batches())
    assert batch.inputs.shape == (16, 1, 8, 8)
    assert batch.labels is None
    assert loader.samples == 30
    every = torch.cat([b.inputs for b in loader.bare().batches()])
    wanted = fitted(colours, (1, 8, 8), None)
    wanted = ((wanted * 255).round() / 255 - 0.3) / 0.4
    assert all((wanted - image).abs().amax(dim=(1, 2, 3)).min() < 1e-5 for image in every)


def test_the_control_learns_from_another_source():
    with pytest.raises(ConfigError, match=r"scheme.source"):
        build("noise_kd", images="other")
    with pytest.raises(ConfigError, match=r"scheme.source"):
        build("noise_kd", source="digits")
    scheme = build("noise_kd", images="other", source="digits", samples=50)
    found = trained(scheme, cast(images(poison=True)))
    assert all(t.isfinite().all() for t in found.values())
    other = trained(build("noise_kd"), cast(images(poison=True)))
    assert not same(found, other)


def test_the_generator_rests_between_its_moves():
    whole = cast(steps=4)
    (training,) = build("dfad", **SMALL, every=3).trainings(whole)
    distiller = training.stages[0].distiller
    moves = []
    judge = distiller.judge

    def noted(*args):
        moves.append(int(distiller.moves))
        return judge(*args)

    distiller.judge = noted
    done = fit(training.stages, training.train, quiet=True)
    assert moves == [3]
    assert done.steps == 4
    assert isinstance(distiller.generator, nn.Module)
