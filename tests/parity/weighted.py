"""An objective with its authors' weights, against a run of theirs: its value, and gradients of features and weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.objective import DataInfo, Objective
from limbeck.core.trace import Trace
from tests.parity.test_parity import close, under


def same_with_their_weights(
    case: str, numbers: dict[str, np.ndarray], make: Callable[[list[str], list[str]], Objective]
) -> None:
    """``make`` is given the names of the student's and the teacher's features."""
    students, teachers = (under(f"{case}/{name}/", numbers) for name in ("student", "teacher"))
    leaves = {name: tensor.requires_grad_() for name, tensor in students.items()}
    traces, batch = (Trace(None, dict(leaves)), Trace(None, dict(teachers))), Batch(torch.zeros(1))
    loss = make(list(leaves), list(teachers))
    loss.setup(*traces, batch, DataInfo())
    loss.double().load_state_dict(under(f"{case}/weights/", numbers))
    value = loss(*traces, batch)
    assert value.item() == pytest.approx(float(numbers[f"{case}/loss"]), rel=1e-10)
    value.backward()
    for name, gradient in under(f"{case}/grad/", numbers).items():
        close(leaves[name].grad, gradient)
    for name, gradient in under(f"{case}/weight_grad/", numbers).items():
        if gradient.abs().max() > 1e-14:
            close(loss.get_parameter(name).grad, gradient)
        else:  # a bias before batch normalisation
            assert loss.get_parameter(name).grad.abs().max() < 1e-14
