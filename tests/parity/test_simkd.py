"""SimKD's head against the authors' module: projector, prediction through the teacher's classifier, and gradients.

The loss alone is compared by ``test_parity.py`` from the same file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.taps import listen
from limbeck.models import put_head
from limbeck.objectives.feature.simkd import simkd_loss

FILE = Path(__file__).parent / "simkd_simkd.npz"
with np.load(FILE, allow_pickle=False) as loaded:
    NUMBERS = dict(loaded)


def part(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in NUMBERS.items() if k.startswith(prefix)}


class Network(nn.Module):
    """Nothing but a map, pooled by a function, and a linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("case", ["1", "2"])
def test_projector_and_prediction(case: str) -> None:
    given = part(f"{case}/module/")
    feature, hint = given["feature"].requires_grad_(), part(f"{case}/input/")["teacher_feature"]
    teacher, student = Network(hint.shape[1], 3).double(), Network(feature.shape[1], 3).double()
    with torch.no_grad():
        teacher.fc.weight.copy_(given["classifier_weight"])
        teacher.fc.bias.copy_(given["classifier_bias"])
    example = Batch(feature.detach(), teacher_inputs=hint)
    put_head(student, {"reused": {"factor": int(given["factor"])}}, example=example, teacher=teacher)
    projector = student.get_submodule("body.projector")
    projector.load_state_dict(part(f"{case}/module/state/"))
    trace = listen(student.train(), feature, ["head.projector"])
    torch.testing.assert_close(trace.logits, given["prediction"], rtol=1e-9, atol=1e-9)
    loss = simkd_loss(trace["head.projector"], hint)
    assert loss.item() == pytest.approx(float(NUMBERS[f"{case}/value"]), rel=1e-9)
    loss.backward()
    torch.testing.assert_close(feature.grad, given["grad_feature"], rtol=1e-8, atol=1e-10)
    for name, wanted in part(f"{case}/module/grad/").items():
        torch.testing.assert_close(projector.get_parameter(name).grad, wanted, rtol=1e-8, atol=1e-10)
