"""Distances in a few bits, against the nearest level found one by one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.cache.levels import as_half, from_levels, to_levels


def level_values(widest: float, count: int, temperature: float) -> list[float]:
    """Where levels lie, from the definition, as gaps; the lowest level first."""
    lowest = math.exp(-widest / (3 * temperature))
    ys = [lowest + (1 - lowest) * i / (count - 1) for i in range(count)]
    return [widest, *(-3 * temperature * math.log(y) for y in ys[1:])]


@given(
    st.lists(st.floats(0, 60), min_size=1, max_size=8),
    st.integers(2, 12),
    st.sampled_from([0.5, 1.0, 4.0, 30.0]),
    st.booleans(),
)
@settings(max_examples=50)
def test_every_gap_goes_to_the_nearest_level(gaps, bits, temperature, ruled_out):
    gaps = [0.0, *gaps]
    row = torch.tensor([gaps + [math.inf] * ruled_out], dtype=torch.float64)
    levels, widest = to_levels(row, bits, temperature)
    assert float(widest.abs()) == float(torch.tensor(max(gaps)).half())
    assert bool(torch.signbit(widest)) == ruled_out
    decoded = from_levels(levels, widest, bits, temperature).double()[0].neg().tolist()
    if ruled_out:
        assert decoded.pop() == math.inf
    known = level_values(float(widest.abs()), (1 << bits) - ruled_out, temperature)
    a = 1 / (3 * temperature)
    half = (1 - math.exp(-a * known[0])) / (2 * (len(known) - 1))
    for gap, found in zip(gaps, decoded, strict=True):
        assert min(abs(found - k) for k in known) <= 2e-3 * found + 1e-6  # it is a level
        # and within half a step: plus what half precision takes from the widest, and float32 from y
        slack = a * math.exp(-a * gap) * 1e-3 * known[0] + 1e-5
        assert abs(math.exp(-a * found) - math.exp(-a * gap)) <= half + slack
    assert decoded[0] == 0


def test_order_stays():
    gaps = torch.rand(50, 40, dtype=torch.float64).sort(dim=1).values * 20
    gaps -= gaps[:, :1].clone()
    found = -from_levels(*to_levels(gaps, 4, 1.0), 4, 1.0)
    assert (found.diff(dim=1) >= 0).all()
    assert (found.diff(dim=1) > 0).any(1).all()


def test_rows_of_equal_values():
    for gaps in (torch.zeros(3, 5), torch.full((1, 4), 1e-9)):
        assert torch.equal(from_levels(*to_levels(gaps, 6, 4.0), 6, 4.0), torch.zeros_like(gaps))


def test_a_one_hot_row():
    gaps = torch.tensor([[math.inf, 0.0, math.inf]])
    found = from_levels(*to_levels(gaps, 2, 4.0), 2, 4.0)
    assert found.tolist() == [[-math.inf, 0.0, -math.inf]]


@pytest.mark.parametrize("far", [1e4, 6e4, 1e9])
def test_far_gaps_stay_finite(far):
    found = from_levels(*to_levels(torch.tensor([[0.0, 1.0, far]]), 12, 1.0), 12, 1.0)[0]
    assert found[0] == 0
    assert found[1] == pytest.approx(-1.0, abs=0.01)
    assert found[2] == pytest.approx(-min(far, 65504.0), rel=1e-3)


def test_half_precision_keeps_finite_values_finite():
    values = torch.tensor([1e9, -1e9, math.inf, -math.inf, 1.5])
    assert as_half(values).tolist() == [65504.0, -65504.0, math.inf, -math.inf, 1.5]
