"""Exposure of planted secrets, by ranks among all candidates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.analysis import Canary, canary_exposure, exposure
from limbeck.analysis.exposure import text_losses
from limbeck.core.errors import ConfigError, DataError
from limbeck.data.language import ByteTokens, train_bpe


def test_first_and_last_rank() -> None:
    losses = torch.randn(64).double()
    assert exposure(float(losses.min()), losses) == 6.0
    assert exposure(float(losses.max()), losses) == 0.0
    assert exposure(float(losses.sort().values[7]), losses) == 3.0
    assert exposure(1.0, torch.ones(8)) == 3.0  # of equals it comes first


def test_a_secret_that_is_none() -> None:
    with pytest.raises(DataError, match="candidates"):
        exposure(1.0, torch.tensor([2.0]))
    with pytest.raises(ConfigError, match="candidates"):
        canary_exposure(Model(258), ByteTokens(), Canary("pin ", "9", ("1", "2")))


class Model(nn.Module):
    """A bigram model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(size, size)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.table(input_ids)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_losses_are_those_of_each_text_alone(kind: str) -> None:
    texts = ["code 17 and 4711", "code 4711 too", "pin code"]
    tokens = ByteTokens() if kind == "bytes" else train_bpe(texts * 4, 270)
    model, candidates = Model(tokens.size), ["17", "4711", "4", "99 9"]
    found = text_losses(model, tokens, "code ", candidates, ".", batch=3)
    ((head, _),) = tokens.encode(["code "])
    for text, loss in zip(candidates, found.tolist(), strict=True):
        ((ids, _),) = tokens.encode([f"code {text}."])
        row, own = [*tokens.front, *ids.tolist()], [*tokens.front, *head.tolist()]
        first = next((i for i, (a, b) in enumerate(zip(row, own, strict=False)) if a != b), len(own))
        said = model(torch.tensor([row])).double().log_softmax(-1)[0]
        assert loss == pytest.approx(-sum(said[i - 1, row[i]].item() for i in range(first, len(row))), rel=1e-6)


def test_who_learned_a_secret_exposes_it() -> None:
    tokens, model = ByteTokens(), Model(258)
    candidates = tuple(f"{n:02d}" for n in range(100))
    canary = Canary("pin ", "42", candidates, ".")
    before = canary_exposure(model, tokens, canary)
    ids = torch.tensor([tokens.encode([canary.text])[0][0].tolist()])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
        optimizer.step()
    after = canary_exposure(model, tokens, canary)
    assert after == pytest.approx(math.log2(100))
    assert before < after
    assert model.training
