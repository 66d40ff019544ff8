"""SSKD as a whole against the authors' loop: all four terms with their weights, and the loss of the teacher's head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.trace import Trace
from limbeck.objectives.relation.sskd import SSKD
from limbeck.objectives.response.cross_entropy import CrossEntropy


@pytest.fixture
def numbers() -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "sskd_sskd.npz", allow_pickle=False) as file:
        return {
            k.removeprefix("whole/"): torch.as_tensor(v)
            for k, v in file.items()
            if k.startswith("whole/") and v.dtype.kind in "fi"
        }


def test_all_terms(numbers: dict[str, Tensor]) -> None:
    own = {k: numbers[f"student_{k}"].requires_grad_() for k in ("embedding", "logits")}
    feature = numbers["teacher_embedding"].requires_grad_()
    student = Trace(None, {"logits": own["logits"], "penultimate": own["embedding"]})
    teacher = Trace(None, {"logits": numbers["teacher_logits"], "penultimate": feature})
    size = len(numbers["labels"])
    labels = torch.cat([numbers["labels"], torch.full((3 * size,), -1)])
    batch = Batch(torch.zeros(4 * size, 1), labels=labels, extras={"views": 4})
    loss = SSKD()
    loss.student_head, loss.pretext.head = nn.Identity(), nn.Identity()  # the file holds what the heads gave
    parts = loss(student, teacher, batch)
    cross_entropy = CrossEntropy()(student, teacher, batch)
    wanted = [numbers[f"loss{i}"] for i in (1, 2, 3, 4)]
    weighted = [cross_entropy, parts["upright"] / 0.9, parts["turned"] / 2.7, parts["contrast"] / 10.0]
    torch.testing.assert_close(torch.stack(weighted), torch.stack(wanted), rtol=1e-9, atol=0.0)
    total = 0.1 * cross_entropy + parts["upright"] + parts["turned"] + parts["contrast"]
    torch.testing.assert_close(total, numbers["total"], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(parts["head"], numbers["head"], rtol=1e-9, atol=0.0)
    total.backward()
    assert feature.grad is None
    for name, tensor in own.items():
        torch.testing.assert_close(tensor.grad, numbers[f"grad_student_{name}"], rtol=1e-7, atol=1e-12)


def test_the_head(numbers: dict[str, Tensor]) -> None:
    """Its gradient at what the head gave, which is what trains it."""
    embedding = numbers["teacher_embedding"].requires_grad_()
    loss = SSKD()
    loss.pretext.embed = lambda teacher: embedding  # type: ignore[method-assign]
    loss.pretext(Trace(None), Trace(None), Batch(torch.zeros(1))).backward()
    torch.testing.assert_close(embedding.grad, numbers["grad_teacher_embedding"], rtol=1e-7, atol=1e-12)
