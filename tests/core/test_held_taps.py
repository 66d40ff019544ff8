"""Taps on what a model holds: the weight and bias of the layer that makes the logits, and modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import TapError
from limbeck.core.taps import Listener, listen
from limbeck.core.teacher import FrozenTeacher


def model(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias))


def test_the_classifier_of_a_model_rebuilds_its_logits() -> None:
    net, x = model(), torch.randn(5, 4)
    trace = listen(net, x, ["penultimate", "logits@weight", "logits@bias"])
    made = trace["penultimate"] @ trace["logits@weight"].T + trace["logits@bias"]
    torch.testing.assert_close(made, trace.logits)
    made.sum().backward()
    assert net[2].weight.grad is not None


def test_a_layer_without_bias_has_zeros() -> None:
    assert listen(model(bias=False), torch.randn(2, 4), ["logits@bias"])["logits@bias"].tolist() == [0.0, 0.0, 0.0]


def test_a_teacher_hands_out_its_weights_without_gradient() -> None:
    teacher, batch = FrozenTeacher(model()), Batch(torch.randn(2, 4))
    teacher.attach(("logits@weight", "penultimate"), batch)
    trace = teacher(batch)
    assert not trace["logits@weight"].requires_grad
    assert trace.output is None  # it stopped after the penultimate feature


def test_held_places_alone_need_no_stop() -> None:
    listener = Listener(model(), ["0@weight"], torch.randn(2, 4))
    trace = listener(torch.randn(2, 4))
    assert trace["0@weight"].shape == (8, 4)
    assert trace.logits.shape == (2, 3)


def test_a_module_can_be_run_again() -> None:
    trace = listen(model(), torch.randn(2, 4), ["2@module"])
    assert trace["2@module"](torch.zeros(1, 8)).shape == (1, 3)


@pytest.mark.parametrize("tap", ["1@weight", "7@weight"])
def test_what_holds_no_such_thing_is_named(tap: str) -> None:
    with pytest.raises(TapError) as caught:
        listen(model(), torch.randn(2, 4), [tap])
    assert caught.value.where in ("1", tap)


def test_a_plural_role_holds_several() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](x))

    trace = listen(Net(), torch.randn(2, 4), ["blocks@module", "blocks:-1@module"])
    assert trace["blocks@module"] == list(blocks)
    assert trace["blocks:-1@module"] is blocks[1]


def test_a_trace_with_a_module_can_be_mapped() -> None:
    trace = listen(model(), torch.randn(2, 4), ["2@module", "penultimate"])
    twice = trace.map(lambda t: 2 * t)
    assert twice["2@module"] is trace["2@module"]
    torch.testing.assert_close(twice["penultimate"], 2 * trace["penultimate"])
