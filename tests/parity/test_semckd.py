"""SemCKD's attention and regressors against their authors' code, with their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.feature.semckd import SemCKD
from tests.parity.test_parity import close, load, under

NUMBERS = load(Path(__file__).parent / "semckd_attention.npz")


@pytest.mark.parametrize("case", [key.split("/")[0] for key in NUMBERS if key.endswith("/call")])
def test_attend_regress_compare(case: str) -> None:
    students, teachers = (under(f"{case}/{name}/", NUMBERS) for name in ("student", "teacher"))
    leaves = {name: tensor.requires_grad_() for name, tensor in students.items()}
    traces, batch = (Trace(None, dict(leaves)), Trace(None, dict(teachers))), Batch(torch.zeros(1))
    loss = SemCKD(list(leaves), list(teachers), group=int(NUMBERS[f"{case}/group"]))
    loss.setup(*traces, batch, DataInfo())
    loss.double().load_state_dict(under(f"{case}/weights/", NUMBERS))
    value = loss(*traces, batch)
    assert value.item() == pytest.approx(float(NUMBERS[f"{case}/loss"]), rel=1e-10)
    value.backward()
    for name, gradient in under(f"{case}/grad/", NUMBERS).items():
        close(leaves[name].grad, gradient)
    for name, gradient in under(f"{case}/weight_grad/", NUMBERS).items():
        close(loss.get_parameter(name).grad, gradient)
