"""Running a module without training it."""

from __future__ import annotations

import torch
from torch import nn

from limbeck.objectives.parts.frozen import run_frozen


def test_gradient_goes_through_and_not_into() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3, requires_grad=True)
    out = run_frozen(module, x)
    torch.testing.assert_close(out, module(x))
    out.square().sum().backward()
    assert all(p.grad is None for p in module.parameters())
    wanted = torch.autograd.grad(module(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)


def test_it_runs_in_the_features_precision() -> None:
    module = nn.Linear(3, 2).half()
    assert run_frozen(module, torch.randn(4, 3)).dtype == torch.float32
    assert module.weight.dtype == torch.float16
