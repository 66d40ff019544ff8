"""What a forward pass said, and where its logits are."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ModelError, TapError
from limbeck.core.trace import Trace, logits_of

L, H = torch.zeros(2, 3), torch.ones(2, 5)


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor | None


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "output",
    [L, {"hidden": H, "logits": L}, {"out": L, "aux": H}, (L, H), [L], (None, L), Output(H, L), Pair(L, H)],
    ids=str,
)
def test_logits_are_found_in_common_outputs(output: Any) -> None:
    assert logits_of(output) is L
    assert Trace(output).logits is L


@pytest.mark.parametrize(
    ("output", "where"),
    [
        ({"head": L}, "head"),
        ((H, L), "1"),
        ((H, L), "-1"),
        ({"heads": {"main": L, "aux": H}}, "heads.main"),
        ({"heads": [H, (H, L)]}, "heads.1.1"),
        (Output(H, None), "hidden"),
    ],
    ids=str,
)
def test_logits_are_found_where_one_says(output: Any, where: str) -> None:
    assert logits_of(output, where).shape in (L.shape, H.shape)


@pytest.mark.parametrize(
    ("output", "where", "message"),
    [
        ({"hidden": H}, None, r"output: the model's output holds no logits; found dict with keys \['hidden'\]"),
        (None, None, "holds no logits; found NoneType"),
        (Output(H, None), None, "holds no logits; found Output"),
        (("a", None), None, r"found tuple of \['str', 'NoneType'\]"),
        ({"hidden": H}, "logit", r"no such entry; found dict with keys \['hidden'\]"),
        ((H, L), "2", "no such entry"),
        ((H, L), "logits", "no such entry"),
        ({"deep": {"loss": 3}}, "deep.loss", "holds no logits; found int"),
    ],
)
def test_where_there_are_none_the_error_lists_what_is(output: Any, where: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        logits_of(output, where)


def test_taps_that_were_not_asked_for_are_named() -> None:
    trace = Trace(L, {"layer1": H})
    assert trace["layer1"] is H
    assert trace["logits"] is L
    with pytest.raises(TapError, match=r"layer2: this tap was not asked for; found taps \['layer1'\].*'layer1'"):
        trace["layer2"]


def test_a_stopped_model_has_no_logits() -> None:
    with pytest.raises(TapError, match="stopped before its logits.*among the objective's taps"):
        Trace(None, {"layer1": H}).logits  # noqa: B018


def test_map_reaches_everything_once() -> None:
    leaf = torch.ones(2, 3, requires_grad=True)
    twice = leaf * 2
    seen = []
    trace = Trace({"logits": twice, "text": "a"}, {"logits": twice, "stages": [leaf, twice]}, members=(Trace(twice),))
    mapped = trace.map(lambda t: (seen.append(t), t + 1)[1])
    assert mapped["stages"][1] is mapped.logits is mapped.output["logits"]
    assert mapped.output["text"] == "a"
    assert torch.equal(mapped.members[0].logits, twice + 1)
    assert len(seen) == 3  # the two tensors, and the member's
    assert trace["stages"][0] is leaf


def test_detach_cuts_every_tensor() -> None:
    leaf = torch.ones(2, 3, requires_grad=True)
    trace = Trace((leaf, {"h": leaf}), {"stages": [leaf]}, "0", (Trace(leaf),)).detach()
    tensors = [trace.output[0], trace.output[1]["h"], trace["stages"][0], trace.members[0].output, trace.logits]
    assert not any(t.requires_grad for t in tensors)
