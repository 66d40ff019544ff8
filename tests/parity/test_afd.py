"""AFD's attention against their authors' code, with their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.feature.afd import AFD
from tests.parity.test_parity import close, load, under

NUMBERS = load(Path(__file__).parent / "afd_attention.npz")


@pytest.mark.parametrize("case", [key.split("/")[0] for key in NUMBERS if key.endswith("/call")])
def test_attend_and_compare(case: str) -> None:
    students, teachers = (under(f"{case}/{name}/", NUMBERS) for name in ("student", "teacher"))
    leaves = {name: tensor.requires_grad_() for name, tensor in students.items()}
    traces, batch = (Trace(None, dict(leaves)), Trace(None, dict(teachers))), Batch(torch.zeros(1))
    loss = AFD(list(leaves), list(teachers), dim=int(NUMBERS[f"{case}/dim"]))
    loss.setup(*traces, batch, DataInfo())
    loss.double().load_state_dict(under(f"{case}/weights/", NUMBERS))
    value = loss(*traces, batch)
    assert value.item() == pytest.approx(float(NUMBERS[f"{case}/loss"]), rel=1e-10)
    value.backward()
    for name, gradient in under(f"{case}/grad/", NUMBERS).items():
        close(leaves[name].grad, gradient)
    for name, gradient in under(f"{case}/weight_grad/", NUMBERS).items():
        if gradient.abs().max() > 1e-14:
            close(loss.get_parameter(name).grad, gradient)
        else:  # a bias before batch normalisation
            assert loss.get_parameter(name).grad.abs().max() < 1e-14
