"""The k most probable classes and their tail."""

import math

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.core.top_k import TopK


def test_all_classes_are_the_whole_prediction():
    logits = torch.randn(5, 7, dtype=torch.float64)
    top = TopK.of(logits, 7)
    assert torch.equal(top.log_tail, torch.full((5,), -math.inf, dtype=torch.float64))
    assert torch.equal(top.dense(), logits.log_softmax(-1))


def test_the_tail_keeps_its_digits():
    logits = torch.tensor([60.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    top = TopK.of(logits, 2)
    assert float(top.log_tail) == pytest.approx(math.log(2) - 60.0, abs=1e-9)  # 1 - sum(p) would be zero


def test_positions_temperature_and_order():
    logits = torch.randn(2, 3, 11, dtype=torch.float64)
    top = TopK.of(logits, 4, temperature=2.5)
    expected = (logits / 2.5).softmax(-1)
    assert top.ids.shape == (2, 3, 4)
    assert (top.ids.diff(dim=-1) > 0).all()
    for row, ids, kept, tail in zip(
        expected.reshape(-1, 11),
        top.ids.reshape(-1, 4),
        top.log_probs.reshape(-1, 4),
        top.log_tail.flatten(),
        strict=True,
    ):
        best = sorted(range(11), key=lambda c: -row[c])[:4]
        assert sorted(best) == ids.tolist()
        assert torch.allclose(kept.exp(), row[ids])
        assert float(tail.exp()) == pytest.approx(float(sum(row[c] for c in range(11) if c not in best)))
    dense = top.dense().exp()
    assert torch.allclose(dense.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert torch.allclose(dense.gather(-1, top.ids), expected.gather(-1, top.ids))


@pytest.mark.parametrize("k", [0, 8])
def test_k_out_of_range_is_named(k):
    with pytest.raises(ConfigError, match="k: .*1 to 7"):
        TopK.of(torch.zeros(2, 7), k)
