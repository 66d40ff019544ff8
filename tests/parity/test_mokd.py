"""MOKD against the authors' losses and heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.schemes.online.mokd_modes import dino_loss, search_loss
from limbeck.schemes.parts.view_heads import MLPHead, TokenHead

with np.load(Path(__file__).parent / "mokd_mokd.npz", allow_pickle=False) as loaded:
    NUMBERS = dict(loaded)
NAMES = {
    "patch_embed.": "enter.",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "last_layer.weight_g": "last.length",
    "last_layer.weight_v": "last.direction",
    "pos_embed": "place",
}


def part(prefix: str) -> dict[str, Tensor]:
    found = {k.removeprefix(prefix): v for k, v in NUMBERS.items() if k.startswith(prefix)}
    return {k: torch.from_numpy(np.asarray(v)) for k, v in found.items() if v.dtype.kind in "fi"}


def same(found: Tensor | None, wanted: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_dino(case: str) -> None:
    given = part(f"dino{case}/")
    student = given["student"].requires_grad_()
    value = dino_loss(
        student,
        given["teacher"],
        given["center"],
        size=int(given["size"]),
        teacher_temperature=float(given["temperature"]),
    )
    value.backward()
    same(value.detach(), given["value"])
    same(student.grad, given["grad"])
    same(given["center"].lerp(given["teacher"].mean(0), 0.1), given["moved"])


def test_search() -> None:
    given = part("search/")
    student = given["student"].requires_grad_()
    value = search_loss(student, given["teacher"], teacher_temperature=float(given["temperature"]))
    value.backward()
    same(value.detach(), given["value"])
    same(student.grad, given["grad"])


def load(head: nn.Module, kind: str) -> None:
    state = {}
    for name, value in part(f"{kind}/state/").items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = value.flatten(1) if name == "enter.weight" else value
        if name == "place":
            state[name] = value.transpose(1, 2).unflatten(2, (3, 3))
    head.load_state_dict(state)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_token_heads(kind: str) -> None:
    given = part(f"{kind}/")
    head = TokenHead(given["input"], width=8, prototypes=6, depth=2, heads=2).double()
    load(head, kind)
    feature = given["input"].requires_grad_()
    (alone, own), (searched, _) = head(feature), head(feature, given["query"])
    (alone.sin().sum() + searched.cos().sum()).backward()
    same(alone.detach(), given["alone"])
    same(searched.detach(), given["searched"])
    same(feature.grad, given["grad"])
    if kind == "cnn":
        same(own.detach(), given["query_own"])


def test_mlp_head() -> None:
    given = part("mlp/")
    head = MLPHead(4, 6, hidden=5, bottleneck=3).double()
    state = {k.replace("mlp.", "layers."): v for k, v in part("mlp/state/").items()}
    head.load_state_dict({next((k.replace(a, b) for a, b in NAMES.items() if a in k), k): v for k, v in state.items()})
    same(head(given["input"]).detach(), given["output"])
    assert not head.last.length.requires_grad
