from __future__ import annotations

import pytest
import torch

from limbeck.objectives.response.dist import dist_loss
from tests.objectives import reference


@pytest.mark.parametrize(("beta", "gamma", "tau"), [(1.0, 1.0, 1.0), (2.0, 0.0, 4.0), (0.0, 2.0, 0.5)])
@pytest.mark.parametrize("classes", [2, 7])
def test_equals_the_paper(beta: float, gamma: float, tau: float, classes: int) -> None:
    student, teacher = torch.randn(2, 5, classes).double()
    value = dist_loss(student, teacher, beta=beta, gamma=gamma, tau=tau, eps=0.0)
    assert value.item() == pytest.approx(reference.dist(student, teacher, beta, gamma, tau), rel=1e-9)


def test_positions_are_rows() -> None:
    student, teacher = torch.randn(2, 4, 3, 6).double()
    torch.testing.assert_close(dist_loss(student, teacher), dist_loss(student.flatten(0, 1), teacher.flatten(0, 1)))


def test_inter_class_part_ignores_scale_and_shift_of_probabilities() -> None:
    """Any teacher whose probabilities are a positive affine map of the student's is matched already."""
    y = torch.randn(5, 6).double().softmax(-1)
    mixed = 0.3 * y + 0.7 / 6
    assert dist_loss(y.log(), mixed.log(), gamma=0.0, eps=0.0).item() == pytest.approx(0.0, abs=1e-12)
    assert dist_loss(y.log(), mixed.log(), gamma=1.0, eps=0.0).item() == pytest.approx(0.0, abs=1e-12)


def test_one_sample_has_no_intra_class_relation() -> None:
    student, teacher = torch.randn(2, 1, 6)
    student.requires_grad_()
    value = dist_loss(student, teacher, beta=0.0)
    value.backward()
    assert value == 0
    assert not student.grad.any()


def test_what_does_not_vary_passes_no_gradient() -> None:
    """A new classifier that gives every class the same probability: epsilon alone would give gradients of 1e7."""
    student = torch.zeros(4, 6, requires_grad=True)
    value = dist_loss(student, torch.randn(4, 6))
    value.backward()
    assert value == 2
    assert not student.grad.any()
    assert dist_loss(torch.zeros(4, 6), torch.zeros(4, 6)) == 0
