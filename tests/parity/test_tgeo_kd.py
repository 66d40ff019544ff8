"""TGeo-KD against the authors' state, controller and distillation term."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.response.tgeo_kd import TGeoKD, tgeo_kd_loss, trilateral_state

NUMBERS = Path(__file__).parent / "tgeo_kd_tgeo_kd.npz"


def case(number: int) -> dict[str, Tensor]:
    with np.load(NUMBERS) as file:
        start = f"{number}/"
        return {k.removeprefix(start): torch.from_numpy(np.asarray(v)) for k, v in file.items() if k.startswith(start)}


@pytest.mark.parametrize("number", [0, 1])
def test_state_ratio_and_distillation(number: int) -> None:
    given = case(number)
    student, teacher, labels = given["student"].requires_grad_(), given["teacher"], given["labels"]
    classes, tau = student.shape[1], float(given["temperature"])
    objective = TGeoKD(temperature=tau)
    batch = Batch(student.detach(), labels=labels)
    said = Trace(None, {"logits": teacher})
    objective.setup(Trace(None, {"logits": student}), said, batch, DataInfo(answers=lambda: [(said, batch)]))
    torch.testing.assert_close(
        trilateral_state(student, teacher, labels, objective.class_means.double()), given["state"], rtol=1e-6, atol=1e-7
    )
    controller = objective.controller
    assert isinstance(controller, nn.Sequential)
    names = [("0", "fc1"), ("2", "fc2"), ("4", "fc3")]
    theirs = {f"{a}.{k}": given[f"controller/{b}.{k}"] for a, b in names for k in ("weight", "bias")}
    controller.double().load_state_dict(theirs)
    assert controller[0].in_features == 9 * classes
    ratio = objective.ratio(student, teacher, labels)
    torch.testing.assert_close(ratio, given["alpha"], rtol=1e-6, atol=1e-7)
    own = tgeo_kd_loss(torch.zeros_like(ratio), student, teacher, labels, temperature=tau, reduction="none")
    whole = tgeo_kd_loss(given["alpha"], student, teacher, labels, temperature=tau, reduction="none")
    found = (whole - (1 - given["alpha"]) * own).mean()
    torch.testing.assert_close(found, given["distill"].to(found.dtype))
    found.backward()
    torch.testing.assert_close(student.grad, given["grad"])
