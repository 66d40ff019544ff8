"""Parameters, floating-point operations and time, and that measuring changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.models import create, flops, latency, parameters


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y)


def test_parameters_shared_ones_once_and_trainable_ones() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert parameters(net) == 40
    net[1].weight = net[0].weight
    assert parameters(net) == 24
    net[0].requires_grad_(False)
    assert parameters(net, trainable=True) == 4


def test_flops_by_hand() -> None:
    assert flops(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 5, 5)) == 2 * 2 * 25 * 8 * 27
    x = torch.zeros(2, 4)
    assert flops(Pair(), (x, x)) == flops(Pair(), {"x": x, "y": x}) == 2 * 2 * 2 * 12


def test_flops_of_resnet20_are_those_of_the_paper() -> None:
    """He et al. do not print it, but 41M multiply-adds is the figure in use; option A adds none."""
    assert flops(create("resnet20_a"), torch.zeros(1, 3, 32, 32)) / 2e6 == pytest.approx(40.8, abs=0.3)


def test_measuring_leaves_modes_and_statistics_alone() -> None:
    net = create("resnet8", in_channels=1).train()
    net.layer2.eval()
    modes = [m.training for m in net.modules()]
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    x = torch.randn(2, 1, 8, 8)
    flops(net, x)
    assert latency(net, x, repeats=2) > 0
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())


def test_latency_grows_with_work_and_is_in_milliseconds() -> None:
    small, large = create("resnet8"), create("resnet110")
    x = torch.randn(1, 3, 32, 32)
    assert latency(small, x, repeats=5) * 2 < latency(large, x, repeats=5) < 10_000
    with pytest.raises(ModelError, match="repeats"):
        latency(small, x, repeats=0)
