"""Mu's loss, with teacher and student at their places, against the authors' on logits of several widths."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.objective import Terms
from limbeck.data.language.pairs import side_by_side
from limbeck.objectives import KD
from limbeck.schemes.language.mu_encdec_kd import AlignedTeacher, MuDistiller
from tests.parity.test_parity import close

NUMBERS = Path(__file__).parent / "mu_encdec_kd_encoder_decoder_slm.npz"


class Said(nn.Module):
    """A model that says what it was made with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_value_and_gradient(case: str) -> None:
    with np.load(NUMBERS) as file:
        given = {k.removeprefix(f"{case}/"): v for k, v in file.items() if k.startswith(f"{case}/")}
    student, teacher, grad = (torch.from_numpy(given[name]) for name in ("student", "teacher", "grad"))
    own, source = Said(student), torch.ones(len(student), int(given["source"]), dtype=torch.long)
    target = torch.ones(student.shape[:2], dtype=torch.long)
    batch = side_by_side(source, source > 0, target, target > 0, start=1)
    distiller = MuDistiller(own, Terms.of(KD(temperature=1.0)), AlignedTeacher(Said(teacher)))
    distiller.apart(alpha=1.0)
    total = distiller.setup(batch)(batch).total
    assert total.item() == pytest.approx(float(given["loss"]), rel=1e-12)
    total.backward()
    close(own.logits.grad, grad, 1e-12)
