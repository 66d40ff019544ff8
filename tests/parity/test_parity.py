"""limbeck's losses against numbers that the authors' code gave.

Each ``<key>_<repository>.npz`` holds numbers and strings only: ``repository``, ``commit``, ``torch`` and ``method``,
and for every case ``i``: ``i/call`` (what was run, in float64), ``i/options`` (ours, as JSON), ``i/input/NAME``,
``i/value``, ``i/grad/NAME``, and ``i/factor`` with ``i/why`` where the released code differs from the paper by a
factor: ours is ``factor`` times theirs. The files of CRD hold whole runs of three steps instead, memory banks included.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.core.memory import update_bank
from limbeck.objectives.relation.crd import crd_bank_loss, crd_log_z

HERE = Path(__file__).parent
WHERE = {"kd": "response", "dkd": "response", "dist": "response", "at": "feature", "fitnets": "feature"}
WHERE |= {"rkd": "relation", "crd": "relation"}


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def under(prefix: str, numbers: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in numbers.items() if k.startswith(prefix)}


FILES = {path.stem: load(path) for path in sorted(HERE.glob("*.npz"))}
CASES = [(name, k.split("/")[0]) for name, numbers in FILES.items() for k in numbers if k.endswith("/call")]
SINGLE = [c for c in CASES if not c[0].startswith("crd_")]
BANKS = [c for c in CASES if c[0].startswith("crd_")]


def close(found: Tensor, wanted: Tensor) -> None:
    """To 1e-5 of the largest entry: a gradient's small entries are differences of large ones."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_every_compared_method_is_here() -> None:
    assert {str(f["method"]) for f in FILES.values()} == set(WHERE)
    for numbers in FILES.values():
        assert "/" in str(numbers["repository"])
        assert len(str(numbers["commit"])) == 40


@pytest.mark.parametrize(("name", "case"), SINGLE, ids=["-".join(c) for c in SINGLE])
def test_value_and_gradient(name: str, case: str) -> None:
    numbers = FILES[name]
    key = str(numbers["method"])
    loss = getattr(importlib.import_module(f"limbeck.objectives.{WHERE[key]}.{key}"), f"{key}_loss")
    inputs = under(f"{case}/input/", numbers)
    gradients = under(f"{case}/grad/", numbers)
    factor = float(numbers[f"{case}/factor"])
    assert factor == 1.0 or str(numbers[f"{case}/why"])
    for argument in gradients:
        inputs[argument].requires_grad_()
    value = loss(**inputs, **json.loads(str(numbers[f"{case}/options"])))
    assert value.item() == pytest.approx(factor * float(numbers[f"{case}/value"]), rel=1e-5, abs=1e-12)
    value.backward()
    for argument, gradient in gradients.items():
        close(inputs[argument].grad, factor * gradient)


@pytest.mark.parametrize(("name", "case"), BANKS, ids=["-".join(c) for c in BANKS])
def test_crd_over_three_steps(name: str, case: str) -> None:
    """Loss, gradients, normalisation constants and momentum updates, with the released code's own negatives."""
    numbers = FILES[name]
    banks = [torch.from_numpy(numbers[f"{case}/{side}_bank"]).clone() for side in ("student", "teacher")]
    temperature, momentum = float(numbers[f"{case}/temperature"]), float(numbers[f"{case}/momentum"])
    log_z: Tensor | None = None
    for step in range(3):
        given: dict[str, Any] = under(f"{case}/step{step}/", numbers)
        student, teacher = given["student_embedding"].requires_grad_(), given["teacher_embedding"].requires_grad_()
        arguments = (student, teacher, *banks, given["index"], given["negatives"])
        if log_z is None:
            log_z = crd_log_z(*arguments, temperature=temperature)
        close(log_z.exp(), given["z"])
        value = crd_bank_loss(*arguments, log_z=log_z, temperature=temperature)
        assert value.item() == pytest.approx(float(given["value"]), rel=1e-5)
        value.backward()
        close(student.grad, given["grad_student"])
        close(teacher.grad, given["grad_teacher"])
        for bank, embedding in zip(banks, (student, teacher), strict=True):
            update_bank(bank, given["index"], embedding, momentum=momentum)
    for bank, side in zip(banks, ("student", "teacher"), strict=True):
        close(bank, given[f"{side}_bank_after"])
