"""MDCS against the authors' loss: its value, and its gradient at every expert's logits of both views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.objective import Terms
from limbeck.data.resident import ResidentLoader
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, build
from tests.parity.panel import Panel

with np.load(Path(__file__).parent / "mdcs_mdcs.npz", allow_pickle=False) as loaded:
    NUMBERS = {k: torch.from_numpy(np.asarray(v)) for k, v in loaded.items() if v.dtype.kind in "fib"}


@pytest.mark.parametrize("case", ["0", "1"])
def test_loss_and_gradients(case: str) -> None:
    given = {name.split("/")[1]: value for name, value in NUMBERS.items() if name.startswith(case)}
    counts, labels = given["counts"], given["labels"]
    every = torch.arange(len(counts)).repeat_interleave(counts)
    train = ResidentLoader(torch.zeros(len(every), 1, 2, 2), every, batch_size=2, classes=len(counts))
    student = Panel(given["logits"])
    cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(), train)
    (training,) = build("mdcs").trainings(cast)
    batch = Batch(torch.zeros(len(labels), 1, 2, 2), labels, progress=float(given["epoch"]) / 400)
    distiller = training.stages[0].distiller.setup(batch)
    losses = distiller(distiller.made(batch))
    losses.total.backward()
    assert losses.total.item() == pytest.approx(float(given["loss"]), rel=1e-6)  # priors are single floats
    found = torch.stack([expert.logits.grad for expert in student.experts])
    torch.testing.assert_close(found, given["grad"], rtol=1e-5, atol=1e-7)
