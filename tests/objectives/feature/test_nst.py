"""NST against its paper's equations, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, LimbeckError
from limbeck.models import create
from limbeck.objectives.feature.nst import NST, nst_loss

KERNELS = ["poly", "linear", "gaussian"]


def reference(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    """Sums over channels by hand, sample by sample."""
    losses = []
    for s_map, t_map in zip(student, teacher, strict=True):
        s = [c.flatten() / c.flatten().norm() for c in s_map]
        t = [c.flatten() / c.flatten().norm() for c in t_map]
        spread = sum((a - b).dot(a - b).item() for a in s for b in t) / (len(s) * len(t))

        def k(a: Tensor, b: Tensor, spread: float = spread) -> Tensor:
            if kernel == "linear":
                return a.dot(b)
            return a.dot(b) ** 2 if kernel == "poly" else torch.exp(-(a - b).dot(a - b) / (2 * spread))

        value = sum(k(a, b) for a in t for b in t) / len(t) ** 2
        value += sum(k(a, b) for a in s for b in s) / len(s) ** 2
        losses.append(value - 2 * sum(k(a, b) for a in s for b in t) / (len(s) * len(t)))
    return torch.stack(losses)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_papers_sums(kernel: str) -> None:
    student, teacher = torch.randn(3, 4, 3, 2).double(), torch.randn(3, 5, 3, 2).double()
    wanted = reference(student, teacher, kernel)
    torch.testing.assert_close(nst_loss(student, teacher, kernel=kernel, reduction="none"), wanted)
    torch.testing.assert_close(nst_loss(student, teacher, kernel=kernel), wanted.mean())
    tokens = [f.flatten(2).transpose(1, 2) for f in (student, teacher)]
    torch.testing.assert_close(nst_loss(*tokens, kernel=kernel), wanted.mean())


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_a_discrepancy(kernel: str) -> None:
    """0 between equal sets of channels, in whatever order and size; else above."""
    feature = torch.randn(2, 4, 3, 3).double()
    shuffled = torch.tensor([2.0, 3.0, 1.0, 7.0])[None, :, None, None] * feature[:, [2, 0, 3, 1]]
    assert nst_loss(feature, shuffled, kernel=kernel).item() == pytest.approx(0.0, abs=1e-12)
    assert nst_loss(feature, torch.randn(2, 3, 3, 3).double(), kernel=kernel) > 1e-4


@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_left_out_are_as_if_they_were_not(kernel: str) -> None:
    student, teacher = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 3).double()
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    found = nst_loss(student, teacher, kernel=kernel, mask=mask)
    torch.testing.assert_close(found, nst_loss(student[:, :3], teacher[:, :3], kernel=kernel))


def test_one_layer_or_all() -> None:
    student, teacher = create("resnet8", in_channels=1), create("resnet14", in_channels=1)
    batch = Batch(torch.randn(3, 1, 8, 8), labels=torch.tensor([0, 1, 2]))
    each = [Distiller(student, NST(f"stages:{i}"), teacher).setup(batch)(batch).total for i in range(3)]
    whole = Distiller(student, NST(), teacher).setup(batch)(batch).total
    torch.testing.assert_close(whole, sum(each), rtol=1e-4, atol=1e-6)
    assert math.isfinite(whole.item())


def test_between_a_network_of_maps_and_tokens() -> None:
    value = nst_loss(torch.randn(2, 4, 8, 8), torch.randn(2, 17, 6))
    assert 0 < value.item() < 4


def test_mistakes_are_named() -> None:
    feature = torch.randn(2, 4, 3, 3)
    with pytest.raises(ConfigError, match="kernel: no such kernel; found 'rbf'"):
        nst_loss(feature, feature, kernel="rbf")
    with pytest.raises(LimbeckError, match="student_feature"):
        nst_loss(feature.flatten(1), feature)
    with pytest.raises(LimbeckError, match="teacher_feature"):
        nst_loss(feature, feature[:1])
    with pytest.raises(LimbeckError, match="mask"):
        nst_loss(feature, feature, mask=torch.ones(2, 5, dtype=torch.bool))
