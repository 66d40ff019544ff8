"""Several players in one step: each has its optimizer, and nobody's gradient reaches another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.objectives import CrossEntropy


class Duel(Distiller):
    """A shift of the inputs that raises the student's loss, and a student that lowers it, twice."""

    turns = ("shift", "student", "student")

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student, CrossEntropy())
        self.shift = nn.Parameter(torch.zeros(6))
        self.seen: list[tuple[str, bool]] = []

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        return iter([self.shift]) if turn == "shift" else self.student.parameters()

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        stale = any(p.grad is not None for p in self.parameters())
        self.seen.append((turn, stale))
        losses = super().forward(batch.replace(inputs=batch.inputs + self.shift), turn)
        if turn == "shift":
            losses.total = -losses.total
        return losses


def duel() -> Duel:
    torch.manual_seed(4)
    return Duel(nn.Linear(6, 3))


def by_hand(batches: list[Batch], lr: float) -> tuple[Duel, list[float]]:
    found, losses = duel(), []
    found.setup(batches[0])
    players = {t: torch.optim.SGD(list(found.parameters_of(t)), lr=lr, momentum=0.9) for t in ("shift", "student")}
    for batch in batches:
        for turn in found.turns:
            found.zero_grad()
            total = found(batch, turn).total
            total.backward()
            players[turn].step()
            losses.append(float(total.detach()))
    return found, losses


def test_as_written_by_hand(loader):
    train, found = loader(), duel()
    config = TrainConfig(epochs=1, lr=0.05, schedule="constant", weight_decay=0.0, log_every=2)
    result = fit([Stage("duel", found, config)], train, quiet=True)
    wanted, losses = by_hand(list(train.batches(0)), 0.05)
    assert found.shift.abs().min() > 0
    torch.testing.assert_close(found.shift, wanted.shift)
    torch.testing.assert_close(found.student.weight, wanted.student.weight)
    assert [turn for turn, _ in found.seen] == ["shift", "student", "student"] * 6
    assert not any(stale for _, stale in found.seen)
    first = result.history[0]  # of two steps, each with one turn of the shift and two of the student
    of_student = [losses[i] for i in (1, 2, 4, 5)]
    assert first["terms"]["student/cross_entropy"] == pytest.approx(sum(of_student) / 4, rel=1e-5)
    assert first["terms"]["shift/cross_entropy"] == pytest.approx(-(losses[0] + losses[3]) / 2, rel=1e-5)
    assert first["total"] == pytest.approx(sum(of_student) / 4 + (losses[0] + losses[3]) / 2, rel=1e-5)


def test_resumes_exactly(loader, tmp_path):
    config = TrainConfig(steps=8, checkpoint_every=3, keep=9, optimizer="adam", lr=0.01)
    wanted, found = duel(), duel()
    fit([Stage("duel", wanted, config)], loader(), out=tmp_path, quiet=True)
    (tmp_path / "checkpoints" / "step-00000008").rename(tmp_path / "aside")
    fit([Stage("duel", found, config)], loader(), out=tmp_path, resume=True, quiet=True)
    assert torch.equal(found.student.weight, wanted.student.weight)
    assert torch.equal(found.shift, wanted.shift)


def test_a_turn_needs_something_to_train(loader):
    found = duel()
    found.shift.requires_grad_(False)
    with pytest.raises(Exception, match="turn 'shift': this turn has nothing to train"):
        fit([Stage("duel", found, TrainConfig(steps=1))], loader(), quiet=True)
