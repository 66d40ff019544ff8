"""ONE against the authors' network and loss: the loss of one step, and the gradient of every weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.objective import Terms
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, build

with np.load(Path(__file__).parent / "one_one.npz", allow_pickle=False) as loaded:
    NUMBERS = dict(loaded)


def part(prefix: str) -> dict[str, Tensor]:
    found = {k.removeprefix(prefix): v for k, v in NUMBERS.items() if k.startswith(prefix)}
    return {k: torch.from_numpy(np.asarray(v)) for k, v in found.items() if v.dtype.kind in "fi"}


@pytest.mark.parametrize("case", ["0", "1"])
def test_one_step(case: str) -> None:
    given, state = part(f"{case}/"), part(f"{case}/state/")

    def net() -> nn.Module:
        (width, read), classes = state["trunk.weight"].shape, len(state["branch_0.bias"])
        return nn.Sequential(nn.Linear(read, width), nn.Linear(width, classes)).double()

    student = net()
    cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(), fresh=lambda number: net())
    (training,) = build("one", tap="0").trainings(cast)
    batch = Batch(given["inputs"], given["labels"], progress=float(given["epoch"]) / 300)
    tree = training.stages[0].distiller.setup(batch).train()
    layers = {"trunk": student[0], "branch_0": student[1], "gate": tree.gate.linear, "norm": tree.gate.norm}
    layers |= {f"branch_{n}": tree.tails[n - 1].model[1] for n in (1, 2)}
    with torch.no_grad():
        for name, value in state.items():
            layer, _, kind = name.partition(".")
            getattr(layers[layer], kind).copy_(value)
    losses = tree(batch)
    assert float(losses.weights["ensemble"]) == pytest.approx(float(given["weight"]), rel=1e-6)
    assert losses.total.item() == pytest.approx(float(given["loss"]), rel=5e-6)  # their targets: 1e-7 too large
    losses.total.backward()
    for name, wanted in part(f"{case}/grad/").items():
        layer, _, kind = name.partition(".")
        found = getattr(layers[layer], kind).grad
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert all(p.grad is not None for p in tree.parameters())
