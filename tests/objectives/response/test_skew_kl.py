from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.reverse_kl import reverse_kl_loss
from limbeck.objectives.response.skew_kl import SkewKL, skew_kl_loss
from tests.objectives.reference import kl, mean, softmax


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("skew", "temperature"), [(0.1, 1.0), (0.6, 2.0)])
def test_equals_the_paper(skew: float, temperature: float, reverse: bool) -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax(s, temperature), softmax(t, temperature)
        first, second = (q, p) if reverse else (p, q)
        mixed = [skew * a + (1 - skew) * b for a, b in zip(first, second, strict=True)]
        wanted.append(temperature**2 * kl(first, mixed))
    found = skew_kl_loss(student, teacher, skew=skew, reverse=reverse, temperature=temperature)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_without_skew_it_is_kl() -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    torch.testing.assert_close(
        skew_kl_loss(student, teacher, skew=1e-12), kd_loss(student, teacher, temperature=1.0), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        skew_kl_loss(student, teacher, skew=1e-12, reverse=True),
        reverse_kl_loss(student, teacher),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_bounded(reverse: bool) -> None:
    """By -log(skew), also where one rules out all that the other believes in."""
    student, teacher = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    found = skew_kl_loss(student, teacher, skew=0.1, reverse=reverse)
    assert found.item() == pytest.approx(-math.log(0.1))


def test_what_it_refuses() -> None:
    for skew in (0.0, 1.0):
        with pytest.raises(ConfigError, match="skew"):
            SkewKL(skew=skew)
