"""Adapters: what they change, and that nothing is left of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.errors import ConfigError, ModelError
from limbeck.models.low_rank import adapt, merge
from tests.schemes.tiny import llama


def test_a_fresh_adapter_changes_nothing_and_a_merged_one_is_what_it_was() -> None:
    model, ids = llama(layers=2, seed=1).double().eval(), torch.arange(2, 9).view(1, 7)
    before, names = model(ids).logits, list(model.state_dict())
    layers = adapt(model, rank=3, alpha=6.0)
    assert len(layers) == 14
    assert "lm_head" not in layers
    assert torch.equal(model(ids).logits, before)
    weights = dict(model.named_parameters())
    one = "model.layers.1.mlp.up_proj.parametrizations.weight"
    with torch.no_grad():
        for name, parameter in weights.items():
            if name.endswith((".up", ".down")):
                parameter.normal_()
    wanted = weights[f"{one}.original"] + 2.0 * weights[f"{one}.0.up"] @ weights[f"{one}.0.down"]
    adapted = model(ids).logits
    assert merge(model) == 14
    assert torch.allclose(model.model.layers[1].mlp.up_proj.weight, wanted)
    assert torch.equal(model(ids).logits, adapted)
    assert not torch.allclose(adapted, before)
    assert sorted(model.state_dict()) == sorted(names)
    assert merge(model) == 0


def test_what_cannot_be_is_said() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="rank"):
        adapt(net, 0)
    with pytest.raises(ModelError, match="no such linear"):
        adapt(net, layers=["q_proj"])
    adapt(net)
    with pytest.raises(ModelError, match="already"):
        adapt(net)
