"""WAKD: averages of weights against plain means of every step's, valleys against scripted losses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import as_teacher
from limbeck.data.build import as_loader
from limbeck.data.resident import ResidentLoader
from limbeck.engine import TrainConfig
from limbeck.engine.evaluation import evaluate
from limbeck.engine.fitting import fit
from limbeck.engine.stage import Stage
from limbeck.objectives import KD
from limbeck.schemes import Cast, build
from limbeck.schemes.in_steps.weight_average import Mean, ValleyMean, valley


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def cast(config: TrainConfig | None = None, validation: bool = False, labels: bool = False, **more: object) -> Cast:
    generator = torch.Generator().manual_seed(3)
    inputs, classes = torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    train = ResidentLoader(inputs, classes if labels else None, batch_size=8, shuffle=True, drop_last=True)
    held = as_loader((inputs[:9] + 0.1, classes[:9]), batch_size=4) if validation else None
    settings = {"student": net(), "loss": Terms.of(KD(5.0)), "teacher": as_teacher(net(1))}
    config = config or TrainConfig(steps=12, lr=0.2)
    return Cast(**{**settings, "config": config, "train": train, "validation": held, **more})


def watched(given: Cast, **options: object):
    """A run of the scheme, and what its walker's weights and its loss on validation data were after every step."""
    (training,) = build("wakd", **options).trainings(given)
    distiller, seen = training.stages[0].distiller, []
    forward = distiller.forward

    def noted(batch: Batch, turn: str = "student"):
        if turn == "average":
            seen.append([p.detach().clone() for p in distiller.walking.student.parameters()])
        return forward(batch, turn)

    distiller.forward = noted
    fit(training.stages, given.train, given.validation, quiet=True)
    return distiller, seen


def test_a_valley_begins_and_ends_where_the_algorithm_says():
    assert valley([5, 4, 3, 2]) == (None, None)
    assert valley([5, 4, 2, 3]) == (None, None)  # one more is needed
    assert valley([5, 4, 2, 3, 2.5]) == (2, None)
    flat = [5, 4, 2, 3, 2.5]  # the bound is 1.3 * 2.5 = 3.25
    assert valley([*flat, 2, 4, 4, 4, 4, 4]) == (2, None)
    assert valley([*flat, 2, 4, 4, 4, 4, 4, 4]) == (2, 6)
    assert valley([*flat, 2, 4, 4, 3, 4, 4, 4]) == (2, None)
    assert valley([*flat, 4, 4, 4, 4, 4, 4, 1, 1]) == (2, 5)
    assert valley([1.0, 1.0, 1.0], converge=3) == (0, None)


def test_a_running_mean_is_the_mean():
    weights = [[torch.randn(3, 2), torch.randn(5)] for _ in range(9)]
    average = [torch.zeros(3, 2), torch.zeros(5)]
    mean = Mean(first=4)
    for step, live in enumerate(weights, 1):
        mean.follow(average, live, step)
        if step < 4:
            assert all(torch.equal(a, b) for a, b in zip(average, live, strict=True))
    for place, value in enumerate(average):
        torch.testing.assert_close(value, torch.stack([w[place] for w in weights[3:]]).mean(0))


@pytest.mark.parametrize(
    "losses", [[5, 4, 2, 3, 3, 9, 9, 9, 1], [5, 4, 3, 2, 1], [3, 2, 2.2, 2.1, 2, 2.3, 2, 9, 2, 9, 9, 2]]
)
def test_a_valleys_mean_is_that_of_its_blocks(losses):
    """Whenever it is looked at: what is in the valley so far, without what is past its end."""
    torch.manual_seed(0)
    average = [torch.zeros(2, 2)]
    keeper, blocks = ValleyMean(average, len(losses), 2, 2, 2, 1.2), []
    for number, loss in enumerate(losses):
        live = [torch.randn(2, 2) for _ in range(2)]
        ends = [keeper.gather([w], 2 * number + k) for k, w in enumerate(live, 1)]
        assert ends == [False, True]
        keeper.judge(average, loss)
        blocks.append(torch.stack(live).mean(0))
        start, stop = valley(losses[: number + 1], 2, 2, 1.2)
        wanted = blocks[-1] if start is None else torch.stack(blocks[start:stop]).mean(0)
        torch.testing.assert_close(average[0], wanted)


def test_the_student_is_the_mean_of_every_step_from_the_start_on_and_labels_are_never_read():
    given = cast()
    distiller, seen = watched(given, start=0.5)
    assert len(seen) == 12
    for place, value in enumerate(given.student.parameters()):
        wanted = torch.stack([weights[place] for weights in seen[5:]]).mean(0)
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-5, atol=1e-6)
    assert not any(m._forward_hooks for m in [*given.student.modules(), *distiller.walking.student.modules()])


def test_a_start_at_the_end_is_plain_distillation():
    """To the bit, with the same statistics: those of a student whose normalisation is left alone."""
    given = cast()
    plain = copy.deepcopy(given.student)

    class Frozen(Distiller):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.student[1].eval()
            return self

    fit([Stage("plain", Frozen(plain, Terms.of(KD(5.0)), as_teacher(net(1))), given.config)], given.train, quiet=True)
    before = {name: value.clone() for name, value in given.student.named_buffers()}
    watched(given, start=1.0)
    for name, value in given.student.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert all(torch.equal(value, before[name]) for name, value in given.student.named_buffers())


def test_statistics_that_are_recomputed_are_the_averaged_students_own():
    given = cast(TrainConfig(steps=40, lr=0.05))
    watched(given, statistics="recompute")
    inputs = torch.cat([batch.inputs for batch in given.train.plain()])
    wanted = given.student[0](inputs).mean(0).detach()
    torch.testing.assert_close(given.student[1].running_mean, wanted, rtol=0.2, atol=0.1)


def test_swad_averages_the_valley_of_the_validation_loss():
    given = cast(validation=True)
    distiller, seen = watched(given, average="swad", every=3, converge=2, tolerance=2, ratio=1.0)
    losses, probe = [], copy.deepcopy(distiller.walking.student).eval()
    teacher = given.teacher.model.eval()
    inputs = torch.cat([batch.inputs for batch in given.validation.plain()])
    for weights in seen[2::3]:
        for own, value in zip(probe.parameters(), weights, strict=True):
            own.data.copy_(value)
        p, q = ((m(inputs) / 5).log_softmax(1) for m in (teacher, probe))
        losses.append((25 * (p.exp() * (p - q)).sum(1).mean()).item())
    torch.testing.assert_close(distiller.keeper.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    start, stop = valley(losses, 2, 2, 1.0)
    first, last = (9, 12) if start is None else (3 * start, 12 if stop is None else 3 * stop)
    for place, value in enumerate(given.student.parameters()):
        wanted = torch.stack([weights[place] for weights in seen[first:last]]).mean(0)
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_sma_keeps_the_running_mean_that_does_best():
    given = cast(validation=True, labels=True)
    (training,) = build("wakd", average="sma", every=2).trainings(given)
    fitted = fit(training.stages, given.train, given.validation, quiet=True)
    judged = [line["accuracy"] for line in fitted.history if line["split"] == "validation"]
    assert len(judged) == 6
    assert fitted.best["value"] == max(judged)
    assert evaluate(given.student, given.validation)["accuracy"] == max(judged)


def test_parts_of_a_step_move_the_average_once():
    whole, cut = cast(), cast(TrainConfig(steps=12, lr=0.2, accumulate=3))
    for given in (whole, cut):
        (training,) = build("wakd").trainings(given)
        fit(training.stages, given.train, quiet=True)
        assert int(training.stages[0].distiller.steps) == 12
    for own, other in zip(whole.student.parameters(), cut.student.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_where_steps_are_rough_the_average_does_better_than_the_last_weights_on_a_domain_nobody_saw():
    """A student that cannot say all that its teacher says, small batches, and a constant rate."""
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        teacher[2].weight.mul_(8)
    train = ResidentLoader(torch.randn(200, 4), batch_size=4)
    config = TrainConfig(steps=150, lr=0.2, schedule="constant", weight_decay=0.0)
    given = cast(config, student=student, teacher=as_teacher(teacher), train=train, loss=Terms.of(KD(1.0)))
    distiller, _ = watched(given, start=0.3)
    unseen = 1.3 * torch.randn(500, 4) + 0.5
    p = teacher(unseen).log_softmax(1)
    found, last = (
        float((p.exp() * (p - m(unseen).log_softmax(1))).sum(1).mean().detach())
        for m in (student, distiller.walking.student)
    )
    assert found < 0.9 * last


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ({}, {"average": "sma"}, "told by validation data"),
        ({"config": TrainConfig(steps=4, ema=0.9)}, {}, "averages weights itself"),
        ({}, {"start": 2.0}, "scheme.start"),
        ({}, {"ratio": 0.5}, "scheme.ratio"),
    ],
)
def test_mistakes_are_told(more, options, message):
    with pytest.raises(ConfigError, match=message):
        list(build("wakd", **options).trainings(cast(**more)))
    with pytest.raises(ConfigError, match="not one whole block"):
        list(build("wakd", average="swad").trainings(cast(validation=True)))
