from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from limbeck.core.hashing import below, draw_bits, key, key_tensor, uniform

GAMMA = 0x9E3779B97F4A7C15


def test_is_splitmix64():
    """The published outputs of SplitMix64 for seed 0: its state after n steps is n times gamma."""
    bits = draw_bits(key_tensor([GAMMA]), torch.arange(3)).flatten().tolist()
    assert [b % 2**64 for b in bits] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), st.lists(st.integers(0, 2**40), min_size=1))
def test_matches_whole_number_arithmetic(keys, index):
    mask = 2**64 - 1

    def reference(key: int, sample: int) -> int:
        z = (sample * GAMMA + key) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return z ^ z >> 31

    bits = draw_bits(key_tensor(keys), torch.tensor(index))
    assert [[b % 2**64 for b in row] for row in bits.tolist()] == [[reference(k, i) for k in keys] for i in index]
    expected = [[(reference(k, i) >> 40) / 2**24 for k in keys] for i in index]
    assert uniform(bits).tolist() == expected
    assert below(bits, 10).tolist() == [[(reference(k, i) >> 32) * 10 >> 32 for k in keys] for i in index]


@given(st.lists(st.integers(-5, 5), max_size=4), st.lists(st.integers(-5, 5), max_size=4))
def test_keys_differ_with_counters_order_and_number(first, second):
    assert (key(*first) == key(*second)) == (first == second)


def test_draws_are_uniform_and_independent():
    keys = key_tensor([key(seed, draw) for seed in range(4) for draw in range(2)])
    values = uniform(draw_bits(keys, torch.arange(20_000))).double()
    assert ((values >= 0) & (values < 1)).all()
    for column in values.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
    off_diagonal = torch.corrcoef(values.T) - torch.eye(8)
    assert off_diagonal.abs().max() < 5 / 20_000**0.5
    assert abs(torch.corrcoef(torch.stack([values[1:, 0], values[:-1, 0]]))[0, 1]) < 5 / 20_000**0.5


@pytest.mark.parametrize("limit", [1, 2, 7, 1_000_003])
def test_below_fills_its_range(limit):
    values = below(draw_bits(key_tensor([3]), torch.arange(50_000)).flatten(), limit)
    assert values.min() >= 0
    assert values.max() < limit
    if 1 < limit < 10:
        assert stats.chisquare(values.bincount(minlength=limit).numpy()).pvalue > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits():
    keys, index = key_tensor([1, 2, 3]), torch.arange(10_000)
    assert torch.equal(draw_bits(keys.cuda(), index.cuda()).cpu(), draw_bits(keys, index))
