"""VID against its paper's equations, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.projectors import ConvProjector, LinearProjector
from limbeck.models import create
from limbeck.objectives.feature.vid import VID, regressor, vid_loss


def test_the_papers_sum() -> None:
    student, teacher, raw = torch.randn(2, 3, 4, 2).double(), torch.randn(2, 3, 4, 2).double(), torch.randn(3).double()
    wanted = 0.0
    for b in range(2):
        for c in range(3):
            variance = math.log(1 + math.exp(raw[c])) + 1e-5
            for h in range(4):
                for w in range(2):
                    gap = (teacher[b, c, h, w] - student[b, c, h, w]).item()
                    wanted += math.log(math.sqrt(variance)) + gap**2 / (2 * variance)
    wanted /= 2 * 3 * 4 * 2
    assert vid_loss(student, teacher, raw).item() == pytest.approx(wanted, rel=1e-12)
    tokens = [f.flatten(2).transpose(1, 2) for f in (student, teacher)]
    assert vid_loss(*tokens, raw).item() == pytest.approx(wanted, rel=1e-12)


def test_it_is_the_likelihood_of_torch() -> None:
    student, teacher, raw = torch.randn(5, 3).double(), torch.randn(5, 3).double(), torch.randn(3).double()
    variance = nn.functional.softplus(raw) + 1e-5
    wanted = nn.functional.gaussian_nll_loss(student, teacher, variance.expand(5, 3), eps=1e-12)
    torch.testing.assert_close(vid_loss(student, teacher, raw), wanted)


def test_the_best_variance_is_the_error() -> None:
    """At the mean squared error of a channel the loss has its minimum in the variance."""
    student, teacher = torch.randn(400, 1).double(), torch.randn(400, 1).double()
    error = (student - teacher).square().mean()
    raw = torch.log(torch.expm1(error - 1e-5)).reshape(1).requires_grad_()
    vid_loss(student, teacher, raw).backward()
    assert raw.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_regressor() -> None:
    kinds = {ConvProjector: torch.zeros(1, 4, 2, 2), LinearProjector: torch.zeros(1, 3, 4)}
    for kind, feature in kinds.items():
        layers = regressor(feature, feature.repeat(1, 2, 1, 1) if feature.ndim == 4 else feature.repeat(1, 1, 2))
        assert [type(m) for m in layers] == [kind, nn.ReLU, kind, nn.ReLU, kind]
        assert [tuple(p.shape[:2]) for p in layers.parameters()] == [(8, 4), (8, 8), (8, 8)]  # and no bias


def test_variances_start_where_they_are_told_and_learn() -> None:
    loss = VID(initial_variance=2.0, eps=0.01)
    batch = Batch(torch.randn(4, 1, 8, 8), labels=torch.arange(4))
    student, teacher = create("resnet8", in_channels=1), create("wrn_10_2", in_channels=1)
    distiller = Distiller(student, loss, teacher).setup(batch)
    for raw in loss.raw_variances:
        torch.testing.assert_close(nn.functional.softplus(raw.detach()) + 0.01, torch.full_like(raw, 2.0))
    distiller(batch).total.backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())


def test_tokens_left_out_change_nothing() -> None:
    student, teacher, raw = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(3)
    mask = torch.arange(5) < torch.tensor([[2], [5]])
    wanted = (2 * vid_loss(student[:1, :2], teacher[:1, :2], raw) + 5 * vid_loss(student[1:], teacher[1:], raw)) / 7
    torch.testing.assert_close(vid_loss(student, teacher, raw, mask=mask), wanted)


def test_mistakes_are_named() -> None:
    feature = torch.randn(2, 4, 3, 3)
    with pytest.raises(TensorError, match=r"raw_variance: one variance a channel; found \[3\]; wanted \[4\]"):
        vid_loss(feature, feature, torch.zeros(3))
    with pytest.raises(TensorError, match="student_feature"):
        vid_loss(feature[:, :3], feature, torch.zeros(4))
    with pytest.raises(ConfigError, match="initial_variance"):
        VID(initial_variance=0.0)
    with pytest.raises(ConfigError, match="eps"):
        vid_loss(feature, feature, torch.zeros(4), eps=0.0)
