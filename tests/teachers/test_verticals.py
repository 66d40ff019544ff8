"""Specialists of some classes: who is asked, what counts of an answer, and what all others say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.teachers.verticals import NEVER, VerticalTeachers

VERTICALS = [[0, 3, 4], [1, 2]]


class Counted(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear, self.asked = nn.Linear(4, classes), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += len(x)
        return self.linear(x)


def teacher(most: int = 100, sizes: tuple[int, int] = (3, 2)) -> VerticalTeachers:
    torch.manual_seed(0)
    found = VerticalTeachers([Counted(n) for n in sizes], VERTICALS, most)
    found.attach(("logits",), Batch(torch.zeros(2, 4), torch.tensor([0, 1])))
    for member in found.members:
        member.model.asked = 0  # type: ignore[attr-defined]
    return found


def test_labels_choose_who_is_asked_and_others_say_no() -> None:
    found, x = teacher(), torch.randn(5, 4)
    labels = torch.tensor([3, 1, -1, 2, 0])
    said = found(Batch(x, labels)).logits
    first, second = (member.model.linear for member in found.members)  # type: ignore[attr-defined]
    for row, label in enumerate(labels.tolist()):
        own = VERTICALS[0] if label in VERTICALS[0] else VERTICALS[1]
        wanted = torch.full((5,), NEVER)
        if label >= 0:
            wanted[own] = (first if own is VERTICALS[0] else second)(x[row])
        torch.testing.assert_close(said[row], wanted)
    assert [member.model.asked for member in found.members] == [2, 2]  # type: ignore[attr-defined]
    assert bool((said.sigmoid()[labels < 0] == 0).all())


def test_a_sample_of_several_labels_asks_every_specialist_of_one() -> None:
    found, x = teacher(), torch.randn(2, 4)
    labels = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 1.0]])
    said = found(Batch(x, labels)).logits
    assert (said > NEVER).tolist() == [[True] * 5, [True, False, False, True, True]]


def test_only_the_likeliest_count() -> None:
    whole, few = teacher(), teacher(most=2)
    batch = Batch(torch.randn(6, 4), torch.zeros(6, dtype=torch.long))
    every, kept = whole(batch).logits, few(batch).logits
    assert bool(((kept > NEVER).sum(dim=1) == 2).all())
    best = every.topk(2, dim=1)
    torch.testing.assert_close(kept.gather(1, best.indices), best.values)


def test_specialists_may_answer_for_all_classes() -> None:
    found, x = teacher(sizes=(5, 5)), torch.randn(3, 4)
    said = found(Batch(x, torch.tensor([1, 1, 2]))).logits
    torch.testing.assert_close(said[:, [1, 2]], found.members[1].model.linear(x)[:, [1, 2]])  # type: ignore[attr-defined]


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="every vertical has its specialist"):
        VerticalTeachers([nn.Linear(4, 2)], VERTICALS)
    found = teacher(sizes=(4, 2))
    with pytest.raises(TensorError, match="a specialist answers"):
        found(Batch(torch.zeros(1, 4), torch.tensor([0])))
    for labels in (torch.tensor([7]), torch.zeros(1, 3)):
        with pytest.raises(TensorError, match="labels are of other classes"):
            found(Batch(torch.zeros(1, 4), labels))
