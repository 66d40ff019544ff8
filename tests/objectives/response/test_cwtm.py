"""CWTM: the paper's weights, and cross-entropy where the teacher is equally sure of all."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import TensorError
from limbeck.objectives.response.cwtm import cwtm_loss


def test_weights_are_the_teachers_confidence() -> None:
    """Of 0.9, 0.6 and 0.5: 0.45, 0.30 and 0.25."""
    teacher = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.6, 0.2], [0.25, 0.25, 0.5]]).double().log()
    logits, labels = torch.randn(3, 3).double().requires_grad_(), torch.tensor([0, 2, 1])
    found = cwtm_loss(logits, teacher, labels)
    each = F.cross_entropy(logits, labels, reduction="none")
    weights = torch.tensor([0.45, 0.30, 0.25]).double()
    torch.testing.assert_close(found, (weights * each).sum())
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, weights[:, None] * (logits.softmax(1) - F.one_hot(labels, 3)))


def test_a_teacher_that_is_equally_sure_teaches_nothing() -> None:
    logits, labels = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 3, 0])
    teacher = 7.0 * F.one_hot(torch.tensor([3, 1, 0, 2, 1]), 4).double()
    torch.testing.assert_close(cwtm_loss(logits, teacher, labels), F.cross_entropy(logits, labels))


def test_what_does_not_count_weighs_nothing() -> None:
    logits, teacher = torch.randn(2, 5, 4).double()
    labels, mask = torch.tensor([0, -1, 2, 3, 1]), torch.tensor([True, True, True, False, True])
    kept = [0, 2, 4]
    teacher[3] = float("nan")
    found = cwtm_loss(logits, teacher, labels, mask=mask)
    torch.testing.assert_close(found, cwtm_loss(logits[kept], teacher[kept], labels[kept]))
    assert float(cwtm_loss(logits, teacher, torch.full((5,), -1))) == 0.0


def test_it_needs_labels() -> None:
    with pytest.raises(TensorError):
        cwtm_loss(torch.zeros(2, 3), torch.zeros(2, 3))
