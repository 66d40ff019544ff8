"""ScaleKD's cross-attention projector against the authors', weights included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.core.projectors import CrossAttentionProjector

NAMES = {  # ours: theirs
    "position": "pos_embed",
    "queries": "query.weight",
    "ask.0.weight": "proj_pos.0.weight",
    "ask.0.bias": "proj_pos.0.bias",
    "encode.0.weight": "proj_student.0.weight",
    "encode.1.weight": "proj_student.1.weight",
    "encode.1.bias": "proj_student.1.bias",
    "query.weight": "pos_attention.q.weight",
    "query.bias": "pos_attention.q.bias",
    "key.weight": "pos_attention.k.weight",
    "value.weight": "pos_attention.v.weight",
    "value.bias": "pos_attention.v.bias",
    "out.weight": "pos_attention.proj.weight",
    "out.bias": "pos_attention.proj.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "feed.0.weight": "ffn.layers.0.0.weight",
    "feed.0.bias": "ffn.layers.0.0.bias",
    "feed.2.weight": "ffn.layers.1.weight",
    "feed.2.bias": "ffn.layers.1.bias",
}


def numbers(case: str) -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "scalekd_scalekd.npz", allow_pickle=False) as file:
        return {
            k.removeprefix(f"{case}/"): torch.from_numpy(v)
            for k, v in file.items()
            if k.startswith(f"{case}/") and v.dtype.kind == "f"
        }


@pytest.mark.parametrize("case", ["learned", "given"])
def test_the_projector(case: str) -> None:
    """Its output, and gradients at its inputs and weights; two biases without effect are left out here."""
    theirs = numbers(case)
    goal = torch.zeros(1, 4, 3, 2)
    layer = CrossAttentionProjector(theirs["student_feature"], goal, learned=case == "learned", heads=2).double()
    own = dict(layer.named_parameters())
    state = {k: theirs[f"state/{v}"].reshape(own[k].shape) for k, v in NAMES.items() if k in own}
    layer.load_state_dict(state)
    feature = theirs["student_feature"].requires_grad_()
    query = None
    if case == "given":
        query = theirs["query"].transpose(1, 2).unflatten(2, (3, 2)).requires_grad_()
    out = layer(feature, query).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out, theirs["out"], rtol=1e-9, atol=1e-12)
    (out * theirs["weights"]).sum().backward()
    torch.testing.assert_close(feature.grad, theirs["grad_student_feature"], rtol=1e-7, atol=1e-10)
    if query is not None:
        found = query.grad.flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, theirs["grad_query"], rtol=1e-7, atol=1e-10)
    compared = [k for k, v in NAMES.items() if f"grad/{v}" in theirs]
    assert len(compared) >= 6
    for name in compared:
        wanted = theirs[f"grad/{NAMES[name]}"].reshape(own[name].shape)
        torch.testing.assert_close(own[name].grad, wanted, rtol=1e-7, atol=1e-10)
