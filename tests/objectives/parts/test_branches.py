from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.errors import TensorError
from limbeck.objectives.parts.branches import BottleneckBranch, TokenBranch, branch, branch_points, conv_branch


def test_the_last_layer_at_each_resolution_branches_off() -> None:
    maps = [torch.zeros(1, 8, s, s) for s in (16, 16, 8, 8, 8, 4)]
    assert branch_points(maps) == [1, 4, 5]
    assert branch_points(maps, most=2) == [4, 5]
    merged = [torch.zeros(1, n, 8) for n in (64, 64, 16, 16, 4)]
    assert branch_points(merged) == [1, 3, 4]


def test_layers_of_one_resolution_branch_off_evenly() -> None:
    blocks = [torch.zeros(1, 17, 8)] * 6
    assert branch_points(blocks) == [1, 2, 4, 5]
    assert branch_points(blocks, most=1) == [5]
    assert branch_points(blocks[:2]) == [0, 1]
    with pytest.raises(TensorError, match="maps or tokens"):
        branch_points([torch.zeros(2, 8)])


@pytest.mark.parametrize(("size", "after"), [(16, 3), (8, 2), (4, 1), (2, 0), (1, 0), (5, 2)])
def test_branches_on_maps(size: int, after: int) -> None:
    head = branch(torch.zeros(3, 6, size, size), after, 20, 5)
    assert head(torch.randn(3, 6, size, size)).shape == (3, 5)
    assert sum(m.stride == (2, 2) for m in head.modules() if isinstance(m, nn.Conv2d)) == after


@pytest.mark.parametrize(("tokens", "merges"), [(196, 1), (197, 1), (784, 2), (49, 0), (17, 0), (225, 0), (10, 0)])
def test_branches_on_tokens(tokens: int, merges: int) -> None:
    head = branch(torch.zeros(3, tokens, 8), 2, 12, 5)
    assert isinstance(head, TokenBranch)
    assert (len(head.merges), len(head.blocks)) == (merges, 2)
    assert head(torch.randn(3, tokens, 8)).shape == (3, 5)
    last = branch(torch.zeros(3, tokens, 8), 0, 12, 5)
    assert isinstance(last, TokenBranch)
    assert len(last.blocks) == 1


def test_the_class_token_is_read_where_there_is_one() -> None:
    x = torch.randn(2, 17, 8)
    head = TokenBranch(x, 1, 8, 3).eval()
    only = TokenBranch(x, 0, 8, 3)
    assert torch.equal(only(x), only.classifier(x[:, 0]))
    assert torch.allclose(only(x[:, 1:]), only.classifier(x[:, 1:].mean(1)))
    assert head(x).shape == (2, 3)


def test_convolutions_double_and_end_at_the_width() -> None:
    widths = [m.out_channels for m in conv_branch(6, 3, 40, 5).modules() if isinstance(m, nn.Conv2d)]
    assert widths == [6, 6, 6, 12, 12, 12, 12, 24, 24, 24, 24, 40]


def test_bottlenecks_bring_a_layer_to_the_last_ones_grid() -> None:
    """The released ResNet's first branch: 32x32 to 4x4 by one convolution of stride 8, a quarter as wide inside."""
    head = BottleneckBranch(torch.zeros(2, 8, 32, 32), torch.zeros(2, 64, 4, 4), 64, 10)
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convolutions] == [
        (8, 16, (1, 1), (1, 1)),
        (16, 16, (8, 8), (8, 8)),
        (16, 64, (1, 1), (1, 1)),
    ]
    answer, read = head(torch.randn(2, 8, 32, 32))
    assert (answer.shape, read.shape) == ((2, 10), (2, 64))
    assert (read >= 0).all()
    tokens = torch.randn(2, 17, 8)
    other = BottleneckBranch(tokens, tokens, 12, 10, relu=False)(tokens)[1]
    assert other.shape == (2, 12)
    assert (other < 0).any()
