"""Prototypes of classes: averages that move, contrast between two sets, and labels by distance."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import TensorError
from limbeck.objectives.parts.class_prototypes import ClassPrototypes, alignment, likely


def test_prototypes_move_on_as_told_and_absent_classes_stay() -> None:
    found = ClassPrototypes(3, 4, momentum=0.9).double()
    first, labels = torch.randn(6, 4).double(), torch.tensor([0, 0, 1, 1, 1, 0])
    found.keep(found.folded(first, labels))
    wanted = torch.stack([F.normalize(first[labels == k].mean(0), dim=0) for k in (0, 1)])
    torch.testing.assert_close(found.value[:2], wanted)
    assert found.seen.tolist() == [True, True, False]
    second, weights = torch.randn(4, 4).double(), torch.rand(4).double()
    again = torch.tensor([1, 1, 2, 1])
    found.keep(found.folded(second, again, weights))
    own = again == 1
    mean = F.normalize((weights[own, None] * second[own]).sum(0) / weights[own].sum(), dim=0)
    torch.testing.assert_close(found.value[0], wanted[0])
    torch.testing.assert_close(found.value[1], F.normalize(0.9 * wanted[1] + 0.1 * mean, dim=0))
    assert found.seen.all()
    assert bool(found.value.isfinite().all())


def test_an_empty_batch_changes_nothing() -> None:
    found = ClassPrototypes(3, 4)
    found.keep(found.folded(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))
    assert not found.seen.any()
    assert bool((found.value == 0).all())


def test_gradients_flow_through_the_batch_alone_and_survive_the_move() -> None:
    found = ClassPrototypes(2, 3).double()
    found.keep(found.folded(torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1])))
    features = torch.randn(4, 3).double().requires_grad_()
    folded = found.folded(features, torch.tensor([0, 0, 1, 1]))
    value = alignment(folded[0], folded[0].detach().flip(0))
    found.keep(folded)
    value.backward()
    assert float(features.grad.abs().sum()) > 0
    assert not found.value.requires_grad


@pytest.mark.parametrize("classes", [2, 5])
def test_of_equal_prototypes_it_is_the_log_of_all_choices_each_way(classes: int) -> None:
    same = F.normalize(torch.ones(classes, 8), dim=1)
    assert float(alignment(same, same)) == pytest.approx(2 * math.log(2 * classes - 1), rel=1e-5)


def test_alignment_is_its_definition_and_least_where_classes_meet_and_are_apart() -> None:
    a, b = (F.normalize(torch.randn(4, 6).double(), dim=1) for _ in range(2))
    total = 0.0
    for x, y in ((a, b), (b, a)):
        for k in range(4):
            top = (x[k] @ y[k] / 0.1).exp()
            rest = sum((x[k] @ y[j] / 0.1).exp() + (x[k] @ x[j] / 0.1).exp() for j in range(4) if j != k)
            total = total - (top / (top + rest)).log() / 4
    torch.testing.assert_close(alignment(a, b), total)
    best = torch.eye(6).double()[:4]
    assert alignment(best, best) < min(alignment(a, b), alignment(best, a), alignment(best, best.roll(1, 0)))


def test_classes_that_one_language_lacks_count_nowhere() -> None:
    a, b = (F.normalize(torch.randn(4, 6).double(), dim=1) for _ in range(2))
    known = torch.tensor([True, False, True, True])
    torch.testing.assert_close(alignment(a, b, known), alignment(a[known], b[known]))
    a.requires_grad_()
    none = alignment(a, b, torch.zeros(4, dtype=torch.bool))
    none.backward()
    assert float(none.detach()) == 0.0
    assert bool(a.grad.isfinite().all())


def test_distances_tell_classes() -> None:
    x, prototypes = torch.randn(5, 4).double(), F.normalize(torch.randn(3, 4).double(), dim=1)
    every = torch.ones(3, dtype=torch.bool)
    unit = F.normalize(x, dim=1)
    wanted = (-((unit[:, None] - prototypes) ** 2).sum(-1) / 0.5).softmax(1)
    torch.testing.assert_close(likely(x, prototypes, every, temperature=0.5), wanted)
    sharp = likely(x, prototypes, every, temperature=1e-5)
    torch.testing.assert_close(sharp.sum(1), torch.ones(5).double())
    torch.testing.assert_close(sharp.max(1).values, torch.ones(5).double())
    some = likely(x, prototypes, torch.tensor([True, False, True]))
    assert bool((some[:, 1] == 0).all())
    torch.testing.assert_close(likely(x, prototypes, ~every), torch.full((5, 3), 1 / 3).double())


def test_mistakes() -> None:
    with pytest.raises(TensorError, match="same classes"):
        alignment(torch.eye(3), torch.eye(2))
