"""Operations of a training: counted on its first steps, by hand on linear layers, the same over a resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.engine.operations import Operations, estimate
from limbeck.objectives import KD, CrossEntropy
from limbeck.recipes.load import load
from limbeck.recipes.run import run


def stage(steps: int = 6, teacher: bool = True, **settings) -> Stage:
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)) if teacher else None
    loss = CrossEntropy() + KD() if teacher else CrossEntropy()
    return Stage("one", Distiller(nn.Linear(6, 3), loss, judge), TrainConfig(steps=steps, **settings))


def test_by_hand(loader):
    """A forward of so many samples through 6 x 3 weights is 2 * 18 each; backward makes the weights' gradient alone."""
    train = loader()
    size = train.batch_size
    found = fit([stage()], train, quiet=True).operations
    student, teacher = 2 * size * 6 * 3, 2 * size * (6 * 40 + 40 * 3)
    assert found == {"total": 6 * (2 * student + teacher), "teacher": 6 * teacher}
    alone = fit([stage(teacher=False)], train, quiet=True).operations
    assert alone == {"total": 6 * 2 * student, "teacher": 0}


def test_stages_and_micro_batches_add_up(loader):
    train = loader()
    one = fit([stage()], train, quiet=True).operations
    parts = fit([stage(accumulate=4)], train, quiet=True).operations
    assert parts == pytest.approx(one)
    first, second = stage(2), stage(4)
    second = Stage("two", Distiller(first.distiller.student, KD(), second.distiller.teacher), second.config)
    both = fit([first, second], train, quiet=True).operations
    assert both == pytest.approx(one)


def test_a_resumed_run_says_the_same(loader, tmp_path):
    settings = {"checkpoint_every": 2, "keep": 9}
    whole = fit([stage(7, **settings)], loader(), out=tmp_path, quiet=True).operations
    for name in ("step-00000004", "step-00000006", "step-00000007"):
        (tmp_path / "checkpoints" / name).rename(tmp_path / name)
    again = fit([stage(7, **settings)], loader(), out=tmp_path, resume=True, quiet=True).operations
    assert again == whole


def test_counting_changes_nothing(loader, monkeypatch):
    counted, plain = stage(), stage()
    fit([counted], loader(), quiet=True)
    monkeypatch.setattr("limbeck.engine.operations.COUNTED", 0)
    fit([plain], loader(), quiet=True)
    assert torch.equal(counted.distiller.student.weight, plain.distiller.student.weight)
    assert "_teach" not in vars(counted.distiller)


def test_counting_leaves_attention_as_it_is():
    """The same bits; and by hand: the inputs need no gradient, attention's backward computes its scores again."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(4, 33, 16, generator=torch.Generator().manual_seed(0))

    def done() -> list[torch.Tensor]:
        layer.zero_grad()
        layer(x).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    plain, operations = done(), Operations()
    with operations.counting(Distiller(layer, CrossEntropy())):
        counted = done()
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))
    linear, attention = 2 * 4 * 33 * (16 * 48 + 16 * 16 + 2 * 16 * 32), 2 * 2 * 4 * 33 * 33 * 16
    assert operations.whole == 3 * linear - 2 * 4 * 33 * 16 * 48 + 3.5 * attention


def test_an_estimate_is_near(loader):
    train = loader()
    one = stage()
    batch = train.example(4)
    whole, teacher = estimate(one.distiller.setup(batch), batch, train.batch_size)
    counted = fit([stage(1)], train, quiet=True).operations
    assert teacher == counted["teacher"]
    assert counted["total"] <= whole <= 1.5 * counted["total"]  # its backward has the inputs' gradient, too
    assert Operations.estimated(one.distiller, batch, train.batch_size).of(3)["total"] == pytest.approx(3 * whole)


def test_all_trainings_of_a_scheme_count(tmp_path):
    small = [
        "data.samples=60",
        "data.batch_size=20",
        "teacher={model: mlp_16, untrained: true}",
        "student={model: mlp_8}",
        "players={assistant: {model: mlp_8}}",
        "train={steps: 3}",
        "loss=kd",
    ]
    plain = run(load("digits", small), tmp_path / "plain", quiet=True)["training"]
    chain = run(load("digits", [*small, "scheme=takd"]), tmp_path / "chain", quiet=True)["training"]
    assert chain["steps"] == 2 * plain["steps"]
    own = plain["operations"]["total"] - plain["operations"]["teacher"]
    # In the second training a student's like teaches, whose forward is a part of what a student's step takes.
    assert plain["operations"]["total"] + own < chain["operations"]["total"] < plain["operations"]["total"] + 2 * own
