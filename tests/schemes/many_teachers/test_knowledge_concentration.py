"""Knowledge concentration: the loss, who trains on what, and that specialists help."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.data.resident import ResidentLoader
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.many_teachers.knowledge_concentration import VerticalLabels, concentration_loss, samples_of

VERTICALS = [[0, 3], [1, 2, 4]]


def net(seed: int, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, classes)).double()


def student(**options) -> Distiller:
    named = {"a": FrozenTeacher(net(1, 2)), "b": FrozenTeacher(net(2, 3))}
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(steps=3), teachers=named)
    (training,) = build("knowledge_concentration", verticals=VERTICALS, **options).trainings(cast)
    return training.stages[0].distiller.setup(batch()).train()


def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    return Batch(torch.randn(8, 4, generator=draw).double(), torch.tensor([0, 1, 2, 3, 4, -1, 3, 1]))


def test_the_loss_is_that_of_sums_over_samples_and_classes() -> None:
    """With the top two of each specialist; a sample without a label counts nowhere."""
    found, given = student(most=2), batch()
    total, members = 0.0, (net(1, 2), net(2, 3))
    for x, label in zip(given.inputs, given.labels.tolist(), strict=True):
        if label < 0:
            continue
        vertical = 0 if label in VERTICALS[0] else 1
        said = members[vertical](x).sigmoid()
        target = torch.zeros(5).double()
        for place in said.argsort(descending=True)[:2].tolist():
            target[VERTICALS[vertical][place]] = said[place]
        p = found.student(x).sigmoid()
        total = total - (target * p.log() + (1 - target) * (1 - p).log()).sum()
    torch.testing.assert_close(found(given).total, total / 7)


def test_one_vertical_of_all_classes_is_soft_distillation() -> None:
    z, t = torch.randn(6, 5).double(), torch.randn(6, 5).double()
    wanted = F.binary_cross_entropy_with_logits(z, t.sigmoid(), reduction="sum") / 6
    torch.testing.assert_close(concentration_loss(z, t), wanted)
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(steps=3), teachers={"a": FrozenTeacher(net(1))})
    (training,) = build("knowledge_concentration", verticals=[5]).trainings(cast)
    found, x = training.stages[0].distiller.setup(batch()).train(), batch().inputs
    given = Batch(x, torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(found(given).total, concentration_loss(found.student(x), net(1)(x)))


def test_firing_in_another_vertical_costs() -> None:
    found, given = student(), batch()
    rows = torch.tensor([0, 3, 6])
    logits = found.student(given.inputs[rows]).detach().requires_grad_()
    teacher = found.teacher(Batch(given.inputs[rows], given.labels[rows])).logits
    concentration_loss(logits, teacher).backward()
    torch.testing.assert_close(logits.grad[:, [1, 2, 4]], logits.sigmoid().detach()[:, [1, 2, 4]] / 3)


def test_parts_of_a_step_add_up() -> None:
    found, given = student(labels=0.5), batch()
    totals = {"labels": given.count("labels")}
    parts = [found(Batch(given.inputs[r], given.labels[r], totals=totals)).total for r in (slice(0, 5), slice(5, 8))]
    torch.testing.assert_close(sum(parts), found(given).total)


def test_specialists_train_on_their_own_samples_and_classes() -> None:
    labels = torch.arange(20) % 5
    loader = ResidentLoader(torch.randn(20, 4).double(), labels, batch_size=4, shuffle=True)
    assert samples_of(loader, [0, 3]).tolist() == [n for n in range(20) if n % 5 in (0, 3)]
    many = ResidentLoader(torch.randn(3, 4), torch.tensor([[1.0, 0, 0], [0, 1.0, 1], [0, 0, 0]]), batch_size=2)
    assert samples_of(many, [0, 2]).tolist() == [0, 1]
    z, y = torch.randn(8, 5).double(), batch().labels
    known = y >= 0
    wanted = F.binary_cross_entropy_with_logits(
        z[known][:, [0, 3]], torch.stack([y == 0, y == 3], 1)[known].double(), reduction="sum"
    )
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(steps=2), loader, fresh=lambda n: net(n))
    trainings = build("knowledge_concentration", verticals=VERTICALS).trainings(cast)
    first = next(trainings)
    assert (first.name, first.judged) == ("specialist_0", False)
    assert set(labels[first.train.only].tolist()) == {0, 3}
    (value,) = first.stages[0].distiller.loss
    assert value.places.tolist() == [0, 3]
    torch.testing.assert_close(value(Trace(None, {"logits": z}), Trace(None), batch()), wanted / 7)
    many_labels = torch.rand(8, 5).round().double()
    found = value(Trace(None, {"logits": z}), Trace(None), Batch(batch().inputs, many_labels))
    wanted = F.binary_cross_entropy_with_logits(z[:, [0, 3]], many_labels[:, [0, 3]], reduction="sum") / 8
    torch.testing.assert_close(found, wanted)


def test_three_specialists_make_a_better_student_than_poor_labels() -> None:
    """Specialists that know the rule; a generalist of the same size and steps learns from labels, of which few are
    wrong within their vertical."""
    draw = torch.Generator().manual_seed(0)
    x, fresh = torch.randn(2, 240, 6, generator=draw)

    def rule(x: torch.Tensor) -> torch.Tensor:
        return 2 * x[:, :3].argmax(1) + (x[:, 3] > 0).long()

    labels = rule(x)
    wrong = torch.rand(240, generator=draw) < 0.4
    noisy = torch.where(wrong, labels // 2 * 2 + (1 - labels % 2), labels)

    class Knows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([-8 * x[:, 3], 8 * x[:, 3]], dim=1)

    scores = {}
    for concentrated in (False, True):
        torch.manual_seed(0)
        own = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6))
        named = {f"t{n}": FrozenTeacher(Knows()) for n in range(3)}
        cast = Cast(own, Terms.of(CrossEntropy()), None, TrainConfig(), teachers=named)
        (training,) = build("knowledge_concentration", verticals=[2, 2, 2]).trainings(cast)
        given = Batch(x, noisy)
        taught = training.stages[0].distiller.setup(given).train()
        plain = Distiller(own, VerticalLabels(list(range(6)))).setup(given).train()
        optimizer = torch.optim.Adam(own.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            (taught if concentrated else plain)(given).total.backward()
            optimizer.step()
        scores[concentrated] = float((own(fresh).argmax(1) == rule(fresh)).float().mean())
    assert scores[True] > scores[False] + 0.05


def test_unsaid_all_share_the_classes_evenly() -> None:
    named = {"a": FrozenTeacher(net(1, 3)), "b": FrozenTeacher(net(2, 2))}
    loader = ResidentLoader(torch.randn(9, 4).double(), torch.arange(9) % 5, batch_size=3, classes=5)
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(steps=2), loader, teachers=named)
    (training,) = build("knowledge_concentration").trainings(cast)
    assert [p.tolist() for p in training.stages[0].distiller.teacher.places] == [[0, 1, 2], [3, 4]]
    cast.teachers = {}
    with pytest.raises(ConfigError, match="which classes belong together"):
        next(build("knowledge_concentration").trainings(cast))


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="every class is of one vertical"):
        build("knowledge_concentration", verticals=[[0, 1], [1]])
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(steps=2), teachers={"a": FrozenTeacher(net(1))})
    with pytest.raises(ConfigError, match="its specialist"):
        next(build("knowledge_concentration", verticals=[3, 2]).trainings(cast))
    loader = ResidentLoader(torch.randn(4, 4).double(), torch.zeros(4, dtype=torch.long), batch_size=2)
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(steps=2), loader, fresh=lambda n: net(n))
    with pytest.raises(DataError, match="no samples"):
        perform(build("knowledge_concentration", verticals=[[1], [0, 2, 3, 4]]), cast, quiet=True)
