"""A model run from the middle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.errors import TapError
from limbeck.core.taps import listen
from limbeck.models.split_forward import SplitForward
from tests.schemes.tiny import llama


def test_its_own_state_gives_back_its_own_answer() -> None:
    """In a transformer, whose blocks need masks and positions; and no parameter gets a gradient."""
    model = llama(layers=3, seed=0).eval()
    ids = torch.randint(2, 250, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": (ids > 20).long()}
    trace = listen(model, inputs, ["blocks:0", "blocks:2"])
    run = SplitForward(model, "blocks:0", "blocks:2", inputs)
    state = trace["blocks:0"].detach().requires_grad_()
    torch.testing.assert_close(run(inputs, state), trace["blocks:2"])
    run(inputs, state).sum().backward()
    assert state.grad is not None
    assert bool(state.grad.abs().sum() > 0)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    other = run(inputs, torch.zeros_like(state))
    assert not torch.equal(other, trace["blocks:2"])


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: object) -> tuple[torch.Tensor, None]:
        return self.layer(x[0] if isinstance(x, tuple) else x), None


def test_of_a_tuple_the_tensor_is_replaced() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Tuples(), Tuples()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))[0]

    model, x = Model(), torch.ones(2, 3)
    state = torch.randn(2, 3)
    assert torch.equal(SplitForward(model, "first", "second", x)(x, state), model.second.layer(state))


def test_what_it_refuses() -> None:
    model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(1, 2)
    with pytest.raises(TapError, match="does not come after"):
        SplitForward(model, "2", "0", x)
    with pytest.raises(TapError, match="not the output of one module"):
        SplitForward(model, "0@in", "2", x)
