from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import TensorError
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.logit_mse import logit_mse_loss
from tests.objectives.reference import mean


def test_equals_the_paper() -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    wanted = mean([mean([(a - b) ** 2 for a, b in zip(s, t, strict=True)]) for s, t in pairs])
    assert logit_mse_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)


def test_it_is_twice_kd_at_a_very_high_temperature() -> None:
    student, teacher = (z - z.mean(-1, keepdim=True) for z in torch.randn(2, 5, 6).double())
    torch.testing.assert_close(
        logit_mse_loss(student, teacher), 2 * kd_loss(student, teacher, temperature=1e4), rtol=1e-3, atol=1e-6
    )


def test_what_it_refuses() -> None:
    with pytest.raises(TensorError, match="teacher_logits"):
        logit_mse_loss(torch.randn(2, 3), torch.randn(2, 4))
