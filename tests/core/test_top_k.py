"""The k most probable classes and their tail."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import ConfigError
from limbeck.core.top_k import TopK, top_ids


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
    for call in (TopK.of, top_ids):
        with pytest.raises(ConfigError, match="k: .*1 to 7"):
            call(torch.zeros(2, 7), k)


def test_chosen_classes():
    logits = torch.randn(2, 3, 6, dtype=torch.float64)
    ids = torch.tensor([1, 4, 5]).expand(2, 3, 3)
    top, p = TopK.at(logits, ids, 3.0), (logits / 3.0).softmax(-1)
    assert torch.allclose(top.log_probs.exp(), p[..., [1, 4, 5]])
    assert torch.allclose(top.log_tail.exp(), p[..., [0, 2, 3]].sum(-1))
    assert top.classes == 6


@pytest.mark.parametrize("k", [1, 3, 7])
def test_softening_is_that_of_the_dense_form(k):
    top = TopK.of(3 * torch.randn(5, 7, dtype=torch.float64), k)
    wanted = (top.dense() / 4.0).log_softmax(-1)
    found = top.softened(4.0)
    assert torch.allclose(found.dense(), wanted)
    assert torch.equal(found.ids, top.ids)
    assert torch.allclose(top.softened(1.0).log_probs, top.log_probs)


@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 5), st.data())
def test_of_equals_the_lowest_ids_are_kept(rows, classes, levels, data):
    k = data.draw(st.integers(1, classes))
    level = st.one_of(st.integers(0, levels - 1), st.just(-math.inf))
    values = torch.tensor(
        data.draw(st.lists(st.lists(level, min_size=classes, max_size=classes), min_size=rows, max_size=rows))
    )
    for row, ids in zip(values.tolist(), top_ids(values.float(), k).tolist(), strict=True):
        assert ids == sorted(sorted(range(classes), key=lambda c: (-row[c], c))[:k])


def test_no_rows_have_no_ids():
    assert top_ids(torch.zeros(0, 5), 2).shape == top_ids(torch.zeros(0, 2), 2).shape == (0, 2)
