from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.feature.flex_kd import FlexKD, flex_kd_loss
from limbeck.objectives.parts.task_units import task_scores
from tests.objectives.reference import mean


def correlation(x: list[float], y: list[float]) -> float:
    a, b = [v - mean(x) for v in x], [v - mean(y) for v in y]
    return sum(p * q for p, q in zip(a, b, strict=True)) / sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def test_equals_the_formula_over_places_that_count() -> None:
    student, teacher = torch.randn(2, 3, 4, 5).double()
    mask = torch.tensor([[True, True, False, True], [False, True, True, True], [True, False, False, True]])
    s, t = student[mask].T.tolist(), teacher[mask].T.tolist()
    wanted = [(1 - correlation(a, b)) ** 2 for a, b in zip(s, t, strict=True)]
    assert flex_kd_loss(student, teacher, mask=mask).item() == pytest.approx(mean(wanted), rel=1e-9)
    each = flex_kd_loss(student, teacher, mask=mask, reduction="none")
    torch.testing.assert_close(each, torch.tensor(wanted).double())


def test_positive_scales_and_shifts_do_not_matter_and_negative_ones_cost_four() -> None:
    teacher = torch.randn(9, 5).double()
    student = teacher * torch.tensor([0.1, 2.0, 30.0, 1.0, 5.0]) + torch.randn(5).double()
    assert flex_kd_loss(student, teacher).item() == pytest.approx(0, abs=1e-20)
    assert flex_kd_loss(-student, teacher).item() == pytest.approx(4)
    other = torch.randn(9, 5).double()
    torch.testing.assert_close(flex_kd_loss(7 * other - 3, 0.2 * teacher + 1), flex_kd_loss(other, teacher))


def test_what_does_not_vary_says_nothing() -> None:
    teacher = torch.randn(9, 3).double()
    teacher[:, 1] = 2.0
    student = torch.randn(9, 3).double()
    rest = torch.tensor([0, 2])
    torch.testing.assert_close(flex_kd_loss(student, teacher), flex_kd_loss(student[:, rest], teacher[:, rest]))
    assert flex_kd_loss(student[:1], teacher[:1]).item() == 0


@pytest.mark.parametrize("of", ["loss", "logit"])
@pytest.mark.parametrize("labelled", [True, False])
def test_scores_are_gradients_of_the_head(of: str, labelled: bool) -> None:
    feature, head = torch.randn(2, 3, 6).double(), nn.Linear(6, 4).double()
    labels = torch.tensor([[1, -1, 0], [3, 2, 2]]) if labelled else None
    mask = torch.tensor([[True, True, True], [True, False, True]])
    leaf = feature.clone().requires_grad_()
    logits = head(leaf)
    target = logits.argmax(-1) if labels is None else labels.clamp(min=0)
    values = (logits.log_softmax(-1) if of == "loss" else logits).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    gradient = torch.autograd.grad(values.sum(), leaf)[0].abs()
    counts = mask if labels is None else mask & (labels >= 0)
    found = task_scores(feature, head.weight, head.bias, labels, of=of, mask=mask)  # type: ignore[arg-type]
    torch.testing.assert_close(found, gradient[counts].sum(dim=0))


def test_many_places_are_looked_at_in_parts() -> None:
    feature, head = torch.randn(3000, 6).double(), nn.Linear(6, 4).double()
    labels = torch.randint(0, 4, (3000,))
    pairs = zip(feature.split(700), labels.split(700), strict=True)
    parts = [task_scores(f, head.weight, head.bias, y) for f, y in pairs]
    torch.testing.assert_close(task_scores(feature, head.weight, head.bias, labels), sum(parts))


Made = tuple[FlexKD, nn.Sequential, nn.Sequential, DataInfo]


def made(student_width: int, teacher_width: int = 8, **options: object) -> Made:
    """A teacher whose head reads units 0, 3 and 7 only."""
    student = nn.Sequential(nn.Linear(5, student_width), nn.Tanh(), nn.Linear(student_width, 3))
    teacher = nn.Sequential(nn.Linear(5, teacher_width), nn.Tanh(), nn.Linear(teacher_width, 3))
    with torch.no_grad():
        read = torch.zeros(teacher_width)
        read[[0, 3, 7]] = 1.0
        teacher.get_parameter("2.weight").mul_(read)
    batches = [Batch(torch.randn(6, 5), labels=torch.randint(0, 3, (6,))) for _ in range(3)]
    return FlexKD(**options), student, teacher, DataInfo(batches=lambda: batches)  # type: ignore[arg-type]


@pytest.mark.parametrize("of", ["loss", "logit"])
def test_it_finds_the_units_that_the_head_reads(of: str) -> None:
    loss, student, teacher, data = made(3, of=of)
    batch = Batch(torch.randn(6, 5), labels=torch.randint(0, 3, (6,)))
    distiller = Distiller(student, loss, teacher).setup(batch, data)
    assert loss.units is not None
    assert loss.units.tolist() == [0, 3, 7]
    assert not list(loss.parameters())
    assert torch.equal(distiller.state_dict()["loss.objectives.flex_kd.units"], loss.units)
    own, other = student[:2](batch.inputs), teacher[:2](batch.inputs)[:, [0, 3, 7]]
    losses = distiller(batch)
    torch.testing.assert_close(losses.total, flex_kd_loss(own, other))
    losses.total.backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("width", "wanted"), [(8, list(range(8))), (12, list(range(8)))])
def test_a_student_as_wide_or_wider_takes_all_units(width: int, wanted: list[int]) -> None:
    loss, student, teacher, data = made(width)
    batch = Batch(torch.randn(6, 5))
    distiller = Distiller(student, loss, teacher).setup(batch, data)
    assert loss.units is not None
    assert loss.units.tolist() == wanted
    found = flex_kd_loss(student[:2](batch.inputs)[:, :8], teacher[:2](batch.inputs))
    torch.testing.assert_close(distiller(batch).total, found)


def test_training_brings_units_together() -> None:
    loss, student, teacher, data = made(3)
    batch = Batch(torch.randn(64, 5), labels=torch.randint(0, 3, (64,)))
    distiller = Distiller(student, loss, teacher).setup(batch, data)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.05)
    before = distiller(batch).total.item()
    for _ in range(100):
        optimizer.zero_grad()
        distiller(batch).total.backward()
        optimizer.step()
    assert distiller(batch).total.item() < 0.02 * before


def test_only_some_batches_are_looked_at() -> None:
    loss, student, teacher, data = made(3, batches=1)
    seen: list[Batch] = []

    def batches() -> object:
        for batch in data.batches():  # type: ignore[misc]
            seen.append(batch)
            yield batch

    Distiller(student, loss, teacher).setup(Batch(torch.randn(6, 5)), DataInfo(batches=batches))  # type: ignore[arg-type]
    assert len(seen) == 1


def test_what_it_refuses() -> None:
    feature: Tensor = torch.randn(4, 3)
    with pytest.raises(TensorError, match="student_feature"):
        flex_kd_loss(feature, feature[:, :2])
    with pytest.raises(ConfigError, match="batches"):
        FlexKD(batches=0)
    loss, student, teacher, _ = made(3)
    with pytest.raises(ConfigError, match="answers over the whole training set"):
        Distiller(student, loss, teacher).setup(Batch(torch.randn(6, 5)))
    with pytest.raises(ConfigError, match="not set up"):
        FlexKD()(Trace(feature), Trace(feature), Batch(feature))
