"""Numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.report.words import count, number, percent, signed


@given(st.floats(-1, 1, allow_nan=False), st.integers(0, 3))
def test_signs_are_never_lost(value, digits):
    text = signed(value, digits)
    shown = float(text.replace("−", "-"))
    assert shown == pytest.approx(100 * value, abs=0.51 * 10**-digits)
    assert text[0] in "+−" or shown == 0
    assert "-" not in text


@given(st.floats(1, 1e15))
def test_counts_keep_three_digits(value):
    text = count(value)
    size = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.split()[0]) * size == pytest.approx(value, rel=0.006, abs=0.51)


def test_numbers_that_are_not_there():
    assert number(None) == number(float("nan")) == percent(None) == count(None) == "–"
