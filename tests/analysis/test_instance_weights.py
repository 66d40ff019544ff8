"""The weight of a sample is the ratio of two gradients, and signs of a teacher that cannot help."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.analysis.instance_weights import class_cosines, instance_weights, teaching_signs


def test_weights_are_the_ratio_of_the_gradients_at_the_label() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = 2 * torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    labels, share = torch.arange(9) % 4, 0.7
    z = student.requires_grad_()
    plain = F.cross_entropy(z, labels, reduction="sum")
    mixed = (1 - share) * plain + share * F.cross_entropy(z, teacher.softmax(1), reduction="sum")
    rows = torch.arange(9)
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0][rows, labels] for loss in (mixed, plain)]
    found = instance_weights(student.detach(), teacher, labels, share)
    torch.testing.assert_close(found, gradients[0] / gradients[1], rtol=1e-9, atol=1e-9)
    assert instance_weights(student.detach(), teacher, labels - 1)[labels == 0].isnan().all()
    sure = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)  # here 1 - q has no digits left but its own
    assert float(instance_weights(sure, sure, torch.tensor([0]), 1.0)) == pytest.approx(0.0, abs=1e-6)


def test_signs_of_teachers_that_cannot_help() -> None:
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(60) % 5
    clear = torch.randn(60, 5, generator=generator) + 3 * F.one_hot(labels, 5)
    student = clear + 0.3 * torch.randn(60, 5, generator=generator)
    smoothed = 3.0 * F.one_hot(labels, 5) * torch.ones(60, 5)
    good, flat, hot = (teaching_signs(student, t, labels) for t in (clear, smoothed, clear / 50))
    assert good["easiness"] > 0.8
    assert abs(flat["easiness"]) < 0.3 < good["easiness"]
    assert flat["tail_entropy"] == pytest.approx(1.0)
    assert good["tail_entropy"] < 0.95
    assert hot["entropy"] > good["entropy"]
    assert teaching_signs(student, student, labels)["weight_spread"] == pytest.approx(0.0, abs=1e-5)


def test_groups_of_classes_show_as_blocks() -> None:
    rows = torch.tensor([[1.0, 0.1], [2.0, 0.0], [0.0, 3.0], [-0.1, 1.0]])
    found = class_cosines(rows)
    torch.testing.assert_close(found.diagonal(), torch.ones(4))
    assert found[0, 1] > 0.9 > 0.2 > found[1, 2]
