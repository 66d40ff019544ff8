"""Reduced vocabularies against the authors' steps: places summed, tokens mapped, or both only matched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.data.language import Translation
from limbeck.objectives.parts.paired_tokens import Chunks
from limbeck.objectives.response.vocab_reduce_kd import vocab_reduce_kd_loss
from tests.parity.test_parity import close

NUMBERS = Path(__file__).parent / "vocab_reduce_kd_rubert_tiny.npz"


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_value_and_gradient(case: str) -> None:
    with np.load(NUMBERS) as file:
        numbers = {k.removeprefix(f"{case}/"): v for k, v in file.items() if k.startswith(f"{case}/")}
    given = {k: torch.from_numpy(v) for k, v in numbers.items() if v.ndim}
    words = Translation(given["matched_teacher"], given["matched_student"], given["source"], given["pieces"])
    chunks = Chunks(given["chunk"], given["teacher_chunk"], torch.zeros_like(given["teacher_chunk"]))
    student = given["student"].requires_grad_()
    options: dict[str, Any] = {name: str(numbers[name]) for name in ("alignment", "combine")}
    value = vocab_reduce_kd_loss(
        student,
        given["teacher"],
        translation=words,
        chunks=chunks,
        temperature=float(numbers["temperature"]),
        reduction="sum",
        **options,
    ) / int(numbers["pairs"])
    assert value.item() == pytest.approx(float(numbers["loss"]), rel=1e-9)
    value.backward()
    close(student.grad, given["grad"], 1e-8)
