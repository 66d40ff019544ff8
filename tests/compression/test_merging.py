"""Arcs between tensors and between models."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.compression import slerp, slerp_merge
from limbeck.core.errors import ConfigError, TensorError


def test_ends_are_the_tensors_and_lengths_are_kept() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7, dtype=torch.double)
    b = b * a.norm() / b.norm()
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-14)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-14)
    for t in (0.1, 0.5, 0.8):
        assert float(slerp(a, b, t).norm()) == pytest.approx(float(a.norm()))
    whole = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    part = slerp(a, b, 0.3)
    assert math.acos(float((a * part).sum() / (a.norm() * part.norm()))) == pytest.approx(0.3 * whole)


def test_where_there_is_no_arc_it_is_a_line() -> None:
    a = torch.tensor([1.0, 2.0])
    assert torch.allclose(slerp(a, 3 * a, 0.25), 1.5 * a)
    assert torch.allclose(slerp(a, torch.zeros(2), 0.25), 0.75 * a)
    assert torch.allclose(slerp(a, -a, 0.5), torch.zeros(2))


def test_models_are_merged_tensor_by_tensor() -> None:
    first, second = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)) for _ in range(2))
    merged = slerp_merge(first.state_dict(), second.state_dict(), 0.5)
    own, other = first.state_dict()["0.weight"], second.state_dict()["0.weight"].clone()
    assert torch.equal(merged["0.weight"], slerp(own, other))
    assert not torch.equal(merged["0.weight"], own)
    second.load_state_dict(merged)
    assert merged["1.num_batches_tracked"].dtype == torch.long
    with pytest.raises(TensorError, match=r"0\.bias"):
        slerp_merge({"0.bias": torch.zeros(2)}, {})
    with pytest.raises(TensorError, match="shape"):
        slerp(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ConfigError, match="t"):
        slerp(torch.zeros(2), torch.zeros(2), 1.5)
