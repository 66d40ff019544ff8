"""TED's two stages with the weights of the authors' models, on the states of a run of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.feature.ted import TED
from tests.parity.test_parity import close, load, under
from tests.parity.weighted import same_with_their_weights

NUMBERS = load(Path(__file__).parent / "ted_task_aware_distillation.npz")


def made(own: list[str], other: list[str]) -> TED:
    """Student layers 2 and 4 with the teacher's 3 and 6; the filters of both are given."""
    loss = TED(own, other, every=2, teacher_every=3)
    loss.opening()
    loss.teacher_filters.size([(8, 8)] * 2, torch.device("cpu"))
    return loss


def test_the_second_stage() -> None:
    same_with_their_weights("distill", NUMBERS, made)


def test_the_first_stage() -> None:
    """Theirs trains each model's filters by itself; ours both at once, a part of the loss each."""
    states = [under(f"opening/{side}/", NUMBERS) for side in ("student", "teacher")]
    logits = {"logits": torch.zeros(2, 3).double()}
    student, teacher = (Trace(None, {**known, **logits}) for known in states)
    batch = Batch(torch.zeros(2, 1), labels=torch.from_numpy(NUMBERS["opening/labels"]))
    loss = TED(list(states[0]), list(states[1]), every=2, teacher_every=3).opening()
    loss.setup(student, teacher, batch, DataInfo())
    loss.double().load_state_dict(under("opening/weights/", NUMBERS))
    parts = loss(student, teacher, batch)
    assert isinstance(parts, dict)
    for side, value in parts.items():
        assert value.item() == pytest.approx(float(NUMBERS[f"opening/loss/{side}"]), rel=1e-6)
    sum(parts.values(), torch.zeros(())).backward()
    for name, gradient in under("opening/weight_grad/", NUMBERS).items():
        close(loss.get_parameter(name).grad, gradient, 1e-5)
