"""Structurally connected layers: how many weights, who sees whom, and the pace of each vertical."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.models import load_model
from limbeck.models.concentration import Branches, ConcentrationHead, verticals_of

VERTICALS = [[0, 3, 5], [1, 2], [4]]


def test_the_paper_s_count_of_weights() -> None:
    width, shared, own, classes = 10, 8, 5, 6
    head = ConcentrationHead(width, VERTICALS, shared, [own])
    weights = sum(p.numel() for name, p in head.named_parameters() if name.endswith("weight"))
    assert weights == width * shared + shared * own * len(VERTICALS) + own * classes
    assert sum(p.numel() for p in head.pace) == 3
    assert sum(p.numel() for p in ConcentrationHead(width, VERTICALS, pace="class").pace) == classes
    assert len(ConcentrationHead(width, VERTICALS, pace="none").pace) == 0


def test_a_vertical_s_loss_moves_its_own_branch_alone() -> None:
    head = ConcentrationHead(4, VERTICALS, 8, [6, 5], common=2)
    head(torch.randn(7, 4))[:, [1, 2]].square().sum().backward()
    for layer in head.branches:
        moved = layer.weight.grad.flatten(1).abs().sum(dim=1)
        assert moved[1] > 0
        assert moved[0] == moved[2] == 0
    assert head.shared.weight.grad.abs().sum() > 0
    assert head.common.weight.grad.abs().sum() > 0
    assert head.last[0].weight.grad is None or not head.last[0].weight.grad.any()


def test_it_is_the_layers_written_out() -> None:
    head, x = ConcentrationHead(4, VERTICALS, 8, [5], pace="none").double(), torch.randn(7, 4).double()
    shared, (branches,) = head.shared(x).relu(), head.branches
    found = head(x)
    for v, classes in enumerate(VERTICALS):
        own = (shared @ branches.weight[v].T + branches.bias[v]).relu()
        torch.testing.assert_close(found[:, classes], head.last[v](own))


@pytest.mark.parametrize("pace", ["vertical", "class"])
def test_the_length_of_a_vertical_is_its_pace_whatever_its_layers_say(pace: str) -> None:
    head, x = ConcentrationHead(4, VERTICALS, 8, [5], pace=pace), torch.randn(7, 4)  # type: ignore[arg-type]
    said = head(x)
    for gain, classes in zip(head.pace, VERTICALS, strict=True):
        size = (said[:, classes] / gain).norm(dim=1)
        torch.testing.assert_close(size, torch.ones(7))
        assert float(gain.detach().mean()) == pytest.approx(math.sqrt(len(classes)), abs=0.01)
    with torch.no_grad():
        for layer in head.last:
            layer.weight *= 3
            layer.bias *= 3
    torch.testing.assert_close(head(x), said)
    assert float(ConcentrationHead(4, VERTICALS, start=10.0).pace[0].detach()) == pytest.approx(10, abs=0.01)


def test_without_a_shared_layer_verticals_part_at_once() -> None:
    head = ConcentrationHead(4, VERTICALS, 0, [6, 5])
    assert [tuple(layer.weight.shape) for layer in head.branches] == [(3, 6, 4), (3, 5, 6)]
    assert head(torch.randn(2, 4)).shape == (2, 6)
    x = torch.randn(2, 3, 4)
    layer = Branches(3, 4, 6)
    torch.testing.assert_close(layer(x)[:, 1], x[:, 1] @ layer.weight[1].T + layer.bias[1])


def test_a_model_gets_it_by_name() -> None:
    spec = "limbeck.models.concentration:concentrated"
    model = load_model(spec, body="resnet8", verticals=[6, 4], shared=8, branches=[4], in_channels=1)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_mistakes() -> None:
    for wrong in ([], [[0, 1], [1]], [[0, 2]], [0, 3]):
        with pytest.raises(ConfigError, match="every class is of one vertical"):
            verticals_of(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="units of its own"):
        ConcentrationHead(4, [2, 2], branches=[])
