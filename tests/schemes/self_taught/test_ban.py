"""Born-again generations: by each of the paper's losses, from new starts, and their ensemble."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.engine import TrainConfig
from limbeck.objectives import CWTM, DKPP, KD, CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.teachers.ensemble import Ensemble

LOSSES = {
    "ban": lambda: Terms.of(KD(1.0)),
    "ban_l": lambda: CrossEntropy() + KD(1.0),
    "cwtm": lambda: Terms.of(CWTM()),
    "dkpp": lambda: Terms.of(DKPP()),
}


def cast(loss: Terms) -> Cast:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    data = as_loader((x, (x[:, 0] > 0).long() + (x[:, 1] > 0)), batch_size=16, train=True)

    def fresh(number: int) -> nn.Module:
        torch.manual_seed(number)
        return nn.Linear(4, 3)

    return Cast(nn.Linear(4, 3), loss, None, TrainConfig(epochs=6, lr=0.5), data, data, fresh=fresh)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_generations_by_the_papers_losses(loss: str, tmp_path: Path) -> None:
    fitted = perform(build("ban", generations=2), cast(LOSSES[loss]()), out=tmp_path / "run", quiet=True)
    assert fitted.steps == 3 * 24
    assert fitted.validation["accuracy"] > 0.6
    assert sorted(p.name for p in (tmp_path / "run/trainings").iterdir()) == ["generation-0", "generation-1"]


def test_each_generation_starts_anew_and_learns_from_the_last() -> None:
    given = cast(LOSSES["cwtm"]())
    students, teachers = [], []
    for training in build("ban", generations=3).trainings(given):
        students.append(training.student)
        teachers.append(getattr(training.stages[0].distiller.teacher, "model", None))
    assert teachers == [None, *students[:-1]]
    weights = torch.stack([student.weight.detach().flatten() for student in students])
    assert float(torch.pdist(weights).min()) > 0.1
    together = Ensemble([FrozenTeacher(student) for student in students[1:]])
    batch = given.train.example(5)
    together.attach(("logits",), batch)
    assert together(batch).logits.shape == (5, 3)
