"""A teacher that owes no logits stops after its last owed tap: counted in operations, not in seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.objective import Contract, Objective
from limbeck.core.taps import Listener
from limbeck.core.trace import Trace
from limbeck.models import create
from limbeck.objectives import KD, FitNets


def flops(run: Any, *args: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*args)
    return counter.get_total_flops()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize(("taps", "share"), [(["layer1"], 0.40), (["layer2"], 0.75), (["layer1", "layer2"], 0.75)])
def test_a_listener_runs_no_further_than_its_last_owed_tap(images: Tensor, taps: list[str], share: float) -> None:
    model = create("resnet20", num_classes=10).eval()
    whole, stopped = flops(model, images), flops(Listener(model, taps, images), images)
    assert 0.5 * share < stopped / whole < share


def test_logits_need_the_whole_model(images: Tensor) -> None:
    model = create("resnet20", num_classes=10).eval()
    listener = Listener(model, ["layer2", "logits"], images)
    assert flops(listener, images) == flops(model, images)
    assert torch.equal(listener(images).logits, model(images))


def test_what_was_captured_is_what_the_whole_model_computes(images: Tensor) -> None:
    model = create("resnet20", num_classes=10).eval()
    stopped = Listener(model, ["layer2"], images)(images)
    whole = Listener(model, ["layer2", "logits"], images)(images)
    assert torch.equal(stopped["layer2"], whole["layer2"])
    assert stopped.output is None


class Gap(Objective):
    """Asks both sides for one layer and the student for its logits."""

    contract = Contract(at_equal=None)
    student_taps, teacher_taps = ("logits",), ("layer2",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return (student.logits.mean() - teacher["layer2"].detach().mean()).square()


def test_the_distiller_stops_its_teacher(images: Tensor) -> None:
    student, teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), create("resnet20", num_classes=10)
    whole, own = flops(teacher.eval(), images), flops(student, images)
    distiller = Distiller(student, Gap(), teacher).setup(Batch(images))
    step = flops(distiller, Batch(images))
    assert own < step - own < 0.75 * whole
    with_logits = Distiller(student, Gap() + KD(), teacher).setup(Batch(images))
    assert flops(with_logits, Batch(images)) == whole + own


def test_a_hint_stage_stops_both_sides(images: Tensor) -> None:
    student, teacher = create("resnet8", num_classes=10), create("resnet20", num_classes=10)
    full = flops(student, images) + flops(teacher.eval(), images)
    distiller = Distiller(student, FitNets("layer2"), teacher).setup(Batch(images))
    assert flops(distiller, Batch(images)) < 0.75 * full
    distiller(Batch(images)).total.backward()
    trained = {name.split(".")[0] for name, p in student.named_parameters() if p.grad is not None}
    assert trained == {"conv1", "bn1", "layer1", "layer2"}


def test_stopping_survives_a_model_that_catches_every_exception() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.first(x)
            except Exception:
                x = x * 0
            return self.second(x)

    model, x = Careful(), torch.randn(3, 4)
    trace = Listener(model, ["first"], x)(x)
    assert trace.output is None
    assert torch.equal(trace["first"], model.first(x))
