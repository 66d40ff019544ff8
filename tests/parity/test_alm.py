"""ALM against the authors' loss, on chunks of several tokens on either side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.objectives.parts.paired_tokens import Chunks
from limbeck.objectives.response.alm import alm_loss
from tests.parity.test_parity import close

NUMBERS = Path(__file__).parent / "alm_tokenkit.npz"


@pytest.mark.parametrize("case", ["0", "1"])
def test_value_and_gradient(case: str) -> None:
    with np.load(NUMBERS) as file:
        given = {k.removeprefix(f"{case}/"): v for k, v in file.items() if k.startswith(f"{case}/")}
    names = ("student", "teacher", "labels", "teacher_labels", "chunk", "teacher_chunk", "grad")
    student, teacher, labels, other, chunk, teacher_chunk, grad = (torch.from_numpy(given[name]) for name in names)
    temperature, number = float(given["temperature"]), int(given["chunks"])
    chunks = Chunks(chunk, teacher_chunk, other)
    student.requires_grad_()
    value = alm_loss(student, teacher, labels, chunks=chunks, temperature=temperature, reduction="sum") / number
    # Theirs is a cross-entropy: it has the teacher's entropy too.
    entropy = torch.zeros(()).double()
    told = teacher.log_softmax(-1).gather(2, other.clamp(min=0).unsqueeze(2)).squeeze(2)
    for row in range(len(chunk)):
        for first in set(teacher_chunk[row].tolist()) - {-1}:
            p = (told[row][teacher_chunk[row] == first].sum() / temperature - 1e-6).exp()
            entropy -= (p * p.log() + (1 - p) * (1 - p).log()) / number
    assert value.item() + entropy.item() == pytest.approx(float(given["loss"]), rel=1e-8)
    value.backward()
    close(student.grad, grad, 1e-7)
