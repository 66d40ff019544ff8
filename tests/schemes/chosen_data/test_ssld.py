"""SSLD: the released loss, which samples are chosen, that labels are unused, and that the pool helps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.data.sources.load import load_source
from limbeck.engine import TrainConfig, fit
from limbeck.engine.stage import Stage
from limbeck.objectives import JSD, KD, CrossEntropy, ReverseKL
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.chosen_data.ssld import lookalikes, topk_per_class
from tests.schemes.pools import half_labelled


def released() -> Terms:
    return 0.5 * KD(1.0) + 0.5 * ReverseKL()


def net(seed: int, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


class Said(nn.Module):
    """Logits that are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(x)]


def value(student: torch.Tensor, teacher: torch.Tensor, loss: Terms | None = None) -> tuple[float, torch.Tensor]:
    batch, model = Batch(torch.zeros(len(student), 1, dtype=torch.float64)), Said(student)
    total = Distiller(model, loss or released(), Said(teacher)).setup(batch)(batch).total
    total.backward()
    return total.item(), model.logits.grad


def test_the_released_loss_over_batch_size_times_classes():
    student, teacher = (3 * torch.randn(7, 5, dtype=torch.float64) for _ in range(2))
    p, q = student.softmax(1), teacher.softmax(1)
    theirs = ((q * (q / p).log() * 5).sum() + (p * (p / q).log() * 5).sum()) / 2  # _jsdiv of its ppcls/modeling/loss.py
    assert value(student, teacher)[0] == pytest.approx(theirs.item() / (7 * 5))
    assert value(teacher, student)[0] == pytest.approx(theirs.item() / (7 * 5))  # symmetric


def test_the_cards_example_and_the_bound():
    half, sure = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    assert value(half, sure)[0] == pytest.approx(0.5 * (0.368 + 0.511), abs=1e-3)
    far = torch.tensor([[40.0, 0.0]], dtype=torch.float64)
    assert value(far, far.flip(1), Terms.of(JSD()))[0] == pytest.approx(math.log(2), abs=1e-6)
    found, gradient = value(half + 3, half)
    assert found == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


def test_each_class_chooses_its_best():
    scores = torch.rand(50, 4)
    rows = topk_per_class(scores, 3)
    assert set(rows.tolist()) == {int(r) for c in range(4) for r in scores[:, c].argsort(descending=True)[:3]}
    assert len(topk_per_class(scores, 900)) == 50


def test_what_looks_like_validation_data_is_left_out():
    features = torch.randn(9, 6)
    assert lookalikes(features, 3 * features[[2, 5]], 0.999).nonzero().flatten().tolist() == [2, 5]


def cast(seed: int = 0, **changes):
    source = half_labelled()
    given = {"train": as_loader(source.train, batch_size=16, train=True, seed=3), **changes}
    config = TrainConfig(epochs=4, lr=0.1, device="cpu", compile="off")
    loss = given.pop("loss", released())
    return Cast(net(seed), Terms.of(loss), FrozenTeacher(given.pop("teacher", net(1))), config, **given)


def test_chosen_and_trained_in_two_parts():
    given = cast()
    labels = given.train.labels
    first, second = build("ssld", per_class=2, finetune=0.5).trainings(given)
    chosen = first.train.only[labels[first.train.only] < 0]
    pool = (labels < 0).nonzero().flatten()
    inputs = torch.cat([batch.inputs for batch in given.train.chosen(pool).plain()])
    wanted = pool[topk_per_class(given.teacher.model(inputs).softmax(1), 2)]
    assert 10 <= len(chosen) <= 20
    assert torch.equal(chosen, wanted)
    assert torch.equal(second.train.only, (labels >= 0).nonzero().flatten())
    assert (first.stages[0].config.lr, second.stages[0].config.lr) == (0.1, pytest.approx(0.001))
    assert (first.stages[0].config.epochs, second.stages[0].config.epochs) == (4, 2)
    assert first.student is second.student is given.student


def test_copies_of_validation_images_are_not_chosen():
    source = half_labelled()
    held = as_loader(source.train.subset(torch.arange(100, 140)), batch_size=40)
    given = cast(validation=held)
    free, _ = build("ssld", per_class=500, similar=None).chosen(given, given.train)
    kept, facts = build("ssld", per_class=500).chosen(given, given.train)
    own = set(range(100, 140))
    assert own & set(free.tolist())
    assert not own & set(kept.tolist())
    assert facts["like_validation"] >= len(own & set(free.tolist()))


def test_labels_change_nothing():
    students = []
    for turned in (False, True):
        given = cast()
        if turned:
            seen = given.train.labels >= 0
            given.train.labels = torch.where(seen, (given.train.labels + 3) % 10, -1)
            given.train._labels = given.train.labels
        perform(build("ssld", per_class=3), given, quiet=True)
        students.append(given.student)
    for one, other in zip(*(s.parameters() for s in students), strict=True):
        assert torch.equal(one, other)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="teacher alone"):
        list(build("ssld").trainings(cast(loss=CrossEntropy() + KD())))
    plain = as_loader(load_source("digits").train, batch_size=16, train=True)
    with pytest.raises(DataError, match="every sample has a label"):
        list(build("ssld").trainings(cast(train=plain)))


@pytest.mark.slow
def test_the_pool_helps():
    source = load_source("digits")
    config = TrainConfig(epochs=6, lr=0.1, device="cpu", compile="off")
    teacher = net(5, 64)
    train = as_loader(source.train, batch_size=32, train=True, seed=3)
    fit([Stage("labels", Distiller(teacher, CrossEntropy()), config)], train, quiet=True)
    test = next(iter(as_loader(source.test, batch_size=1000).batches()))
    right = {}
    for name in ("pool", "labelled"):
        given = cast(teacher=teacher)
        given.config = config.model_copy(update={"epochs": None, "steps": 200})
        if name == "pool":
            perform(build("ssld", per_class=40, finetune=0.1), given, quiet=True)
        else:
            rows = (given.train.labels >= 0).nonzero().flatten()
            distiller = Distiller(given.student, released(), FrozenTeacher(teacher))
            fit([Stage("labelled", distiller, given.config)], given.train.chosen(rows), quiet=True)
        right[name] = (given.student(test.inputs).argmax(1) == test.labels).float().mean().item()
    assert right["pool"] > right["labelled"]
