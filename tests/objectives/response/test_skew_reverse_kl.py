from __future__ import annotations

import math

import pytest
import torch

from limbeck.core import catalogue
from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.trace import Trace
from limbeck.objectives.response.reverse_kl import reverse_kl_loss
from limbeck.objectives.response.skew_reverse_kl import skew_reverse_kl_loss
from tests.objectives.reference import kl, mean, softmax


@pytest.mark.parametrize(("skew", "temperature"), [(0.1, 1.0), (0.6, 2.0)])
def test_equals_the_paper(skew: float, temperature: float) -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax(s, temperature), softmax(t, temperature)
        wanted.append(temperature**2 * kl(q, [skew * b + (1 - skew) * a for a, b in zip(p, q, strict=True)]))
    found = skew_reverse_kl_loss(student, teacher, skew=skew, temperature=temperature)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_its_ends() -> None:
    """Reverse KL without skew; never above -log(skew)."""
    student, teacher = torch.randn(2, 5, 6).double()
    found = skew_reverse_kl_loss(student, teacher, skew=1e-12)
    torch.testing.assert_close(found, reverse_kl_loss(student, teacher), rtol=1e-9, atol=1e-9)
    apart = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    assert skew_reverse_kl_loss(*apart, skew=0.1).item() == pytest.approx(-math.log(0.1))


def test_the_method_is_the_function() -> None:
    student, teacher = torch.randn(2, 3, 4, 6).double()
    mask = torch.tensor([[True, True, False, True], [True, False, False, False], [False, False, False, False]])
    loss = catalogue.get("skew_reverse_kl").build(skew=0.3)
    found = loss(Trace(student), Trace(teacher), Batch(student, mask=mask))
    torch.testing.assert_close(found, skew_reverse_kl_loss(student, teacher, skew=0.3, mask=mask))
    with pytest.raises(ConfigError, match="skew"):
        catalogue.get("skew_reverse_kl").build(skew=1.0)
