"""Layers of two models side by side: before the ReLU, at one resolution, at one width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.layers import LayerObjective, SameWidth
from limbeck.core.layout import aligned
from limbeck.core.objective import DataInfo, Objective
from limbeck.core.projectors import connector
from limbeck.core.roles import Spot, resolve
from limbeck.core.survey import survey
from limbeck.core.taps import listen
from limbeck.core.trace import Trace
from limbeck.models import create


def spots(model: nn.Module, size: int = 16, channels: int = 3) -> list[tuple[str, str]]:
    found = resolve("preactivations", survey(model, torch.randn(2, channels, size, size)))
    assert isinstance(found, list)
    return [(s.module, s.side) for s in found]


def test_before_the_relu_of_a_residual_network_is_the_sum_of_its_last_block() -> None:
    model, x = create("resnet14").eval(), torch.randn(2, 3, 16, 16)
    assert spots(model) == [(f"layer{i}.1.relu2", "in") for i in (1, 2, 3)]
    trace = listen(model, x, ["stages", "preactivations"])
    for after, before in zip(trace["stages"], trace["preactivations"], strict=True):
        assert torch.equal(after, before.relu())
        assert (before < 0).any()


def test_before_the_relu_of_a_wide_one_is_the_next_normalisation() -> None:
    assert spots(create("wrn_10_1")) == [("layer2.0.relu1", "in"), ("layer3.0.relu1", "in"), ("relu", "in")]


def test_without_a_relu_of_its_own_a_stage_stands_for_itself() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 6, 3, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.second(torch.relu(self.first(x))))
            return self.head(x.mean(dim=(2, 3)))

    assert spots(Plain()) == [("first", "out"), ("second", "out")]


def test_a_relu_that_runs_often_is_tapped_at_its_last_call_and_may_write_in_place() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.b(self.relu(self.a(x))) + x)

    model = nn.Sequential(Block(), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(2, 3, 4, 4)
    assert resolve("preactivations:0", survey(model, x)) == Spot("0.relu", "in", call=1)
    block = model[0]
    wanted = block.b(block.a(x).relu()) + x
    torch.testing.assert_close(listen(model, x, ["preactivations:0"])["preactivations:0"], wanted)


def test_aligned_keeps_what_has_the_same_places() -> None:
    shapes = {
        ((2, 5, 8), (2, 5, 3)): ((2, 5, 8), (2, 5, 3)),
        ((2, 8), (2, 3)): ((2, 8), (2, 3)),
        ((2, 16, 8), (2, 17, 3)): ((2, 8, 4, 4), (2, 3, 4, 4)),
        ((2, 8, 4, 4), (2, 3, 8, 8)): ((2, 8, 4, 4), (2, 3, 4, 4)),
    }
    for (student, teacher), wanted in shapes.items():
        found = aligned(torch.zeros(student), torch.zeros(teacher))
        assert tuple(tuple(f.shape) for f in found) == wanted, (student, teacher)
    assert aligned(torch.zeros(2, 8, 4, 4), torch.zeros(2, 3, 8, 8), to="teacher")[0].shape == (2, 8, 8, 8)
    with pytest.raises(TensorError, match="different numbers of samples"):
        aligned(torch.zeros(2, 8), torch.zeros(3, 8))
    with pytest.raises(TensorError, match="3 or more dimensions"):
        aligned(torch.zeros(2, 8), torch.zeros(2, 8, 4, 4))


def test_connector_starts_as_in_the_papers_code() -> None:
    layer, norm = connector(torch.zeros(2, 50, 4, 4), torch.zeros(2, 200, 4, 4))
    assert layer.bias is None
    assert layer.weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.05)
    assert isinstance(norm, nn.BatchNorm2d)


def traces(*widths: int) -> Trace:
    return Trace(None, {"stages": [torch.randn(2, w, 8 // 2**i, 8 // 2**i) for i, w in enumerate(widths)]})


def test_same_width_learns_a_map_only_where_widths_differ() -> None:
    objective = SameWidth("stages")
    student, teacher, batch = traces(3, 4), traces(3, 6), Batch(torch.zeros(2))
    with pytest.raises(ConfigError, match=r"projectors: not set up yet"):
        objective.features(student, teacher)
    objective.setup(student, teacher, batch, DataInfo())
    assert [type(m).__name__ for m in objective.projectors] == ["Identity", "ConvProjector"]
    (s1, _), (s2, t2) = objective.features(student, teacher)
    assert torch.equal(s1, student["stages"][0])
    assert s2.shape == t2.shape == (2, 6, 4, 4)
    with pytest.raises(TensorError, match="found 1 pairs; wanted 2"):
        objective.features(traces(3), traces(3))


def test_an_objective_has_no_first_stage_of_its_own_unless_it_says_so() -> None:
    assert Objective().opening() is None
    assert LayerObjective("stages").opening() is None
