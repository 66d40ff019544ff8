"""MEAL V2 against its released loss: similarity, discriminator, and the gradient of both in one step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.engine import TrainConfig
from limbeck.objectives import KD
from limbeck.schemes import Cast, build

FILE = Path(__file__).parent / "meal_v2_meal_v2.npz"
with np.load(FILE, allow_pickle=False) as loaded:
    NUMBERS = {k: v for k, v in loaded.items() if v.dtype.kind != "U"}


def part(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(np.asarray(v)) for k, v in NUMBERS.items() if k.startswith(prefix)}


class Says(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)]


@pytest.mark.parametrize("case", ["0", "1"])
def test_one_step(case: str) -> None:
    given = part(f"{case}/")
    student, teachers = Says(given["student"]), [FrozenTeacher(Says(one)) for one in given["teachers"]]
    cast = Cast(student, Terms.of(KD(1.0)), None, TrainConfig(), teachers=dict(enumerate(teachers)))
    (training,) = build("meal_v2").trainings(cast)
    batch = Batch(torch.zeros(len(given["student"]), 1, dtype=torch.float64))
    distiller = training.stages[0].distiller.setup(batch).double()
    distiller.judge.layers.load_state_dict(part(f"{case}/state/"))
    losses = distiller(batch)
    losses.total.backward()
    similarity, entropy, apart = (given[name].item() for name in ("similarity", "entropy", "discriminator"))
    assert losses.terms["kd"].item() == pytest.approx(similarity - entropy, rel=1e-9)
    assert losses.terms["apart"].item() == pytest.approx(apart, rel=1e-9)
    wanted = part(f"{case}/grad/")
    torch.testing.assert_close(student.logits.grad, wanted.pop("student"), rtol=1e-8, atol=1e-12)
    for name, gradient in wanted.items():
        torch.testing.assert_close(distiller.judge.layers.get_parameter(name).grad, gradient, rtol=1e-8, atol=1e-12)
