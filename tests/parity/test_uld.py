"""ULD with its pairing of places, against the authors' loss on answers of different lengths and vocabularies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.trace import Trace
from limbeck.objectives.response.uld import ULD
from tests.parity.test_parity import close

NUMBERS = Path(__file__).parent / "uld_llm_recipes.npz"


@pytest.mark.parametrize("case", ["0", "1"])
def test_value_and_gradient(case: str) -> None:
    with np.load(NUMBERS) as file:
        given = {k.removeprefix(f"{case}/"): v for k, v in file.items() if k.startswith(f"{case}/")}
    names = ("student", "teacher", "mask", "teacher_mask", "grad")
    student, teacher, mask, teacher_mask, grad = (torch.from_numpy(given[name]) for name in names)
    batch = Batch(student, mask=mask, extras={"teacher_mask": teacher_mask})
    leaf = student.clone().requires_grad_()
    value = ULD(temperature=float(given["temperature"]))(Trace(leaf), Trace(teacher), batch)
    assert value.item() == pytest.approx(float(given["loss"]), rel=1e-6)  # theirs adds up in float32
    value.backward()
    close(leaf.grad, grad, 1e-6)
