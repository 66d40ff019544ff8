"""Batches that a scheme makes of what was read: totals count what was made, and a resumed run draws the same."""

from __future__ import annotations

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.objectives import CrossEntropy


class Drawn(Distiller):
    """Learns from inputs it draws itself, more of them in every second micro-batch."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        super().__init__(nn.Linear(6, 3), CrossEntropy())
        self.saw: list[Batch] = []

    def made(self, batch: Batch) -> Batch:
        more = 2 if len(self.saw) % 2 else 1
        labels = batch.require("labels").repeat(more)
        found = batch.replace(inputs=torch.randn(len(labels), 6), labels=labels, index=None)
        self.saw.append(found)
        return found


def test_what_was_made_is_counted(loader):
    """One step of three micro-batches of unequal size is the mean over all that was made."""
    found = Drawn()
    config = TrainConfig(steps=1, accumulate=3, optimizer="sgd", lr=0.1, schedule="constant", weight_decay=0.0)
    fit([Stage("drawn", found, config)], loader(), quiet=True)
    inputs = torch.cat([batch.inputs for batch in found.saw])
    labels = torch.cat([batch.labels for batch in found.saw])
    assert len({len(batch.labels) for batch in found.saw}) > 1
    wanted = Drawn().student
    nn.functional.cross_entropy(wanted(inputs), labels).backward()
    torch.testing.assert_close(found.student.weight, wanted.weight - 0.1 * wanted.weight.grad)


def test_resumed_draws_go_on(loader, tmp_path):
    config = TrainConfig(steps=6, checkpoint_every=3, keep=9, lr=0.01)
    wanted, found = Drawn(), Drawn()
    fit([Stage("drawn", wanted, config)], loader(), out=tmp_path, quiet=True)
    (tmp_path / "checkpoints" / "step-00000006").rename(tmp_path / "aside")
    found.saw = wanted.saw[:3]  # the parity of what comes next, which a real scheme would keep in a buffer
    fit([Stage("drawn", found, config)], loader(), out=tmp_path, resume=True, quiet=True)
    assert torch.equal(found.student.weight, wanted.student.weight)
    assert torch.equal(found.saw[-1].inputs, wanted.saw[-1].inputs)
