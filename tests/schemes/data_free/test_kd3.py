"""KD3: which images of a pool are seen, when, and that seeing those pays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.resident import ResidentLoader
from limbeck.data.sources.load import load_source
from limbeck.engine import TrainConfig, fit
from limbeck.engine.stage import Stage
from limbeck.models import put_head
from limbeck.objectives import KD, CrossEntropy, SimKD
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.data_free.contrast import supervised_contrast
from limbeck.schemes.data_free.kd3 import aligned_by_classifier, mix_distribution
from limbeck.schemes.data_free.selection import class_thresholds, confident
from tests.schemes.data_free.scene import cast, images, trained


def headed(**settings):
    whole = cast(loss=SimKD(), **settings)
    put_head(whole.student, "reused", example=whole.train.example(2), teacher=whole.teacher.model)
    return whole


def shifted(**options):
    (training,) = build("kd3", **{"embed": 5, **options}).trainings(headed())
    return training.stages[0].distiller.setup(training.train.example()), training.train


def test_the_cards_thresholds():
    found = class_thresholds(torch.tensor([40, 20, 0, 10]))
    torch.testing.assert_close(found, torch.tensor([0.95, 0.95 / 3, 0.0, 0.95 * 0.25 / 1.75]))


def test_where_too_few_pass_the_nearest_fill_the_batch():
    logits = torch.tensor([[0.3, 0.0, 0.0], [0.2, 0.0, 0.0], [0.1, 0.0, 0.0]])
    assert len(confident(logits, least=1)) == 1
    assert confident(logits, least=2).tolist() == [0, 1]


def test_mixed_images_have_the_mixed_statistics():
    torch.manual_seed(0)
    x = (torch.rand(4, 2, 6, 6, dtype=torch.float64) + 0.1) * torch.rand(4, 2, 1, 1)
    others, share = torch.tensor([3, 0, 1, 2]), torch.rand(4, dtype=torch.float64)
    mixed = mix_distribution(x, others, share, epsilon=0.0)
    for of in (lambda v: v.mean(dim=(2, 3)), lambda v: v.std(dim=(2, 3))):
        wanted = share[:, None] * of(x) + (1 - share[:, None]) * of(x)[others]
        torch.testing.assert_close(of(mixed), wanted)
    torch.testing.assert_close(mix_distribution(x, torch.arange(4), share), x, rtol=1e-3, atol=1e-6)


def test_the_contrast_of_groups_by_its_definition():
    torch.manual_seed(1)
    x, groups = torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    h = nn.functional.normalize(x, dim=1)
    values = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        total = sum((h[i] @ h[a] / 0.2).exp() for a in others)
        own = [((h[i] @ h[p] / 0.2).exp() / total).log() for p in others if groups[p] == groups[i]]
        if own:
            values.append(-sum(own) / len(own))
    torch.testing.assert_close(supervised_contrast(x, groups, 0.2), sum(values) / len(values))
    assert supervised_contrast(x, torch.zeros(7), 0.2) == 0
    assert supervised_contrast(x, torch.arange(7), 0.2) == 0


def test_a_student_that_feels_the_same_costs_nothing():
    distiller, loader = shifted(mix=0.0)
    batch = distiller.made(next(loader.epoch(0))[0])
    student, teacher = distiller.traces(batch)
    assert aligned_by_classifier((student["head.projector"] * 0).mean(1), student.logits, student.logits) == 0
    rows = (student["head.projector"] - teacher["stages:-1"].detach()).square().mean(dim=1)
    weight = (student.logits - teacher.logits).norm(dim=1).sigmoid()
    assert 0.5 <= weight.min() < weight.max() < 1
    found = distiller(batch)
    torch.testing.assert_close(found.total, (weight[:, None, None].detach() * rows).mean(), rtol=1e-4, atol=1e-6)


def test_what_learns_and_what_stays():
    whole = headed()
    before = {k: v.clone() for k, v in whole.teacher.model.state_dict().items()}
    (training,) = build("kd3", embed=5, mix=0.1).trainings(whole)
    distiller = training.stages[0].distiller.setup(training.train.example())
    distiller(distiller.made(next(training.train.epoch(0))[0])).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.embeds[1].parameters() if p.ndim > 1)
    distiller.close()
    start = {k: v.clone() for k, v in whole.student.state_dict().items()}
    after = trained(build("kd3", embed=5), whole)
    classifier = {k for k, p in whole.student.named_parameters() if not p.requires_grad}
    assert {k for k in start if torch.equal(start[k], after[k])} >= classifier != set()
    assert any(not torch.equal(start[k], after[k]) for k in start)
    assert all(torch.equal(before[k], v) for k, v in whole.teacher.model.state_dict().items())


def test_each_epoch_shows_its_choice():
    distiller, loader = shifted()
    shown = torch.cat([batch.index for (batch,) in loader.epoch(0)])
    assert distiller.chosen.sum() >= 16
    assert set(shown.tolist()) <= set(distiller.rows().tolist())
    distiller.chosen.copy_(torch.arange(64) < 40)  # an epoch that goes on keeps its choice
    before = distiller.rows()
    again = torch.cat([batch.index for (batch,) in loader.epoch(1, start_step=1)])
    assert set(again.tolist()) <= set(before.tolist())
    distiller.reached.fill_(0.9)  # the student chooses now
    distiller.student.eval()
    with torch.no_grad():
        wanted = confident(torch.cat([distiller.student(b.inputs) for b in loader.plain()]), 0.95, 16)
    assert torch.equal(distiller.choose(), wanted)


def classifier(width, seed):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(width)
    first = nn.Conv2d(1, width, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


@pytest.fixture(scope="module")
def teacher():
    """Knows digits."""
    model, digits = classifier(16, 0), load_source("digits").train
    config = TrainConfig(epochs=8, lr=0.1, compile="off")
    loader = ResidentLoader(digits.inputs.float() / 255, digits.labels, batch_size=64)
    fit([Stage("teacher", Distiller(model, CrossEntropy()), config)], loader, quiet=True)
    return model


def pool(count=400, foreign=400):
    """Digits, and others with their pixels in another order, which nobody can name."""
    torch.manual_seed(5)
    digits = load_source("digits").train.inputs.float() / 255
    others = digits[-foreign:].flatten(1)[:, torch.randperm(64)].view(-1, 1, 8, 8) * torch.rand(foreign, 1, 1, 1)
    return ResidentLoader(torch.cat([digits[:count], others]), batch_size=32, classes=10)


def of_pool(teacher, select, epochs, **options):
    given = Cast(classifier(6, 1), Terms.of(SimKD()), FrozenTeacher(teacher), TrainConfig(), pool(**options))
    put_head(given.student, "reused", example=given.train.example(2), teacher=teacher)
    given.config = TrainConfig(epochs=epochs, lr=0.1, compile="off")
    return given, build("kd3", select=select)


@pytest.mark.slow
def test_images_that_the_teacher_knows_are_preferred(teacher):
    given, scheme = of_pool(teacher, True, 2)
    (training,) = scheme.trainings(given)
    distiller = training.stages[0].distiller.setup(training.train.example())
    chosen = distiller.choose()
    assert len(chosen) > 100
    assert (chosen < 400).float().mean() > 0.65  # half of the pool is


@pytest.mark.slow
def test_and_the_student_is_better_for_it(teacher):
    test = load_source("digits").test
    right = {}
    for select in (True, False):
        given, scheme = of_pool(teacher, select, 4, count=150, foreign=900)
        perform(scheme, given, quiet=True)
        with torch.no_grad():
            said = given.student.eval()(test.inputs.float() / 255).argmax(1)
        right[select] = (said == test.labels).float().mean().item()
    assert right[True] > right[False] + 0.04  # 0.42 and 0.33


def test_a_pool_of_another_source():
    whole = headed()
    poisoned = replace(whole, train=images(poison=True))
    found = trained(build("kd3", source="digits", samples=40, embed=5), poisoned)
    assert all(t.isfinite().all() for t in found.values() if t.is_floating_point())


def test_what_is_refused():
    with pytest.raises(ConfigError, match="loss={simkd: 1}"):
        list(build("kd3").trainings(cast(loss=KD())))
    with pytest.raises(ConfigError, match="cut into parts"):
        list(build("kd3").trainings(headed(accumulate=2)))
    vectors = ResidentLoader(torch.zeros(40, 5), batch_size=10, classes=3)
    with pytest.raises(ConfigError, match="of images"):
        list(build("kd3").trainings(replace(headed(), train=vectors)))
    (training,) = build("kd3").trainings(cast(loss=SimKD()))
    with pytest.raises(Exception, match=r"head\.projector"):  # the head is missing
        training.stages[0].distiller.setup(training.train.example())
