"""Losses, gradients and memory that go bad: the message names term and step, and the last checkpoint stays."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import TrainingError
from limbeck.core.objective import Contract, Objective
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.engine import step as step_module
from limbeck.engine.meter import Meter
from limbeck.objectives import KD, CrossEntropy


class GoesBad(Objective):
    """Finite until its n-th call; then its value, or its gradient only, is not."""

    contract = Contract(normalizer="samples")
    student_taps = ("logits",)

    def __init__(self, at: int, gradient_only: bool = False) -> None:
        super().__init__()
        self._at, self._calls, self._gradient_only = at, 0, gradient_only

    def forward(self, student, teacher, batch):
        self._calls += 1
        value = student.logits.square().mean()
        if self._calls != self._at:
            return value
        # The root of zero is zero, its slope infinite.
        return (value * 0).sqrt() + value if self._gradient_only else value / 0


@pytest.fixture(params=[1, 4], ids=["looked at every step", "every fourth step"])
def every(request, monkeypatch):
    """How often numbers are fetched, as on the host and as on an accelerator."""
    real = Meter.__init__

    def init(self, every, **options):
        real(self, request.param, **options)

    monkeypatch.setattr(step_module, "Meter", type("Meter", (Meter,), {"__init__": init}))
    return request.param


def start(distiller, loader, out, loss) -> None:
    config = TrainConfig(steps=20, checkpoint_every=3)
    fit([Stage("kd", distiller(CrossEntropy() + 0.5 * KD() + loss), config)], loader(), out=out, quiet=True)


def test_a_bad_loss_names_term_and_step(loader, distiller, tmp_path, every):
    with pytest.raises(TrainingError) as caught:
        start(distiller, loader, tmp_path, GoesBad(8))
    assert caught.value.where == "step 8"
    assert caught.value.message == "the loss is not finite: goesbad"
    assert "cross_entropy = " in caught.value.found
    assert f"{tmp_path}/checkpoints/step-00000006" in str(caught.value)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_a_bad_gradient_names_step_and_terms(loader, distiller, tmp_path, every):
    with pytest.raises(TrainingError) as caught:
        start(distiller, loader, tmp_path, GoesBad(5, gradient_only=True))
    assert caught.value.where == "step 5"
    assert "the gradient of cross_entropy + kd + goesbad is not finite, though the loss is" in caught.value.message
    assert "step-00000003" in str(caught.value)
    if every == 1:  # the gradients are still there
        assert "; first in student.0.weight" in caught.value.message


def test_no_checkpoint_holds_bad_weights(loader, distiller, tmp_path, every):
    with pytest.raises(TrainingError):
        start(distiller, loader, tmp_path, GoesBad(6))  # a checkpoint is due right after it
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003"]


def test_on_the_host_the_weights_stay_as_they_were(loader, distiller):
    found = distiller(CrossEntropy() + GoesBad(4))
    with pytest.raises(TrainingError, match="no checkpoint was written yet"):
        fit([Stage("kd", found, TrainConfig(steps=9))], loader(), quiet=True)
    assert all(bool(v.isfinite().all()) for v in found.student.state_dict().values())


class Hungry(nn.Module):
    """Asks for more memory than any machine has, once it trains."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + torch.empty(2**50, device=inputs.device)[0] if self.training else inputs


def test_out_of_memory_says_what_to_change(loader, tmp_path):
    student = nn.Sequential(Hungry(), nn.Linear(6, 3))
    stages = [Stage("ce", Distiller(student, CrossEntropy()), TrainConfig(steps=3, accumulate=2))]
    with pytest.raises(TrainingError) as caught:
        fit(stages, loader(batch_size=16), out=tmp_path, quiet=True)
    assert "memory ran out" in caught.value.message
    assert caught.value.found == "micro-batches of 8 samples (16 in the step on this device)"
    assert "accumulate above 2" in caught.value.remedy


def test_other_errors_are_not_dressed_up(loader, distiller):
    class Broken(GoesBad):
        def forward(self, student, teacher, batch):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        fit([Stage("kd", distiller(CrossEntropy() + Broken(1)), TrainConfig(steps=3))], loader(), quiet=True)
