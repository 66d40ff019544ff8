from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.cs_kd import ClassWiseKD, cs_kd_loss
from tests.objectives import reference


def divergences(student: Tensor, temperature: float) -> list[list[float]]:
    """Entry i, j: T^2 KL of sample i's prediction from sample j's."""
    p = [reference.softmax(row, temperature) for row in student.tolist()]
    return [[temperature**2 * reference.kl(q, own) for q in p] for own in p]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_all_partners_equal_the_paper_on_average(temperature: float) -> None:
    student, labels = 2 * torch.randn(7, 4).double(), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    gaps, wanted = divergences(student, temperature), []
    for i, label in enumerate(labels.tolist()):
        others = [j for j, other in enumerate(labels.tolist()) if other == label and j != i]
        wanted.append(reference.mean([gaps[i][j] for j in others]) if others else 0.0)
    found = cs_kd_loss(student, labels, temperature=temperature, partner="all", reduction="none")
    assert found.tolist() == pytest.approx(wanted, rel=1e-9)


def test_a_random_partner_is_another_of_the_class() -> None:
    student, labels = 2 * torch.randn(8, 4).double(), torch.tensor([0, 1, 0, 2, 1, 0, 3, 0])
    gaps, seen = divergences(student, 4.0), [set() for _ in range(8)]
    for _ in range(60):
        for i, value in enumerate(cs_kd_loss(student, labels, reduction="none").tolist()):
            partners = [j for j in range(8) if value == pytest.approx(gaps[i][j], rel=1e-9) and j != i]
            seen[i] |= set(partners) if value else set()
    for i, label in enumerate(labels.tolist()):
        assert seen[i] == {j for j in range(8) if labels[j] == label and j != i}


def test_the_partner_is_a_constant() -> None:
    student, labels = torch.randn(2, 3).double().requires_grad_(), torch.tensor([1, 1])
    cs_kd_loss(student, labels, temperature=1.0, reduction="none")[0].backward()
    assert student.grad is not None
    assert (student.grad[1] == 0).all()
    p = student.detach().softmax(-1)
    torch.testing.assert_close(student.grad[0], p[0] - p[1])


def test_who_is_alone_contributes_nothing() -> None:
    student = torch.randn(3, 4).requires_grad_()
    value = cs_kd_loss(student, torch.tensor([0, 1, 2]))
    assert value == 0
    value.backward()
    assert (student.grad == 0).all()


def test_masked_and_unlabelled_places_are_nobodys_partners() -> None:
    student, labels = torch.randn(2, 4, 3).double(), torch.tensor([[0, 0, 1, 2], [0, -100, 1, 1]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, False]])
    kept = mask & (labels >= 0)
    spoiled = student.masked_fill(~kept.unsqueeze(-1), torch.nan)
    found = cs_kd_loss(spoiled, labels, partner="all", mask=mask)
    torch.testing.assert_close(found, cs_kd_loss(student[kept], labels[kept], partner="all"))


def test_what_it_refuses() -> None:
    logits = torch.randn(2, 3)
    with pytest.raises(TensorError, match="integer labels"):
        cs_kd_loss(logits, logits.softmax(-1))
    with pytest.raises(ConfigError, match="partner"):
        cs_kd_loss(logits, torch.tensor([0, 0]), partner="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature"):
        ClassWiseKD(temperature=0.0)
