"""DSKD with and without cross-model attention, against the authors' losses with their projectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.objectives.feature.dskd import dskd_loss
from limbeck.objectives.parts.dual_space import Side
from tests.parity.test_parity import close

NUMBERS = Path(__file__).parent / "dskd_dskd.npz"


def side(given: dict[str, Tensor], name: str) -> Side:
    tensors = {field: given[f"{name}/{field}"] for field in Side._fields if field != "counts"}
    return Side(**tensors, counts=torch.ones_like(tensors["labels"], dtype=torch.bool))


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_value_and_gradients(case: str) -> None:
    with np.load(NUMBERS) as file:
        numbers = {k.removeprefix(f"{case}/"): v for k, v in file.items() if k.startswith(f"{case}/")}
    given = {k: torch.from_numpy(v) for k, v in numbers.items() if v.ndim}
    student, teacher = side(given, "student"), side(given, "teacher")
    leaves = {"feature": student.feature.requires_grad_(), "logits": student.logits.requires_grad_()}
    maps = nn.ModuleDict()
    for name in ("t2s", "s2t", "query"):
        weight = given[f"maps/{name}.weight"]
        maps[name] = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    maps.load_state_dict({k.removeprefix("maps/"): v for k, v in given.items() if k.startswith("maps/")})
    value = dskd_loss(
        student, teacher, maps, temperature=float(numbers["temperature"]), aligned=bool(numbers["aligned"])
    )
    assert value.item() == pytest.approx(float(numbers["loss"]), rel=1e-9)
    value.backward()
    for name, leaf in leaves.items():
        close(leaf.grad, given[f"grad/{name}"], 1e-8)
    for name, parameter in maps.named_parameters():
        if f"mapgrad/{name}" in given:
            close(parameter.grad, given[f"mapgrad/{name}"], 1e-8)
