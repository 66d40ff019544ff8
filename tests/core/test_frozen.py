"""Running a module without training it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError
from limbeck.core.frozen import arguments_beside, run_frozen


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


class Wants(nn.Module):
    def forward(self, x: Tensor, input_dimensions: tuple[int, int], mask: Tensor | None, other: int = 3) -> Tensor:
        assert mask is None
        return x.unflatten(1, input_dimensions)


def test_what_else_a_module_wants() -> None:
    x = torch.zeros(2, 9, 4)
    assert arguments_beside(Wants(), x, "part") == {"input_dimensions": (3, 3), "mask": None}
    assert run_frozen(Wants(), x, **arguments_beside(Wants(), x, "part")).shape == (2, 3, 3, 4)
    with pytest.raises(ConfigError, match="does not go on from one tensor") as caught:
        arguments_beside(nn.Bilinear(4, 4, 1), x, "part")
    assert caught.value.where == "part"
    with pytest.raises(ConfigError, match="one module"):
        arguments_beside([nn.Linear(4, 1)], x, "part")
