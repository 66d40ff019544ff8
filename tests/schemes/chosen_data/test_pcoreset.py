"""Active distillation: what is asked for in which round, what a batch is made of, and that it pays."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from limbeck.core.errors import DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.data.resident import ResidentLoader
from limbeck.data.sources.load import load_source
from limbeck.engine import TrainConfig
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.chosen_data.pcoreset import first_shots
from limbeck.schemes.chosen_data.querying import Halves, badge, balanced, endless, farthest, k_center_greedy


def test_the_cards_distances():
    pool = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]])
    distances = torch.cdist(pool, torch.tensor([[1.0, 0.0]])).flatten()
    assert distances.tolist() == pytest.approx([0.141, 0.707, 1.273], abs=1e-3)
    assert k_center_greedy(pool, torch.tensor([[1.0, 0.0]]), 3).tolist() == [2, 1, 0]


def test_picks_differ_cover_more_and_more_and_doubles_come_last():
    torch.manual_seed(0)
    points = torch.rand(30, 3)
    points[20:] = points[:10]
    centres = torch.rand(4, 3)
    rows = k_center_greedy(points, centres, 30)
    assert sorted(rows.tolist()) == list(range(30))
    radii = []
    for count in range(31):
        known = torch.cat([centres, points[rows[:count]]])
        radii.append(torch.cdist(points, known).amin(dim=1).max().item())
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(radii))
    assert radii[20] == pytest.approx(0, abs=1e-3)
    assert len(points[rows[:20]].unique(dim=0)) == 20
    wanted, near = [], torch.cdist(points, centres).amin(dim=1)
    for _ in range(10):  # by the definition
        wanted.append(int(near.argmax()))
        near = torch.cdist(points, torch.cat([centres, points[wanted]])).amin(dim=1)
    assert rows[:10].tolist() == wanted
    assert len(k_center_greedy(points, torch.zeros(0, 3), 5)) == 5


def test_badge_by_the_products_themselves():
    torch.manual_seed(1)
    chances, features = torch.randn(25, 4).softmax(1), torch.randn(25, 6)
    error = nn.functional.one_hot(chances.argmax(1), 4) - chances
    whole = (error.unsqueeze(2) * features.unsqueeze(1)).flatten(1)
    first = whole.norm(dim=1).argmax()
    unit = nn.functional.normalize(whole, dim=1)
    near = (1 - unit @ unit[first]).index_fill(0, first, torch.inf)
    wanted = farthest(lambda row: 1 - unit @ unit[row], near, 8)
    assert torch.equal(badge(chances, features, 8), wanted)
    assert wanted[0] == first


def test_classes_with_few_labels_are_asked_for_first():
    named = torch.tensor([0] * 10 + [1] * 10 + [2] * 10)
    order = torch.randperm(30)
    rows = balanced(named, torch.tensor([9, 1, 4, 0]), order, 8)
    counts = named[rows].bincount(minlength=3)
    assert len(rows.unique()) == 8
    assert counts.tolist() == [1, 5, 2]  # of 8, in shares of 1/10, 1/2 and 1/5; the last goes to the largest
    assert len(balanced(named, torch.tensor([9, 1, 4, 0]), order, 28).unique()) == 28


def test_endless_rows_begin_anew_in_another_order():
    rows = torch.arange(10, 17)
    pieces = endless(rows, 3, 0, 21)
    assert [view for _, view in pieces] == [0, 1, 2]
    orders = [own.tolist() for own, _ in pieces]
    assert all(sorted(order) == rows.tolist() for order in orders)
    assert orders[0] != orders[1]
    cut = torch.cat([own for a, b in ((0, 5), (5, 13), (13, 21)) for own, _ in endless(rows, 3, a, b)])
    assert cut.tolist() == [row for order in orders for row in order]


def halves(labelled=5, size=8, count=60):
    whole = ResidentLoader(torch.arange(count * 3.0).view(count, 3), torch.arange(count) % 4, batch_size=size)
    return Halves(whole, torch.arange(0, 3 * labelled, 3))


def test_half_a_batch_has_labels_and_resuming_changes_nothing():
    loader = halves()
    batches = list(loader.batches())
    assert len(batches) == loader.steps_per_epoch == 7
    for batch in batches:
        known = torch.isin(batch.index, loader.labelled)
        assert known.sum() == 4
        assert torch.equal(batch.labels >= 0, known)
        assert torch.equal(batch.labels[known], batch.index[known] % 4)
        assert torch.equal(batch.inputs[:, 0], batch.index * 3.0)
    rest = [batch for (batch,) in loader.epoch(0, start_step=4)]
    assert all(torch.equal(a.index, b.index) for a, b in zip(batches[4:], rest, strict=True))
    cut = [torch.cat([part.index for part in step]) for step in loader.epoch(0, parts=3)]
    assert all(torch.equal(a.index.sort().values, b.sort().values) for a, b in zip(batches, cut, strict=True))
    everything = Halves(loader.whole, torch.arange(60))
    assert all((batch.labels >= 0).all() and batch.size == 8 for batch in everything.batches())
    assert loader.describe() != halves(6).describe()


def net(number=0, width=32):
    torch.manual_seed(number)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def digits(samples=600, seed=3, batch=32):
    train = load_source("digits").train
    return as_loader(train.subset(torch.arange(samples)), batch_size=batch, train=True, seed=seed)


def cast(loss=None, teacher=None, steps=3, **given):
    terms = Terms.of(0.5 * CrossEntropy() + 1.0 * KD(2.0) if loss is None else loss)
    config = TrainConfig(steps=steps, lr=0.1, compile="off")
    return Cast(net(), terms, FrozenTeacher(teacher or net(7)), config, digits(), fresh=lambda n: net(n), **given)


@pytest.mark.parametrize("strategy", ["pcoreset", "random", "entropy", "coreset", "badge", "class_balanced"])
def test_each_round_asks_for_new_samples(strategy, tmp_path):
    given = cast(folder=None)
    perform(build("pcoreset", strategy=strategy, rounds=2, budget=7, shots=2), given, quiet=True, out=tmp_path)
    told = json.loads((tmp_path / "asked_samples.json").read_text())["rounds"]
    asked = [set(part["asked"]) for part in told]
    assert [len(part) for part in asked] == [20, 7, 7]
    assert len(set.union(*asked)) == 34
    labels = given.train.labels
    assert labels[torch.tensor(told[0]["asked"])].bincount().tolist() == [2] * 10


def test_pcoreset_asks_by_what_the_rounds_model_says():
    given = cast()
    trainings = build("pcoreset", rounds=1, budget=5).trainings(given)
    first = next(trainings)
    known = first.train.labelled
    second = next(trainings)
    with torch.no_grad():
        chances = first.student.eval()(torch.cat([b.inputs for b in given.train.plain()])).softmax(1)
    pool = torch.tensor([i for i in range(600) if i not in set(known.tolist())])
    wanted = pool[k_center_greedy(chances[pool], chances[known], 5)]
    assert second.train.labelled.tolist() == [*known.tolist(), *wanted.tolist()]
    assert second.student is given.student


def test_samples_without_a_label_are_never_asked_about():
    train = load_source("digits").train
    labels = train.labels[:80].masked_fill(torch.arange(80) % 2 == 0, -1)
    loader = ResidentLoader(train.inputs[:80].float(), labels, batch_size=16, classes=10)
    known = first_shots(loader, labels, 1, 0)
    assert (labels[known] >= 0).all()
    assert len(known) == len(labels[labels >= 0].unique())
    given = cast()
    given.train = loader
    trainings = list(build("pcoreset", strategy="random", rounds=9, budget=12).trainings(given))
    assert len(trainings) == 1 + -(-(40 - len(known)) // 12)  # then all are known
    assert set(trainings[-1].train.labelled.tolist()) == set(range(1, 80, 2))
    with pytest.raises(DataError, match="no sample has a label"):
        first_shots(loader, torch.full((80,), -1), 1, 0)


@pytest.mark.slow
def test_a_teacher_helps_in_each_round_and_the_choice_helps_too():
    torch.manual_seed(0)
    teacher = net(7, 64)
    whole = cast(CrossEntropy(), steps=300)
    whole.student = teacher
    perform(build("offline"), whole, quiet=True)
    test = load_source("digits").test

    def right(strategy, loss, rounds, seed):
        given = cast(loss, teacher, steps=100)
        given.seed = seed
        perform(build("pcoreset", strategy=strategy, rounds=rounds), given, quiet=True)
        with torch.no_grad():
            said = given.student.eval()(test.inputs.float() / 255).argmax(1)
        return (said == test.labels).float().mean().item()

    for rounds in (0, 2):
        assert right("pcoreset", None, rounds, 0) > right("pcoreset", CrossEntropy(), rounds, 0)
    scores = {s: sum(right(s, CrossEntropy(), 3, seed) for seed in range(3)) for s in ("pcoreset", "random")}
    assert scores["pcoreset"] >= scores["random"]
