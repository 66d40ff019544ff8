from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.objectives.response.ttm import ttm_loss
from limbeck.objectives.response.wttm import WTTM, wttm_loss
from tests.objectives.reference import kl, mean, softmax


@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0])
def test_equals_the_paper(gamma: float) -> None:
    student, teacher = 2 * torch.randn(2, 5, 6).double()
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        powers = [p**gamma for p in softmax(t)]
        wanted.append(sum(powers) * kl([p / sum(powers) for p in powers], softmax(s)))
    assert wttm_loss(student, teacher, gamma=gamma).item() == pytest.approx(mean(wanted), rel=1e-9)


def test_its_weight_runs_from_1_to_that_of_a_teacher_who_knows_nothing() -> None:
    student = torch.randn(1, 8).double()
    sure, blank = 500 * torch.eye(8)[:1].double(), torch.zeros(1, 8).double()
    for teacher, weight in ((sure, 1.0), (blank, 8**0.8)):
        plain = ttm_loss(student, teacher, gamma=0.2)
        assert (wttm_loss(student, teacher) / plain).item() == pytest.approx(weight)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="gamma"):
        WTTM(gamma=-1.0)
