from __future__ import annotations

from math import log

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.ttm import TTM, ttm_loss
from tests.objectives.reference import kl, mean, softmax


@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0])
def test_equals_the_paper(gamma: float) -> None:
    student, teacher = 2 * torch.randn(2, 5, 6).double()
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        powers = [p**gamma for p in softmax(t)]
        wanted.append(kl([p / sum(powers) for p in powers], softmax(s)))
    assert ttm_loss(student, teacher, gamma=gamma).item() == pytest.approx(mean(wanted), rel=1e-9)


def test_it_is_kd_and_a_renyi_entropy() -> None:
    """The paper's decomposition: KD at T = 1 / gamma, and the student's Rényi entropy of order gamma."""
    student, teacher, gamma = *torch.randn(2, 5, 6).double(), 0.25
    kd = kd_loss(student, teacher, temperature=1 / gamma, reduction="none") * gamma**2
    entropies = [log(sum(p**gamma for p in softmax(s))) / (1 - gamma) for s in student.tolist()]
    renyi = torch.tensor(entropies, dtype=torch.float64)
    p = (gamma * teacher).softmax(-1)
    q, q_power = student.log_softmax(-1), (gamma * student).log_softmax(-1)
    # log q = (log q_power + (1 - gamma) H_gamma(q)) / gamma
    torch.testing.assert_close(q, (q_power + (1 - gamma) * renyi[:, None]) / gamma)
    entropy = -(p * p.log()).sum(-1)
    wanted = (kd + entropy - (1 - gamma) * renyi) / gamma - entropy
    torch.testing.assert_close(ttm_loss(student, teacher, gamma=gamma, reduction="none"), wanted)


def test_with_power_1_it_is_kd_at_temperature_1() -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    torch.testing.assert_close(ttm_loss(student, teacher, gamma=1.0), kd_loss(student, teacher, temperature=1.0))


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="gamma"):
        TTM(gamma=0.0)
