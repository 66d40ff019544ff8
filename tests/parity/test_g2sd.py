"""G2SD's generic stage against the authors' models and loss: one whole step, in double precision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.teacher import FrozenTeacher
from limbeck.schemes.in_steps import generic
from limbeck.schemes.in_steps.g2sd import G2SD
from limbeck.schemes.parts.masked_patches import sincos_positions
from tests.schemes.in_steps.vits import autoencoder, student

with np.load(Path(__file__).parent / "g2sd_g2sd.npz", allow_pickle=False) as loaded:
    NUMBERS = {n: torch.from_numpy(np.asarray(v)) for n, v in loaded.items() if v.dtype.kind != "U"}
#: Their names in those of transformers and of limbeck's decoder.
NAMES = {
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "cls_token": "vit.embeddings.cls_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "pos_embed": "vit.embeddings.position_embeddings",
    "mask_token": "decoder.mask_token",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_blocks": "decoder.decoder_layers",
    "blocks": "vit.layers",
    "norm.": "vit.layernorm.",
}
INNER = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
OWN = {
    "decoder_embed": "decoder.enter",
    "mask_token": "decoder.mask_token",
    "decoder_blocks": "decoder.blocks",
    "decoderfeature_pred.fc1": "predictor.0",
    "decoderfeature_pred.fc2": "predictor.2",
    "decoder_pos_embed": "decoder.positions",
}


def transformed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their numbers by transformers' names; queries, keys and values apart."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        start = next(theirs for theirs in NAMES if name.startswith(theirs))
        name = NAMES[start] + name.removeprefix(start)
        for theirs, ours in INNER.items():
            name = name.replace(theirs, ours)
        if ".attn.qkv." in name:
            for one, part in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"attention.{one}_proj")] = part
        else:
            found[name] = value
    return found


def owned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of decoder and predictor, by limbeck's names."""
    found = {}
    for name, value in state.items():
        start = next((theirs for theirs in OWN if name.startswith(theirs)), None)
        if start is not None:
            name = OWN[start] + name.removeprefix(start)
            found[re.sub(r"mlp\.fc([12])", lambda m: f"mlp.{2 * int(m[1]) - 2}", name)] = value
    return found


def part(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in NUMBERS.items() if k.startswith(prefix)}


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return transformed({k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))})


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    assert not unknown


def stage(supervise: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The stage with their weights and masks, and its student."""
    order = NUMBERS["noise"].argsort(dim=1).argsort(dim=1)
    monkeypatch.setattr(generic, "patch_order", lambda index, *_: order[index])
    mae = autoencoder(12, num_hidden_layers=1, intermediate_size=48).double()
    load(mae, transformed(part("teacher/")))
    model = student("ViTForImageClassification", hidden_size=8, intermediate_size=32).double()
    load(model, encoder_of(part("student/")))
    scheme = G2SD(teacher_blocks=2, supervise=supervise, decoder_width=4, decoder_blocks=1, decoder_heads=2)
    teacher = FrozenTeacher(mae)
    known = generic.Autoencoder.of(teacher, "teacher")
    encoder = generic.Encoder.of(model, NUMBERS["images"], known.patches)
    loss = generic.GenericLoss(scheme, known, encoder)
    pair = generic.Generic(model, teacher, loss, encoder, seed=0)
    pair.setup(batch())
    load(loss, owned(part("student/")))
    return pair, loss


def batch() -> Batch:
    return Batch(NUMBERS["images"], index=torch.arange(3))


@pytest.mark.parametrize("supervise", ["all", "masked"])
def test_a_step_comes_to_their_loss_and_gradients(supervise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, loss = stage(supervise, monkeypatch)
    total = pair(batch()).total
    torch.testing.assert_close(total.detach(), NUMBERS[f"{supervise}/loss"], rtol=1e-10, atol=0)
    total.backward()
    gradients = part(f"{supervise}/grad/")
    for module, wanted in ((pair.student, encoder_of(gradients)), (loss, owned(gradients))):
        found = dict(module.named_parameters())
        assert len(wanted) > 8
        for name, value in wanted.items():
            torch.testing.assert_close(found[name].grad, value, rtol=1e-8, atol=1e-12)


def test_both_see_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, _ = stage("all", monkeypatch)
    prepared = pair.prepare(batch())
    assert torch.equal((prepared.extras["patch_order"] >= 4).double(), NUMBERS["mask"])
    given = prepared.teacher_inputs
    assert torch.equal(pair.teacher.model.double()(**given).mask.double(), NUMBERS["mask"])


@pytest.mark.parametrize("name", ["positions", "decoder_positions"])
def test_fixed_positions(name: str) -> None:
    wanted = NUMBERS[name][0]
    torch.testing.assert_close(sincos_positions(16, wanted.shape[1]).double(), wanted[1:], rtol=0, atol=1e-6)
    assert not wanted[0].any()
