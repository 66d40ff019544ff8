"""DKPP: what an exchange keeps, what it loses, and the gradient."""

from __future__ import annotations

import torch

from limbeck.objectives.response.dkpp import dkpp_loss, exchange_others
from limbeck.objectives.response.kd import kd_loss


def test_an_exchange_keeps_all_but_the_order() -> None:
    torch.manual_seed(0)
    p = torch.randn(200, 6).double().softmax(1)
    found = exchange_others(p)
    torch.testing.assert_close(found.sort(1).values, p.sort(1).values)
    assert torch.equal(found.argmax(1), p.argmax(1))
    assert torch.equal(found.amax(1), p.amax(1))
    assert int((found != p).any(1).sum()) > 190  # one order in 120 changes nothing


def test_all_orders_are_as_likely() -> None:
    torch.manual_seed(0)
    found = exchange_others(torch.tensor([[1.0, 9.0, 2.0, 3.0]]).expand(6000, 4))
    orders, counts = found.unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert counts.min() > 850  # of 1000 expected
    assert torch.equal(orders[:, 1], torch.full((6,), 9.0))


def test_of_two_classes_nothing_is_exchanged() -> None:
    student, teacher = torch.randn(2, 7, 2).double()
    torch.testing.assert_close(dkpp_loss(student, teacher), kd_loss(student, teacher, temperature=1.0))


def test_value_and_gradient() -> None:
    student, teacher = torch.randn(2, 4, 5).double()
    student.requires_grad_()
    torch.manual_seed(1)
    found = dkpp_loss(student, teacher, temperature=2.0)
    torch.manual_seed(1)
    p, q = exchange_others((teacher / 2).log_softmax(1)).exp(), (student / 2).softmax(1)
    torch.testing.assert_close(found, 4 * (p * (p.log() - q.log())).sum(1).mean())
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], 2 * (q - p) / 4)
