from __future__ import annotations

from math import sqrt

import pytest
import torch

from limbeck.core.divergences import deviation, standardise
from limbeck.core.errors import ConfigError
from limbeck.objectives.response.logit_std import LogitStd, logit_std_loss
from tests.objectives.reference import kl, mean, softmax


def z_scores(row: list[float], unbiased: bool) -> list[float]:
    middle = mean(row)
    sigma = sqrt(sum((z - middle) ** 2 for z in row) / (len(row) - unbiased))
    return [(z - middle) / sigma for z in row]


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_the_paper(temperature: float, unbiased: bool) -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double() + 1
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = (softmax(z_scores(row, unbiased), temperature) for row in (t, s))
        wanted.append(temperature**2 * kl(p, q))
    found = logit_std_loss(student, teacher, temperature=temperature, unbiased=unbiased)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_size_and_place_of_the_logits_do_not_matter() -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    torch.testing.assert_close(
        logit_std_loss(7 * student - 3, 0.1 * teacher + 9), logit_std_loss(student, teacher), rtol=1e-9, atol=1e-12
    )
    assert logit_std_loss(2 * teacher + 1, teacher).item() == pytest.approx(0, abs=1e-12)


def test_the_papers_toy_case() -> None:
    """A student with the right order but small logits beats one with large logits and the wrong order."""
    teacher = torch.tensor([[2.0, 1.0, -1.0, -2.0]])
    small, wrong = 0.2 * teacher, torch.tensor([[2.0, -1.0, 1.0, -2.0]])
    assert logit_std_loss(small, teacher).item() == pytest.approx(0, abs=1e-6)
    assert logit_std_loss(wrong, teacher) > 0.1


def test_the_gradient_has_no_part_along_size_and_place() -> None:
    student, teacher = torch.randn(2, 5, 6).double()
    student.requires_grad_()
    logit_std_loss(student, teacher).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad.sum(-1), torch.zeros(5).double())
    torch.testing.assert_close((student.grad * student).sum(-1), torch.zeros(5).double())


def test_logits_that_do_not_vary_pass_no_gradient() -> None:
    student = torch.full((2, 4), 0.3, requires_grad=True)
    value = logit_std_loss(student, torch.randn(2, 4))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("dim", [0, -1])
def test_standardised_values(dim: int) -> None:
    values = 5 * torch.randn(6, 4).double() + 2
    for correction in (0, 1):
        found = standardise(values, dim, correction=correction)
        torch.testing.assert_close(found.mean(dim), torch.zeros_like(found.mean(dim)))
        torch.testing.assert_close(found.std(dim, correction=correction), torch.ones_like(found.mean(dim)))
        torch.testing.assert_close(
            deviation(values, dim, correction=correction), values.std(dim, correction=correction, keepdim=True)
        )
    loose = standardise(values, dim, correction=0, variance_eps=1e-5, eps=0.5)
    spread = (values.var(dim, correction=0, keepdim=True) + 1e-5).sqrt() + 0.5
    torch.testing.assert_close(loose, (values - values.mean(dim, keepdim=True)) / spread)


def test_standardising_what_counts() -> None:
    values, counts = torch.randn(6, 4).double(), torch.tensor([True, False, True, True, False, True])
    found = standardise(values.masked_fill(~counts[:, None], 77.0), 0, mask=counts[:, None])
    torch.testing.assert_close(found[counts], standardise(values[counts], 0))
    assert not found[~counts].any()


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        LogitStd(temperature=-1.0)
