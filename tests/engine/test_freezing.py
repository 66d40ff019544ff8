"""Who learns in a stage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.engine.freezing import learning, leaves_some_out, reaches, train_mode
from limbeck.models import create
from limbeck.objectives import CrossEntropy, FitNets


def test_requires_grad_comes_back():
    distiller = Distiller(create("mlp", num_classes=3, in_channels=1, image_size=4), CrossEntropy())
    first = next(distiller.student.parameters())
    first.requires_grad_(False)
    before = [p.requires_grad for p in distiller.parameters()]
    with learning(distiller, ["*.weight", "*.bias"]):
        assert not first.requires_grad  # what its owner froze stays frozen
    with pytest.raises(ConfigError, match="nothing is left"), learning(distiller, ["*"], among=[]):
        pass
    assert [p.requires_grad for p in distiller.parameters()] == before


def test_frozen_parts_are_in_evaluation_mode():
    student = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout()), nn.Linear(2, 2))
    distiller = Distiller(student, CrossEntropy())
    with learning(distiller, ["1.*"]):
        train_mode(distiller)
        modes = {n: m.training for n, m in student.named_modules()}
    assert modes == {"": True, "0": False, "0.0": False, "0.1": False, "0.2": False, "1": True}


def test_reaches_what_a_tap_depends_on():
    student = create("resnet8", num_classes=10, in_channels=3)
    names = reaches(student, torch.randn(2, 3, 32, 32), "layer2")
    assert names == [n for n, _ in student.named_parameters() if not n.startswith(("layer3", "fc", "linear"))]
    assert not any(m._forward_hooks for m in student.modules())
    assert student.training


def test_finds_parameters_without_gradient_and_changes_nothing():
    student, teacher = create("resnet8", num_classes=10), create("resnet14", num_classes=10)
    batch = Batch(torch.randn(4, 3, 32, 32), torch.arange(4))
    for loss, wanted in ((FitNets("layer2"), True), (CrossEntropy(), False)):
        distiller = Distiller(student, loss, teacher).setup(batch)
        distiller.train()
        before = {k: v.clone() for k, v in distiller.state_dict().items()}
        random = torch.get_rng_state()
        assert leaves_some_out(distiller, batch) is wanted
        assert all(torch.equal(v, before[k]) for k, v in distiller.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        assert all(p.grad is None for p in distiller.parameters())
        distiller.close()
